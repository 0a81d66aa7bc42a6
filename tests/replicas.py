"""Trains on several replicas and on one; `test_distribute.py` runs it as a process.

    python tests/replicas.py 2
    TF_CONFIG=... python tests/replicas.py workers

Prints a JSON object: for each case the largest difference of any weight from those of
one device, relative to the largest weight, and how far the copies of the replicas lie
apart, which must be 0.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_adam
from keras_adam.diagnostics import StepDiagnostics

ROWS, IDS, BATCH = 60, 5, 16
# Batches that all replicas have an even share of: of others Keras takes the mean of
# the replicas' means. `uneven` has those.
EXAMPLES = 25 * BATCH

Adam, AdaMax = keras_adam.Adam, keras_adam.AdaMax
LONG = {
    "lazy": lambda **k: Adam(sparse_updates="lazy", **k),
    "exact": lambda **k: Adam(**k),
}
CASES = {
    "dense": lambda: Adam(0.01, sparse_updates="dense"),
    "adamax": lambda: AdaMax(0.01),
    "bfloat16 moments": lambda: Adam(0.01, moments_dtype="bfloat16"),
    "beta_1 schedule": lambda: Adam(
        0.01, beta_1=keras_adam.schedules.ExponentialBetaDecay(0.9, 0.999)
    ),
    "clip, decay": lambda: Adam(0.01, global_clipnorm=0.05, weight_decay=0.01),
    "average, decay": lambda: Adam(
        0.01, use_ema=True, ema_momentum=0.9, weight_decay=0.01
    ),
    "average, lazy": lambda: Adam(
        0.01, sparse_updates="lazy", use_ema=True, ema_overwrite_frequency=7
    ),
    "accumulation, exact": lambda: Adam(0.01, gradient_accumulation_steps=3),
    "accumulation, lazy": lambda: Adam(
        0.01, sparse_updates="lazy", gradient_accumulation_steps=3
    ),
}


def make_data() -> tuple[np.ndarray, np.ndarray]:
    """Ids that repeat within a replica's part of a batch and across these."""
    rng = np.random.default_rng(0)
    ids = (ROWS * rng.random((EXAMPLES, IDS)) ** 4).astype(np.int32)
    return ids, (1 + rng.standard_normal((EXAMPLES, 1))).astype(keras.config.floatx())


def make_model(layer) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([IDS], dtype="int32"),
            layer(ROWS, 4),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )


def by_fit(
    make, layer, epochs, evaluated=True, **options
) -> tuple[keras.Model, list[np.ndarray]]:
    """A model and its weights after `fit`; and the losses, of evaluation if asked."""
    model = make_model(layer)
    model.compile(make(), "mse", **options)
    x, y = make_data()
    history = model.fit(
        *(x, y),
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        validation_data=(x, y) if evaluated else None,
        verbose=0,
    ).history
    losses = np.array(history["val_loss" if evaluated else "loss"])
    assert losses[-1] < losses[0]
    return model, [*model.get_weights(), losses]


def by_loop(
    make, layer, epochs, jit_compile=False
) -> tuple[keras.Model, list[np.ndarray]]:
    """The same without `fit`, which in Keras 3.15 fails with workers, whatever the
    optimizer is: it wants to average numbers over an axis that they do not have.

    XLA compiles each replica's gradients. More it cannot: a step sums over replicas,
    and `fit` with `jit_compile=True` would have one program for the variables of all.
    """
    strategy = tf.distribute.get_strategy()
    model = make_model(layer)
    model.optimizer = make()
    model.optimizer.build(model.trainable_variables)
    x, y = make_data()

    @tf.function(jit_compile=jit_compile)
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x) - y) ** 2) / BATCH
        return loss, tape.gradient(loss, [v.value for v in model.trainable_variables])

    def step(x, y):
        loss, grads = gradients(x, y)
        model.optimizer.apply(grads, model.trainable_variables)
        return loss

    @tf.function
    def run(x, y):
        return strategy.reduce("SUM", strategy.run(step, (x, y)), axis=None)

    own, losses = BATCH // strategy.num_replicas_in_sync, []

    def share(a, start):
        """Of the batch that starts there, a replica's part."""

        def of(c):
            first = start + c.replica_id_in_sync_group * own
            return tf.constant(a[first : first + own])

        return strategy.experimental_distribute_values_from_function(of)

    for start in [*range(0, EXAMPLES, BATCH)] * epochs:
        losses.append(run(share(x, start), share(y, start)).numpy())
    model.optimizer.finalize_variable_values(model.trainable_variables)
    return model, [*model.get_weights(), np.array(losses)]


def uneven(strategy: tf.distribute.Strategy, mode: str) -> list[float]:
    """As `compare`, of gradients of 7, 0, 3, ... ids for the replicas, by `apply`."""
    rng = np.random.default_rng(1)
    n = strategy.num_replicas_in_sync
    table = rng.standard_normal((ROWS, 4)).astype(np.float32)
    parts = [
        [(ROWS * rng.random(k) ** 2).astype(np.int32) for k in np.resize([7, 0, 3], n)]
        for _ in range(20)
    ]
    values = [[rng.standard_normal((len(i), 4)) for i in part] for part in parts]

    def start():
        variable = keras.Variable(table)
        optimizer = Adam(0.01, sparse_updates=mode, gradient_accumulation_steps=2)
        optimizer.build([variable])
        return variable, optimizer

    signature = tf.TensorSpec([None, 4]), tf.TensorSpec([None], tf.int32)

    def apply(pair, values, ids):
        slices = tf.IndexedSlices(values, ids, tf.constant([ROWS, 4]))
        pair[1].apply([slices], [pair[0]])

    with strategy.scope():
        many = start()
    one = start()
    run = tf.function(lambda v, i: strategy.run(lambda *x: apply(many, *x), (v, i)))
    run_one = tf.function(lambda v, i: apply(one, v, i), input_signature=signature)
    for g, ids in zip(values, parts):

        def give(x, dtype):
            return strategy.experimental_distribute_values_from_function(
                lambda c: tf.constant(x[c.replica_id_in_sync_group], dtype)
            )

        run(give(g, tf.float32), give(ids, tf.int32))
        run_one(tf.constant(np.concatenate(g), tf.float32), np.concatenate(ids))
    for _, optimizer in (many, one):
        optimizer.settle()
    assert np.abs(one[0].numpy() - table).max() > 0.01
    copies = [x.numpy() for x in keras_adam.rows.components(many[0]._value)]
    apart = max(float(np.abs(x - copies[0]).max()) for x in copies)
    return [difference([copies[0]], [one[0].numpy()]), apart]


def built_early(strategy: tf.distribute.Strategy) -> list[float]:
    """As `compare`, where `predict` is first, and `fit` is called in the scope."""

    def train() -> tuple[keras.Model, list[np.ndarray]]:
        model = make_model(keras_adam.Embedding)
        model.compile(Adam(0.01, weight_decay=0.01), "mse")
        x, y = make_data()
        first = model.predict(x, verbose=0)
        with tempfile.TemporaryDirectory() as folder:
            log = StepDiagnostics(20, f"{folder}/steps.csv")
            options = {"shuffle": False, "verbose": 0, "callbacks": [log]}
            model.fit(x, y, batch_size=BATCH, **options)
        last = model.predict(x, verbose=0)
        assert np.abs(last - first).max() > 0.01
        return model, [*model.get_weights(), first, last, model(x).numpy()]

    with strategy.scope():
        model, many = train()
    return [difference(many, train()[1]), spread(model)]


def difference(many: list[np.ndarray], one: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(many, one))


def spread(model: keras.Model) -> float:
    """The largest difference of any replica's copy from the first one's."""
    optimizer = model.optimizer
    optimizer.settle()
    most = 0.0
    for v in [*model.variables, *optimizer.variables]:
        first, *others = keras_adam.rows.components(v._value)
        for x in others:
            gap = tf.cast(x, tf.float64) - tf.cast(first, tf.float64)
            most = max(most, float(tf.reduce_max(tf.abs(gap))))
    return most


def compare(
    strategy: tf.distribute.Strategy, train, few: bool
) -> dict[str, list[float]]:
    results = {f"uneven, {m}": uneven(strategy, m) for m in ("exact", "lazy", "dense")}

    def add(name, make, epochs, train=train, layer=keras_adam.Embedding, jit=False):
        key = f"{name}, {layer.__module__.split('.')[0]}, {keras.config.floatx()}"
        key += ", jit" if jit else ""
        with strategy.scope():
            options = {"jit_compile": True} if jit else {}
            model, many = train(make, layer, epochs, **options)
        one = train(make, layer, epochs, jit_compile=jit)[1]
        results[key] = [difference(many, one), spread(model)]
        print(key, results[key], file=sys.stderr, flush=True)

    for dtype in ("float32",) if few else ("float32", "float64"):
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        for name, make in LONG.items():  # 200 steps
            # In float32 the sums' order counts, and Adam divides by what is small:
            # what that comes to grows with the rate, which is the default there.
            if dtype == "float64":
                make = functools.partial(make, learning_rate=0.01)
            add(name, make, 8)
            if not few and dtype == "float32":
                add(name, make, 8, train=by_loop, jit=True)
            elif not few:
                add(name, make, 8, layer=keras.layers.Embedding)
    if not few:
        results["built early"] = built_early(strategy)
        for name, make in CASES.items():
            add(name, make, 2, train=functools.partial(train, evaluated=False))
    return results


def main() -> None:
    if sys.argv[1] == "workers":
        strategy, train = tf.distribute.MultiWorkerMirroredStrategy(), by_loop
    else:
        n = int(sys.argv[1])
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * n,
        )
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(n)])
        train = by_fit
    # All options once: of other numbers and kinds of replicas, the two ways of rows.
    print(json.dumps(compare(strategy, train, few=sys.argv[1] != "2")))


if __name__ == "__main__":
    main()
