"""Every optimizer's weights and moments against the float64 oracle."""

import cases
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from cases import DTYPES, EXECUTIONS, MODES, OPTIMIZERS, OPTIONS, PATTERNS

import keras_adam
from keras_adam import ledger, rows

STEPS = 7


def run(name, mode, execution, pattern="repeats", steps=STEPS, ours=(), theirs=(), **s):
    make, rule = OPTIMIZERS[name]
    thetas, gradients = cases.stream(pattern, steps, **s)
    ours = {"learning_rate": cases.LEARNING_RATE, "sparse_updates": mode, **dict(ours)}
    optimizer, variables = cases.train(
        lambda: make(**ours), execution, thetas, gradients
    )
    training = cases.oracle(rule, thetas, gradients, mode=mode, **dict(theirs))
    cases.check(optimizer, variables, training)
    return optimizer, variables, training


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_patterns(name, mode, execution, pattern):
    run(name, mode, execution, pattern)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float32"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adam", "adam_beta_1_schedule", "amsgrad", "adamax"])
def test_dtypes(name, mode, execution, dtype):
    _, variables, _ = run(name, mode, execution, dtype=dtype)
    first, _ = cases.stream("repeats", 0, dtype=dtype)
    assert np.any(variables[0].numpy() != first[0])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adam", "adam_beta_1_schedule", "amsgrad", "adamax"])
def test_options(name, mode, execution, option):
    check_option(name, mode, execution, option)


def check_option(name, mode, execution, option, **s):
    ours, theirs = OPTIONS[option]
    optimizer, _, training = run(name, mode, execution, ours=ours, theirs=theirs, **s)
    if optimizer.use_ema:
        for a, b in zip(
            optimizer._model_variables_moving_average, training.averages, strict=True
        ):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["adam", "adamax"])
def test_a_beta_1_that_is_rounded(name, execution):
    """float32(0.999) is off by 1.3e-5 of 1 - beta_1: in m and its correction alike."""
    cls = {"adam": keras_adam.Adam, "adamax": keras_adam.AdaMax}[name]
    rule = {"adam": reference.Adam(0.999), "adamax": reference.AdaMax(0.999, 0.9995)}
    betas = {"beta_1": 0.999} | ({} if name == "adam" else {"beta_2": 0.9995})
    thetas = [np.zeros((6, 2), np.float32)]
    rng = np.random.default_rng(0)
    gradients = [[rng.uniform(1, 2, (6, 2)).astype(np.float32)] for _ in range(5)]
    training = cases.oracle(
        rule[name], thetas, gradients, mode="dense", learning_rate=0.01
    )
    variable = keras.Variable(thetas[0])
    optimizer = cls(0.01, sparse_updates="dense", **betas)
    optimizer.build([variable])
    apply = EXECUTIONS[execution](lambda g: optimizer.apply([g], [variable]))
    for [g] in gradients:
        apply(tf.constant(g))
    np.testing.assert_allclose(variable.numpy(), training.thetas[0], rtol=2e-6)


@pytest.mark.parametrize("option", ["accumulation_clip_decay", "ema"])
@pytest.mark.parametrize("pattern", ["rank_1", "rank_3"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_options_of_other_ranks(mode, execution, pattern, option):
    check_option("adam", mode, execution, option, pattern=pattern)


@pytest.mark.parametrize("option", ["accumulation", "accumulation_clip_decay"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_accumulation_of_batches_of_all_sizes(monkeypatch, mode, execution, option):
    """A step's last batch, by whose size XLA's programs go, may be its smallest."""

    def ids(rng, step):
        return rng.integers(0, 40, (9, 2, 1)[step % 3])

    monkeypatch.setitem(PATTERNS, "shrinking", ((40, 4), ids))
    check_option("adam", mode, execution, option, pattern="shrinking", steps=12)


@pytest.mark.parametrize("option", ["weight_decay", "ema", "accumulation_clip_decay"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_options_in_other_dtypes(mode, execution, option, dtype):
    ours, theirs = OPTIONS[option]
    optimizer, _, training = run(
        "adam", mode, execution, ours=ours, theirs=theirs, dtype=dtype
    )
    if dtype == "float64" and optimizer.use_ema:
        atol = 1e-6 if mode == "exact" else 1e-12  # as for the weights
        for a, b in zip(optimizer._model_variables_moving_average, training.averages):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_int64_ids(mode, execution):
    run("adam", mode, execution, id_dtype="int64")


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_rows_are_out_of_place(monkeypatch, name, mode, execution):
    """On a TPU, exact steps on rows that are not a multiple of 128 are dense ones."""
    monkeypatch.setattr(rows, "on_tpu", lambda: True)
    optimizer, *_ = run(name, mode, execution)
    assert optimizer._last == [None] * len(optimizer._last)


@pytest.mark.parametrize("execution", ["graph", "xla"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adam", "adam_beta_1_schedule", "amsgrad", "adamax"])
def test_gaps_of_thousands_of_steps(monkeypatch, name, mode, execution):
    """A row touched at the first step and at the 3,000th, and others between."""
    monkeypatch.setitem(
        PATTERNS,
        "gap",
        (
            (4, 2),
            lambda rng, step: np.array([0, 1] if step % 2999 == 0 else [1, 2]),
        ),
    )
    make, rule = OPTIMIZERS[name]
    thetas, gradients = cases.stream("gap", 3000)
    _, variables = cases.train(
        lambda: make(learning_rate=0.001, sparse_updates=mode),
        execution,
        thetas,
        gradients,
    )
    training = cases.oracle(rule, thetas, gradients, mode=mode, learning_rate=0.001)
    for variable, theta in zip(variables, training.thetas, strict=True):
        np.testing.assert_allclose(variable.numpy(), theta, rtol=0, atol=2e-5)
    if mode == "lazy":
        assert np.all(variables[0].numpy()[3] == thetas[0][3])


# name: (ours, the oracle's), of betas at which a row moves for long as it rests.
NEAR_THE_EDGE = {
    "adam": (
        lambda **k: keras_adam.Adam(beta_1=0.87, beta_2=0.9, **k),
        reference.Adam(beta_1=0.87, beta_2=0.9),
    ),
    "adamax": (
        lambda **k: keras_adam.AdaMax(beta_1=0.6, beta_2=0.65, **k),
        reference.AdaMax(beta_1=0.6, beta_2=0.65),
    ),
}


@pytest.mark.parametrize("execution", ["graph", "xla"])
@pytest.mark.parametrize("name", NEAR_THE_EDGE)
def test_betas_near_the_edge(monkeypatch, name, execution):
    """A step is 0.92 of the one before it, for 60 steps of rest."""
    monkeypatch.setattr(ledger, "sweep", lambda rows, t: tf.zeros([0], tf.int32))
    make, rule = NEAR_THE_EDGE[name]
    rng = np.random.default_rng(0)
    thetas = [rng.standard_normal(s).astype(np.float32) for s in ((4, 2), (5,))]
    gradients = []
    for step in range(60):
        ids = np.arange(4 if step == 0 else 1, dtype=np.int32)
        values, vector = (rng.standard_normal(s) for s in ((len(ids), 2), (5,)))
        gradients.append([(values.astype("f"), ids), vector.astype("f")])
    _, variables = cases.train(
        lambda: make(learning_rate=cases.LEARNING_RATE), execution, thetas, gradients
    )
    training = cases.oracle(rule, thetas, gradients, mode="exact")
    for variable, theta in zip(variables, training.thetas, strict=True):
        np.testing.assert_allclose(variable.numpy(), theta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["table", "vector", "by_name", "by_layer"])
def test_exclude_from_weight_decay(mode, execution, which):
    thetas, gradients = cases.stream("repeats", STEPS)

    def exclude(optimizer, variables):
        if which == "by_name":
            optimizer.exclude_from_weight_decay(var_names=["table"])
        elif which == "by_layer":
            optimizer.exclude_from_weight_decay(var_names=["first_layer"])
        else:
            i = ["table", "vector"].index(which)
            optimizer.exclude_from_weight_decay(var_list=[variables[i]])

    make, rule = OPTIMIZERS["adam"]
    optimizer, variables = cases.train(
        lambda: make(
            learning_rate=cases.LEARNING_RATE, sparse_updates=mode, weight_decay=0.1
        ),
        execution,
        thetas,
        gradients,
        before_build=exclude,
    )
    training = cases.oracle(
        rule,
        thetas,
        gradients,
        mode=mode,
        weight_decay=0.1,
        decayed=[0] if which == "vector" else [1],
    )
    cases.check(optimizer, variables, training)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_u_of_zero_is_a_step_of_zero(execution):
    thetas, gradients = cases.stream("repeats", 3)
    gradients = [
        [(values * 0, ids), vector * np.array([0, 1, 0, 1, 0], vector.dtype)]
        for (values, ids), vector in gradients
    ]
    _, variables = cases.train(
        lambda: OPTIMIZERS["adamax"][0](learning_rate=cases.LEARNING_RATE),
        execution,
        thetas,
        gradients,
    )
    np.testing.assert_array_equal(variables[0].numpy(), thetas[0])
    np.testing.assert_array_equal(variables[1].numpy()[::2], thetas[1][::2])
    assert np.all(variables[1].numpy()[1::2] != thetas[1][1::2])


@pytest.mark.parametrize("beta_1", [0.9, lambda t: 0.9], ids=["number", "callable"])
@pytest.mark.parametrize("mode", ["lazy", "dense"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_u_of_zero_beside_momentum_is_a_step_of_zero(execution, mode, beta_1):
    thetas, gradients = cases.stream("repeats", 1)
    (values, _), vector = gradients[0]
    ids = np.arange(len(values)) % len(thetas[0])
    ones, zeros = ([(x(values), ids), x(vector)] for x in (np.ones_like, np.zeros_like))
    before, after = (
        cases.train(
            lambda: keras_adam.AdaMax(0.125, beta_1, 0.0, sparse_updates=mode),
            *(execution, thetas, [ones, *[zeros] * n]),
        )[1]
        for n in (0, 2)
    )
    for start, x, y in zip(thetas, before, after):
        assert np.any(x.numpy() != start)
        np.testing.assert_array_equal(y.numpy(), x.numpy())


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", ["lazy", "dense"])
@pytest.mark.parametrize(
    ("beta_1", "beta_2"), [(0.0, 0.0), (0.25, 0.0), ("falls", 0.0), (0.0, 2.0**-30)]
)
@pytest.mark.parametrize("cls", ["Adam", "AdaMax"])
def test_small_gradients_after_large_ones(cls, beta_1, beta_2, mode, execution):
    """With such a beta_2 their size decides, however small it is."""
    ours = theirs = beta_1
    if beta_1 == "falls":
        ours, theirs = (f(0.5, 2.0**-30) for f in (cases.Halving, cases.halving))
    thetas, [[(values, ids), vector]] = cases.stream("repeats", 1)
    gradients = [
        [(np.full_like(values, c), ids), np.full_like(vector, -c)]
        for c in (37.7, 1.3e-3, 1.7e-6, 2.3e-5)
    ]
    make = getattr(keras_adam, cls)
    _, variables = cases.train(
        lambda: make(0.125, ours, beta_2, sparse_updates=mode),
        *(execution, thetas, gradients),
    )
    rule = getattr(reference, cls)(theirs, beta_2)
    training = cases.oracle(rule, thetas, gradients, mode=mode, learning_rate=0.125)
    for x, truth in zip(variables, training.thetas):
        np.testing.assert_allclose(x.numpy(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["adam", "adamax"])
def test_schedules_of_small_beta_1(name, execution):
    """1 - (1 - beta_1) is off by some ulps of itself, which is no peak."""
    make, rule = OPTIMIZERS[name]
    thetas, gradients = cases.stream("repeats", 4)
    ours, theirs = (f(0.003, 0.999) for f in (cases.Halving, cases.halving))
    _, variables = cases.train(
        lambda: make(learning_rate=cases.LEARNING_RATE, beta_1=ours),
        *(execution, thetas, gradients),
    )
    training = cases.oracle(type(rule)(theirs), thetas, gradients, mode="exact")
    for x, truth in zip(variables, training.thetas):
        np.testing.assert_allclose(x.numpy(), truth, rtol=1e-6, atol=1e-6)
