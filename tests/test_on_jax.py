"""Keras on JAX, in processes of their own, since Keras's backend is chosen once."""

import os
import pathlib
import subprocess
import sys

import cases
import numpy as np
import pytest

import keras_adam

pytest.importorskip("jax", reason="needs jax, of the extra `tests`")

HERE = pathlib.Path(__file__).parent


def run(arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model trained here, and what its state is and its next epoch's loss."""
    folder = tmp_path_factory.mktemp("saved")
    x, y = cases.make_data()
    model = cases.make_model(layer=keras_adam.Embedding)
    model.compile(optimizer=keras_adam.Adam(0.01), loss="mse")
    model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    model.save(folder / "model.keras")
    variables = model.optimizer.variables[: -len(model.optimizer._row_state())]
    state = {str(i): v.numpy() for i, v in enumerate(variables)}
    loss = model.fit(x, y, epochs=1, shuffle=False, verbose=0).history["loss"]
    np.savez(folder / "state.npz", loss=loss, **state)
    return folder


@pytest.mark.parametrize("wide", [False, True], ids=["32_bits", "64_bits"])
def test_on_jax(wide, saved):
    """All of tests/on_jax."""
    done = run(
        ["-m", "pytest", "-q", "-o", "addopts=", "tests/on_jax"],
        KERAS_BACKEND="jax",
        JAX_ENABLE_X64=str(int(wide)),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        SAVED_ON_TENSORFLOW=str(saved),
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_tensorflow_is_not_imported():
    code = (
        "import sys, keras_adam; keras_adam.Adam(), keras_adam.AdaMax();"
        "assert 'tensorflow' not in sys.modules"
    )
    done = run(["-c", code], KERAS_BACKEND="jax")
    assert done.returncode == 0, done.stderr


def test_other_backends_are_refused():
    done = run(["-c", "import keras_adam"], KERAS_BACKEND="torch")
    assert "ImportError: keras_adam works with Keras on TensorFlow" in done.stderr
