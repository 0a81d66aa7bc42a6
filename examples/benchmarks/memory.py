"""Memory: what a process that trains one table has taken at most.

    pip install ".[tests]"
    python examples/benchmarks/memory.py

A table of 1,000,000 x 64 (256 MB) and 8,192 ids a step; bytes of state are those an
optimizer keeps beside the table.
"""

from __future__ import annotations

import csv
import pathlib

import contenders
import harness
import keras
import rows
from absl import app, flags

FLAGS = flags.FLAGS


def state_bytes(name: str, shape: tuple[int, int]) -> int:
    """Of all variables an optimizer makes for a table, kept in files or not."""
    table = keras.Variable(keras.ops.zeros(shape))
    optimizer = contenders.keras_optimizer(name)
    optimizer.build([table])
    variables = [v._value for v in optimizer.variables]
    if hasattr(optimizer, "_untracked"):
        for workspace in optimizer._untracked.workspaces:
            variables += [workspace.places, *workspace.copies]
        for history in getattr(optimizer, "_histories", []):
            variables += history.variables
    return sum(v.dtype.size * int(keras.ops.size(v)) for v in variables)


def main(_) -> None:
    n = round(1_000_000 * FLAGS.scale)
    problem = {"rows": n, "width": 64, "ids": round(8192 * FLAGS.scale)}
    table = []
    for name in harness.wanted(rows.ALL):
        worker = harness.Worker("rows", name, problem)
        worker.close()
        bare = name.split(",")[0]
        known = bare.split()[0] not in contenders.LIBRARIES
        state = state_bytes(bare, (n, 64)) / 1e6 if known else None
        table.append([name, round(worker.peak_bytes / 1e6), state and round(state, 1)])
        shown = "" if state is None else f"{state:10.1f} MB of state"
        print(f"{name:24}{worker.peak_bytes / 1e6:10.0f} MB at most{shown}", flush=True)
    folder = pathlib.Path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "memory.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["contender", "peak MB", "state MB"])
        writer.writerows(table)


if __name__ == "__main__":
    harness.define_flags()
    app.run(main)
