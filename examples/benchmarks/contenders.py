"""One optimizer on one problem, in a process of its own, that takes steps when told.

`harness.Worker` starts it. It prints a line when it is warm, then a line with the
milliseconds of each step for each line it reads, with how many.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On a GPU: no library takes all of its memory at its start.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import functools
import importlib
import itertools
import json
import pathlib
import re
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

    return waiting(lambda: step(values, next(batches)))


def waiting(step: Callable[[], Any]) -> Step:
    """TensorFlow's step, over when its work is, on a GPU too."""
    import tensorflow as tf

    on_gpu = bool(tf.config.list_physical_devices("GPU"))

    def call() -> None:
        step()
        if on_gpu:
            tf.test.experimental.sync_devices()

    return call


def torch_waiting(step: Callable[[], Any]) -> Step:
    """PyTorch's."""
    import torch

    if torch_device() == "cpu":
        return step

    def call() -> None:
        step()
        torch.cuda.synchronize()

    return call


def torch_device() -> str:
    """A GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu(name: str) -> str:
    """That on which a contender computes, or nothing."""
    library = name.split()[0]
    if library == "torch":
        import torch

        return torch.cuda.get_device_name() if torch_device() == "cuda" else ""
    if library == "optax":
        import jax

        return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(device).get(
            "device_name", "GPU"
        )
    return ""


def rows_torch(name: str, problem: dict[str, Any]) -> Step:
    import torch

    to = {"device": torch_device()}
    shape = problem["rows"], problem["width"]
    tables = [
        torch.nn.Parameter(torch.randn(shape, **to))
        for _ in range(problem.get("tables", 1))
    ]
    optimizer = torch_optimizer(name, tables)
    batches = itertools.cycle([torch.tensor(x, **to) for x in draw(problem)])
    values = torch.randn(problem["ids"], problem["width"], **to)

    def gradient(ids: Any) -> Any:
        """As `torch.nn.Embedding` gives it, with `sparse=True` or without."""
        if name == "torch SparseAdam":
            return torch.sparse_coo_tensor(ids[None], values, shape)
        return torch.zeros(shape, **to).index_add_(0, ids, values)

    def step() -> None:
        ids = next(batches)
        for table in tables:
            table.grad = gradient(ids)
        optimizer.step()

    return torch_waiting(step)


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


LIBRARIES = {"torch": "torch", "optax": "optax", "tf_keras": "legacy", "TF": "legacy"}

# The module and the function for each benchmark and library.
MAKERS = {
    ("rows", "tensorflow"): ("contenders", "rows_tensorflow"),
    ("rows", "torch"): ("contenders", "rows_torch"),
    ("rows", "optax"): ("contenders", "rows_optax"),
    ("rows", "legacy"): ("legacy", "rows"),
    ("dense", "tensorflow"): ("dense_steps", "dense_tensorflow"),
    ("dense", "torch"): ("dense_steps", "dense_torch"),
    ("dense", "optax"): ("dense_steps", "dense_optax"),
    ("dense", "legacy"): ("legacy", "dense"),
    ("compiling", "tensorflow"): ("dense_steps", "first_step"),
    ("fit", "tensorflow"): ("whole_steps", "keras_fit"),
    ("fit", "torch"): ("whole_steps", "torch_fit"),
    ("copy", "tensorflow"): ("dense_steps", "copy"),
}


def make(benchmark: str, name: str, problem: dict[str, Any]) -> Step:
    """What a contender does at a step of a problem."""
    library = LIBRARIES.get(name.split()[0], "tensorflow")
    module, function = MAKERS[benchmark, library]
    return getattr(importlib.import_module(module), function)(name, problem)


def main() -> None:
    benchmark, name, problem = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr
    step = make(benchmark, name, problem)
    start = time.perf_counter()
    for i in itertools.count():
        step()
        if i >= 3 and time.perf_counter() - start > 1:
            break
    # Not `ru_maxrss`, which begins with what the parent process had.
    status = pathlib.Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", status)
    about = {"peak_bytes": 1024 * int(kilobytes), "gpu": gpu(name)}
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        ms = []
        for _ in range(int(line)):
            start = time.perf_counter()
            told = step()
            ms.append(told or 1e3 * (time.perf_counter() - start))
        print(json.dumps(ms), file=out, flush=True)


if __name__ == "__main__":
    main()
