"""From Keras's optimizers and back, with Keras on JAX; run as `test_on_jax.py` is."""

import cases
import jax
import keras
import numpy as np
import pytest
import reference
from test_on_jax import EXECUTIONS

import keras_adam

DTYPE = "float64" if jax.config.jax_enable_x64 else "float32"
# Keras's 1 - beta^t, in float32, is good to 1e-5 at the first steps.
ATOL = 1e-9 if jax.config.jax_enable_x64 else 5e-6
BETAS = {"beta_1": 0.75, "beta_2": 0.984375}
HAT = {"epsilon": 1e-4, "epsilon_hat": True}

# name: (Keras's, ours, the oracle's rule)
CASES = {
    "adam": (
        lambda **k: keras.optimizers.Adam(**BETAS, epsilon=1e-4, **k),
        *(keras_adam.Adam, reference.Adam(**BETAS, **HAT)),
    ),
    "adamw": (
        lambda **k: keras.optimizers.AdamW(
            **BETAS, epsilon=1e-4, weight_decay=0.25, **k
        ),
        *(keras_adam.Adam, reference.Adam(**BETAS, **HAT)),
    ),
    "accumulation": (
        lambda **k: keras.optimizers.Adam(
            **BETAS, epsilon=1e-4, gradient_accumulation_steps=3, **k
        ),
        *(keras_adam.Adam, reference.Adam(**BETAS, **HAT)),
    ),
    "adamax": (
        lambda **k: keras.optimizers.Adamax(**BETAS, epsilon=1e-25, **k),
        *(keras_adam.AdaMax, reference.AdaMax(**BETAS)),
    ),
}
OPTIONS = {
    "adamw": {"weight_decay": 0.25},
    "accumulation": {"gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, execution):
    make, ours, rule = CASES[name]
    thetas, gradients = cases.stream("distinct", 12, DTYPE)
    variables = [keras.Variable(x, dtype=x.dtype.name) for x in thetas]
    dense = [
        [
            np.asarray(reference.densify(g, x.shape)[0], x.dtype)
            for g, x in zip(of_step, thetas)
        ]
        for of_step in gradients
    ]
    apply = EXECUTIONS[execution]
    source = make(learning_rate=cases.LEARNING_RATE)
    source.build(variables)
    apply(source, variables, dense[:4])
    optimizer = ours.from_keras(source)
    optimizer.build(variables[::-1] if execution == "eager" else variables)
    apply(optimizer, variables, dense[4:8])
    target = optimizer.to_keras()
    assert int(target.variables[0].numpy()) == 8
    apply(target, variables, dense[8:])
    options = OPTIONS.get(name, {})
    training = cases.oracle(rule, thetas, gradients, mode="dense", **options)
    for variable, theta in zip(variables, training.thetas):
        np.testing.assert_allclose(variable.numpy(), theta, atol=ATOL)


def test_fit(tmp_path):
    """Keras's gradients are dense here too, and all rows are right."""
    x, y = cases.make_data()
    options = {"shuffle": False, "verbose": 0}
    model = cases.make_model()
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    model.fit(x, y, epochs=2, **options)
    path = tmp_path / "model.keras"
    model.save(path)
    expected = model.fit(x, y, epochs=2, **options).history["loss"]
    for source in ("optimizer", path):
        again = keras.saving.load_model(path)
        source = again.optimizer if source == "optimizer" else source
        again.compile(optimizer=keras_adam.Adam.from_keras(source), loss="mse")
        losses = again.fit(x, y, epochs=2, **options).history["loss"]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_lazy_is_refused():
    with pytest.raises(NotImplementedError, match='`sparse_updates="lazy"` needs'):
        keras_adam.Adam.from_keras(keras.optimizers.Adam(), sparse_updates="lazy")


def test_both_keep_their_own_memory():
    """A compiled step gives away the buffers of the state it is given."""
    x, y = cases.make_data()
    model = cases.make_model()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, verbose=0)
    source = model.optimizer
    for make in (lambda: keras_adam.Adam.from_keras(source, use_ema=False),) * 2:
        model.compile(make(), "mse")
        model.fit(x, y, verbose=0)
        assert all(np.all(np.isfinite(np.array(v))) for v in source.variables)
    ours = model.optimizer
    model.compile(ours.to_keras(), "mse")
    model.fit(x, y, verbose=0)
    assert all(np.all(np.isfinite(np.array(v))) for v in ours.variables)
