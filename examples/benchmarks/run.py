"""All benchmarks, one after the other; tables and pictures go to --output.

pip install ".[tests]"
python examples/benchmarks/run.py --output=examples/benchmarks/results
"""

from __future__ import annotations

import compiling
import dense
import fit
import harness
import memory
import rows
from absl import app


def main(_) -> None:
    for module in (rows, dense, fit, memory, compiling):
        print(f"\n== {module.__name__}", flush=True)
        module.main([])


if __name__ == "__main__":
    harness.define_flags()
    app.run(main)
