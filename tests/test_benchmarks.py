"""Every contender takes its steps; the races are run and written, in a few steps."""

import csv
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import compiling
import contenders
import dense
import dense_steps
import fit
import harness
import memory
import numpy as np
import pytest
import reference
import rows
import tensorflow as tf
from absl import flags

ROWS = {"rows": 50, "width": 4, "ids": 20}
DENSE = {"shapes": [[6], [2, 3]]}
FIT = {"rows": 50, "width": 4, "batch": 2, "length": 3, "steps": 8}
FIT_NAMES = [fit.TORCH, f"{fit.KERAS}, default", f"{fit.OURS[0]}, XLA"]
ALL = [
    *(("rows", name, ROWS) for name in rows.ALL if not name.startswith("TF Addons")),
    ("rows", "exact Adam, XLA", {**ROWS, "tables": 3, "uniform": True}),
    ("rows", "torch SparseAdam", {**ROWS, "tables": 3, "in_use": 10}),
    *(("dense", name, DENSE) for name in [*dense.NAMES, *dense.ADAMAX]),
    *(("compiling", name, DENSE) for name in compiling.NAMES),
    *(("fit", name, FIT) for name in FIT_NAMES),
    ("copy", "copy", {"bytes": 4096}),
]


@pytest.mark.parametrize("benchmark, name, problem", ALL)
def test_contenders(benchmark, name, problem):
    step = contenders.make(benchmark, name, problem)
    told = [step() for _ in range(3)]
    if benchmark in ("compiling", "fit"):
        assert all(ms > 0 for ms in told)
    else:
        assert told == [None] * 3


@pytest.mark.skipif(
    not shutil.which("g++") or platform.machine() != "x86_64",
    reason="needs g++ and AVX",
)
def test_native(tmp_path):
    """It is built as it says, and takes Adam's steps."""
    source = pathlib.Path(dense.__file__).with_name("native.cc")
    lines = [x.removeprefix("//") for x in source.read_text().splitlines()]
    i = next(i for i, x in enumerate(lines) if x.strip().startswith("flags()"))
    command = "\n".join(lines[i : i + 3]).replace("native.cc", str(source))
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    problem = {**DENSE, "native": str(tmp_path / "native.so")}
    step = contenders.make("dense", "native Adam, graph", problem)
    assert [step() for _ in range(3)] == [None] * 3
    gradients = np.random.default_rng(0).standard_normal((5, 3, 70)).astype(np.float32)
    with tf.device("/CPU:0"):
        variable = tf.Variable(gradients[0])
        steps = dense_steps.native_steps(problem["native"], [variable])
        for g in gradients:
            steps([tf.constant(g)])
    truth = reference.Training(
        reference.Adam(epsilon_hat=True),
        [gradients[0]],
        [np.float32],
        lazy=False,
        learning_rate=1e-3,
    )
    for g in gradients:
        truth.apply([g])
    np.testing.assert_allclose(variable.numpy(), truth.thetas[0], atol=1e-6)


def test_zipf():
    ids = contenders.zipf(np.random.default_rng(0), 1000, 200_000)
    counts = np.sort(np.bincount(ids, minlength=1000))[::-1]
    share = 1 / sum(1 / k for k in range(1, 1001))
    np.testing.assert_allclose(counts[:3] / 200_000, share / np.arange(1, 4), rtol=0.05)


def test_same_rows_in_tables_of_several_sizes():
    small, large = (
        contenders.draw({"rows": n, "ids": 500, "in_use": 40}) for n in (40, 9000)
    )
    assert small.max() < 40 <= large.max() < 9000

    def pattern(ids):
        return np.unique(ids, return_inverse=True)[1], len(np.unique(ids))

    assert pattern(small)[1] == pattern(large)[1]


@pytest.fixture
def set_flags(monkeypatch):
    def set_flags(module, *args):
        values = flags.FlagValues()
        harness.define_flags(values)
        values(["benchmark", *args])
        monkeypatch.setattr(harness, "FLAGS", values)
        monkeypatch.setattr(module, "FLAGS", values)

    return set_flags


@pytest.mark.parametrize(
    "module, problems, bandwidth",
    [(rows, 9, 8), (dense, 4, 4), (fit, 2, 0), (compiling, 2, 0)],
)
def test_races(set_flags, tmp_path, capsys, module, problems, bandwidth):
    only = {dense: "torch Adamax", compiling: "our AdaMax"}
    only = f"--only={only.get(module, 'torch SparseAdam')}"
    set_flags(module, only, "--scale=0.001", "--rounds=2", f"--output={tmp_path}")
    module.main([])
    on_gpu = tf.config.list_physical_devices("GPU")
    [path] = tmp_path.glob("*.csv")
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    assert len({row["problem"] for row in table}) == problems
    for row in table:
        assert float(row["ms"]) > 0
        assert on_gpu or float(row["peak MB"]) > 10
    assert sum(row["of the bandwidth"] != "" for row in table) == bandwidth
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "GB/s" in capsys.readouterr().out


def test_memory(set_flags, tmp_path):
    args = "--only=lazy AdaMax, graph", "--only=torch Sp", "--scale=0.001"
    set_flags(memory, *args, f"--output={tmp_path}")
    memory.main([])
    with open(tmp_path / "memory.csv", newline="") as file:
        torch, ours = csv.DictReader(file)
    assert torch["contender"] == "torch SparseAdam" and torch["state MB"] == ""
    # Two tables of 1,000 x 64 floats, the places of 1,000 rows, four scalars.
    assert math.isclose(float(ours["state MB"]), 0.5, abs_tol=0.1)


def test_a_contender_that_fails_is_told_of(set_flags):
    set_flags(rows, "--scale=0.001")
    with pytest.raises(SystemExit, match=r"torch Adam of sorts ended with 1(.|\n)*Key"):
        harness.Worker("rows", "torch Adam of sorts", ROWS)


def test_ratios_are_to_the_baseline(set_flags, tmp_path, monkeypatch):
    set_flags(rows, f"--output={tmp_path}")
    monkeypatch.setattr(harness, "bandwidth", lambda gpu: 1e9)
    results = harness.Results("some")
    same = {"peak_bytes": 1e6, "gpu": ""}
    found = {n: {"ms": ms, **same} for n, ms in (("a", 2.0), ("b", 3.0))}
    results.add("title", found, "a", 1e6)
    assert [row["ratio"] for row in results.rows] == [1, 1.5]
    # 1 MB at 1 GB/s takes 1 ms.
    assert [row["of the bandwidth"] for row in results.rows] == [0.5, 0.3333]
    with pytest.raises(SystemExit, match="timed on the CPU, and title not"):
        results.add("title", {"a": {**found["a"], "gpu": "H100"}}, "a", 1e6)


def test_a_worker_takes_as_many_steps_as_told(set_flags):
    set_flags(rows, "--scale=0.001")
    worker = harness.Worker("rows", "torch SparseAdam", ROWS)
    assert len(worker.steps(7)) == 7 and min(worker.steps(3)) > 0
    worker.close()
    assert worker.process.returncode == 0
    assert worker.process.args[0] == sys.executable
