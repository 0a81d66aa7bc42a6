"""The closed form of what skipped steps owe, against their direct sum."""

import math

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from cases import Halving, halving

import keras_adam
from keras_adam import ledger, tails

# (beta_1, beta_2, decays, corrected)
PLANS = {
    "adam": (0.9, 0.999, True, True),
    "epsilon_hat": (0.9, 0.999, True, False),
    "beta_2_0.99": (0.9, 0.99, True, True),
    "beta_2_0.95": (0.9, 0.95, True, True),
    "beta_2_0.9_hat": (0.9, 0.9, True, False),
    "beta_1_0.99": (0.99, 0.999, True, True),
    "beta_1_0.5": (0.5, 0.9, True, True),
    "beta_1_0": (0.0, 0.999, True, True),
    "amsgrad": (0.9, 0.999, False, True),
    "amsgrad_hat": (0.9, 0.999, False, False),
}
EPSILON = 1e-8
RATES = {
    "constant": lambda t: 1.0,
    "inverse_root": lambda t: t**-0.5,
    "warm_up": lambda t: min(1.0, t / 50),
    "by_hand": lambda t: 1.0 if t % 60 < 30 else 0.01,
}


def terms(plan, rate, t0, n):
    """c and s of the n steps after t0, straight from the formulas."""
    j = np.arange(1, n + 1, dtype=np.float64)
    t = t0 + j
    alpha = np.array([rate(x) for x in t])
    c_2 = 1 - plan.beta_2**t if plan.corrected else np.ones(n)
    v = plan.beta_2**j if plan.decays else np.ones(n)
    return alpha * plan.beta_1**j / (1 - plan.beta_1**t), np.sqrt(v / c_2)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", PLANS)
def test_tails_are_right_to_1e_5_of_themselves(name, rate):
    """At every gap, for rows last updated at any step, of any gradient."""
    beta_1, beta_2, decays, corrected = PLANS[name]
    ratio = beta_1 / (math.sqrt(beta_2) if decays else 1)
    plan = tails.Plan(
        beta_1, beta_2, ratio, decays=decays, corrected=corrected, epsilon=EPSILON
    )
    rate = RATES[rate]
    steps = 400 if plan.window < 400 else 2500
    history = ledger.History(plan, False, "float32")
    # Rows of all steps of last update, and of gradients from 1e-16 to 1e6.
    r = tf.constant(10.0 ** np.arange(-16, 7)[None], tf.float32)

    @tf.function
    def advance(t, lead):
        history.advance(plan, t, lead, None, None)

    @tf.function(jit_compile=True)
    def tail(t0, gap):
        gap = tf.cast(tf.reshape(gap, [1]), tf.float32)
        history_of = tf.gather(history.ring, [t0 % ledger.LENGTH])
        owed = tails.owed(plan, history_of, gap, None, 2, tf.float32)
        return tails.tail(owed, tf.ones_like(r), r, EPSILON)[0], owed.m, owed.v

    first = (1, 2, 3, 7, 20, 61, 170)
    start = 1
    worst = 0.0
    # In the middle of a long training, too; and where 1 - beta_2^t becomes 1.
    for later in (0, 100_000) if decays else (0, 17_200, 100_000):
        start = later + 1
        for t in range(start, start + steps):
            alpha = rate(float(t)) / (1 - beta_1**t)
            advance(tf.constant(t), tf.constant(alpha, tf.float32))
            for t0 in (later + k for k in first):
                gap = t - t0
                if gap < 1 or (gap > 12 and gap % 37 and t != start + steps - 1):
                    continue
                ours, m, v = tail(tf.constant(t0), tf.constant(gap))
                c, s = terms(plan, rate, t0, gap)
                truth = (c[:, None] / (s[:, None] * r.numpy() + EPSILON)).sum(0)
                error = np.abs(ours.numpy() - truth) / np.maximum(truth, 1e-30)
                worst = max(worst, error.max())
                np.testing.assert_allclose(m, beta_1**gap, rtol=2e-5, atol=1e-38)
                np.testing.assert_allclose(v, beta_2**gap, rtol=2e-5)
    assert worst < 1e-5


# name: (ours, the oracle's without epsilon)
RESTING = {
    "adam": (
        lambda b: keras_adam.Adam(beta_1=b, beta_2=0.95),
        lambda b: reference.Adam(b, 0.95, epsilon=0),
    ),
    "amsgrad": (
        lambda b: keras_adam.Adam(beta_1=b, beta_2=0.95, amsgrad=True),
        lambda b: reference.Adam(b, 0.95, epsilon=0, amsgrad=True),
    ),
    "adamax": (
        lambda b: keras_adam.AdaMax(beta_1=b, beta_2=0.95),
        lambda b: reference.AdaMax(b, 0.95),
    ),
}


@pytest.mark.parametrize("name", RESTING)
def test_after_the_window_a_row_rests(name):
    """Its step is then a 1e-8th of the first; and a window is no longer than that."""
    make, rule_of = RESTING[name]
    for beta_1 in (0.3, 0.9):
        rule = rule_of(beta_1)
        state = rule.init(np.zeros(1))
        steps = [rule.step(state, np.array([t == 1]), 1.0, t)[0] for t in range(1, 600)]
        ratio = steps[-1] / steps[-2]
        window = make(beta_1)._make_plan(beta_1).window
        assert ratio**window <= 1e-8 < ratio ** (window - 2)


@pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdaMax])
def test_the_edge_itself_is_refused(cls):
    with pytest.raises(ValueError, match="steps that fall"):
        cls(beta_1=0.5, beta_2=0.25 if cls is keras_adam.Adam else 0.5)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("beta_1, beta_2, gap", [(0.49, 0.5, 200), (0.9, 0.91, 1000)])
def test_a_scheduled_beta_1_whose_power_leaves_float32(
    monkeypatch, beta_1, beta_2, gap, jit
):
    """So does that of 1 / beta_2; not their product, by which AdaMax's steps fall."""
    monkeypatch.setattr(ledger, "sweep", lambda rows, t: tf.zeros([0], tf.int32))
    optimizer = keras_adam.AdaMax(0.01, Halving(beta_1, 1.0), beta_2)
    table = keras.Variable(np.ones((3, 2), np.float32))
    optimizer.build([table])
    truth = reference.Training(
        reference.AdaMax(halving(beta_1, 1.0), beta_2),
        [np.ones((2, 1))],
        [np.float64],
        lazy=False,
        learning_rate=0.01,
    )

    @tf.function(jit_compile=jit)
    def step(ids):
        g = tf.IndexedSlices(tf.ones((1, 2)), ids, tf.constant([3, 2]))
        optimizer.apply([g], [table])

    for k in range(gap):
        step(tf.constant([0 if k == 0 else 1]))
        truth.apply([(np.ones((1, 1)), np.array([0 if k == 0 else 1]))])
    np.testing.assert_allclose(table.numpy()[:2, :1], truth.thetas[0], rtol=2e-5)


def test_long_sums_of_logarithms_keep_small_steps():
    add = tf.function(tails.add_log, jit_compile=True)

    def after(total, decay, n):
        for _ in range(n):
            total = add(total, tf.constant(decay))
        return total, total.numpy().astype(np.float64).sum()

    total, large = after(tf.zeros(2), 0.5, 72)
    np.testing.assert_allclose(large, 72 * math.log(0.5), rtol=1e-6)
    _, found = after(total, 1e-7, 2000)
    np.testing.assert_allclose(found - large, 2000 * math.log1p(-1e-7), rtol=1e-4)


def test_very_long_sums_of_logarithms_stay_in_two_parts():
    """The lesser part is less than a digit of the other, and so keeps its own."""

    @tf.function(jit_compile=True)
    def after(n):
        def step(i, total):
            return i + 1, tails.add_log(total, tf.constant(1e-4))

        return tf.while_loop(lambda i, _: i < n, step, [0, tf.zeros(2)])[1]

    high, low = after(250_000).numpy().astype(np.float64)
    assert abs(low) <= abs(np.spacing(np.float32(high)))
    truth = 250_000 * math.log1p(-float(np.float32(1e-4)))
    np.testing.assert_allclose(high + low, truth, rtol=3e-7)


def test_sweep_reaches_every_row_in_time(monkeypatch):
    monkeypatch.setattr(ledger, "LENGTH", 8)
    for rows in (1, 6, 7, 8, 30, 50):
        last = np.zeros(rows, int)
        for t in range(1, 40):
            ids = ledger.sweep(rows, tf.constant(t)).numpy()
            assert len(ids) <= rows // 7 + 1
            last[ids] = t
            assert np.all(t - last < 8)
    # Where a product of the step and the rows of a sweep is past int32.
    rows = 1_000_000
    swept = [
        ledger.sweep(rows, tf.constant(t)).numpy() for t in range(15_029, 15_029 + 7)
    ]
    assert len(np.unique(np.concatenate(swept))) == rows


def test_decays_are_known_in_two_parts():
    """What one part rounds off the other has, after millions of steps."""
    plan = tails.Plan(0.9, 0.999, 0.9 / math.sqrt(0.999), epsilon=EPSILON)
    log_decay = np.array([-30.0, -0.004])
    start, end = np.array([-30.0, -0.001]), np.array([-30.0, -0.003])
    history = np.ones([1, plan.columns + 4])
    history[:, -4:] = [*start, *end]
    arguments = (
        tf.constant(x, tf.float32) for x in (history, np.array([5.0]), log_decay)
    )
    got = tails.owed(plan, *arguments, 2, tf.float32)
    np.testing.assert_allclose(
        np.ravel(got.decay), 1 - np.exp(log_decay.sum() - start.sum()), rtol=1e-6
    )
    np.testing.assert_allclose(
        np.ravel(got.polynomials), np.exp(log_decay.sum() - end.sum()), rtol=1e-6
    )
