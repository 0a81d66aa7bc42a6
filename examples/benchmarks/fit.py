"""A whole step of `model.fit` on an embedding-heavy model, forward pass included.

    pip install ".[tests]"
    python examples/benchmarks/fit.py

A table of 1,000,000 x 64, batches of 256 x 32 Zipf ids, their mean, and two dense
layers; compiled by default (which on a CPU is graph mode) and with `jit_compile=True`;
beside the same model in PyTorch with sparse gradients.
"""

from __future__ import annotations

import harness
from absl import app, flags

FLAGS = flags.FLAGS

TORCH = "torch SparseAdam"
KERAS = "keras Adam, Keras's layer"
OURS = [
    f"{mode} Adam, {layer}"
    for mode in ("exact", "lazy")
    for layer in ("our layer", "Keras's layer")
]


def measure(results: harness.Results) -> None:
    rows = round(1_000_000 * FLAGS.scale)
    problem = {"rows": rows, "width": 64, "batch": 256, "length": 32, "steps": 40}
    if FLAGS.scale < 1:
        problem |= {"batch": 8, "steps": 10}
    for how in ("default", "XLA"):
        names = [TORCH, *(f"{name}, {how}" for name in (KERAS, *OURS))]
        names = harness.wanted(names)
        if names:
            entries = {name: (name, problem) for name in names}
            found = harness.race("fit", entries, steps=1)
            baseline = next((n for n in names if n.startswith("keras")), names[0])
            results.add(f"fit, 1,000,000 x 64, 256 x 32 ids, {how}", found, baseline)


def main(_) -> None:
    harness.run("fit", measure)


if __name__ == "__main__":
    harness.define_flags()
    app.run(main)
