"""bfloat16 weights and moments, rounded stochastically: right on average."""

import itertools

import cases
import keras
import ml_dtypes
import numpy as np
import pytest
import reference
import tensorflow as tf
from cases import EXECUTIONS, MODES, OPTIMIZERS

import keras_adam
from keras_adam import rounding

HALF = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# A test of many means is to fail by chance less than once in a million runs.
SIGMAS = 6


def neighbours(x, dtype):
    """The numbers of a dtype next below and above x, as float64."""
    near = x.astype(dtype)
    wide = near.astype(np.float64)
    below, above = (np.nextafter(near, near.dtype.type(s * np.inf)) for s in (-1, 1))
    low = np.where(wide > x, below, near).astype(np.float64)
    return low, np.where(wide < x, above, near).astype(np.float64)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_cast_is_to_a_neighbour_and_unbiased(dtype, execution):
    rng = np.random.default_rng(0)
    low, high = (-30, 38) if dtype == "bfloat16" else (-8, 4)  # float16's subnormals
    x = rng.choice([-1, 1], 64) * 10 ** rng.uniform(low, high, 64)
    x = x.astype(np.float32).astype(np.float64)
    n = 20_000
    tiled = tf.constant(np.tile(x, (n, 1)), tf.float32)
    cast = EXECUTIONS[execution](lambda t: rounding.cast(tiled, dtype, rounding.key(t)))
    y = cast(tf.constant(3)).numpy().astype(np.float64)
    below, above = neighbours(x, HALF[dtype])
    assert np.all((y == below) | (y == above))
    share = (x - below) / np.where(above > below, above - below, 1)
    sigma = np.sqrt(share * (1 - share) / n) + 1e-9
    # The random bits are 16, or 13, and so is the share in digits.
    up = np.mean(y == above, axis=0)
    assert np.all(np.abs(up - share)[above > below] <= (SIGMAS * sigma + 2e-4).max())


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_of_unknown_rank(mode, rows):
    """As `tf.numpy_function` gives it. Adam's first step is the rate's size."""
    variable = keras.Variable(np.ones((3, 2), np.float32))
    optimizer = keras_adam.Adam(0.25, sparse_updates=mode, moments_dtype="bfloat16")
    optimizer.build([variable])

    @tf.function
    def step(g, ids):
        g = tf.numpy_function(lambda x: x, [g], tf.float32)
        assert g.shape.rank is None
        g = tf.IndexedSlices(g, ids, tf.constant([3, 2])) if rows else g
        optimizer.apply([g], [variable])

    step(np.float32([[1, -1], [2, 1], [-1, 1]]), np.int32([2, 0, 1]))
    expected = [[1, 1], [-1, 1], [1, -1]] if rows else [[1, -1], [1, 1], [-1, 1]]
    np.testing.assert_allclose(
        variable.numpy(), 1 - 0.25 * np.array(expected), atol=0.01
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible"):
        step(np.ones((3, 3), np.float32), np.int32([2, 0, 1]))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_cast_keeps_what_the_dtype_has(dtype, execution):
    """All its numbers, infinities and NaN; and past its largest is as ever."""
    every = np.arange(2**16, dtype=np.uint16).view(HALF[dtype]).astype(np.float32)
    largest = float(ml_dtypes.finfo(dtype).max)
    odd = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32)
    edge = np.float32([largest * 1.001, largest * 1.003, -largest * 1.001, 3.4e38])
    x = np.concatenate([every, edge, odd.view(np.float32)])
    if dtype == "bfloat16":
        x = x[(x == 0) | ~(np.abs(x) < 2.0**-126)]  # which XLA may flush to 0
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(HALF[dtype]).astype(np.float32)
    cast = EXECUTIONS[execution](lambda t: rounding.cast(x, dtype, rounding.key(t)))
    for t in range(3):
        found = cast(tf.constant(t)).numpy().astype(np.float32)
        np.testing.assert_array_equal(found, expected)


def test_random_bits_are_uniform_over_places_and_over_steps():
    def chi_square(h):
        counts = [np.bincount(h >> s & 255, minlength=256) for s in (24, 16, 8, 0)]
        return max(np.sum((c - len(h) / 256) ** 2) * 256 / len(h) for c in counts)

    bound = 255 + SIGMAS * np.sqrt(2 * 255)
    place = tf.zeros((1024, 64))
    over_places = [
        rounding._bits(place, rounding.key(t, 0, i), None).numpy().ravel()
        for t, i in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2**31, 7))
    ]
    steps = tf.range(65536)
    over_steps = [
        rounding._bits(tf.zeros(65536), rounding.key(steps, 0, i), i + 0 * steps)
        for i in range(4)
    ]
    over_steps = [h.numpy() for h in over_steps]
    for h in (*over_places, *over_steps):
        assert chi_square(h) < bound
    for many in (over_places, over_steps):
        for a, b in [*itertools.pairwise(many), *((h[1:], h[:-1]) for h in many)]:
            assert chi_square(a ^ b) < bound
            assert abs(np.corrcoef(a, b)[0, 1]) < SIGMAS / np.sqrt(len(a))


WIDTH = 2048
RATE = 2.0**-10  # a quarter of bfloat16's half digit at 1


def tall_stream(steps, seed=0):
    """Columns that all have the same weights and gradients, for a mean over them."""
    rng = np.random.default_rng(seed)
    theta = rng.choice([-1, 1], (6, 1)) * rng.uniform(1, 2, (6, 1))
    thetas = [np.tile(theta, (1, WIDTH)), np.full(WIDTH, 1.5)]
    gradients = []
    for _ in range(steps):
        ids = rng.integers(0, 5, 4).astype(np.int32)  # repeats, and rows that wait
        values = np.tile(rng.standard_normal((4, 1)), (1, WIDTH))
        vector = np.full(WIDTH, rng.standard_normal())
        as_32 = [np.float32(x) for x in (values, vector)]
        gradients.append([(as_32[0], ids), as_32[1]])
    return [x.astype(ml_dtypes.bfloat16) for x in thetas], gradients


def unrounded(rule, thetas, gradients, mode, **options):
    training = reference.Training(
        rule,
        thetas,
        [np.float64] * 2,
        lazy=mode == "lazy",
        learning_rate=RATE,
        **options,
    )
    for g in gradients:
        training.apply(g)
    return training


def assert_mean(x, expected, name, share=0.0, atol=0.0):
    """The mean over columns, to what chance may make it, and a share of itself."""
    x = x.numpy().astype(np.float64)
    sigma = x.std(axis=-1) / np.sqrt(x.shape[-1])
    error = np.abs(x.mean(axis=-1) - expected[..., 0])
    bound = SIGMAS * sigma + share * np.abs(expected[..., 0]) + atol + 1e-12
    assert np.all(error <= bound), (name, error / bound)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, decay", [("adam", 0.5), ("adamax", 0.0)])
def test_weights_are_the_oracle_s_on_average(name, mode, execution, decay):
    make, rule = OPTIMIZERS[name]
    thetas, gradients = tall_stream(12)
    truth = unrounded(rule, thetas, gradients, mode, weight_decay=decay)

    def train(**kwargs):
        return cases.train(
            lambda: make(
                learning_rate=RATE,
                sparse_updates=mode,
                weight_decay=decay or None,
                **kwargs,
            ),
            *(execution, thetas, gradients),
        )[1]

    variables = train(stochastic_rounding=True)
    plain = train()
    for x, nearest, first, theta in zip(variables, plain, thetas, truth.thetas):
        assert_mean(x, theta, name, atol=2e-6)  # a tail is right to 1e-5
        moved = np.abs(theta - first.astype(np.float64)).mean()
        assert moved > RATE
        # Rounded to nearest, no step is taken, unless several are paid at once.
        if mode != "exact":
            np.testing.assert_array_equal(nearest.numpy(), first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamax"])
def test_a_step_is_within_a_digit_of_the_oracle(name, mode):
    """And the same in all executions, but for another seed."""
    make, rule = OPTIMIZERS[name]
    thetas, gradients = cases.stream("repeats", 1, dtype="bfloat16")

    def train(execution, seed=0):
        return cases.train(
            lambda: make(
                learning_rate=cases.LEARNING_RATE,
                sparse_updates=mode,
                stochastic_rounding=True,
                seed=seed,
            ),
            *(execution, thetas, gradients),
        )[1]

    truth = reference.Training(
        rule,
        thetas,
        [np.float64] * 2,
        lazy=mode == "lazy",
        learning_rate=cases.LEARNING_RATE,
    )
    truth.apply(gradients[0])
    trained = {execution: train(execution) for execution in EXECUTIONS}
    other = train("graph", seed=1)
    assert any(np.any(a.numpy() != b.numpy()) for a, b in zip(trained["graph"], other))
    for variables in (*trained.values(), other):
        for x, theta in zip(variables, truth.thetas):
            error = np.abs(x.numpy().astype(np.float64) - theta)
            digit = 2.0 ** (np.floor(np.log2(np.abs(theta))) - 7)
            assert np.all(error <= digit * (1 + 1e-4))
    for variables in trained.values():
        for a, b in zip(variables, trained["eager"]):
            # A float32 result may differ by a digit, and a bfloat16 one then rarely.
            assert np.mean(a.numpy() != b.numpy()) < 0.05


@pytest.mark.parametrize("execution", ["graph", "xla"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("adam", "bfloat16"),
        ("adam", "float64"),
        ("amsgrad", "float32"),
        ("adamax", "float32"),
    ],
)
def test_moments_are_the_oracle_s_on_average(name, dtype, mode, execution):
    """beta_2 = 0.999 takes 0.001 off v, which is under half a digit of bfloat16."""
    make, rule = OPTIMIZERS[name]
    thetas, gradients = tall_stream(40)
    truth = unrounded(rule, thetas, gradients, mode)
    thetas = [x.astype(np.float32).astype(cases.DTYPES[dtype]) for x in thetas]
    optimizer, variables = cases.train(
        lambda: make(
            learning_rate=RATE,
            sparse_updates=mode,
            stochastic_rounding=True,
            moments_dtype="bfloat16",
        ),
        *(execution, thetas, []),
    )
    apply = EXECUTIONS[execution](
        lambda values, ids, vector: optimizer.apply(
            [tf.IndexedSlices(values, ids, tf.constant([6, WIDTH])), vector], variables
        )
    )
    for step, ((values, ids), vector) in enumerate(gradients):
        if step % 7 == 6:
            optimizer.settle()
        apply(tf.constant(values), tf.constant(ids), tf.constant(vector))
    optimizer.settle()
    for i, x in enumerate(variables):
        for m, (kind, value) in zip(
            optimizer._state(i), truth.states[i].items(), strict=True
        ):
            assert m.dtype == "bfloat16"
            # A maximum of what was rounded lies above that of the mean.
            share = 0.0 if kind in ("m", "v") else 0.01
            assert_mean(m, value, kind, share, atol=1e-6 * np.abs(value).max())
        # A step is no linear function of v: to a share of the way.
        way = np.abs(truth.thetas[i] - thetas[i].astype(np.float64)).mean()
        assert_mean(x, truth.thetas[i], "theta", atol=0.01 * way + 1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("cls", ["Adam", "AdaMax"])
def test_training_goes_on_where_plain_bfloat16_stands_still(cls, jit):
    """Logistic regression with steps of a quarter of a half digit."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 16))
    y = (x @ rng.uniform(-2, 2, 16) + 0.3 * rng.standard_normal(512) > 0).astype(float)
    start = np.where(rng.random(16) < 0.5, -1.0, 1.0)

    def loss(w):
        z = x @ w
        return np.mean(np.logaddexp(0, z) - y * z)

    def gradient(w):
        return x.T @ (1 / (1 + np.exp(-(x @ w))) - y) / len(x)

    def trained(dtype, **kwargs):
        w = keras.Variable(start, dtype=dtype)
        optimizer = getattr(keras_adam, cls)(RATE, **kwargs)
        optimizer.build([w])
        apply = tf.function(lambda g: optimizer.apply([g], [w]), jit_compile=jit)
        for _ in range(800):
            g = gradient(w.numpy().astype(np.float64))
            apply(tf.constant(g, tf.float32))
        return loss(w.numpy().astype(np.float64))

    training = reference.Training(
        getattr(reference, cls)(), [start], [float], lazy=False, learning_rate=RATE
    )
    for _ in range(800):
        training.apply([gradient(training.thetas[0])])
    first, best = loss(start), loss(training.thetas[0])
    way = first - best
    assert way > 0.2
    assert abs(trained("float32") - best) < 1e-4 * way
    assert trained("bfloat16") == first
    assert abs(trained("bfloat16", stochastic_rounding=True) - best) < 0.02 * way
    both = trained("bfloat16", stochastic_rounding=True, moments_dtype="bfloat16")
    assert abs(both - best) < 0.03 * way


def saved(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


@pytest.mark.parametrize(
    "old, new", [("float32", "bfloat16"), ("bfloat16", None), (None, "bfloat16")]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_state_loads_into_another_moments_dtype(tmp_path, old, new, dtype):
    """Rounded to nearest, where it has fewer digits; from a file, and a dictionary."""

    def compiled(moments):
        model = cases.make_model(dtype, keras_adam.Embedding)
        optimizer = keras_adam.Adam(0.01, moments_dtype=moments)
        model.compile(optimizer=optimizer, loss="mse")
        optimizer.build(model.trainable_variables)
        return model

    model, from_file, from_dictionary = compiled(old), compiled(new), compiled(new)
    model.fit(*cases.make_data(), epochs=2, shuffle=False, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    from_file.load_weights(tmp_path / "model.weights.h5")
    from_dictionary.optimizer.load_own_variables(saved(model.optimizer))
    for copy in (from_file, from_dictionary):
        n = len(copy.trainable_variables)
        for a, b in zip(
            model.optimizer.variables[: 2 + 2 * n], copy.optimizer.variables
        ):
            wide = {"bfloat16": "float32"}.get(dtype, dtype)
            if len(b.shape):
                assert b.dtype == (new or wide)
            as_dtype = cases.DTYPES.get(b.dtype, b.dtype)
            np.testing.assert_array_equal(b.numpy(), a.numpy().astype(as_dtype))
        assert int(copy.optimizer.iterations) == 4
    from_file.fit(*cases.make_data(), verbose=0)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_a_saved_bfloat16_training_goes_on_bit_for_bit(tmp_path, mode, jit):
    model = cases.make_model("bfloat16", keras_adam.Embedding)
    model.compile(
        optimizer=keras_adam.Adam(
            0.001,
            sparse_updates=mode,
            stochastic_rounding=True,
            moments_dtype="bfloat16",
            seed=5,
        ),
        loss="mse",
        jit_compile=jit,
    )
    data = cases.make_data()
    model.fit(*data, epochs=2, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    copy = keras.models.load_model(tmp_path / "model.keras")
    copy.jit_compile = jit
    for m in (model, copy):
        m.fit(*data, epochs=2, batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(
        (*model.variables, *model.optimizer.variables),
        (*copy.variables, *copy.optimizer.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def traced(optimizer, variables):
    ids, shape = tf.constant([1, 1]), tf.constant([12, 4])
    step = tf.function(
        lambda g: optimizer.apply(
            [tf.IndexedSlices(g, ids, shape), g[0, 0] * tf.ones(5)], variables
        )
    )
    return step.get_concrete_function(tf.ones((2, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_float32_is_as_ever_and_costs_nothing(mode):
    """The same bits, of the same operations."""
    thetas, gradients = cases.stream("repeats", 5)
    results, operations = [], []
    for kwargs in ({}, {"stochastic_rounding": True, "moments_dtype": "float32"}):
        optimizer, variables = cases.train(
            lambda kwargs=kwargs: keras_adam.Adam(0.1, sparse_updates=mode, **kwargs),
            *("graph", thetas, gradients),
        )
        results.append([v.numpy() for v in (*variables, *optimizer.variables)])
        step = traced(optimizer, variables)
        operations.append(sorted(op.type for op in step.graph.get_operations()))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    assert operations[0] == operations[1]


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("mode", MODES)
def test_an_average_is_of_the_weights_as_they_are_written(mode, jit):
    table = keras.Variable(np.ones((6, 64)), dtype="bfloat16")
    optimizer = keras_adam.Adam(
        RATE,
        sparse_updates=mode,
        stochastic_rounding=True,
        use_ema=True,
        ema_momentum=0.75,
    )
    optimizer.build([table])
    slices = EXECUTIONS["xla" if jit else "graph"](
        lambda ids: optimizer.apply(
            [tf.IndexedSlices(tf.ones((2, 64)), ids, tf.constant([6, 64]))], [table]
        )
    )
    average = np.zeros((6, 64))
    for _ in range(8):
        slices(tf.constant([1, 3]))  # at every step: these rows never owe
        average = 0.75 * average + 0.25 * table.numpy().astype(np.float64)
    found = optimizer._model_variables_moving_average[0].numpy()[[1, 3]]
    np.testing.assert_allclose(found, average[[1, 3]] / (1 - 0.75**8), rtol=1e-6)
    assert len(np.unique(table.numpy()[[1, 3]])) > 1  # rounded both ways


def test_diagnostics_of_bfloat16_moments():
    figures = []
    for moments in (None, "bfloat16"):
        model = cases.make_model(layer=keras_adam.Embedding)
        model.compile(optimizer=keras_adam.Adam(moments_dtype=moments), loss="mse")
        model.fit(*cases.make_data(), epochs=3, shuffle=False, verbose=0)
        figures.append(keras_adam.diagnostics.figures(model.optimizer, 0).numpy())
    assert figures[0][0] > 0.1
    np.testing.assert_allclose(*figures, rtol=0.03)


@pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdaMax])
def test_bad_arguments(cls):
    with pytest.raises(ValueError, match=r"moments_dtype.*bfloat16.*'float16'.*None"):
        cls(moments_dtype="float16")
    with pytest.raises(ValueError, match=r"seed.*integer.*0\.5.*Use 0"):
        cls(seed=0.5)
