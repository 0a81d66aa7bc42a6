"""The optimizer's step on dense gradients, against Keras and TensorFlow's kernel.

    python examples/benchmarks/dense.py

Lists of float32 variables; graph mode and XLA. Every number is a median over
interleaved rounds in this one process.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf
from absl import app, flags
from timing import medians

import keras_adam

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 15, "Rounds to take the median of.")
flags.DEFINE_float("scale", 1.0, "Of the variables' sizes.")

LISTS = {"16 x 1,000,000": [1_000_000] * 16, "1 x 16,777,216": [16_777_216]}


def step(optimizer, sizes: list[int], gradients: list[tf.Tensor], jit: bool):
    """A call that takes one step on all variables."""
    variables = [keras.Variable(tf.random.normal((n,))) for n in sizes]
    optimizer.build(variables)
    apply = tf.function(optimizer.apply, jit_compile=jit)

    def call():
        apply(gradients)
        if tf.config.list_physical_devices("GPU"):
            optimizer.iterations.numpy()  # waits for it

    return call


def kernel(sizes: list[int], gradients: list[tf.Tensor]):
    """The same with tf.raw_ops.ResourceApplyAdam."""
    slots = [
        [tf.Variable(make((n,))) for make in (tf.random.normal, tf.zeros, tf.zeros)]
        for n in sizes
    ]
    powers = tf.Variable(0.9), tf.Variable(0.999)

    @tf.function
    def apply(gradients):
        for (variable, m, v), g in zip(slots, gradients):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=powers[0],
                beta2_power=powers[1],
                lr=0.001,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-8,
                grad=g,
            )
        powers[0].assign(powers[0] * 0.9)
        powers[1].assign(powers[1] * 0.999)

    def call():
        apply(gradients)
        if tf.config.list_physical_devices("GPU"):
            powers[0].numpy()

    return call


def main(_) -> None:
    for title, sizes in LISTS.items():
        sizes = [round(n * FLAGS.scale) for n in sizes]
        gradients = [tf.random.normal((n,)) for n in sizes]
        ms = medians(
            {
                "keras.optimizers.Adam, graph": step(
                    keras.optimizers.Adam(), sizes, gradients, False
                ),
                "ResourceApplyAdam, graph": kernel(sizes, gradients),
                "keras_adam.Adam, graph": step(
                    keras_adam.Adam(), sizes, gradients, False
                ),
                "keras.optimizers.Adam, XLA": step(
                    keras.optimizers.Adam(), sizes, gradients, True
                ),
                "keras_adam.Adam, XLA": step(keras_adam.Adam(), sizes, gradients, True),
            },
            FLAGS.rounds,
        )
        print(f"\n{title} float32")
        for name, t in ms.items():
            print(f"{name:32}{t:9.2f} ms")
        best = min(ms["ResourceApplyAdam, graph"], ms["keras.optimizers.Adam, XLA"])
        print(
            f"graph: {ms['keras_adam.Adam, graph'] / best:.2f}x the faster of keras "
            "under XLA and ResourceApplyAdam; XLA: "
            f"{ms['keras_adam.Adam, XLA'] / ms['keras.optimizers.Adam, XLA']:.2f}x "
            "keras under XLA",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
