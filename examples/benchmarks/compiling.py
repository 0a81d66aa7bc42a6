"""The first step of a new optimizer: its tracing, and XLA's compilation.

    pip install ".[tests]"
    python examples/benchmarks/compiling.py

200 variables with dense gradients, small, so that the step itself takes no time.
"""

from __future__ import annotations

import harness
from absl import app, flags

FLAGS = flags.FLAGS

NAMES = [
    f"{name}, {how}"
    for how in ("XLA", "graph")
    for name in ("keras Adam", "our Adam", "our AdaMax")
]


def measure(results: harness.Results) -> None:
    variables = max(2, round(200 * FLAGS.scale))
    for how in ("XLA", "graph"):
        names = harness.wanted([name for name in NAMES if name.endswith(how)])
        if names:
            problem = {"shapes": [[64, 4]] * variables}
            entries = {name: (name, problem) for name in names}
            found = harness.race("compiling", entries, steps=1)
            results.add(f"the first step on 200 variables, {how}", found, names[0])


def main(_) -> None:
    harness.run("compiling", measure)


if __name__ == "__main__":
    harness.define_flags()
    app.run(main)
