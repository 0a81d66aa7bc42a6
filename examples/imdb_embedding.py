"""Tells good film reviews from bad ones: an embedding table and an average.

    pip install ".[examples]"
    python examples/imdb_embedding.py
    python examples/imdb_embedding.py --optimizer keras.Adam
    python examples/imdb_embedding.py --optimizer keras_adam.AdaMax --limit 2000
    python examples/imdb_embedding.py --dtype bfloat16 --stochastic_rounding

Trains on the 25,000 training reviews of IMDB, through TensorFlow Datasets, and
tests on the 25,000 test reviews after each epoch. The first run downloads the
data (80 MB). Writes a table (CSV) and a picture of all epochs to --output.

The layer is Keras's, which all optimizers know. Its forward pass reads rows as they
were when last touched, so exact mode is dense Adam's trajectory only with
`keras_adam.Embedding` in its place.
"""

from __future__ import annotations

import csv
import pathlib
import time
from typing import Any

import data
import devices
import keras
import matplotlib
import numpy as np
from absl import app, flags

import keras_adam
from keras_adam.base import SPARSE_UPDATES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAGS = flags.FLAGS

OPTIMIZERS = {
    "keras_adam.Adam": keras_adam.Adam,
    "keras_adam.AdaMax": keras_adam.AdaMax,
    "keras.Adam": keras.optimizers.Adam,
    "keras.Adamax": keras.optimizers.Adamax,
    "keras.SGD": keras.optimizers.SGD,
    "keras.RMSprop": keras.optimizers.RMSprop,
    "keras.Adagrad": keras.optimizers.Adagrad,
    "keras.Adadelta": keras.optimizers.Adadelta,
}


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Not at import: another example may import this one and have a --seed too."""
    to = {"flag_values": values}
    flags.DEFINE_enum("optimizer", "keras_adam.Adam", list(OPTIMIZERS), "Which.", **to)
    flags.DEFINE_float("learning_rate", None, "None: the optimizer's default.", **to)
    flags.DEFINE_enum(
        "sparse_updates",
        None,
        list(SPARSE_UPDATES),
        "Of keras_adam's optimizers only. None: the optimizer's default.",
        **to,
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Weights'.", **to)
    flags.DEFINE_bool(
        "stochastic_rounding", False, "Of bfloat16 weights; keras_adam's only.", **to
    )
    flags.DEFINE_enum(
        "moments_dtype",
        None,
        ["float32", "bfloat16"],
        "Of keras_adam's optimizers only. None: float32.",
        **to,
    )
    flags.DEFINE_integer("epochs", 10, "Passes over the training reviews.", 1, **to)
    flags.DEFINE_integer("batch_size", 128, "Reviews a step.", 1, **to)
    flags.DEFINE_integer("vocabulary", 20_000, "Rows of the table.", 3, **to)
    flags.DEFINE_integer("sequence_length", 400, "Words read of a review.", 1, **to)
    flags.DEFINE_integer(
        "limit", None, "Reviews to train on, and to test on. None or 0: all.", 0, **to
    )
    devices.define_flags(values)
    flags.DEFINE_integer("seed", 0, "Of weights, batches and dropout.", **to)
    flags.DEFINE_string("output", "results", "Folder for table and picture.", **to)


def vectorize(
    train: np.ndarray, test: np.ndarray, vocabulary: int, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of each text's first words; 0 pads, 1 is a word not in the table.

    The vocabulary is the training texts' most frequent words.
    """
    layer = keras.layers.TextVectorization(
        max_tokens=vocabulary, output_sequence_length=sequence_length
    )
    with keras.device("cpu"):  # the one that knows strings
        layer.adapt(train, batch_size=1024)
        return tuple(layer(texts).numpy().astype(np.int32) for texts in (train, test))


def make_optimizer(
    name: str,
    learning_rate: float | None = None,
    **own: Any,
) -> keras.optimizers.Optimizer:
    """The optimizer of that name; what is None stays at its default.

    Args:
        name: One of OPTIMIZERS.
        learning_rate: Of any of them.
        **own: Arguments of keras_adam's optimizers only.
    """
    own = {k: v for k, v in own.items() if v is not None}
    if own and not name.startswith("keras_adam."):
        raise app.UsageError(
            f"--{next(iter(own))} is an option of keras_adam's optimizers; {name} has "
            "no such choice. Leave it out, or choose another --optimizer."
        )
    given = {} if learning_rate is None else {"learning_rate": learning_rate}
    return OPTIMIZERS[name](**given, **own)


def make_model(
    vocabulary: int, width: int = 64, dtype: str | None = None
) -> keras.Model:
    """The probability that a review is good, from its words' mean embedding."""
    return keras.Sequential(
        [
            keras.Input([None], dtype="int32"),
            # With the mask the mean is over the words and not over the padding.
            keras.layers.Embedding(vocabulary, width, mask_zero=True, dtype=dtype),
            keras.layers.GlobalAveragePooling1D(dtype=dtype),
            keras.layers.Dropout(0.5, dtype=dtype),
            keras.layers.Dense(1, activation="sigmoid", dtype=dtype),
        ]
    )


class Clock(keras.callbacks.Callback):
    """Seconds of each epoch's training, without its test."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self._start = time.perf_counter()

    def on_test_begin(self, logs=None) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def write(history: dict[str, list[float]], folder: pathlib.Path, title: str) -> None:
    """A row an epoch in imdb_embedding.csv, a curve a column in the .png."""
    epochs = range(1, len(history["loss"]) + 1)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "imdb_embedding.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", *history])
        table.writerows(zip(epochs, *history.values()))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for panel, name in zip(panels, ("loss", "accuracy")):
        panel.plot(epochs, history[name], marker=".", label="training")
        panel.plot(epochs, history[f"val_{name}"], marker=".", label="test")
        panel.set(xlabel="epoch", ylabel=name)
        panel.legend()
    figure.suptitle(title)
    figure.savefig(folder / "imdb_embedding.png", dpi=120)
    plt.close(figure)


def main(_) -> None:
    devices.use()
    keras.utils.set_random_seed(FLAGS.seed)
    optimizer = make_optimizer(
        FLAGS.optimizer,
        FLAGS.learning_rate,
        sparse_updates=FLAGS.sparse_updates,
        stochastic_rounding=FLAGS.stochastic_rounding or None,
        moments_dtype=FLAGS.moments_dtype,
    )
    (texts, labels), (test_texts, test_labels) = data.load("imdb_reviews", FLAGS.limit)
    ids, test_ids = vectorize(
        texts, test_texts, FLAGS.vocabulary, FLAGS.sequence_length
    )
    model = make_model(FLAGS.vocabulary, dtype=FLAGS.dtype)
    model.compile(
        optimizer=optimizer,
        loss="binary_crossentropy",
        metrics=["accuracy"],
        jit_compile=devices.jit_compile(),
    )
    clock = Clock()
    history = model.fit(
        ids,
        labels,
        batch_size=FLAGS.batch_size,
        epochs=FLAGS.epochs,
        validation_data=(test_ids, test_labels),
        callbacks=[clock],
        verbose=2,
    ).history
    history["seconds"] = clock.seconds
    folder = pathlib.Path(FLAGS.output)
    write(history, folder, f"IMDB reviews, {FLAGS.optimizer}")
    print(f"Test accuracy {history['val_accuracy'][-1]:.4f}")
    print(f"Every epoch: {folder / 'imdb_embedding.csv'} and .png")


if __name__ == "__main__":
    define_flags()
    app.run(main)
