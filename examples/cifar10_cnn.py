"""Figure 3: a convolutional network on CIFAR-10.

    pip install ".[examples]"
    python examples/cifar10_cnn.py
    python examples/cifar10_cnn.py --settings=dropout --optimizers=Adam --grid=1

Section 6.3 of the paper, c64-c64-c128-1000: 5x5 convolutions, each followed by 3x3
max pooling of stride 2, a dense layer of 1,000; whitened images; batches of 128;
with and without dropout on the input and on the dense layer. Writes a table (CSV)
and a picture of the training loss to --output.
"""

from __future__ import annotations

import data
import experiment
import keras
from absl import app, flags

FLAGS = flags.FLAGS

SETTINGS = ("no dropout", "dropout")


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    experiment.define_flags(
        values,
        epochs=3,
        tune_epochs=1,
        grid=(1,),
        optimizers=("Adam", "AdaMax", "SGDNesterov", "AdaGrad"),
    )
    to = {"flag_values": values}
    flags.DEFINE_multi_enum("settings", list(SETTINGS), SETTINGS, "Which.", **to)
    flags.DEFINE_multi_integer("filters", [64, 64, 128], "Of the layers.", 1, **to)


def make_model(dropout: bool, filters: list[int]) -> keras.Model:
    layers = [keras.Input([32, 32, 3])]
    if dropout:
        layers.append(keras.layers.Dropout(0.2))
    for n in filters:
        layers += [
            keras.layers.Conv2D(n, 5, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(3, 2, padding="same"),
        ]
    layers += [keras.layers.Flatten(), keras.layers.Dense(1000, activation="relu")]
    if dropout:
        layers.append(keras.layers.Dropout(0.5))
    return keras.Sequential([*layers, keras.layers.Dense(10)])


def main(_) -> None:
    x, y = data.images("cifar10", FLAGS.limit)
    x = data.whiten(x).reshape(-1, 32, 32, 3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(setting, optimizer, epochs):
        model = make_model(setting == "dropout", FLAGS.filters)
        return experiment.fit(model, optimizer, loss, x, y, epochs)

    experiment.run(
        "cifar10_cnn",
        "c64-c64-c128-1000 on CIFAR-10 (figure 3, left)",
        FLAGS.settings,
        train,
        size=len(x),
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
