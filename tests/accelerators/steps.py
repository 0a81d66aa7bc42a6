"""The steps that are compiled for TPUs and GPUs, and what must hold of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

import keras_adam

ROWS = 250_000
IDS = 2048


class Program(NamedTuple):
    """A step as a function to compile.

    Attributes:
        f: A `tf.function`.
        args: What it could be called with.
        state: Variables that it writes.
        tables: Shapes of those among them that must not be copied.
        results: How many tensors it returns.
    """

    f: Callable[..., Any]
    args: tuple[Any, ...]
    state: list[Any]
    tables: list[tuple[int, ...]]
    results: int = 0

    @property
    def state_bytes(self) -> int:
        sizes = (tf.as_dtype(v.dtype).size for v in self.state)
        return sum(math.prod(v.shape) * n for v, n in zip(self.state, sizes))


def written(optimizer: Any, variables: list[Any]) -> list[Any]:
    """The variables that every step of the optimizer writes."""
    others = "learning_rate", "last_step"
    state = [v for v in optimizer.variables if not v.name.endswith(others)]
    return [*variables, *state]


def dense(optimizer: Any, dtype: str = "float32") -> Program:
    """One step on matrices and a bias."""
    shapes = (1024, 1000), (1000,), (512, 512), (3, 3, 128, 256)
    variables = [keras.Variable(tf.zeros(s, dtype), dtype=dtype) for s in shapes]
    optimizer.build(variables)

    @tf.function(jit_compile=True, autograph=False)
    def step(*grads):
        optimizer.apply(list(grads), variables)

    grads = tuple(tf.zeros(s, dtype) for s in shapes)
    return Program(step, grads, written(optimizer, variables), list(shapes))


def sparse(optimizer: Any, width: int = 128, dtype: str = "float32") -> Program:
    """One step on rows of a table."""
    table = keras.Variable(tf.zeros((ROWS, width), dtype), dtype=dtype)
    optimizer.build([table])

    @tf.function(jit_compile=True, autograph=False)
    def step(values, ids):
        slices = tf.IndexedSlices(values, ids, table.shape)
        optimizer.apply([slices], [table])

    args = tf.zeros((IDS, width), dtype), tf.zeros((IDS,), tf.int32)
    state = written(optimizer, [table])
    return Program(step, args, state, [(ROWS, width)])


def train(optimizer: Any, width: int = 128) -> Program:
    """A whole step: forward, backward, update."""
    model = keras.Sequential(
        [
            keras.Input([32], dtype="int32"),
            keras_adam.Embedding(ROWS, width),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True, autograph=False)
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        variables = model.trainable_variables
        grads = tape.gradient(value, [v.value for v in variables])
        optimizer.apply(grads, variables)
        return value

    args = tf.zeros((64, 32), tf.int32), tf.zeros((64, 1))
    state = written(optimizer, model.trainable_variables)
    return Program(step, args, state, [(ROWS, width)], results=1)


Adam, AdaMax = keras_adam.Adam, keras_adam.AdaMax
DENSE = {
    "dense, Adam": lambda: dense(Adam()),
    "dense, Adam, amsgrad": lambda: dense(Adam(amsgrad=True)),
    "dense, AdaMax": lambda: dense(AdaMax()),
    "dense, Adam, bfloat16": lambda: dense(Adam(), "bfloat16"),
}
ROW_STEPS = {
    "rows, Adam, lazy": lambda: sparse(Adam(sparse_updates="lazy")),
    "rows, Adam, exact": lambda: sparse(Adam()),
    "rows, AdaMax, lazy": lambda: sparse(AdaMax(sparse_updates="lazy")),
    "rows, AdaMax, exact": lambda: sparse(AdaMax()),
    "rows, Adam, exact, bfloat16": lambda: sparse(Adam(), dtype="bfloat16"),
    "rows of 256, Adam, exact": lambda: sparse(Adam(), width=256),
    "train step, Adam, exact": lambda: train(Adam()),
    "train step, Adam, lazy": lambda: train(Adam(sparse_updates="lazy")),
    "train step, AdaMax, exact": lambda: train(AdaMax()),
}
# On a TPU, rows of these widths cannot be reached without copying the table.
NARROW = {
    "rows of 64, Adam, lazy": lambda: sparse(Adam(sparse_updates="lazy"), width=64),
    "rows of 64, Adam, exact": lambda: sparse(Adam(), width=64),
    "rows of 200, Adam, exact": lambda: sparse(Adam(), width=200),
    "rows of 64, AdaMax, exact": lambda: sparse(AdaMax(), width=64),
}
STEPS = {**DENSE, **ROW_STEPS, **NARROW}
