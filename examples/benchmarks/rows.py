"""The optimizer's step on embedding tables, given the gradients of a batch's rows.

    pip install ".[tests]"
    python examples/benchmarks/rows.py
    python examples/benchmarks/rows.py --only=SparseAdam --only=exact

Tables of 100,000, 1,000,000 and 4,000,000 rows; batches of 8,192 ids, drawn by Zipf's
law (the id of rank k with probability ~ 1/k), other ones at each of 16 steps; 26 tables
at once, as recommendation models have; and the same ids spread over tables of several
sizes, which should take the same time.
"""

from __future__ import annotations

import contenders
import harness
import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS

FEW = ["torch SparseAdam", "exact Adam, graph", "lazy Adam, graph"]
FEW += ["exact Adam, XLA", "lazy Adam, XLA"]
MAIN = [*FEW, "exact AdaMax, graph", "exact AdaMax, XLA", "TF Addons LazyAdam, graph"]
MAIN += ["keras Adam, graph", "keras Adam, XLA"]
# In a race of their own: all processes of one stay, and take gigabytes each.
OTHERS = ["torch SparseAdam", "exact Adam, XLA", "lazy AdaMax, graph"]
OTHERS += ["lazy AdaMax, XLA", "keras Adamax, XLA", "tf_keras legacy Adam, graph"]
OTHERS += ["torch Adam fused", "optax adam"]
ALL = list(dict.fromkeys([*MAIN, *OTHERS]))


def must_move(problem: dict) -> float:
    """Bytes a step has to read and write: gradients, and each row's theta and state."""
    row = 4 * problem["width"]
    ids = contenders.draw(problem)
    rows = np.mean([len(np.unique(batch)) for batch in ids])
    gradients = ids.shape[1] * row
    state = 2 * 3 * row * rows  # read and written: theta, m, v
    return problem.get("tables", 1) * (gradients + state)


def add(results: harness.Results, title: str, names: list[str], problem: dict) -> None:
    names = harness.wanted(names)
    if not names:
        return
    found = harness.race("rows", {name: (name, problem) for name in names})
    baseline = next((n for n in names if n == "torch SparseAdam"), names[0])
    results.add(title, found, baseline, must_move(problem))


def measure(results: harness.Results) -> None:
    n = {k: round(k * FLAGS.scale) for k in (100_000, 1_000_000, 4_000_000)}
    large = {"rows": n[1_000_000], "width": 64, "ids": round(8192 * FLAGS.scale)}
    add(results, "1,000,000 x 64, 8,192 Zipf ids", MAIN, large)
    add(results, "1,000,000 x 64, 8,192 Zipf ids: the others", OTHERS, large)
    for width in (16, 128):
        problem = {**large, "width": width}
        add(results, f"1,000,000 x {width}, 8,192 Zipf ids", FEW, problem)
    for ids in (1024, 65536):
        problem = {**large, "ids": round(ids * FLAGS.scale)}
        add(results, f"1,000,000 x 64, {ids:,} Zipf ids", FEW, problem)
    add(results, "1,000,000 x 64, 8,192 ids", FEW, {**large, "uniform": True})
    many = {"rows": n[100_000], "width": 16, "ids": round(2048 * FLAGS.scale)}
    title = "26 tables of 100,000 x 16, 2,048 Zipf ids each"
    add(results, title, FEW, {**many, "tables": 26})
    # The same ids, spread at random: rows at even distances would share a few sets of
    # the processor's caches.
    for name in harness.wanted(FEW):
        entries = {
            f"{name}, {rows:,} rows": (
                name,
                {**large, "rows": n[rows], "in_use": n[100_000]},
            )
            for rows in n
        }
        found = harness.race("rows", entries)
        results.add(f"The same rows: {name}", found, next(iter(entries)))


def main(_) -> None:
    harness.run("rows", measure)


if __name__ == "__main__":
    harness.define_flags()
    app.run(main)
