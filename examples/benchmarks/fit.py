"""A whole step of `model.fit` on an embedding-heavy model, forward pass included.

    python examples/benchmarks/fit.py

A table of 1,000,000 x 64, 128 x 64 Zipf ids a batch, their mean, and two dense
layers; compiled by default (which on a CPU is graph mode) and with
`jit_compile=True`. Every number is the median over the steps of interleaved epochs
in this one process.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from rows import zipf

import keras_adam

FLAGS = flags.FLAGS
# rows.py gives --width, --scale and --rounds.
flags.DEFINE_integer("steps", 40, "Of an epoch.")

BATCH, LENGTH, WARM = 128, 64, 5


class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def make_model(optimizer, layer, rows: int, jit) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input([LENGTH], dtype="int32"),
            layer(rows, FLAGS.width),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse", jit_compile=jit)
    return model


CONTENDERS = {
    "keras.optimizers.Adam": (keras.layers.Embedding, keras.optimizers.Adam, {}),
    "exact": (keras_adam.Embedding, keras_adam.Adam, {}),
    "exact, Keras's layer": (keras.layers.Embedding, keras_adam.Adam, {}),
    "lazy": (keras_adam.Embedding, keras_adam.Adam, {"sparse_updates": "lazy"}),
    "lazy, Keras's layer": (
        keras.layers.Embedding,
        keras_adam.Adam,
        {"sparse_updates": "lazy"},
    ),
}


def main(_) -> None:
    rng = np.random.default_rng(0)
    rows = round(1_000_000 * FLAGS.scale)
    n = FLAGS.steps * BATCH
    x = zipf(rng, rows, (n, LENGTH)).astype(np.int32)
    y = rng.standard_normal((n, 1)).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache().prefetch(2)
    for jit, mode in (("auto", "default compile"), (True, "jit_compile=True")):
        models = {
            name: make_model(cls(**kwargs), layer, rows, jit)
            for name, (layer, cls, kwargs) in CONTENDERS.items()
        }
        times = {name: [] for name in models}
        for i in range(FLAGS.rounds + 1):
            for name, model in models.items():
                clock = Clock()
                model.fit(data, shuffle=False, verbose=0, callbacks=[clock])
                if i:  # the first epoch compiles
                    times[name] += clock.seconds[WARM:]
        ms = {name: 1e3 * float(np.median(t)) for name, t in times.items()}
        print(f"\n{rows:,} x {FLAGS.width}, {BATCH * LENGTH:,} ids, {mode}")
        for name, t in ms.items():
            print(
                f"{name:24}{t:10.2f} ms{ms['keras.optimizers.Adam'] / t:8.1f}x"
                f"{t / ms['lazy']:8.2f} of lazy",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
