"""The schedules against NumPy, and in an optimizer that is saved and loaded."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_adam import Adam, schedules

STEPS = np.array([0, 1, 2, 3, 99, 10_000, 1_000_000])
# (ours, in float64)
SCHEDULES = {
    "inverse_sqrt": (
        schedules.InverseSqrtDecay(0.3),
        lambda step: 0.3 / np.sqrt(step + 1.0),
    ),
    "beta": (
        schedules.ExponentialBetaDecay(0.8, 0.999),
        lambda step: 0.8 * 0.999**step,
    ),
    "beta_default": (
        schedules.ExponentialBetaDecay(),
        lambda step: 0.9 * np.exp(step * np.log1p(-1e-8)),
    ),
    "beta_0": (schedules.ExponentialBetaDecay(0.0), lambda step: 0.0 * step),
    "beta_constant": (
        schedules.ExponentialBetaDecay(0.9, 1),
        lambda step: 0.9 + 0.0 * step,
    ),
}


@pytest.mark.parametrize("execution", cases.EXECUTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_values(name, execution):
    ours, expected = SCHEDULES[name]
    f = cases.EXECUTIONS[execution](ours)
    values = np.array([f(tf.constant(step, tf.int64)) for step in STEPS])
    # Of log(decay) * step, up to 1000 in size, float32 keeps seven digits.
    np.testing.assert_allclose(values, expected(STEPS), rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(values[:5], expected(STEPS[:5]), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_config(name):
    ours, _ = SCHEDULES[name]
    config = keras.saving.serialize_keras_object(ours)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(ours) and again.get_config() == ours.get_config()


def test_model_with_both_is_saved_and_loaded(tmp_path):
    model = cases.make_model()
    model.compile(
        optimizer=Adam(
            schedules.InverseSqrtDecay(0.1),
            beta_1=schedules.ExponentialBetaDecay(0.9, 0.99),
        ),
        loss="mse",
    )
    x, y = cases.make_data()
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    assert float(loaded.optimizer.beta_1(10)) == float(model.optimizer.beta_1(10))
    assert loaded.optimizer.beta_1.decay_rate == 0.99


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: schedules.InverseSqrtDecay(-1.0), "initial_learning_rate=-1.0"),
        (
            lambda: schedules.InverseSqrtDecay(float("nan")),
            "initial_learning_rate=nan",
        ),
        (lambda: schedules.ExponentialBetaDecay(1.0), "initial_beta_1=1.0"),
        (lambda: schedules.ExponentialBetaDecay(1 - 1e-9), "initial_beta_1=0.999"),
        (lambda: schedules.ExponentialBetaDecay(0.9, 1.5), "decay_rate=1.5"),
        (lambda: schedules.ExponentialBetaDecay(0.9, 0), "decay_rate=0"),
        (lambda: schedules.ExponentialBetaDecay(0.9, None), "decay_rate=None"),
        (lambda: schedules.InverseSqrtDecay("0.1"), "initial_learning_rate='0.1'"),
    ],
)
def test_errors(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()
