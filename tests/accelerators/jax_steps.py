"""Train steps of Keras on JAX, those that `model.fit` jits, compiled for chips.

Keras's backend is chosen once a process: `run` runs this file in another, which prints
a line of JSON for each step and chip.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROWS, WIDTH, IDS = 250_000, 128, 2048
TABLE_BYTES = 4 * ROWS * WIDTH


def run() -> list[dict[str, Any]]:
    """Of each step and chip, the fields of `main`'s line."""
    path = f"{pathlib.Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    import aot
    import jax
    import keras
    import numpy as np

    import keras_adam

    assert "tensorflow" not in sys.modules
    steps = {
        "JAX train step, Adam": (keras_adam.Adam, "float32"),
        "JAX train step, AdaMax": (keras_adam.AdaMax, "float32"),
        "JAX train step, Adam, bfloat16": (keras_adam.Adam, "bfloat16"),
    }
    x = np.zeros((IDS // 8, 8), np.int32)
    y = np.zeros((IDS // 8, 1), np.float32)
    for name, (make, dtype) in steps.items():
        for chip in aot.CHIPS:
            keras.config.set_dtype_policy(dtype)
            model = keras.Sequential(
                [
                    keras.Input([8], dtype="int32"),
                    keras_adam.Embedding(ROWS, WIDTH),
                    keras.layers.GlobalAveragePooling1D(),
                    keras.layers.Dense(1),
                ]
            )
            model.compile(optimizer=make(), loss="mse")
            model.optimizer.build(model.trainable_variables)
            kinds = (
                model.trainable_variables,
                model.non_trainable_variables,
                model.optimizer.variables,
                model.metrics_variables,
            )
            state = tuple([v.value for v in kind] for kind in kinds)
            compiled = aot.compile_on_jax_for(chip, model.train_step, state, (x, y))
            line = {
                "name": name,
                "chip": chip,
                "seconds": compiled.seconds,
                "state_bytes": sum(v.nbytes for v in jax.tree.leaves(state)),
                "alias_bytes": compiled.alias_bytes,
                "new_results": len(compiled.new_results),
                "temporary_bytes": compiled.temporary_bytes,
                "copies": compiled.copies(ROWS, WIDTH),
                "fusions": compiled.fusions(ROWS, WIDTH),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
