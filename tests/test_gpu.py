"""On a GPU, if there is one: what a CPU computes, and at the cost of the rows."""

import time

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_adam

pytestmark = pytest.mark.skipif(
    not tf.config.list_physical_devices("GPU"), reason="needs a GPU"
)


@pytest.fixture(autouse=True)
def exact_products():
    """Of float32 matrices; a GPU takes ten bits of each number, unless told."""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(True)


JIT = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])


@JIT
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("make", [keras_adam.Adam, keras_adam.AdaMax])
def test_fit(make, mode, jit):
    x, y = cases.make_data()

    def train(device):
        with tf.device(device):
            model = cases.make_model(layer=keras_adam.Embedding)
            model.compile(make(0.01, sparse_updates=mode), loss="mse", jit_compile=jit)
            model.fit(x, y, epochs=20, shuffle=False, verbose=0)
        return model

    gpu, cpu = train("/GPU:0"), train("/CPU:0")
    for v in (*gpu.trainable_variables, *gpu.optimizer._state(0)):
        assert "GPU" in v._value.device
    for ours, theirs in zip(gpu.get_weights(), cpu.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@JIT
@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_cost_does_not_grow_with_the_table(mode, jit):
    ids = tf.constant(np.random.default_rng(0).integers(0, 100_000, 8192))

    def median(rows):
        table = keras.Variable(tf.zeros((rows, 64)))
        optimizer = keras_adam.Adam(sparse_updates=mode)
        optimizer.build([table])

        @tf.function(jit_compile=jit)
        def step(ids):
            values = tf.ones((8192, 64))
            g = tf.IndexedSlices(values, ids, tf.constant([rows, 64]))
            optimizer.apply([g], [table])
            return tf.gather(table._value, ids)[0, 0]

        seconds = []
        for _ in range(30):
            start = time.perf_counter()
            step(ids).numpy()
            seconds.append(time.perf_counter() - start)
        return np.median(seconds[10:])

    assert median(4_000_000) < 2 * median(100_000)
