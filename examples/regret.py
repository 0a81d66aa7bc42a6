"""Theorem 4.1: the regret of Adam on convex online problems grows at most as sqrt(T).

    pip install ".[examples]"
    python examples/regret.py
    python examples/regret.py --problems=sparse --optimizers=Adam,AdaGrad

Section 4 of the paper. At each step the model predicts, pays the squared error, and
takes one step of an optimizer with learning rate alpha / sqrt(t) (constant for AdaGrad
and AdaDelta), of Adam and AdaMax with beta_1,t = beta_1 * lambda^(t - 1). The regret
after T steps is what it has paid more than the best fixed weights for these T steps
would have, which least squares finds. (The theorem is about Adam, for gradients and
distances that are bounded, which a squared error does not promise.) The dense problem
has 20 normal features; the sparse one 10 words a step out of a table, drawn by Zipf's
law. Writes a table (CSV) and a picture to --output, with the slopes of log regret over
log T in the last decade.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import csv
import pathlib
from collections.abc import Iterator

import experiment
import keras
import numpy as np
from absl import app, flags

import keras_adam
from keras_adam.schedules import ExponentialBetaDecay, InverseSqrtDecay

FLAGS = flags.FLAGS

PROBLEMS = ("dense", "sparse")
OURS = ("Adam", "AdaMax")  # have a beta_1 that may be a schedule
FEATURES = 20
WORDS = 10


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    to = {"flag_values": values}
    flags.DEFINE_multi_enum("problems", list(PROBLEMS), PROBLEMS, "Which.", **to)
    experiment.define_optimizers(values, OURS)
    flags.DEFINE_integer("steps", 30_000, "T.", 100, **to)
    flags.DEFINE_float("alpha", 1.0, "Learning rate at the first step.", 0, **to)
    flags.DEFINE_float("decay_rate", 0.9999, "lambda, of beta_1.", 0, 1, **to)
    flags.DEFINE_integer("rows", 200, "Of the sparse problem's table.", 1, **to)
    flags.DEFINE_float("noise", 0.5, "Of what is to be predicted.", 0, **to)
    flags.DEFINE_integer("seed", 0, "Of the problems.", **to)
    flags.DEFINE_string("output", "results", "Folder for table and picture.", **to)


def make_inputs(problem: str) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of a model, and the same as rows of a matrix."""
    rng = np.random.default_rng(FLAGS.seed)
    if problem == "dense":
        x = rng.standard_normal((FLAGS.steps, FEATURES)).astype(np.float32)
        return x, x
    cdf = np.cumsum(1 / np.arange(1, FLAGS.rows + 1))
    draws = rng.random((FLAGS.steps, WORDS)) * cdf[-1]
    ids = np.searchsorted(cdf, draws).astype(np.int32)
    counts = np.zeros([FLAGS.steps, FLAGS.rows])
    np.add.at(counts, (np.arange(FLAGS.steps)[:, None], ids), 1)
    return ids, counts


def make_model(problem: str) -> keras.Model:
    """One that starts at 0."""
    if problem == "dense":
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        return keras.Sequential([keras.Input([FEATURES]), layer])
    words = keras.Input([WORDS], dtype="int32")
    table = keras_adam.Embedding(FLAGS.rows, 1, embeddings_initializer="zeros")
    return keras.Model(words, keras.ops.sum(table(words), axis=1))


class Paid(keras.callbacks.Callback):
    """What each step's loss came to, before the step."""

    def __init__(self) -> None:
        super().__init__()
        self.total = [0.0]

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.total.append(float(logs["loss"]) * (batch + 1))  # logs holds the mean


def schedules() -> tuple[InverseSqrtDecay, ExponentialBetaDecay]:
    """Of the learning rate and of beta_1."""
    beta_1 = ExponentialBetaDecay(0.9, FLAGS.decay_rate)
    return InverseSqrtDecay(FLAGS.alpha), beta_1


def regrets(problem: str, at: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each optimizer's, after each number of steps of `at`."""
    x, matrix = make_inputs(problem)
    rng = np.random.default_rng(FLAGS.seed + 1)
    y = matrix @ rng.standard_normal(matrix.shape[1])
    y += FLAGS.noise * rng.standard_normal(len(y))

    def least(t: int) -> float:
        theta, *_ = np.linalg.lstsq(matrix[:t], y[:t], rcond=None)
        return float(np.sum((matrix[:t] @ theta - y[:t]) ** 2))

    best = np.array([least(t) for t in at])
    alpha, beta_1 = schedules()
    for name in FLAGS.optimizers:
        method = experiment.METHODS[name]
        optimizer = method.make(
            FLAGS.alpha if method.lowers else alpha,
            **({"beta_1": beta_1} if name in OURS else {}),
        )
        model, paid = make_model(problem), Paid()
        model.compile(optimizer=optimizer, loss="mse")
        model.fit(
            *(x, y[:, None]), batch_size=1, shuffle=False, callbacks=[paid], verbose=0
        )
        yield name, np.array(paid.total)[at] - best


def slope(at: np.ndarray, values: np.ndarray) -> float:
    """Of log regret over log T, in the last decade."""
    last = at >= at[-1] / 10
    return float(np.polyfit(np.log(at[last]), np.log(values[last]), 1)[0])


def main(_) -> None:
    at = np.unique(np.geomspace(10, FLAGS.steps, 60).astype(int))
    folder = pathlib.Path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    panels = {}
    with open(folder / "regret.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["problem", "method", "steps", "regret"])
        for problem in FLAGS.problems:
            lines = panels.setdefault(f"regret, {problem}", {})
            for name, values in regrets(problem, at):
                table.writerows([problem, name, *row] for row in zip(at, values))
                label = f"{name}, slope {slope(at, values):.2f}"
                print(f"{problem:10}{label}", flush=True)
                lines[label] = list(zip(at, values))
            scale = values[-1] / np.sqrt(at[-1])
            lines["sqrt(T)"] = [(t, scale * np.sqrt(t)) for t in at]
    alpha, beta = schedules()
    panels["schedules"] = {
        f"{FLAGS.alpha:g} / sqrt(t)": [(t, float(alpha(t - 1))) for t in at],
        f"0.9 * {FLAGS.decay_rate:g}^(t - 1)": [(t, float(beta(t - 1))) for t in at],
    }
    experiment.draw(
        panels,
        folder / "regret.png",
        "Regret on convex online problems (theorem 4.1)",
        xlabel="steps",
        ylabel="",
        xscale="log",
        yscale="log",
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
