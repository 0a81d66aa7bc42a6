"""Figure 3, left: a convolutional network on CIFAR-10 (right: --epochs=45).

    pip install ".[examples]"
    python examples/cifar10_cnn.py
    python examples/cifar10_cnn.py --settings=dropout --optimizers=Adam --grid=1
    python examples/cifar10_cnn.py --diagnostics --epochs=10

Section 6.3 of the paper, c64-c64-c128-1000: 5x5 convolutions, each followed by 3x3
max pooling of stride 2, a dense layer of 1,000; whitened images; batches of 128;
with and without dropout on the input and on the dense layer. A --grid of one rate, as
it comes, is not tuned. Writes a table (CSV) and a picture of the training loss to
--output.

With --diagnostics it trains Adam only, and writes how Adam moves each variable: the
section says that v_hat vanishes after a few epochs and epsilon dominates it.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Callable
from typing import Any

import data
import devices
import experiment
import keras
from absl import app, flags

from keras_adam.diagnostics import StepDiagnostics

FLAGS = flags.FLAGS

SETTINGS = ("no dropout", "dropout")
SHOWN = ("effective_step_mean", "signal_to_noise", "epsilon_share")


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
    flags.DEFINE_boolean(
        "diagnostics",
        False,
        "Log how Adam, at the first rate of --grid, moves each variable.",
        **to,
    )


def make_model(dropout: bool, filters: list[int]) -> keras.Model:
    layers = [keras.Input([32, 32, 3])]
    if dropout:
        layers.append(keras.layers.Dropout(0.2))
    for i, n in enumerate(filters):
        layers += [
            keras.layers.Conv2D(
                n, 5, padding="same", activation="relu", name=f"convolution_{i + 1}"
            ),
            keras.layers.MaxPooling2D(3, 2, padding="same"),
        ]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(1000, activation="relu", name="dense"),
    ]
    if dropout:
        layers.append(keras.layers.Dropout(0.5))
    return keras.Sequential([*layers, keras.layers.Dense(10, name="logits")])


def diagnose(train: Callable[..., Any], size: int) -> None:
    """Trains Adam in each setting; draws the figures of each kernel by passes."""
    folder = pathlib.Path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    steps = -(-size // FLAGS.batch_size)  # an epoch
    method = experiment.METHODS["Adam"]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for setting in FLAGS.settings:
        path = folder / f"cifar10_cnn_steps_{setting.replace(' ', '_')}.csv"
        path.unlink(missing_ok=True)
        keras.utils.set_random_seed(FLAGS.seed)
        optimizer = method.make(method.rate * float(FLAGS.grid[0]))
        log = StepDiagnostics(max(1, steps // 5), path)
        train(setting, optimizer, FLAGS.epochs, [log])
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                layer, name = row["variable"].split("/")[-2:]
                if name == "kernel":
                    for shown in SHOWN:
                        lines = panels.setdefault(f"{setting}: {shown}", {})
                        point = int(row["step"]) / steps, float(row[shown])
                        lines.setdefault(layer, []).append(point)
    experiment.draw(
        panels,
        folder / "cifar10_cnn_steps.png",
        "Adam's steps on CIFAR-10, by layer (section 6.3)",
        xlabel=experiment.XLABELS["epoch"],
        ylabel="",
    )


def main(_) -> None:
    devices.use()
    x, y = data.images("cifar10", FLAGS.limit)
    x = data.whiten(x).reshape(-1, 32, 32, 3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(setting, optimizer, epochs, callbacks=()):
        model = make_model(setting == "dropout", FLAGS.filters)
        return experiment.fit(model, optimizer, loss, x, y, epochs, callbacks)

    if FLAGS.diagnostics:
        diagnose(train, len(x))
        return
    experiment.run(
        experiment.open_table("cifar10_cnn", "filters"),
        "c64-c64-c128-1000 on CIFAR-10 (figure 3, left)",
        FLAGS.settings,
        train,
        size=len(x),
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
