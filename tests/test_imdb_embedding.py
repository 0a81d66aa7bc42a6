"""The IMDB example: on mock data, on real data where it is, and its errors."""

import csv
import math
import os
import pathlib
import subprocess
import sys

import devices
import imdb_embedding
import pytest
import tensorflow_datasets as tfds
from absl import app, flags


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Calls main with flags; gives the CSV's rows."""

    def call(*args: str) -> list[dict[str, float]]:
        values = flags.FlagValues()
        imdb_embedding.define_flags(values)
        values(["imdb_embedding", f"--output={tmp_path / 'out'}", *args])
        monkeypatch.setattr(imdb_embedding, "FLAGS", values)
        monkeypatch.setattr(devices, "FLAGS", values)
        imdb_embedding.main([])
        assert (tmp_path / "out/imdb_embedding.png").stat().st_size > 1000
        with open(tmp_path / "out/imdb_embedding.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{k: float(v) for k, v in row.items()} for row in rows]

    return call


def check(rows: list[dict[str, float]], epochs: int) -> None:
    columns = {"epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds"}
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    for row in rows:
        assert row.keys() == columns
        assert all(math.isfinite(x) for x in row.values())


@pytest.mark.parametrize(
    "args",
    [
        ["--sparse_updates=lazy"],
        ["--dtype=bfloat16", "--stochastic_rounding", "--moments_dtype=bfloat16"],
        ["--sparse_updates=dense", "--jit=false"],
        ["--optimizer=keras.Adam", "--jit=true"],
    ],
    ids=lambda args: args[0],
)
def test_mock_data(run, args):
    with tfds.testing.mock_data(num_examples=50):
        rows = run(
            *args,
            "--epochs=2",
            "--batch_size=16",
            "--vocabulary=100",
            "--sequence_length=8",
            "--limit=40",
        )
    check(rows, 2)


@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ,
    reason="needs TFDS_DATA_DIR, a folder with imdb_reviews prepared",
)
def test_accuracy_on_real_data(run):
    rows = run()
    check(rows, 10)
    assert rows[-1]["val_accuracy"] >= 0.86


def test_vectorize():
    train, test = imdb_embedding.vectorize(
        ["a film, a Film!", "a very long review"], ["film unheard-of"], 4, 3
    )
    assert train[0].tolist() == [2, 3, 2]  # by frequency, cut at 3 words
    assert test.tolist() == [[3, 1, 0]]
    assert max(train.max(), test.max()) < 4


@pytest.mark.parametrize("name", imdb_embedding.OPTIMIZERS)
def test_optimizer(name):
    default = imdb_embedding.make_optimizer(name)
    assert type(default) is imdb_embedding.OPTIMIZERS[name]
    assert float(default.learning_rate) == float(type(default)().learning_rate)
    given = imdb_embedding.make_optimizer(name, learning_rate=0.25)
    assert float(given.learning_rate) == 0.25


@pytest.mark.parametrize("option", ["sparse_updates=dense", "stochastic_rounding"])
def test_own_options_with_an_optimizer_of_keras(run, option):
    name = option.partition("=")[0]
    with pytest.raises(app.UsageError, match=rf"--{name} .*keras\.SGD"):
        run("--optimizer=keras.SGD", f"--{option}")


def test_missing_data(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    # A proxy that is not there, so that a machine with a network has none either.
    proxies = dict.fromkeys(
        ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"], "http://127.0.0.1:9"
    )
    done = subprocess.run(
        [sys.executable, root / "examples/imdb_embedding.py"],
        env={
            **os.environ,
            **proxies,
            "no_proxy": "",
            "NO_PROXY": "",
            "PYTHONPATH": str(root),
            "TFDS_DATA_DIR": str(tmp_path),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Cannot load imdb_reviews" in done.stderr
    assert "pip install" in done.stderr and "TFDS_DATA_DIR" in done.stderr
    assert "Traceback" not in done.stderr
