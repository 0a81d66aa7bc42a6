"""The optimizer's step on an embedding table, against keras.optimizers.Adam.

    python examples/benchmarks/rows.py

One table of 1,000,000 x 64 and 8,192 ids a step, drawn by Zipf's law (id of
rank k with probability ~ 1/k), other ones at each of 16 steps; then tables of
100,000 and 4,000,000 rows. Every number is a median over interleaved rounds in
this one process.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import itertools

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from timing import medians

import keras_adam

FLAGS = flags.FLAGS
flags.DEFINE_integer("width", 64, "Columns of the table.")
flags.DEFINE_integer("ids", 8192, "Ids a step.")
flags.DEFINE_float("scale", 1.0, "Of the tables' rows.")
flags.DEFINE_integer("rounds", 5, "Rounds to take the median of.")


BATCHES = 16


def zipf(rng: np.random.Generator, rows: int, shape) -> np.ndarray:
    """Ids of a table, the id of rank k with probability ~ 1/k."""
    cdf = np.cumsum(1 / np.arange(1, rows + 1))
    ranks = np.searchsorted(cdf, rng.random(shape) * cdf[-1])
    return rng.permutation(rows)[ranks]


def step(optimizer, rows: int, ids: np.ndarray, jit: bool):
    """A call that takes one step on one table."""
    table = keras.Variable(tf.random.normal((rows, FLAGS.width)))
    optimizer.build([table])
    batches = itertools.cycle([tf.constant(x) for x in ids])
    values = tf.random.normal((ids.shape[1], FLAGS.width))

    @tf.function(jit_compile=jit)
    def apply(values, ids):
        optimizer.apply([tf.IndexedSlices(values, ids, table.shape)], [table])

    def call():
        apply(values, next(batches))
        if tf.config.list_physical_devices("GPU"):
            optimizer.iterations.numpy()  # waits for it

    return call


def main(_) -> None:
    rng = np.random.default_rng(0)
    small, middle, large = (
        round(n * FLAGS.scale) for n in (100_000, 1_000_000, 4_000_000)
    )
    for jit, mode in ((False, "graph"), (True, "XLA")):
        shape = BATCHES, FLAGS.ids
        ids = zipf(rng, middle, shape)
        ms = medians(
            {
                name: step(make(), middle, ids, jit)
                for name, make in {
                    "keras.optimizers.Adam": keras.optimizers.Adam,
                    "keras_adam.Adam": keras_adam.Adam,
                    "keras_adam.Adam, lazy": lambda: keras_adam.Adam(
                        sparse_updates="lazy"
                    ),
                    "keras_adam.AdaMax": keras_adam.AdaMax,
                }.items()
            },
            FLAGS.rounds,
        )
        print(
            f"\n{middle:,} x {FLAGS.width}, {FLAGS.ids:,} ids, "
            f"{len(np.unique(ids[0])):,} of them distinct, {mode}"
        )
        for name, t in ms.items():
            ratio = ms["keras.optimizers.Adam"] / t
            print(f"{name:24}{t:10.2f} ms{ratio:8.1f}x", flush=True)

        # The same ids, spread over tables of several sizes: at random, since rows
        # at even distances would share a few sets of the processor's caches.
        ids = zipf(rng, small, shape)
        spread = {
            rows: rng.permutation(rows)[:small][ids] for rows in (small, middle, large)
        }
        for kind in ("exact", "lazy"):
            ms = medians(
                {
                    f"{kind}, {rows:,} rows": step(
                        keras_adam.Adam(sparse_updates=kind),
                        rows,
                        spread[rows],
                        jit,
                    )
                    for rows in (small, middle, large)
                },
                FLAGS.rounds,
            )
            first = next(iter(ms.values()))
            for name, t in ms.items():
                print(f"{name:24}{t:10.2f} ms{t / first:8.2f}x the first", flush=True)


if __name__ == "__main__":
    app.run(main)
