"""The quickstart and the picture of exact rows, from end to end, in a few steps."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(tmp_path, script, *args):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    out = run(tmp_path, "quickstart.py", "--steps=4", "--width=8")
    rows = dict(
        re.findall(r"^(keras\S+\.Adam) +[\d.]+ +[\d.]+x +([\d.]+)$", out, re.MULTILINE)
    )
    assert rows.keys() == {"keras.optimizers.Adam", "keras_adam.Adam"}
    for loss in rows.values():
        assert 1.0 < float(loss) < 3.0  # 16 candidates: log(16) = 2.77 untrained
    assert (tmp_path / "results/quickstart.png").stat().st_size > 1000


def test_exact_rows(tmp_path):
    """In `fit`, every step's loss is dense Adam's; that of lazy rows is not."""
    out = run(tmp_path, "exact_rows.py", "--steps=100", "--rows=20000")
    found = re.findall(r"^(\S.*\S) +[\d.]+ +([\d.e+-]+)$", out, re.MULTILINE)
    largest = {name: float(value) for name, value in found}
    assert largest["exact, keras_adam.Embedding"] < 1e-4
    assert largest["lazy"] > 1e-3
    assert largest["exact, keras.layers.Embedding"] < largest["lazy"]
    assert (tmp_path / "results/exact_rows.png").stat().st_size > 1000
    lines = (tmp_path / "results/exact_rows.csv").read_text().splitlines()
    assert len(lines) == 101
