"""Contenders of `dense.py` and `compiling.py`: steps on dense variables."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import contenders


def dense_tensorflow(name: str, problem: dict[str, Any]) -> contenders.Step:
    import keras
    import tensorflow as tf

    name, mode = name.split(", ")
    gradients = [tf.random.normal(shape) for shape in problem["shapes"]]
    if name == "ResourceApplyAdam":
        return kernel(gradients)
    if name == "native Adam":
        return native(problem["native"], gradients)
    optimizer = contenders.keras_optimizer(name)
    variables = [
        keras.Variable(tf.random.normal(shape), name=f"v_{i}")
        for i, shape in enumerate(problem["shapes"])
    ]
    optimizer.build(variables)
    apply = tf.function(
        lambda gradients: optimizer.apply(gradients), jit_compile=mode == "XLA"
    )
    return contenders.waiting(lambda: apply(gradients))


def first_step(name: str, problem: dict[str, Any]) -> contenders.Step:
    """Each time of a new optimizer, on new variables."""

    def step() -> float:
        call = dense_tensorflow(name, problem)
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    return step


def kernel(gradients: list[Any]) -> contenders.Step:
    import tensorflow as tf

    slots = [
        [tf.Variable(make(g.shape)) for make in (tf.random.normal, tf.zeros, tf.zeros)]
        for g in gradients
    ]
    powers = tf.Variable(0.9), tf.Variable(0.999)

    @tf.function
    def apply(gradients):
        for (variable, m, v), g in zip(slots, gradients):
            tf.raw_ops.ResourceApplyAdam(
                **{"var": variable.handle, "m": m.handle, "v": v.handle, "grad": g},
                **{"beta1_power": powers[0], "beta2_power": powers[1]},
                **{"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
            )
        powers[0].assign(powers[0] * 0.9)
        powers[1].assign(powers[1] * 0.999)

    return contenders.waiting(lambda: apply(gradients))


def native(library: str, gradients: list[Any]) -> contenders.Step:
    import tensorflow as tf

    variables = [tf.Variable(tf.random.normal(g.shape)) for g in gradients]
    apply = native_steps(library, variables)
    return lambda: apply(gradients)


def native_steps(library: str, variables: list[Any]) -> Callable[[list[Any]], None]:
    """Steps of the kernel of `native.cc`, which is for a CPU."""
    import tensorflow as tf

    # A name without a folder would be looked for among the system's libraries.
    one_pass = tf.load_op_library(os.path.abspath(library)).one_pass_adam
    slots = [
        (v, *(tf.Variable(tf.zeros(v.shape)) for _ in range(2))) for v in variables
    ]
    t = tf.Variable(0.0)

    @tf.function
    def apply(gradients):
        t.assign_add(1.0)
        alpha = 1e-3 * tf.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        for state, g in zip(slots, gradients):
            one_pass(*(v.handle for v in state), g, alpha, 0.9, 0.999, 1e-8)

    return apply


def copy(name: str, problem: dict[str, Any]) -> contenders.Step:
    """Of so many bytes, within a device."""
    import tensorflow as tf

    there = tf.Variable(tf.ones(problem["bytes"] // 4))
    new = tf.random.normal(there.shape)
    # Plus 1, so that numbers move and not a buffer's name alone.
    assign = tf.function(lambda: there.assign(new + 1.0), jit_compile=True)
    return contenders.waiting(assign)


def dense_torch(name: str, problem: dict[str, Any]) -> contenders.Step:
    import torch

    to = {"device": contenders.torch_device()}
    variables = [torch.nn.Parameter(torch.randn(s, **to)) for s in problem["shapes"]]
    for v in variables:
        v.grad = torch.randn_like(v)
    return contenders.torch_waiting(contenders.torch_optimizer(name, variables).step)


def dense_optax(name: str, problem: dict[str, Any]) -> contenders.Step:
    import jax

    keys = jax.random.split(jax.random.key(0), len(problem["shapes"]))
    variables = [jax.random.normal(k, s) for k, s in zip(keys, problem["shapes"])]
    gradients = itertools.repeat([x + 1 for x in variables])
    return contenders.optax_step(name, variables, lambda batch: batch, gradients)
