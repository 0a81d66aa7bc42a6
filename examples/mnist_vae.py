"""Figure 4: bias correction, in a variational autoencoder of MNIST.

    pip install ".[examples]"
    python examples/mnist_vae.py
    python examples/mnist_vae.py --beta_1=0.9 --beta_2=0.9999 --epochs=2

Section 6.4 of the paper: one hidden layer of 500 softplus units in the encoder and in
the decoder, 50 Gaussian latent numbers, Adam with and without bias correction for
each beta_1, beta_2 and learning rate, from 1e-5 to 1e-1. Writes a table (CSV) and a
picture of the loss after the last epoch, over the learning rate, to --output.
"""

from __future__ import annotations

import functools
import itertools
import math
import pathlib

import data
import devices
import experiment
import keras
import numpy as np
from absl import app, flags

import keras_adam

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    to = {"flag_values": values}
    experiment.define_common(values, epochs=10)
    flags.DEFINE_multi_float("beta_1", [0.0, 0.9], "Adam's beta_1.", **to)
    flags.DEFINE_multi_float("beta_2", [0.99, 0.999, 0.9999], "Adam's beta_2.", **to)
    flags.DEFINE_multi_float(
        "log10_rate", [-5.0, -4.0, -3.0, -2.0, -1.0], "Learning rates.", **to
    )
    flags.DEFINE_integer("hidden", 500, "Units of a hidden layer.", 1, **to)
    flags.DEFINE_integer("latent", 50, "Latent numbers.", 1, **to)


class Sample(keras.layers.Layer):
    """Draws from N(mean, exp(log_variance)); adds its divergence from N(0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = keras.random.SeedGenerator()

    def call(self, mean, log_variance):
        ops = keras.ops
        divergence = ops.exp(log_variance) + mean**2 - 1 - log_variance
        self.add_loss(ops.mean(ops.sum(divergence, axis=1)) / 2)
        noise = keras.random.normal(ops.shape(mean), seed=self.noise)
        return mean + ops.exp(log_variance / 2) * noise


def make_model(hidden: int, latent: int) -> keras.Model:
    dense = keras.layers.Dense
    x = keras.Input([784])
    h = dense(hidden, activation="softplus")(x)
    z = Sample()(dense(latent)(h), dense(latent)(h))
    return keras.Model(x, dense(784)(dense(hidden, activation="softplus")(z)))


def negative_log_likelihood(x, logits):
    """Of pixels as probabilities, summed over the image."""
    return keras.ops.sum(
        keras.ops.binary_crossentropy(x, logits, from_logits=True), axis=-1
    )


def train(
    x: np.ndarray, rate: float, beta_1: float, beta_2: float, corrected: bool
) -> list[dict[str, float]]:
    """The epochs of a new model."""
    keras.utils.set_random_seed(FLAGS.seed)
    optimizer = keras_adam.Adam(rate, beta_1, beta_2, bias_correction=corrected)
    model = make_model(FLAGS.hidden, FLAGS.latent)
    return experiment.fit(model, optimizer, negative_log_likelihood, x, x, FLAGS.epochs)


def _text(beta: float) -> str:
    """All digits: of a beta close to 1 the last ones count."""
    return np.format_float_positional(beta, trim="-")


def main(_) -> None:
    devices.use()
    x, _ = data.images("mnist", FLAGS.limit)
    folder = pathlib.Path(FLAGS.output)
    table = experiment.open_table("mnist_vae", "hidden", "latent")
    # The loss after training, by learning rate.
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for beta_1, beta_2, corrected, log10_rate in itertools.product(
        FLAGS.beta_1, FLAGS.beta_2, (True, False), FLAGS.log10_rate
    ):
        setting = f"beta_1={_text(beta_1)} beta_2={_text(beta_2)}"
        method = "Adam" if corrected else "Adam, uncorrected"
        rate = 10**log10_rate
        curve_of = functools.partial(train, x, rate, beta_1, beta_2, corrected)
        curve = experiment.Curve(
            *(setting, method, float(f"{rate:.4g}"), FLAGS.epochs),
            *(FLAGS.batch_size, len(x), FLAGS.seed),
        )
        end = experiment.last_loss(table.get(curve, curve_of))
        points = panels.setdefault(setting, {}).setdefault(method, [])
        points.append((rate, end if math.isfinite(end) else math.nan))
    experiment.draw(
        panels,
        folder / "mnist_vae.png",
        f"Variational autoencoder of MNIST after {FLAGS.epochs} epochs (figure 4)",
        xlabel="learning rate",
        xscale="log",
        xlim=(10 ** min(FLAGS.log10_rate) / 1.5, 10 ** max(FLAGS.log10_rate) * 1.5),
        ylim=(80, 250),
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
