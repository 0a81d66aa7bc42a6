"""Figure 2: two hidden layers of 1,000 ReLU on MNIST, and SFO.

    pip install ".[examples]"
    python examples/mnist_mlp.py
    python examples/mnist_mlp.py --settings=dropout --optimizers=Adam,AdaDelta

Section 6.2 of the paper: batches of 128, L2 on the weights, (a) with dropout and
(b) without, where the loss is a function and SFO can be compared; SFO sees the
data in --sfo_batches fixed parts. Writes a table (CSV) and pictures of the training
loss, by passes and by time, to --output.
"""

from __future__ import annotations

import pathlib
import time

import data
import devices
import experiment
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from sfo import SFO

FLAGS = flags.FLAGS

SETTINGS = ("dropout", "deterministic")


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    grid = 0.1, 0.3, 1, 3, 10, 30
    experiment.define_flags(values, epochs=20, tune_epochs=5, grid=grid)
    to = {"flag_values": values}
    flags.DEFINE_multi_enum("settings", list(SETTINGS), SETTINGS, "Which.", **to)
    flags.DEFINE_integer("width", 1000, "Units of a hidden layer.", 1, **to)
    flags.DEFINE_boolean("sfo", True, "Whether to train with SFO too.", **to)
    flags.DEFINE_integer("sfo_batches", 100, "Parts of the data SFO sees.", 1, **to)


def make_model(dropout: float, width: int, l2: float = 1e-4) -> keras.Model:
    regularizer = keras.regularizers.L2(l2)
    layers = [keras.Input([784])]
    for units in (width, width):
        layers += [
            keras.layers.Dense(
                units, activation="relu", kernel_regularizer=regularizer
            ),
            keras.layers.Dropout(dropout),
        ]
    layers.append(keras.layers.Dense(10, kernel_regularizer=regularizer))
    return keras.Sequential(layers)


def train_sfo(
    model: keras.Model,
    loss: keras.losses.Loss,
    x: np.ndarray,
    y: np.ndarray,
    epochs: int,
    n: int,
) -> list[dict[str, float]]:
    """What `experiment.fit` gives, of SFO: the mean of the losses it saw in a pass.

    A pass is as many evaluations as there are parts. SFO begins with two parts and
    takes in more as it goes, so its first passes see some several times and most not.
    """
    weights = model.trainable_variables
    ends = np.cumsum([v.shape.num_elements() for v in weights])[:-1]
    order = np.random.default_rng(FLAGS.seed).permutation(len(x))
    parts = [
        (tf.constant(x[rows]), tf.constant(y[rows]))
        for rows in np.array_split(order, n)
    ]
    seen: list[float] = []

    @tf.function
    def evaluate(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True)) + tf.add_n(model.losses)
        gradient = tape.gradient(value, [v.value for v in weights])
        return value, tf.concat([tf.reshape(g, [-1]) for g in gradient], axis=0)

    def f_df(theta, part):
        for v, values in zip(weights, np.split(theta, ends), strict=True):
            v.assign(values.reshape(v.shape))
        value, gradient = evaluate(*part)
        seen.append(float(value))
        return seen[-1], gradient.numpy()

    theta = np.concatenate([v.numpy().ravel() for v in weights])
    rows, start = [], time.perf_counter()
    for _ in SFO(f_df, theta, parts, seed=FLAGS.seed).iterate(epochs):
        rows.append(
            {
                "loss": float(np.mean(seen)),
                "seconds": round(time.perf_counter() - start, 3),
            }
        )
        seen.clear()
    return rows


def main(_) -> None:
    devices.use()
    x, y = data.images("mnist", FLAGS.limit)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    folder = pathlib.Path(FLAGS.output)
    table = experiment.open_table("mnist_mlp", "width")

    def make(setting):
        return make_model(0.5 if setting == "dropout" else 0.0, FLAGS.width)

    def train(setting, optimizer, epochs):
        return experiment.fit(make(setting), optimizer, loss, x, y, epochs)

    panels = experiment.compare(table, FLAGS.settings, train, size=len(x))
    if FLAGS.sfo and "deterministic" in FLAGS.settings:
        # It has no learning rate, and its batches are parts of the data.
        parts = min(FLAGS.sfo_batches, len(x))
        method = f"SFO, {parts} parts"
        curve = experiment.Curve(
            *("deterministic", method, 0.0, FLAGS.epochs),
            *(-(-len(x) // parts), len(x), FLAGS.seed),
        )

        def run_sfo():
            keras.utils.set_random_seed(FLAGS.seed)
            return train_sfo(make("deterministic"), loss, x, y, FLAGS.epochs, parts)

        panels["deterministic"][method] = table.get(curve, run_sfo)
    title = "Two hidden layers on MNIST (figure 2)"
    experiment.plot(panels, folder / "mnist_mlp.png", title, yscale="log")
    path = folder / "mnist_mlp_time.png"
    experiment.plot(panels, path, title, by="seconds", yscale="log")


if __name__ == "__main__":
    define_flags()
    app.run(main)
