"""keras.optimizers.Adam and keras_adam.Adam on one embedding-heavy model.

    pip install ".[examples]" && python examples/quickstart.py

Needs no download: the text is the source code of Python's own standard library,
as a sequence of identifiers. The model reads the last identifiers and the last
pairs of identifiers, averages their embeddings, and tells the next identifier
from others drawn at random (noise-contrastive, 15 to 1). Both optimizers start
from the same weights, see the same batches and use the same learning rate; only
one argument of `model.compile` differs. Ends with a table and a picture of loss
against time.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import collections
import itertools
import pathlib
import re
import sysconfig
import time

import keras
import matplotlib
import numpy as np
from absl import app, flags

import keras_adam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAGS = flags.FLAGS
flags.DEFINE_integer("steps", 600, "Training steps of each optimizer.")
flags.DEFINE_integer("batch_size", 256, "Positions in the text a step.")
flags.DEFINE_float("learning_rate", 0.01, "Of both optimizers.")
flags.DEFINE_integer("width", 64, "Columns of the tables.")
flags.DEFINE_integer("seed", 0, "Of weights, batches and negatives.")
flags.DEFINE_string("output", "results", "Folder for the picture.")

CONTEXT = 4  # identifiers read, and one pair of them less
NEGATIVES = 15
ROWS = 262_144  # of the table of identifiers and pairs
TARGETS = 131_072  # of the table of identifiers to tell
HELD_OUT = 20_000  # positions at the end of the text, that training does not see


def read_identifiers() -> list[list[str]]:
    """The identifiers of each file of the standard library, in a fixed order."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    identifier = re.compile(r"[A-Za-z_]\w*")
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.parts)
    )
    if not files:
        raise app.UsageError(
            f"No Python source in {root}: this Python comes without the source of "
            "its standard library, the text this example trains on."
        )
    return [
        identifier.findall(path.read_text(encoding="utf-8", errors="ignore"))
        for path in files
    ]


def number(words: list[str], rows: int) -> np.ndarray:
    """A word's number is its rank by frequency; 0 stands for all beyond `rows`."""
    ranks = collections.Counter(words).most_common(rows - 1)
    table = {word: i + 1 for i, (word, _) in enumerate(ranks)}
    return np.array([table.get(word, 0) for word in words], np.int32)


def make_data(rng: np.random.Generator) -> tuple[tuple, tuple, int]:
    """Training and held-out (contexts, candidates); the number of rows in use."""
    files = read_identifiers()
    rng.shuffle(files)
    words = [word for file in files for word in file]
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    # Words and pairs share a table: their numbers are ranks among both.
    both = number(words + pairs, ROWS)
    singles, doubles = both[: len(words)], both[len(words) :]
    targets = number(words, TARGETS)

    windows = np.lib.stride_tricks.sliding_window_view
    contexts = np.concatenate(
        [
            windows(singles[:-1], CONTEXT),
            windows(doubles[:-1], CONTEXT - 1),
        ],
        axis=1,
    )
    nexts = targets[CONTEXT:]
    cut = len(nexts) - HELD_OUT
    wanted = FLAGS.steps * FLAGS.batch_size
    share = np.maximum(np.bincount(nexts[:cut], minlength=TARGETS), 1) ** -0.25

    def sample(low: int, high: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        at = rng.choice(np.arange(low, high), n, replace=n > high - low)
        # Negatives come from the text itself, thinned as in word2vec.
        drawn = nexts[rng.integers(0, cut, (n, 2 * NEGATIVES))]
        keys = rng.random(drawn.shape) ** (1 / share[drawn])
        best = np.argpartition(-keys, NEGATIVES, axis=1)[:, :NEGATIVES]
        negatives = np.take_along_axis(drawn, best, axis=1)
        return contexts[at], np.concatenate([nexts[at, None], negatives], axis=1)

    in_use = len(np.unique(both)) + len(np.unique(targets))
    return sample(0, cut, wanted), sample(cut, len(nexts), HELD_OUT), in_use


def make_model() -> keras.Model:
    context = keras.Input([2 * CONTEXT - 1], dtype="int32")
    candidates = keras.Input([1 + NEGATIVES], dtype="int32")
    read = keras_adam.Embedding(ROWS, FLAGS.width, name="read")(context)
    told = keras_adam.Embedding(TARGETS, FLAGS.width, name="tell")(candidates)
    state = keras.layers.GlobalAveragePooling1D()(read)
    state = keras.layers.Dense(FLAGS.width)(state)
    return keras.Model(
        [context, candidates], keras.layers.Dot(axes=(1, 2))([state, told])
    )


class Clock(keras.callbacks.Callback):
    """Seconds and running loss after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.losses.append(logs["loss"] * (batch + 1))  # Keras gives the mean so far


def train(optimizer, model, weights, data, held_out) -> dict:
    model.set_weights(weights)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    clock = Clock()
    model.fit(
        list(data),
        np.zeros(len(data[0]), np.int32),  # the first candidate is the right one
        batch_size=FLAGS.batch_size,
        shuffle=False,
        callbacks=[clock],
    )
    loss = model.evaluate(
        list(held_out), np.zeros(len(held_out[0]), np.int32), 1024, verbose=0
    )
    warm = min(20, len(clock.seconds) // 2)
    return {
        "ms": 1e3 * float(np.median(clock.seconds[warm:])),
        "held out": loss,
        "seconds": np.cumsum(clock.seconds),
        "losses": np.diff(clock.losses, prepend=0),
    }


def plot(results: dict[str, dict], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, result in results.items():
        window = min(20, len(result["losses"]))
        smooth = np.convolve(result["losses"], np.ones(window) / window, "valid")
        axes.plot(result["seconds"][-len(smooth) :], smooth, label=name)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="training loss")
    axes.set_title("Same model, weights, batches and learning rate")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(_) -> None:
    keras.utils.set_random_seed(FLAGS.seed)
    data, held_out, in_use = make_data(np.random.default_rng(FLAGS.seed))
    model = make_model()
    print(
        f"Tables of {ROWS:,} and {TARGETS:,} rows x {FLAGS.width}, {in_use:,} rows "
        f"of them in use; {FLAGS.steps} steps of {FLAGS.batch_size} positions each."
    )
    weights = model.get_weights()
    results = {}
    for name, cls in (
        ("keras.optimizers.Adam", keras.optimizers.Adam),
        ("keras_adam.Adam", keras_adam.Adam),
    ):
        print(f"\n{name}")
        results[name] = train(cls(FLAGS.learning_rate), model, weights, data, held_out)
    first = results["keras.optimizers.Adam"]
    print(f"\n{'optimizer':24}{'ms a step':>12}{'speed-up':>10}{'held-out loss':>15}")
    for name, r in results.items():
        print(
            f"{name:24}{r['ms']:12.2f}{first['ms'] / r['ms']:9.1f}x"
            f"{r['held out']:15.4f}"
        )
    folder = pathlib.Path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    plot(results, folder / "quickstart.png")
    print(f"\nLoss against time: {folder / 'quickstart.png'}")


if __name__ == "__main__":
    app.run(main)
