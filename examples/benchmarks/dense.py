"""The optimizer's step on dense gradients.

    pip install ".[tests]"
    python examples/benchmarks/dense.py

Lists of float32 variables: one large, a few, many small ones, and those of a model like
BERT-base. --native=native.so adds a kernel of one pass: see `native.cc`.
"""

from __future__ import annotations

import harness
import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS

NAMES = [
    *("keras Adam, graph", "keras Adam, XLA", "ResourceApplyAdam, graph"),
    *("our Adam, graph", "our Adam, XLA", "tf_keras legacy Adam, graph"),
    *("torch Adam foreach", "torch Adam fused", "optax adam"),
]
ADAMAX = [
    *("keras Adamax, graph", "keras Adamax, XLA"),
    *("our AdaMax, graph", "our AdaMax, XLA", "torch Adamax", "optax adamax"),
]


def bert(layers: int = 12, width: int = 768) -> list[list[int]]:
    """The 197 weights of BERT-base, without its table of word pieces."""
    attention = [[width, width], [width]] * 4
    mlp = [[width, 4 * width], [4 * width], [4 * width, width], [width]]
    norms = [[width]] * 4
    first = [[512, width], [2, width], [width], [width], [width, width]]
    return [*first, *(attention + mlp + norms) * layers]


def lists() -> dict[str, list[list[int]]]:
    return {
        "1 x 16,777,216": [[16_777_216]],
        "16 x 1,000,000": [[1_000_000]] * 16,
        "200 x 65,536": [[65_536]] * 200,
        "BERT-base, 197 variables": bert(),
    }


def measure(results: harness.Results) -> None:
    for title, shapes in lists().items():
        scaled = [[max(1, round(s[0] * FLAGS.scale)), *s[1:]] for s in shapes]
        # Read: g, theta, m, v; written: theta, m, v.
        must_move = 7 * 4 * sum(int(np.prod(s)) for s in scaled)
        native = ["native Adam, graph"] if FLAGS.native else []
        problem = {"shapes": scaled, "native": FLAGS.native}
        for names, baseline in (
            ([*NAMES, *native], "keras Adam, graph"),
            (ADAMAX, "keras Adamax, graph"),
        ):
            names = harness.wanted(names)
            if not names:
                continue
            entries = {name: (name, problem) for name in names}
            found = harness.race("dense", entries)
            baseline = baseline if baseline in names else names[0]
            results.add(title, found, baseline, must_move)


def main(_) -> None:
    harness.run("dense", measure)


if __name__ == "__main__":
    harness.define_flags()
    app.run(main)
