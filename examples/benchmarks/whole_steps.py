"""Contenders of `fit.py`: an epoch of whole steps, forward pass and all.

Each gives the milliseconds of its median step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import contenders
import numpy as np

WARM = 5  # steps at an epoch's beginning that do not count


def data(problem: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    n = problem["steps"] * problem["batch"]
    ids = contenders.zipf(rng, problem["rows"], (n, problem["length"]))
    return ids, rng.standard_normal((n, 1)).astype(np.float32)


def keras_fit(name: str, problem: dict[str, Any]) -> Callable[[], float]:
    """`model.fit`; names are an optimizer's, a layer's, and how it is compiled."""
    import keras
    import tensorflow as tf

    import keras_adam

    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.seconds = []

        def on_train_batch_begin(self, batch, logs=None):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            self.seconds.append(time.perf_counter() - self.start)

    name, layer, how = name.split(", ")
    layer = {"Keras's layer": keras.layers, "our layer": keras_adam}[layer].Embedding
    x, y = data(problem)
    dataset = tf.data.Dataset.from_tensor_slices((x.astype(np.int32), y))
    dataset = dataset.batch(problem["batch"]).cache().prefetch(2)
    model = keras.Sequential(
        [
            keras.Input([problem["length"]], dtype="int32"),
            layer(problem["rows"], problem["width"]),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        optimizer=contenders.keras_optimizer(name),
        loss="mse",
        jit_compile={"default": "auto", "XLA": True}[how],
    )
    clock = Clock()

    def epoch() -> float:
        model.fit(dataset, verbose=0, callbacks=[clock])
        return 1e3 * float(np.median(clock.seconds[WARM:]))

    return epoch


def torch_fit(name: str, problem: dict[str, Any]) -> Callable[[], float]:
    """The same model with `sparse=True`: SparseAdam on the table, Adam on the rest."""
    import torch

    device = contenders.torch_device()
    x, y = data(problem)
    batches = list(
        zip(
            torch.from_numpy(x).split(problem["batch"]),
            torch.from_numpy(y).split(problem["batch"]),
        )
    )
    table = torch.nn.Embedding(problem["rows"], problem["width"], sparse=True)
    top = torch.nn.Sequential(
        torch.nn.Linear(problem["width"], 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
    )
    table.to(device)
    top.to(device)
    optimizers = [
        torch.optim.SparseAdam(table.parameters()),
        torch.optim.Adam(top.parameters(), fused=True),
    ]

    def epoch() -> float:
        seconds = []
        for ids, target in batches:
            start = time.perf_counter()
            ids, target = ids.to(device), target.to(device)
            loss = torch.nn.functional.mse_loss(top(table(ids).mean(1)), target)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            loss.item()
            seconds.append(time.perf_counter() - start)
        return 1e3 * float(np.median(seconds[WARM:]))

    return epoch
