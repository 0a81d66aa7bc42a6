"""Figure 1, left: logistic regression on MNIST, with alpha / sqrt(t).

    pip install ".[examples]"
    python examples/mnist_logistic.py
    python examples/mnist_logistic.py --optimizers=Adam,AdaGrad --grid=1 --epochs=3

Section 6.1 of the paper: multi-class logistic regression with L2 on the pixels,
batches of 128. The rate falls as alpha / sqrt(t), save for AdaGrad and AdaDelta,
whose steps fall by themselves. Writes a table (CSV) and a picture of the training
loss to --output.
"""

from __future__ import annotations

import data
import devices
import experiment
import keras
from absl import app, flags

from keras_adam.schedules import InverseSqrtDecay

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    grid = 0.3, 1, 3, 10, 30, 100, 300
    experiment.define_flags(values, epochs=45, tune_epochs=5, grid=grid)


def make_model(l2: float = 1e-4) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input([784]),
            keras.layers.Dense(10, kernel_regularizer=keras.regularizers.L2(l2)),
        ]
    )


def main(_) -> None:
    devices.use()
    x, y = data.images("mnist", FLAGS.limit)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(setting, optimizer, epochs):
        return experiment.fit(make_model(), optimizer, loss, x, y, epochs)

    experiment.run(
        experiment.open_table("mnist_logistic"),
        "Logistic regression (figure 1, left)",
        ["MNIST"],
        train,
        size=len(x),
        schedule=InverseSqrtDecay,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
