"""Row updates cost what the batch touches, and copy no table."""

import re
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_adam
from keras_adam import ledger, rows

LARGE, SMALL, WIDTH, IDS = 1_000_000, 10_000, 16, 256
EMA = {"use_ema": True, "ema_overwrite_frequency": 1000, "weight_decay": 0.1}


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_sum_repeats(jit):
    table = tf.Variable(tf.zeros((9, 2)))
    places = rows.Workspace(table, copies=0).places
    ids = tf.constant([3, 0, 3, 8, 3, 0], tf.int64)
    values = tf.reshape(tf.range(12.0), (6, 2))

    @tf.function(jit_compile=jit)
    def sum_repeats(values, ids):
        return rows.sum_repeats(values, rows.distinct(ids, places))

    for _ in range(2):  # the second time with what the first left behind
        summed = sum_repeats(values, ids)
    found = {
        int(i): v.tolist() for i, v in zip(summed.ids.numpy(), summed.values.numpy())
    }
    left_over = found.pop(9, None)
    assert found == {0: [12.0, 14.0], 3: [12.0, 15.0], 8: [6.0, 7.0]}
    assert left_over == ([0.0, 0.0] if jit else None)


@pytest.mark.parametrize("outside", [4, 7])
@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_ids_outside_the_table_touch_nothing_under_xla(mode, outside):
    """In graph mode on a CPU TensorFlow raises; elsewhere nothing can."""
    table = keras.Variable(np.ones((4, 2), np.float32))
    optimizer = keras_adam.Adam(0.1, sparse_updates=mode)
    optimizer.build([table])
    shape = tf.constant([4, 2])

    # Were one of the others' gradients taken for row 1's or 2's, it would go up.
    values = tf.constant([[1.0] * 2, [1.0] * 2, [-5.0] * 2, [-5.0] * 2])

    def apply(ids):
        optimizer.apply([tf.IndexedSlices(values, ids, shape)], [table])

    tf.function(apply, jit_compile=True)(tf.constant([1, 2, outside, -1]))
    np.testing.assert_allclose(table.numpy()[1:3], 0.9, rtol=1e-6)
    np.testing.assert_array_equal(table.numpy()[[0, 3]], 1)
    if tf.config.list_physical_devices("GPU"):
        tf.function(apply)(tf.constant([1, 2, outside, -1]))
        assert (table.numpy()[1:3] < 0.9).all()
        np.testing.assert_array_equal(table.numpy()[[0, 3]], 1)
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"= {outside} is not"):
        tf.function(apply)(tf.constant([1, 2, outside, -1]))


def test_batches_of_many_lengths_have_few(monkeypatch):
    """XLA compiles for each."""
    lengths = set()

    def uncompiled(f):
        def call(values, place, like):
            tf.py_function(lambda n: lengths.add(int(n)), [tf.shape(values)[0]], [])
            return f(values, place, like)

        return call

    monkeypatch.setattr(rows, "compiled", uncompiled)

    @tf.function(
        input_signature=[tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int32)]
    )
    def sums(values, place):
        return rows.segment_sum(values, place, tf.zeros([7]))

    rng = np.random.default_rng(0)
    for n in [*range(70), *rng.integers(70, 3000, 100)]:
        values, place = rng.standard_normal((n, 2)), rng.integers(-1, 7, n)
        truth = np.zeros((8, 2))
        np.add.at(truth, place, values)  # -1 is the last
        found = sums(tf.constant(values, tf.float32), tf.constant(place, tf.int32))
        np.testing.assert_allclose(found, truth[:7], atol=1e-4)
    assert len(lengths) <= 9 + 8 * 6


def train_step(vocabulary, jit, mode, layer, kwargs):
    """A whole step of a model with an Embedding layer."""
    model = keras.Sequential(
        [
            layer(vocabulary, WIDTH),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    optimizer = keras_adam.Adam(sparse_updates=mode, **kwargs)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=jit)
    x = np.random.default_rng(0).integers(0, SMALL, (IDS // 8, 8))
    y = np.zeros((len(x), 1), np.float32)
    model.train_on_batch(x, y)
    iterator = iter(tf.data.Dataset.from_tensors((x, y)).repeat())

    def step():
        for _ in range(kwargs.get("gradient_accumulation_steps", 1)):
            model.train_function(iterator)

    return step


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize(
    "kwargs, layer",
    [
        ({}, keras.layers.Embedding),
        ({}, keras_adam.Embedding),
        (EMA, keras.layers.Embedding),
        (EMA, keras_adam.Embedding),
        ({"gradient_accumulation_steps": 2}, keras_adam.Embedding),
    ],
)
def test_time_does_not_grow_with_the_table(kwargs, jit, mode, layer):
    """100 times the rows; one copy of the table alone would take 10 times as long."""
    steps = {v: train_step(v, jit, mode, layer, kwargs) for v in (SMALL, LARGE)}
    times = {v: [] for v in steps}
    for _ in range(60):
        for v, step in steps.items():
            start = time.perf_counter()
            step()
            times[v].append(time.perf_counter() - start)
    small, large = (np.median(times[v][10:]) for v in (SMALL, LARGE))
    assert large < 3 * small + 5e-4


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"weight_decay": 0.1}, {"use_ema": True}],
    ids=["", "decay", "ema"],
)
@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdaMax])
def test_no_table_sized_work_under_xla(cls, mode, kwargs):
    optimizer = cls(sparse_updates=mode, **kwargs)
    table = keras.Variable(np.ones((LARGE, WIDTH), np.float32))
    optimizer.build([table])

    @tf.function(jit_compile=True)
    def apply(values, ids):
        slices = tf.IndexedSlices(values, ids, tf.constant([LARGE, WIDTH]))
        optimizer.apply([slices], [table])

    args = tf.ones((IDS, WIDTH)), tf.range(IDS)
    hlo = apply.experimental_get_compiler_ir(*args)(stage="optimized_hlo")
    sizes = f"{LARGE}|{ledger.LENGTH}"
    sized = set(re.findall(rf"= \w+\[(?:{sizes})\S* ([\w-]+)\(", hlo))
    # Ways to pass a buffer on and to write some of its rows; nothing that writes
    # it whole, such as copy, add, select or broadcast. (A scatter becomes a loop
    # of dynamic-update-slice in some versions of XLA.)
    passed = {"parameter", "get-tuple-element", "bitcast", "fusion"}
    assert sized <= passed | {"scatter", "dynamic-update-slice"}
    aliased = hlo.splitlines()[0]
    assert aliased.count("may-alias") + aliased.count("must-alias") >= 4
