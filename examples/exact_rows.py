"""Dense Adam, exact rows and lazy rows: one training, step by step.

    pip install ".[examples]" && python examples/exact_rows.py

Needs no download: the text is the source code of Python's standard library, as
in quickstart.py. A model reads eight identifiers of a vocabulary of 50,000 and
tells the next one among the 64 most frequent. Dense Adam is keras.optimizers.Adam
on one-hot vectors times a matrix, which is the same model without an embedding
layer. All start from the same weights and see the same batches. Ends with the
largest difference of any step's loss from dense Adam's, and a picture.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import csv
import pathlib

import keras
import matplotlib
import numpy as np
import quickstart
from absl import app, flags

import keras_adam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAGS = flags.FLAGS
# quickstart.py gives --steps, --batch_size, --learning_rate, --width, --seed and
# --output.
flags.DEFINE_integer("rows", 50_000, "Of the table.")
flags.FLAGS.set_default("steps", 500)
flags.FLAGS.set_default("batch_size", 64)
flags.FLAGS.set_default("width", 32)

CONTEXT, CLASSES = 8, 64


def make_data() -> tuple[np.ndarray, np.ndarray]:
    words = [word for file in quickstart.read_identifiers() for word in file]
    numbers = quickstart.number(words, FLAGS.rows)
    at = np.flatnonzero((numbers[CONTEXT:] > 0) & (numbers[CONTEXT:] <= CLASSES))
    rng = np.random.default_rng(FLAGS.seed)
    at = rng.choice(at, FLAGS.steps * FLAGS.batch_size, replace=False)
    contexts = np.lib.stride_tricks.sliding_window_view(numbers, CONTEXT)[at]
    return contexts, numbers[at + CONTEXT] - 1


class OneHot(keras.layers.Layer):
    """An embedding as a matrix product, whose gradient is dense."""

    def build(self, shape):
        self.table = self.add_weight((FLAGS.rows, FLAGS.width))

    def call(self, ids):
        return keras.ops.matmul(keras.ops.one_hot(ids, FLAGS.rows), self.table)

    def compute_output_shape(self, shape):
        return (*shape, FLAGS.width)


class Losses(keras.callbacks.Callback):
    """Each step's own loss; Keras's is the mean of the epoch so far."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])


def losses(layer, optimizer, weights, data) -> tuple[list, np.ndarray]:
    model = keras.Sequential(
        [
            keras.Input([CONTEXT], dtype="int32"),
            layer,
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(CLASSES),
        ]
    )
    if weights is not None:
        model.set_weights(weights)
    weights = model.get_weights()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    seen = Losses()
    model.fit(
        *data,
        batch_size=FLAGS.batch_size,
        shuffle=False,
        verbose=0,
        callbacks=[seen],
    )
    return weights, np.array(seen.losses)


def plot(curves: dict[str, np.ndarray], path: pathlib.Path) -> None:
    (_, dense), *others = curves.items()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    window = np.ones(20) / 20
    left.axhline(0, color="0.8", lw=4, label="dense Adam")
    for name, curve in others:
        left.plot(np.convolve(curve - dense, window, "valid"), label=name)
        right.semilogy(np.abs(curve / dense - 1) + 1e-9, label=name, lw=0.8)
    left.set(xlabel="step", ylabel="loss above dense Adam's, mean of 20 steps")
    right.set(xlabel="step", ylabel="relative difference of a step's loss")
    figure.legend(*left.get_legend_handles_labels(), loc="upper center", ncols=4)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main(_) -> None:
    keras.utils.set_random_seed(FLAGS.seed)
    data = make_data()
    # What keras.optimizers.Adam computes.
    keras_form = {"epsilon": 1e-7, "epsilon_hat": True}
    contenders = {
        "dense Adam (one-hot)": (OneHot, keras.optimizers.Adam, {}),
        "exact, keras_adam.Embedding": (
            lambda: keras_adam.Embedding(FLAGS.rows, FLAGS.width),
            keras_adam.Adam,
            {"sparse_updates": "exact", **keras_form},
        ),
        "exact, keras.layers.Embedding": (
            lambda: keras.layers.Embedding(FLAGS.rows, FLAGS.width),
            keras_adam.Adam,
            {"sparse_updates": "exact", **keras_form},
        ),
        "lazy": (
            lambda: keras_adam.Embedding(FLAGS.rows, FLAGS.width),
            keras_adam.Adam,
            {"sparse_updates": "lazy", **keras_form},
        ),
    }
    weights, curves = None, {}
    for name, (layer, cls, kwargs) in contenders.items():
        optimizer = cls(FLAGS.learning_rate, **kwargs)
        weights, curves[name] = losses(layer(), optimizer, weights, data)
    dense = curves["dense Adam (one-hot)"]
    print(f"\n{'':32}{'last 50 steps':>14}{'largest difference of a step':>30}")
    for name, curve in curves.items():
        largest = np.abs(curve / dense - 1).max()
        print(f"{name:32}{curve[-50:].mean():14.4f}{largest:30.1e}")
    folder = pathlib.Path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "exact_rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        writer.writerows(zip(range(FLAGS.steps), *curves.values()))
    plot(curves, folder / "exact_rows.png")
    print(f"\nLoss by step: {folder / 'exact_rows.png'} and .csv")


if __name__ == "__main__":
    app.run(main)
