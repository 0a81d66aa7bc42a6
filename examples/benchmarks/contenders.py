"""One optimizer on one problem, in a process of its own, that takes steps when told.

`harness.Worker` starts it. It prints a line when it is warm, then a line with the
milliseconds of each step for each line it reads, with how many.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

BATCHES = 16  # of other ids, over and over

# Takes a step; gives its milliseconds, if it is not the whole of the call.
Step = Callable[[], float | None]


def zipf(rng: np.random.Generator, rows: int, shape: Any) -> np.ndarray:
    """Ids of a table, the id of rank k with probability ~ 1/k."""
    cdf = np.cumsum(1 / np.arange(1, rows + 1))
    ranks = np.searchsorted(cdf, rng.random(shape) * cdf[-1])
    return rng.permutation(rows)[ranks]


def draw(problem: dict[str, Any]) -> np.ndarray:
    """`[BATCHES, ids]`, the same for all contenders."""
    rng = np.random.default_rng(0)
    rows, shape = problem["rows"], (BATCHES, problem["ids"])
    if problem.get("uniform"):
        return rng.integers(0, rows, shape)
    # The same ids in tables of several sizes: as many rows are in use in each.
    in_use = problem.get("in_use", rows)
    spread = rng.permutation(rows)[:in_use]
    return spread[zipf(rng, in_use, shape)]


# What makes each library's optimizers.


def keras_optimizer(name: str) -> Any:
    import keras

    import keras_adam

    return {
        "keras Adam": lambda: keras.optimizers.Adam(),
        "keras Adamax": lambda: keras.optimizers.Adamax(),
        "exact Adam": lambda: keras_adam.Adam(),
        "lazy Adam": lambda: keras_adam.Adam(sparse_updates="lazy"),
        "exact AdaMax": lambda: keras_adam.AdaMax(),
        "lazy AdaMax": lambda: keras_adam.AdaMax(sparse_updates="lazy"),
        "our Adam": lambda: keras_adam.Adam(),
        "our AdaMax": lambda: keras_adam.AdaMax(),
    }[name]()


def torch_optimizer(name: str, parameters: Any) -> Any:
    import torch

    return {
        "torch SparseAdam": lambda p: torch.optim.SparseAdam(p),
        "torch Adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
        "torch Adam fused": lambda p: torch.optim.Adam(p, fused=True),
        "torch Adamax": lambda p: torch.optim.Adamax(p, foreach=True),
    }[name](parameters)


# An optimizer's step on tables, given the gradients of some rows of each.


def rows_tensorflow(name: str, problem: dict[str, Any]) -> Step:
    import keras
    import tensorflow as tf

    name, mode = name.split(", ")
    optimizer = keras_optimizer(name)
    shape = problem["rows"], problem["width"]
    tables = [
        keras.Variable(tf.random.normal(shape), name=f"table_{i}")
        for i in range(problem.get("tables", 1))
    ]
    optimizer.build(tables)
    batches = itertools.cycle([tf.constant(x) for x in draw(problem)])
    values = tf.random.normal((problem["ids"], problem["width"]))

    @tf.function(jit_compile=mode == "XLA")
    def step(values, ids):
        slices = tf.IndexedSlices(values, ids, tf.constant(shape))
        optimizer.apply([slices] * len(tables), tables)

    return waiting(lambda: step(values, next(batches)), optimizer)


def waiting(step: Any, optimizer: Any) -> Step:
    """The call is over when the step is, on a GPU too."""
    import tensorflow as tf

    on_gpu = bool(tf.config.list_physical_devices("GPU"))

    def call() -> None:
        step()
        if on_gpu:
            optimizer.iterations.numpy()

    return call


def rows_torch(name: str, problem: dict[str, Any]) -> Step:
    import torch

    shape = problem["rows"], problem["width"]
    tables = [
        torch.nn.Parameter(torch.randn(shape)) for _ in range(problem.get("tables", 1))
    ]
    optimizer = torch_optimizer(name, tables)
    batches = itertools.cycle([torch.tensor(x) for x in draw(problem)])
    values = torch.randn(problem["ids"], problem["width"])

    def gradient(ids: Any) -> Any:
        """As `torch.nn.Embedding` gives it, with `sparse=True` or without."""
        if name == "torch SparseAdam":
            return torch.sparse_coo_tensor(ids[None], values, shape)
        return torch.zeros(shape).index_add_(0, ids, values)

    def step() -> None:
        ids = next(batches)
        for table in tables:
            table.grad = gradient(ids)
        optimizer.step()

    return step


def rows_optax(name: str, problem: dict[str, Any]) -> Step:
    import jax

    shape = problem["rows"], problem["width"]
    key = jax.random.key(0)
    tables = [jax.random.normal(key, shape) for _ in range(problem.get("tables", 1))]
    values = jax.random.normal(key, (problem["ids"], problem["width"]))
    batches = itertools.cycle([jax.numpy.asarray(x) for x in draw(problem)])

    def gradients(ids):  # JAX's of an embedding
        return [jax.numpy.zeros(shape).at[ids].add(values)] * len(tables)

    return optax_step(name, tables, gradients, batches)


def optax_step(name: str, variables: Any, gradients: Any, batches: Any) -> Step:
    """Steps on variables, which are donated, with the gradients of each batch."""
    import jax
    import optax

    optimizer = {"optax adam": optax.adam, "optax adamax": optax.adamax}[name](1e-3)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        variables, inner = state
        updates, inner = optimizer.update(gradients(batch), inner, variables)
        return optax.apply_updates(variables, updates), inner

    holder = [(variables, optimizer.init(variables))]

    def call() -> None:
        holder[0] = jax.block_until_ready(step(holder[0], next(batches)))

    return call


# An optimizer's step on dense variables.


def dense_tensorflow(name: str, problem: dict[str, Any]) -> Step:
    import keras
    import tensorflow as tf

    name, mode = name.split(", ")
    gradients = [tf.random.normal(shape) for shape in problem["shapes"]]
    if name == "ResourceApplyAdam":
        return kernel(gradients)
    optimizer = keras_optimizer(name)
    variables = [
        keras.Variable(tf.random.normal(shape), name=f"v_{i}")
        for i, shape in enumerate(problem["shapes"])
    ]
    optimizer.build(variables)
    apply = tf.function(
        lambda gradients: optimizer.apply(gradients), jit_compile=mode == "XLA"
    )
    return waiting(lambda: apply(gradients), optimizer)


def first_step(name: str, problem: dict[str, Any]) -> Step:
    """Each time of a new optimizer, on new variables."""

    def step() -> float:
        call = dense_tensorflow(name, problem)
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    return step


def kernel(gradients: list[Any]) -> Step:
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

    return lambda: apply(gradients)


def dense_torch(name: str, problem: dict[str, Any]) -> Step:
    import torch

    variables = [torch.nn.Parameter(torch.randn(s)) for s in problem["shapes"]]
    for v in variables:
        v.grad = torch.randn_like(v)
    return torch_optimizer(name, variables).step


def dense_optax(name: str, problem: dict[str, Any]) -> Step:
    import jax

    keys = jax.random.split(jax.random.key(0), len(problem["shapes"]))
    variables = [jax.random.normal(k, s) for k, s in zip(keys, problem["shapes"])]
    gradients = itertools.repeat([x + 1 for x in variables])
    return optax_step(name, variables, lambda batch: batch, gradients)


def whole(name: str, problem: dict[str, Any]) -> Callable[[], float]:
    import whole_steps

    make = whole_steps.torch_fit if "torch" in name else whole_steps.keras_fit
    return make(name, problem)


def of_keras_2(benchmark: str) -> Callable[..., Step]:
    def make(name: str, problem: dict[str, Any]) -> Step:
        import legacy

        return getattr(legacy, benchmark)(name, problem)

    return make


LIBRARIES = {"torch": "torch", "optax": "optax", "tf_keras": "legacy", "TF": "legacy"}
MAKERS = {
    ("rows", "legacy"): of_keras_2("rows"),
    ("dense", "legacy"): of_keras_2("dense"),
    ("fit", "torch"): whole,
    ("fit", "tensorflow"): whole,
    ("rows", "torch"): rows_torch,
    ("rows", "optax"): rows_optax,
    ("dense", "torch"): dense_torch,
    ("dense", "optax"): dense_optax,
    ("rows", "tensorflow"): rows_tensorflow,
    ("dense", "tensorflow"): dense_tensorflow,
    ("compiling", "tensorflow"): first_step,
}


def make(benchmark: str, name: str, problem: dict[str, Any]) -> Step:
    """What a contender does at a step of a problem."""
    library = LIBRARIES.get(name.split()[0], "tensorflow")
    return MAKERS[benchmark, library](name, problem)


def main() -> None:
    benchmark, name, problem = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr
    step = make(benchmark, name, problem)
    start = time.perf_counter()
    for i in itertools.count():
        step()
        if i >= 3 and time.perf_counter() - start > 1:
            break
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_bytes": 1024 * kilobytes}), file=out, flush=True)
    for line in sys.stdin:
        ms = []
        for _ in range(int(line)):
            start = time.perf_counter()
            told = step()
            ms.append(told or 1e3 * (time.perf_counter() - start))
        print(json.dumps(ms), file=out, flush=True)


if __name__ == "__main__":
    main()
