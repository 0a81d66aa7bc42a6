"""--tpu and --jit of the examples, on a machine without a TPU."""

import cases
import devices
import pytest
import tensorflow as tf
from absl import flags

import keras_adam


@pytest.fixture
def set_flags(monkeypatch):
    def set_flags(*args):
        values = flags.FlagValues()
        devices.define_flags(values)
        values(["example", *args])
        monkeypatch.setattr(devices, "FLAGS", values)

    yield set_flags
    tf.distribute.experimental_set_strategy(None)


@pytest.mark.parametrize("jit", ["auto", "true", "false"])
def test_without_a_tpu(set_flags, jit):
    set_flags(f"--jit={jit}")
    devices.use()
    assert not tf.distribute.has_strategy()
    assert devices.jit_compile() == {"auto": "auto", "true": True, "false": False}[jit]


@pytest.mark.parametrize("name", ["local", "grpc://127.0.0.1"])
def test_a_tpu_that_is_not_there(set_flags, monkeypatch, name):
    set_flags(f"--tpu={name}")

    def connect(_):
        raise tf.errors.UnavailableError(None, None, "No route\nand more")

    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", connect)
    with pytest.raises(SystemExit, match=rf"--tpu={name}: (.+)\n\nTensorFlow.*out"):
        devices.use()


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_tpu(set_flags, monkeypatch, mode):
    """With a CPU in its place: training is what it is without a strategy."""
    x, y = cases.make_data()

    def losses(jit):
        model = cases.make_model(layer=keras_adam.Embedding)
        optimizer = keras_adam.Adam(0.01, sparse_updates=mode)
        model.compile(optimizer=optimizer, loss="mse", jit_compile=jit)
        return model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"]

    without = losses(True)
    cpus = tf.config.list_logical_devices("CPU")
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", lambda _: None)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: cpus)
    set_flags("--tpu=local", "--jit=false")
    devices.use()
    strategy = tf.distribute.get_strategy()
    assert isinstance(strategy, tf.distribute.OneDeviceStrategy)
    assert devices.jit_compile() is True
    monkeypatch.undo()  # keras_adam would take dense steps for want of width
    assert losses(True) == without
