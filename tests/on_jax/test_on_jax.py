"""Adam and AdaMax with Keras on JAX, against the oracle and in `model.fit`.

Not collected by itself: `tests/test_on_jax.py` runs this with KERAS_BACKEND=jax, once
with JAX's 64 bits and once without.
"""

import importlib
import os
import pathlib

import cases
import jax
import keras
import ml_dtypes
import numpy as np
import pytest
import reference

import keras_adam


@pytest.fixture
def saved_on_tensorflow():
    return pathlib.Path(os.environ["SAVED_ON_TENSORFLOW"])


WIDE = jax.config.jax_enable_x64
DTYPES = ["float64"] if WIDE else ["float32", "bfloat16", "float16"]


def stateless(optimizer, variables, gradients, jit):
    """`fit`'s way: the state goes in and comes out, and is donated."""

    def step(optimizer_variables, trainable_variables, gradients):
        return optimizer.stateless_apply(
            optimizer_variables, gradients, trainable_variables
        )

    step = jax.jit(step, donate_argnums=(0, 1)) if jit else step
    theta = [jax.numpy.array(v.value) for v in variables]
    state = [jax.numpy.array(v.value) for v in optimizer.variables]
    for g in gradients:
        theta, state = step(state, theta, g)
    for v, value in zip(
        (*variables, *optimizer.variables), (*theta, *state), strict=True
    ):
        v.assign(value)


def eager(optimizer, variables, gradients):
    for g in gradients:
        optimizer.apply(g, variables)


EXECUTIONS = {
    "eager": eager,
    "stateless": lambda *args: stateless(*args, jit=False),
    "jit": lambda *args: stateless(*args, jit=True),
}


def train(make, execution, thetas, gradients):
    variables = [
        keras.Variable(x, dtype=x.dtype.name, name=f"v{i}")
        for i, x in enumerate(thetas)
    ]
    optimizer = make()
    optimizer.build(variables)
    dense = [
        [
            np.asarray(reference.densify(g, x.shape)[0], x.dtype)
            for g, x in zip(of_step, thetas)
        ]
        for of_step in gradients
    ]
    EXECUTIONS[execution](optimizer, variables, dense)
    return optimizer, variables


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_optimizers(name, execution, dtype):
    make, rule = cases.OPTIMIZERS[name]
    thetas, gradients = cases.stream("distinct", 8, dtype)
    optimizer, variables = train(
        lambda: make(learning_rate=cases.LEARNING_RATE), execution, thetas, gradients
    )
    training = cases.oracle(rule, thetas, gradients, mode="dense")
    cases.check(optimizer, variables, training)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("option", cases.OPTIONS)
@pytest.mark.parametrize("name, mode", [("adam", "exact"), ("adamax", "dense")])
def test_options(name, option, execution, mode):
    """The modes are one here: no step asks which it is."""
    make, rule = cases.OPTIMIZERS[name]
    ours, theirs = cases.OPTIONS[option]
    thetas, gradients = cases.stream("distinct", 8, DTYPES[0])
    optimizer, variables = train(
        lambda: make(
            **{"learning_rate": cases.LEARNING_RATE, **ours}, sparse_updates=mode
        ),
        *(execution, thetas, gradients),
    )
    training = cases.oracle(rule, thetas, gradients, mode=mode, **theirs)
    cases.check(optimizer, variables, training)
    if training.averages is not None:
        for ours, average in zip(
            optimizer._model_variables_moving_average, training.averages
        ):
            np.testing.assert_allclose(ours.numpy(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("accumulate", [None, 2])
def test_low_precision_is_the_oracle_s_on_average(execution, accumulate):
    """Of columns that all have the same gradients; to nearest none would move."""
    rng, rate, width = np.random.default_rng(0), 2.0**-10, 4096
    first = np.tile([[1.5], [-1.25], [1.9]], (1, width)).astype(ml_dtypes.bfloat16)
    column = rng.standard_normal((16, 3, 1)).astype(np.float32)
    gradients = [[np.tile(g, (1, width))] for g in column]
    variable = keras.Variable(first, dtype="bfloat16")
    optimizer = keras_adam.Adam(
        rate,
        stochastic_rounding=True,
        moments_dtype="bfloat16",
        gradient_accumulation_steps=accumulate,
    )
    optimizer.build([variable])
    EXECUTIONS[execution](optimizer, [variable], gradients)
    truth = reference.Training(
        *(reference.Adam(), [first], [np.float64]),
        lazy=False,
        learning_rate=rate,
        gradient_accumulation_steps=accumulate or 1,
    )
    for g in gradients:
        truth.apply(g)
    state = truth.states[0]
    for x, value in zip(
        (*optimizer._state(0), variable), (state["m"], state["v"], truth.thetas[0])
    ):
        assert x.dtype == "bfloat16"
        x = np.asarray(x.value).astype(np.float64)
        sigma = x.std(axis=1) / np.sqrt(width)
        # theta is no linear function of v: to a share of the way.
        bound = 6 * sigma + (0.01 * rate if value is truth.thetas[0] else 0)
        assert np.all(sigma > 0)
        assert np.all(np.abs(x.mean(axis=1) - value[:, 0]) <= bound + 1e-9)


@pytest.mark.parametrize("make", [keras_adam.Adam, keras_adam.AdaMax])
@pytest.mark.parametrize("layer", [keras.layers.Embedding, keras_adam.Embedding])
def test_fit(make, layer, tmp_path):
    """A fit that is saved, loaded and goes on is one that did not stop."""
    x, y = cases.make_data()
    model = cases.make_model(layer=layer)
    model.compile(optimizer=make(0.01), loss="mse")
    losses = model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    more, same = (
        m.fit(x, y, epochs=2, shuffle=False, verbose=0).history["loss"]
        for m in (model, again)
    )
    assert more == same


def test_epsilon_hat_is_keras():
    """What Keras's own Adam computes, on the same backend."""
    x, y = cases.make_data()

    def losses(optimizer):
        model = cases.make_model()
        model.compile(optimizer=optimizer, loss="mse")
        return model.fit(x, y, epochs=5, shuffle=False, verbose=0).history["loss"]

    ours = keras_adam.Adam(0.01, epsilon=1e-7, epsilon_hat=True)
    theirs = keras.optimizers.Adam(0.01, epsilon=1e-7)
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-5)


def test_use_ema(tmp_path):
    """`fit` ends with the average as the weights; before a step there is none."""
    x, y = cases.make_data()
    model = cases.make_model()
    model.compile(optimizer=keras_adam.Adam(use_ema=True), loss="mse")
    before = model.get_weights()
    model.optimizer.build(model.trainable_variables)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    model.fit(x, y, epochs=2, verbose=0)
    for weight, average in zip(
        model.trainable_variables, model.optimizer._model_variables_moving_average
    ):
        np.testing.assert_array_equal(weight.numpy(), average.numpy())
    # The next step gives away the memory of weights, and so not the averages'.
    model.evaluate(x, y, verbose=0)
    model.fit(x, y, verbose=0)
    model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")


def test_averages_go_by_variable():
    a, b = keras.Variable([1.0]), keras.Variable([2.0])
    other = keras.Variable([3.0])
    optimizer = keras_adam.Adam(use_ema=True)
    optimizer.build([a, b])
    optimizer.apply([np.float32([1]), np.float32([1])])
    averages = [x.numpy() for x in optimizer._model_variables_moving_average]
    a.assign([7.0])
    b.assign([7.0])
    optimizer.finalize_variable_values([b, other])
    assert b.numpy() == averages[1] and a.numpy() == 7 and other.numpy() == 3


def test_an_error_in_a_step_is_shown():
    class Faulty(keras.Model):
        def train_step(self, *args):
            raise KeyError("the fault")

    x, y = cases.make_data()
    inner = cases.make_model()
    model = Faulty(inner.inputs, inner.outputs)
    model.compile(optimizer=keras_adam.Adam(use_ema=True), loss="mse")
    with pytest.raises(KeyError, match="the fault"):
        model.fit(x, y, verbose=0)


def test_overwritten_with_the_gradient():
    """As Keras's float8 layers have them: with all that keeps a value a variable."""
    theta, scale = (keras.Variable([1.0], dtype="float32") for _ in range(2))
    scale.overwrite_with_gradient = True
    optimizer = keras_adam.Adam(
        0.5,
        gradient_accumulation_steps=2,
        use_ema=True,
        ema_overwrite_frequency=5,
        weight_decay=0.1,
    )
    optimizer.build([scale, theta])
    for g in (2.0, 4.0):
        optimizer.apply([np.float32([g]), np.float32([1])])
    assert float(scale.numpy()[0]) == 4  # Keras takes the largest
    np.testing.assert_allclose(theta.numpy(), 1 - 0.5 * 0.1 - 0.5, rtol=1e-6)


def test_several_devices():
    """Batches shared out to two devices: what one device gives."""
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    x, y = cases.make_data()

    def weights(distribution):
        keras.distribution.set_distribution(distribution)
        model = cases.make_model()
        model.compile(optimizer=keras_adam.Adam(0.01), loss="mse")
        model.fit(x, y, batch_size=16, epochs=5, shuffle=False, verbose=0)
        return model.get_weights()

    try:
        parallel = weights(keras.distribution.DataParallel(devices=devices))
    finally:
        keras.distribution.set_distribution(None)
    for two, one in zip(parallel, weights(None)):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_state_of_tensorflow(tmp_path, saved_on_tensorflow):
    """A model that was trained on TensorFlow, exact rows and all, goes on here."""
    model = keras.models.load_model(saved_on_tensorflow / "model.keras")
    expected = np.load(saved_on_tensorflow / "state.npz")
    for i, v in enumerate(model.optimizer.variables):
        np.testing.assert_array_equal(v.numpy(), expected[str(i)])
    x, y = cases.make_data()
    loss = model.fit(x, y, epochs=1, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-4)


def test_lazy_is_refused():
    with pytest.raises(NotImplementedError, match='sparse_updates="lazy"'):
        keras_adam.Adam(sparse_updates="lazy")


def test_what_needs_tensorflow_says_so():
    for name in ("averaging", "diagnostics"):
        with pytest.raises(ImportError, match=f"{name} needs Keras on TensorFlow"):
            importlib.import_module(f"keras_adam.{name}")
    with pytest.raises(ImportError, match="diagnostics needs Keras on TensorFlow"):
        _ = keras_adam.diagnostics
    with pytest.raises(ImportError, match="averaging needs Keras on TensorFlow"):
        _ = keras_adam.averaging
    with pytest.raises(ImportError, match="diagnostics needs Keras on TensorFlow"):
        from keras_adam import diagnostics  # noqa: F401
    exec("from keras_adam import *", {})


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'adamw'"):
        _ = keras_adam.adamw
