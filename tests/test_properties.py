"""Random optimizers and trainings against the oracle; and what must hold of steps.

`pytest tests/test_properties.py` runs 300 trainings against the oracle, the same ones
each time. `pytest -n0 --hypothesis-profile=many tests/test_properties.py` runs 5,100,
others each time; a failure prints how to have them again: `--hypothesis-seed=N`, or
`@hypothesis.reproduce_failure` of the smallest program and case that fail.

The unit of an error is an ulp of the weights' dtype at the largest size the weight
has had: see `ulps.Oracle.units`.
"""

import math
import zlib

import hypothesis
import keras
import numpy as np
import programs
import pytest
import tensorflow as tf
import ulps
from cases import EXECUTIONS
from hypothesis import given
from hypothesis import strategies as st

import keras_adam

FEW = hypothesis.settings.get_profile("few")
MANY = hypothesis.settings.get_current_profile_name() == "many"
RANDOM = hypothesis.settings.get_profile("many") if MANY else FEW
CASES = 50 if MANY else 10  # of a program

largest = {}


@pytest.fixture(scope="module", autouse=True)
def report(request):
    """Prints the largest errors when all is done."""
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for name, (n, error, share, where) in largest.items():
            print(
                f"\n{name}: {n} trainings, largest error {error:.2f} ulps, "
                f"{share:.0%} of what is allowed there: {where}"
            )


def train_and_compare(program, many):
    """Yields each case, its steps, and its largest error in ulps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        compiled = programs.Compiled(program, monkeypatch)
        for case in many:
            thetas, gradients = programs.stream(program, case)
            found = compiled.train(thetas, gradients)
            oracle = ulps.Oracle(program, thetas)
            for g in gradients:
                oracle.apply(g)
            yield case, len(gradients), ulps.largest_error(program, found, oracle)


SEEDS = st.lists(st.integers(0, 2**32 - 1), min_size=CASES, max_size=CASES, unique=True)


@pytest.mark.parametrize("execution", ["graph", "xla"])
@pytest.mark.parametrize("mode", ["exact", "lazy", "dense"])
def test_random_trainings(mode, execution):
    """All options, against the oracle."""

    @RANDOM
    @given(programs.programs(mode, execution), SEEDS)
    def run(program, seeds):
        many = [programs.case(seed) for seed in seeds]
        for case, steps, error in train_and_compare(program, many):
            bound = 4 + steps / 2
            n, most, share, where = largest.get((mode, execution), (0, 0, 0, None))
            if error / bound > share:
                share, where = error / bound, f"{program}, {case}"
            largest[mode, execution] = n + 1, max(most, error), share, where
            assert error <= bound, (error, program, case)  # False for NaN

    if not MANY:  # other programs for each of the six, the same each time
        run = hypothesis.seed(zlib.crc32(f"{mode} {execution}".encode()))(run)
    run()


# What must hold whatever the gradients are.


def steps_of(make, execution, gradients, shape, first=None):
    """The weights before the first step, and after each."""
    table = keras.Variable(np.zeros(shape) if first is None else first)
    optimizer = make()
    optimizer.build([table])

    @EXECUTIONS[execution]
    def step(g):
        optimizer.apply([g], [table])

    thetas = [table.numpy()]
    for g in gradients:
        if isinstance(g, tuple):
            values, ids = map(tf.constant, g)
            step(tf.IndexedSlices(values, ids, tf.constant(shape)))
        else:
            step(tf.constant(g))
        thetas.append(table.numpy())
    return np.array(thetas)


RATE = 2.0**-7


@FEW
@given(
    st.floats(0, 0.95),
    st.floats(0.05, 0.999),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["Adam", "AdaMax"]),
)
def test_steps_are_bounded(b_1, b_2, seed, cls):
    """Section 2.1: |step| <= alpha max(1, (1 - beta_1) / sqrt(1 - beta_2)).

    That is so for gradients of one size and for those of the paper's "most severe case
    of sparsity", but not for all: for steps of any gradients the bound is
    Cauchy-Schwarz's. For AdaMax likewise, with section 7.1's |step| <= alpha.
    """
    rng = np.random.default_rng(seed)
    n, width = 12, 64
    size = 10.0 ** rng.uniform(-3, 3, width)
    constant = size * rng.choice([-1, 1], (n, width))
    sparse = np.zeros((n, width))
    sparse[-1] = size
    wild = size * 10.0 ** rng.uniform(-3, 3, (n, width)) * constant
    growing = size * (b_2 / max(b_1, 0.1)) ** np.arange(n)[:, None]  # the worst

    t = np.arange(1, n + 1)
    c_1, c_2 = 1 - b_1**t, 1 - b_2**t
    if cls == "Adam":
        papers = max(1, (1 - b_1) / math.sqrt(1 - b_2))
        sums = np.cumsum([float(b_1) ** (2 * k) / b_2**k for k in range(n)])
        any_gradients = (1 - b_1) / c_1 * np.sqrt(c_2 / (1 - b_2) * sums)
        make = keras_adam.Adam
    else:
        papers = 1
        sums = np.cumsum([(b_1 / b_2) ** k for k in range(n)])
        any_gradients = (1 - b_1) / c_1 * sums
        make = keras_adam.AdaMax

    def largest_steps(gradients):
        thetas = steps_of(
            lambda: make(RATE, b_1, b_2, sparse_updates="dense"),
            "graph",
            gradients.astype(np.float32),
            (width,),
        )
        return np.abs(np.diff(thetas.astype(np.float64), axis=0)).max(axis=1) / RATE

    for gradients in (constant, sparse):
        found = largest_steps(gradients)
        assert np.all(found <= papers * (1 + 1e-4))
    assert largest_steps(constant).max() > 0.999  # the first step is alpha
    for gradients in (wild, growing):
        assert np.all(largest_steps(gradients) <= any_gradients * (1 + 1e-4))


def sparse_stream(seed, n=7, rows=12, steps=8):
    """Gradients of 8 bits, all of whose sums are exact."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(-127, 128, (n, 4)).astype(np.float32),
            rng.integers(0, rows, n).astype(np.int32),
        )
        for _ in range(steps)
    ]


def plain(mode, cls, **kwargs):
    return getattr(keras_adam, cls)(RATE, sparse_updates=mode, **kwargs)


BOTH = pytest.mark.parametrize("cls", ["Adam", "AdaMax"])
MODES = pytest.mark.parametrize("mode", ["exact", "lazy", "dense"])


@MODES
@BOTH
def test_steps_do_not_know_the_scale_of_gradients(cls, mode):
    """Section 2.1: with c * g, m is c times as large and so is sqrt(v)."""
    epsilon = {"epsilon": 1e-30} if cls == "Adam" else {}
    found = [
        steps_of(
            lambda: plain(mode, cls, **epsilon),
            "graph",
            [(c * values, ids) for values, ids in sparse_stream(0)],
            (12, 4),
        )
        for c in (np.float32(1), np.float32(2**-20), np.float32(2**20))
    ]
    assert np.abs(np.diff(found[0], axis=0)).max() > RATE / 2
    for other in found[1:]:  # powers of 2: not one digit differs
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("execution", ["graph", "xla"])
@MODES
@BOTH
def test_order_and_splitting_of_a_gradient_change_nothing(cls, mode, execution):
    """A batch in another order, and one slice as two that sum to it."""
    rng = np.random.default_rng(1)
    stream = sparse_stream(0)
    shuffled, split = [], []
    for values, ids in stream:
        order = rng.permutation(len(ids))
        shuffled.append((values[order], ids[order]))
        some = rng.integers(-127, 128, values.shape).astype(np.float32)
        split.append((np.concatenate([some, values - some]), np.tile(ids, 2)))
    found = [
        steps_of(lambda: plain(mode, cls), execution, x, (12, 4))
        for x in (stream, shuffled, split)
    ]
    assert np.abs(np.diff(found[0], axis=0)).max() > RATE / 2
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=2e-9)
