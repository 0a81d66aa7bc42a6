"""What keras.optimizers.Adam gets wrong with embeddings, and we get right.

Each test runs for both; that Keras fails is asserted too (strict xfail), so a
release that mends it shows here.
"""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_adam

KERAS_FAILS = pytest.mark.xfail(
    strict=True,
    raises=(AssertionError, TypeError),
    reason="keras.optimizers.Adam's fault",
)
BOTH = pytest.mark.parametrize(
    "adam",
    [
        pytest.param(keras_adam.Adam, id="keras_adam"),
        pytest.param(keras.optimizers.Adam, id="keras", marks=KERAS_FAILS),
    ],
)
JIT = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])

IDS = [1, 1, 4, 1]
VALUES = [[1.0, -3.0], [3.0, 1.0], [0.5, 0.5], [-1.0, 1.0]]


def steps(optimizer, jit, sparse, n=3):
    """n steps from ones on the same gradient, as slices or densified."""
    table = keras.Variable(np.ones((5, 2), np.float32))
    optimizer.build([table])
    slices = tf.IndexedSlices(
        tf.constant(VALUES), tf.constant(IDS), tf.constant([5, 2])
    )

    @tf.function(jit_compile=jit)
    def apply():
        g = slices if sparse else tf.convert_to_tensor(slices)
        optimizer.apply([g], [table])

    for _ in range(n):
        apply()
    return table.numpy()


@BOTH
@JIT
def test_repeated_rows(adam, jit):
    """Repeats are summed, so slices and the same gradient densified agree."""
    kwargs = {"epsilon": 1e-7}
    if adam is keras_adam.Adam:
        kwargs |= {"epsilon_hat": True, "sparse_updates": "dense"}
    expected = steps(keras.optimizers.Adam(0.1, epsilon=1e-7), jit, sparse=False)
    actual = steps(adam(0.1, **kwargs), jit, sparse=True)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@JIT
@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_repeated_rows_by_rows(mode, jit):
    actual = steps(keras_adam.Adam(0.1, sparse_updates=mode), jit, sparse=True)
    # The same sign at each step: three whole steps of the rate.
    expected = np.ones((5, 2), np.float32)
    expected[1] += [-0.3, 0.3]
    expected[4] -= 0.3
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@BOTH
@JIT
@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_clipping_sees_summed_repeats(adam, jit, option):
    """beta_1 = 0 and beta_2 ~ 1 with a large epsilon: a step shows the gradient."""
    kwargs = {"beta_1": 0.0, "epsilon": 1e3, option: 0.4}
    if adam is keras_adam.Adam:
        kwargs["epsilon_hat"] = True
    table = steps(adam(1e3, **kwargs), jit, sparse=True, n=1)
    g = np.zeros((5, 2))
    np.add.at(g, IDS, VALUES)
    g = np.clip(g, -0.4, 0.4) if option == "clipvalue" else g * 0.4 / np.linalg.norm(g)
    alpha = np.sqrt(1 - 0.999)
    np.testing.assert_allclose(1 - table, alpha * g, rtol=1e-3, atol=1e-6)


@BOTH
@JIT
def test_loss_scale_factor(adam, jit):
    """Training with a loss scale is training without."""
    weights = []
    for scale in (None, 1024.0):
        model = cases.make_model()
        # A model that averages a batch's embeddings has repeats in its slices.
        optimizer = adam(0.01, loss_scale_factor=scale)
        model.compile(optimizer=optimizer, loss="mse", jit_compile=jit)
        model.fit(*cases.make_data(), batch_size=8, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@BOTH
@JIT
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_moves(adam, jit, dtype):
    """Every weight with a gradient moves by about the rate at the first step."""
    kwargs = {"sparse_updates": "dense"} if adam is keras_adam.Adam else {}
    optimizer = adam(0.125, **kwargs)
    dense = keras.Variable(np.zeros(3, np.float32), dtype=dtype)
    optimizer.build([dense])

    @tf.function(jit_compile=jit)
    def apply():
        optimizer.apply([tf.constant([1.0, -2.0, 0.5], dtype)], [dense])

    apply()
    np.testing.assert_allclose(
        dense.numpy().astype(np.float32), [-0.125, 0.125, -0.125], rtol=0.01
    )


def test_slots_do_not_depend_on_what_was_traced():
    """State saved by one optimizer loads into another with the same arguments."""
    stores, slots = [], []
    for sparse in (None, True, False):
        optimizer = keras_adam.Adam(0.1, gradient_accumulation_steps=2)
        table = keras.Variable(np.ones((5, 2), np.float32))
        optimizer.build([table])
        if sparse is not None:
            g = tf.IndexedSlices(
                tf.constant(VALUES), tf.constant(IDS), tf.constant([5, 2])
            )
            g = g if sparse else tf.convert_to_tensor(g)
            apply = tf.function(optimizer.apply)
            apply([g])
        slots.append([(v.dtype, tuple(v.shape)) for v in optimizer.variables])
        stores.append({})
        optimizer.save_own_variables(stores[-1])
        for store in stores:
            optimizer.load_own_variables(store)
            assert len(optimizer.variables) == len(store)
            for i, variable in enumerate(optimizer.variables):
                np.testing.assert_array_equal(variable.numpy(), store[str(i)])
    assert slots[0] == slots[1] == slots[2]
