"""Contenders of Keras 2: its Adam, as tf_keras has it, and TF Addons' LazyAdam.

TF Addons ended with TensorFlow 2.14, and runs in an environment of its own:

    python3.11 -m venv addons
    addons/bin/pip install tensorflow-cpu==2.14.1 tensorflow-addons==0.23.0
    python examples/benchmarks/rows.py --addons_python=addons/bin/python
"""

from __future__ import annotations

import itertools
from typing import Any

import contenders
import tensorflow as tf


def optimizer(name: str) -> Any:
    if name == "TF Addons LazyAdam":
        import tensorflow_addons

        return tensorflow_addons.optimizers.LazyAdam()
    import tf_keras

    return {"tf_keras legacy Adam": tf_keras.optimizers.legacy.Adam}[name]()


def rows(name: str, problem: dict[str, Any]) -> contenders.Step:
    name, mode = name.split(", ")
    adam = optimizer(name)
    shape = problem["rows"], problem["width"]
    tables = [
        tf.Variable(tf.random.normal(shape)) for _ in range(problem.get("tables", 1))
    ]
    batches = itertools.cycle([tf.constant(x) for x in contenders.draw(problem)])
    values = tf.random.normal((problem["ids"], problem["width"]))

    @tf.function(jit_compile=mode == "XLA")
    def step(values, ids):
        slices = tf.IndexedSlices(values, ids, tf.constant(shape))
        adam.apply_gradients([(slices, table) for table in tables])

    return contenders.waiting(lambda: step(values, next(batches)))


def dense(name: str, problem: dict[str, Any]) -> contenders.Step:
    name, mode = name.split(", ")
    adam = optimizer(name)
    gradients = [tf.random.normal(shape) for shape in problem["shapes"]]
    variables = [tf.Variable(tf.random.normal(g.shape)) for g in gradients]

    @tf.function(jit_compile=mode == "XLA")
    def step(gradients):
        adam.apply_gradients(zip(gradients, variables))

    return contenders.waiting(lambda: step(gradients))
