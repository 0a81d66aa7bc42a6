"""The optimizer's step on an embedding table, against keras.optimizers.Adam.

    python examples/benchmarks/rows.py

One table of 1,000,000 x 64 and 8,192 ids a step, drawn by Zipf's law (id of
rank k with probability ~ 1/k); then tables of 100,000 and 4,000,000 rows. Every
number is a median over interleaved rounds in this one process.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from timing import medians

import keras_adam

FLAGS = flags.FLAGS
flags.DEFINE_integer("width", 64, "Columns of the table.")
flags.DEFINE_integer("ids", 8192, "Ids a step.")
flags.DEFINE_integer("rounds", 5, "Rounds to take the median of.")


def zipf(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """n ids of a table, the id of rank k with probability ~ 1/k."""
    cdf = np.cumsum(1 / np.arange(1, rows + 1))
    ranks = np.searchsorted(cdf, rng.random(n) * cdf[-1])
    return rng.permutation(rows)[ranks]


def step(optimizer, rows: int, ids: np.ndarray, jit: bool):
    """A call that takes one step on one table."""
    table = keras.Variable(tf.random.normal((rows, FLAGS.width)))
    optimizer.build([table])
    ids = tf.constant(ids)
    values = tf.random.normal((len(ids), FLAGS.width))

    @tf.function(jit_compile=jit)
    def apply(values, ids):
        optimizer.apply([tf.IndexedSlices(values, ids, table.shape)], [table])

    def call():
        apply(values, ids)
        if tf.config.list_physical_devices("GPU"):
            optimizer.iterations.numpy()  # waits for it

    return call


def main(_) -> None:
    rng = np.random.default_rng(0)
    for jit, mode in ((False, "graph"), (True, "XLA")):
        ids = zipf(rng, 1_000_000, FLAGS.ids)
        ms = medians(
            {
                name: step(make(), 1_000_000, ids, jit)
                for name, make in {
                    "keras.optimizers.Adam": keras.optimizers.Adam,
                    "keras_adam.Adam": keras_adam.Adam,
                    "keras_adam.AdaMax": keras_adam.AdaMax,
                }.items()
            },
            FLAGS.rounds,
        )
        print(f"\n1,000,000 x {FLAGS.width}, {FLAGS.ids} ids, {mode}")
        print(f"{len(np.unique(ids))} of them distinct")
        for name, t in ms.items():
            ratio = ms["keras.optimizers.Adam"] / t
            print(f"{name:24}{t:10.2f} ms{ratio:8.1f}x", flush=True)

        # The same ids, spread over tables of several sizes.
        ids = zipf(rng, 100_000, FLAGS.ids)
        ms = medians(
            {
                f"{rows:,} rows": step(
                    keras_adam.Adam(), rows, ids * (rows // 100_000), jit
                )
                for rows in (100_000, 1_000_000, 4_000_000)
            },
            FLAGS.rounds,
        )
        first = ms["100,000 rows"]
        for name, t in ms.items():
            print(f"{name:24}{t:10.2f} ms{t / first:8.2f}x of 100,000 rows", flush=True)


if __name__ == "__main__":
    app.run(main)
