"""From Keras's optimizers and back: the training goes on as if nothing had happened."""

import cases
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from cases import DTYPES, LEARNING_RATE, Halving, halving

import keras_adam

# Exact in float32, to which Keras rounds some of them whatever the variable's dtype.
BETAS = {"beta_1": 0.75, "beta_2": 0.984375}
FIRST, REST = 5, 4
MODES = pytest.mark.parametrize("mode", cases.MODES)

# name: (Keras's, ours, the oracle's rule, the oracle's other arguments)
KINDS = {
    "adam": (
        lambda **k: keras.optimizers.Adam(**BETAS, epsilon=1e-4, **k),
        keras_adam.Adam,
        reference.Adam(**BETAS, epsilon=1e-4, epsilon_hat=True),
        {},
    ),
    "adamw": (
        lambda **k: keras.optimizers.AdamW(**BETAS, weight_decay=0.25, **k),
        keras_adam.Adam,
        reference.Adam(**BETAS, epsilon=1e-7, epsilon_hat=True),
        {"weight_decay": 0.25},
    ),
    "amsgrad": (
        lambda **k: keras.optimizers.Adam(**BETAS, amsgrad=True, **k),
        keras_adam.Adam,
        reference.Adam(**BETAS, epsilon=1e-7, epsilon_hat=True, amsgrad=True),
        {},
    ),
    # An epsilon of rounding: AdaMax has none.
    "adamax": (
        lambda **k: keras.optimizers.Adamax(**BETAS, epsilon=1e-25, **k),
        keras_adam.AdaMax,
        reference.AdaMax(**BETAS),
        {},
    ),
}
# name: (Keras's, the oracle's)
OPTIONS = {
    "none": ({}, {}),
    "weight_decay": ({"weight_decay": 0.125}, {"weight_decay": 0.125}),
    **{
        name: cases.OPTIONS[name]
        for name in (
            *("clipnorm", "clipvalue", "global_clipnorm", "loss_scale"),
            *("accumulation", "schedule", "callable"),
        )
    },
}


def make_variables(thetas):
    return [keras.Variable(x, dtype=x.dtype.name, name=f"v{len(x)}") for x in thetas]


def keras_steps(optimizer, variables, gradients):
    """On dense gradients, of which it makes what dense Adam makes."""
    for (values, ids), vector in gradients:
        table = np.zeros(variables[0].shape, values.dtype)
        np.add.at(table, ids, values)
        optimizer.apply([tf.constant(table), tf.constant(vector)], variables)


def our_steps(optimizer, variables, gradients, wrap=lambda f: f):
    def apply(values, ids, vector):
        shape = tf.constant(variables[0].shape.as_list())
        optimizer.apply([tf.IndexedSlices(values, ids, shape), vector], variables)

    apply = wrap(apply)
    for (values, ids), vector in gradients:
        apply(tf.constant(values), tf.constant(ids), tf.constant(vector))


def begin(keras_optimizer, steps=FIRST, dtype="float64", seed=0):
    """Keras's optimizer after some steps, its variables, the gradients to come."""
    thetas, gradients = cases.stream("distinct", steps + REST, dtype, seed=seed)
    variables = make_variables(thetas)
    keras_optimizer.build(variables)
    keras_steps(keras_optimizer, variables, gradients[:steps])
    return variables, thetas, gradients[:steps], gradients[steps:]


def oracle(rule, thetas, first, rest, *, mode="dense", **options):
    options = {"learning_rate": LEARNING_RATE, **options}
    dtypes = [x.dtype for x in thetas]
    training = reference.Training(rule, thetas, dtypes, lazy=False, **options)
    for g in first:
        training.apply([reference.densify(x, t.shape)[0] for x, t in zip(g, thetas)])
    training.lazy = mode == "lazy"
    for g in rest:
        training.apply(g)
    return training


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_as_keras(kind, mode):
    """And as the oracle, that took all steps; in float64, where all agree."""
    make, ours, rule, options = KINDS[kind]
    source = make(learning_rate=LEARNING_RATE)
    variables, thetas, first, rest = begin(source)
    optimizer = ours.from_keras(source, sparse_updates=mode)
    our_steps(optimizer, variables, rest)
    optimizer.settle()
    cases.check(
        optimizer, variables, oracle(rule, thetas, first, rest, mode=mode, **options)
    )
    if mode != "lazy":
        other = make(learning_rate=LEARNING_RATE)
        theirs = make_variables(thetas)
        keras_steps(other, theirs, first + rest)
        for a, b in zip(variables, theirs):
            np.testing.assert_allclose(a, b, atol=1e-6 if mode == "exact" else 1e-12)


@pytest.mark.parametrize(
    "option, steps", [("none", 0), ("accumulation", 3), *((x, FIRST) for x in OPTIONS)]
)
def test_options(option, steps):
    theirs, options = OPTIONS[option]
    make, ours, rule, _ = KINDS["adam"]
    source = make(**{"learning_rate": LEARNING_RATE, **theirs})
    variables, thetas, first, rest = begin(source, steps)
    optimizer = ours.from_keras(source)
    assert optimizer.name == source.name
    our_steps(optimizer, variables, rest, wrap=tf.function)
    optimizer.settle()
    cases.check(optimizer, variables, oracle(rule, thetas, first, rest, **options))


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_back_to_keras(kind, mode):
    make, ours, rule, options = KINDS[kind]
    source = make(learning_rate=LEARNING_RATE)
    variables, _, _, rest = begin(source, 0)
    optimizer = ours.from_keras(source, sparse_updates=mode)
    our_steps(optimizer, variables, rest)
    thetas, more = cases.stream("distinct", REST + FIRST, "float64")
    target = optimizer.to_keras()
    assert type(target) in ours._kinds and target.built
    assert int(target.iterations) == REST
    keras_steps(target, variables, more[REST:])
    training = reference.Training(
        *(rule, thetas, [x.dtype for x in thetas]),
        lazy=mode == "lazy",
        learning_rate=LEARNING_RATE,
        **options,
    )
    for g in rest:
        training.apply(g)
    training.lazy = False
    for g in more[REST:]:
        training.apply([reference.densify(x, t.shape)[0] for x, t in zip(g, thetas)])
    for variable, theta in zip(variables, training.thetas):
        np.testing.assert_allclose(variable, theta, atol=1e-6)
    for i, state in enumerate(training.states):
        for name, value in zip(ours._moments, state.values()):
            moment = getattr(target, name)[i]
            np.testing.assert_allclose(moment, value, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_back_to_keras(option):
    theirs, options = OPTIONS[option]
    rule = reference.Adam(**BETAS, epsilon=1e-4, epsilon_hat=True)
    thetas, gradients = cases.stream("distinct", FIRST + REST, "float64")
    variables = make_variables(thetas)
    optimizer = keras_adam.Adam(
        **BETAS,
        epsilon=1e-4,
        epsilon_hat=True,
        **{"learning_rate": LEARNING_RATE, **theirs},
    )
    our_steps(optimizer, variables, gradients[:FIRST])
    target = optimizer.to_keras()
    keras_steps(target, variables, gradients[FIRST:])
    training = oracle(rule, thetas, gradients, [], **options)
    for variable, theta in zip(variables, training.thetas):
        np.testing.assert_allclose(variable, theta, atol=1e-6)


def test_float32_defaults():
    """Keras's 1 - beta_2^t, in float32, is good to 1e-4 at the first steps."""
    source = keras.optimizers.Adam(LEARNING_RATE)
    variables, thetas, first, rest = begin(source, dtype="float32")
    optimizer = keras_adam.Adam.from_keras(source)
    our_steps(optimizer, variables, rest)
    other = make_variables(thetas)
    keras_steps(source.from_config(source.get_config()), other, first + rest)
    training = oracle(
        reference.Adam(epsilon=1e-7, epsilon_hat=True), thetas, first, rest
    )
    for ours, theirs, theta in zip(variables, other, training.thetas):
        np.testing.assert_allclose(ours, theta, atol=2e-5)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_moments_are_widened(dtype):
    source = keras.optimizers.Adam(0.125, beta_1=0.5, beta_2=0.75)
    variables, *_ = begin(source, dtype=dtype)
    optimizer = keras_adam.Adam.from_keras(source)
    optimizer.build(variables)
    for name in ("_momentums", "_velocities"):
        for ours, theirs in zip(getattr(optimizer, name), getattr(source, name)):
            assert ours.dtype == "float32" and theirs.dtype == dtype
            np.testing.assert_array_equal(ours, np.array(theirs, DTYPES[dtype]))
    with pytest.raises(ValueError, match=f"half precision.*{dtype}"):
        optimizer.to_keras()


def test_state_is_taken_once_where_a_traced_step_builds():
    make, ours, rule, _ = KINDS["adam"]
    source = make(learning_rate=LEARNING_RATE)
    variables, thetas, first, rest = begin(source)
    optimizer = ours.from_keras(source)
    assert not optimizer.built
    assert int(optimizer.iterations) == FIRST
    our_steps(optimizer, variables, rest, wrap=tf.function)
    optimizer.settle()
    cases.check(optimizer, variables, oracle(rule, thetas, first, rest))


@pytest.mark.parametrize("built", [False, True], ids=["unbuilt", "built"])
@pytest.mark.parametrize("by", ["var_list", "var_names", "order"])
def test_exclusions_from_weight_decay(by, built):
    make, ours, rule, _ = KINDS["adam"]
    thetas, gradients = cases.stream("distinct", REST, "float64")
    variables = make_variables(thetas)
    source = make(learning_rate=LEARNING_RATE, weight_decay=0.25)
    old = make_variables(thetas) if by == "order" else variables
    names = {"var_names": ["v5", "bias"]} if by == "var_names" else {}
    source.exclude_from_weight_decay(**names or {"var_list": [old[1]]})
    if built or by == "order":
        source.build(old)
    optimizer = ours.from_keras(source)
    our_steps(optimizer, variables, gradients)
    optimizer.settle()
    options = {"weight_decay": 0.25, "decayed": [0]}
    cases.check(optimizer, variables, oracle(rule, thetas, [], gradients, **options))
    target = optimizer.to_keras()
    before = variables[1].numpy()
    for moment in target._momentums:
        moment.assign(moment * 0)
    target.apply([v * 0 for v in variables], variables)
    np.testing.assert_array_equal(variables[1], before)
    assert np.all(variables[0].numpy() != thetas[0])


@pytest.mark.parametrize("which", ["same", "other order", "other model"])
def test_variables(which):
    """State goes to the variable itself, or to those of another model in order."""
    make, ours, rule, _ = KINDS["adam"]
    source = make(learning_rate=LEARNING_RATE)
    variables, thetas, first, rest = begin(source)
    if which == "other model":
        variables = make_variables([v.numpy() for v in variables])
    optimizer = ours.from_keras(source)
    optimizer.build(variables[::-1] if which == "other order" else variables)
    our_steps(optimizer, variables, rest)
    training = oracle(rule, thetas, first, rest)
    for variable, theta in zip(variables, training.thetas):
        np.testing.assert_allclose(variable, theta, atol=1e-6)


def test_other_variables_are_refused():
    source = keras.optimizers.Adam()
    variables, *_ = begin(source)
    new = keras.Variable(np.zeros(3), name="new")
    for wrong in ([*variables, new], [new], [*variables[:1], new]):
        with pytest.raises(ValueError, match=r"no state for some.*Received: \['new'\]"):
            keras_adam.Adam.from_keras(source).build(wrong)
    reversed_ = make_variables([v.numpy() for v in variables[::-1]])
    with pytest.raises(ValueError, match="same shapes in the same order"):
        keras_adam.Adam.from_keras(source).build(reversed_)
    optimizer = keras_adam.Adam.from_keras(source)
    with pytest.warns(UserWarning, match=r"forgets: \['v5'\]"):
        optimizer.build(variables[:1])
    np.testing.assert_array_equal(optimizer._momentums[0], source._momentums[0])


def test_beta_1_schedule_goes_on_from_the_constant():
    make, ours, _, _ = KINDS["adam"]
    source = make(learning_rate=LEARNING_RATE)
    variables, thetas, first, rest = begin(source)
    optimizer = ours.from_keras(source, beta_1=Halving(0.75))
    our_steps(optimizer, variables, rest)
    optimizer.settle()
    rule = reference.Adam(
        beta_1=lambda i: 0.75 if i < FIRST else halving(0.75)(i),
        beta_2=BETAS["beta_2"],
        epsilon=1e-4,
        epsilon_hat=True,
    )
    cases.check(optimizer, variables, oracle(rule, thetas, first, rest))


EMA = {"use_ema": True, "ema_momentum": 0.25}  # forgotten in float64 at step 27


@pytest.mark.parametrize("overwrite", [None, 4])
def test_average(overwrite):
    """Keras's, once its first weights are rounded away, goes on as section 7.2's."""
    make, ours, rule, _ = KINDS["adam"]
    options = {"learning_rate": LEARNING_RATE, "ema_overwrite_frequency": overwrite}
    source = make(**options, **EMA)
    variables, thetas, first, rest = begin(source, steps=27)
    optimizer = ours.from_keras(source)
    our_steps(optimizer, variables, rest[:2])
    target = optimizer.to_keras()
    keras_steps(target, variables, rest[2:])
    other = make(**options, **EMA)
    theirs = make_variables(thetas)
    keras_steps(other, theirs, first + rest)
    training = oracle(rule, thetas, first, rest, ema_momentum=0.25)
    for i, variable in enumerate(variables):
        average = target._model_variables_moving_average[i]
        expected = other._model_variables_moving_average[i]
        np.testing.assert_allclose(variable, theirs[i], atol=1e-6)
        np.testing.assert_allclose(average, expected, atol=1e-6)
        if not overwrite:  # with which Keras's weights are others from the first step
            np.testing.assert_allclose(average, training.averages[i], atol=1e-6)


def test_average_that_does_not_go_on():
    """Keras's share of the first weights is ema_momentum^t too large."""
    source = keras.optimizers.Adam(LEARNING_RATE, **EMA)
    variables, *_ = begin(source, steps=26)
    with pytest.raises(ValueError, match=r"0\.25.*2\.2e-16 after 26 .*until step 27"):
        keras_adam.Adam.from_keras(source)
    optimizer = keras_adam.Adam.from_keras(source, use_ema=False)
    optimizer.build(variables)
    assert int(optimizer.iterations) == 26
    ours = keras_adam.Adam(epsilon_hat=True, **EMA)
    ours.build(variables)
    ours.apply([v * 0 for v in variables], variables)
    with pytest.raises(
        ValueError,
        match=r"share of 0\.25 .*step 27.*`to_keras\(\.\.\., use_ema=False\)`",
    ):
        ours.to_keras()
    assert not ours.to_keras(use_ema=False).use_ema


def after_one_step(constraint=None, **kwargs):
    source = keras.optimizers.Adam(**kwargs)
    table = keras.Variable(np.ones((3, 2), np.float32), name="table")
    if constraint:
        table.constraint = constraint
    source.build([table])
    source.apply([tf.ones((3, 2))], [table])
    return source


@pytest.mark.parametrize(
    "source, overrides, message",
    [
        ({}, {"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` dec"),
        ({}, {"amsgrad": True}, "`amsgrad=True` needs the largest v"),
        ({}, {"use_ema": True}, "begins with their training"),
        (EMA, {"ema_momentum": 0.5}, "keeps its momentum"),
        (
            {"use_ema": True, "gradient_accumulation_steps": 2},
            {},
            r"micro-step.*Received: use_ema=True, gradient_accumulation_steps=2",
        ),
        (
            {"use_ema": True, "constraint": keras.constraints.NonNeg()},
            {},
            "Received: use_ema=True, table's constraint",
        ),
        ({"use_ema": True, "ema_momentum": 1.0}, {}, "There is no step"),
        ({}, {"sparse_updates": "eager"}, "`sparse_updates` must be one of"),
        ({"beta_1": 0.999, "beta_2": 0.9}, {}, 'needs steps that fall.*"dense"'),
    ],
)
def test_refused_arguments(source, overrides, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        keras_adam.Adam.from_keras(after_one_step(**source), **overrides)


@pytest.mark.parametrize(
    "ours, steps, message",
    [
        ({}, 2, r"epsilon=1e-08, epsilon_hat=False after 2 steps.*step 16,628"),
        ({"bias_correction": False}, 2, "bias_correction=False after 2 .*step 16,628"),
        ({"beta_1": Halving(0.75), "epsilon_hat": True}, 1, "a constant.*a schedule"),
        ({"beta_2": 0.0, "beta_1": 0.0, "sparse_updates": "dense"}, 1, None),
        ({"beta_1": 0.5, "beta_2": 0.5, "bias_correction": False}, 23, "23 .*step 24"),
        ({"beta_1": 0.5, "beta_2": 0.5, "bias_correction": False}, 24, None),
        ({"beta_1": 0.5, "beta_2": 0.5}, 23, "after 23 steps"),
        ({"beta_1": 0.5, "beta_2": 0.5}, 24, None),
        ({"beta_1": 0.0, "beta_2": 0.5, "gradient_accumulation_steps": 2}, 24, "12 st"),
    ],
)
def test_what_keras_lacks(ours, steps, message):
    """Both ways: where it is refused, and where from then on it is rounded away."""
    optimizer = keras_adam.Adam(LEARNING_RATE, **{"sparse_updates": "dense", **ours})
    table = keras.Variable(np.ones(4, np.float32))
    optimizer.build([table])
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((steps + 3, 4)).astype(np.float32)
    for g in gradients[:steps]:
        optimizer.apply([tf.constant(g)], [table])
    if message:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            optimizer.to_keras()
        return
    target = optimizer.to_keras()
    options = {k: v for k, v in ours.items() if k != "sparse_updates"}
    training = oracle(
        *(reference.Adam(**options), [np.ones(4, np.float32)]),
        *([[g] for g in gradients], []),
    )
    for g in gradients[steps:]:
        target.apply([tf.constant(g)], [table])
    np.testing.assert_allclose(table, training.thetas[0], atol=1e-5)


def test_a_schedule_without_bias_correction():
    variable = keras.Variable(np.ones(3, np.float32))
    beta_1 = keras_adam.schedules.ExponentialBetaDecay(0.9, 0.999)
    ours = keras_adam.Adam(
        *(0.1, beta_1, 0.5), bias_correction=False, sparse_updates="dense"
    )
    ours.build([variable])
    with pytest.raises(ValueError, match=r"False after 0 steps.*step 24"):
        ours.to_keras()
    ours.iterations.assign(25)
    with pytest.raises(ValueError, match=r"beta_1.*constant.*to_keras\(beta_1=0.9\)"):
        ours.to_keras()
    with pytest.raises(ValueError, match=r"after 25 steps. Go on until step 158"):
        ours.to_keras(beta_1=0.9)
    assert ours.to_keras(beta_1=0.0).beta_1 == 0


def test_what_keras_lacks_can_be_said():
    optimizer = keras_adam.Adam(beta_1=Halving(0.75))
    with pytest.raises(ValueError, match="built"):
        optimizer.to_keras()
    optimizer.build([keras.Variable(np.ones(2, np.float32))])
    target = optimizer.to_keras(beta_1=0.5, epsilon=1e-3)
    assert (target.beta_1, target.epsilon) == (0.5, 1e-3)


def test_adamax_without_epsilon():
    """Ours is longer by 1 + epsilon / u; back in Keras it is Algorithm 2 still."""
    g = np.array([1e-7, 1e-3, 1.0, 0.0], np.float32)
    source = keras.optimizers.Adamax(LEARNING_RATE)
    variables = [keras.Variable(np.zeros(4, np.float32)) for _ in range(2)]
    optimizer = keras_adam.AdaMax.from_keras(source)
    source.apply([tf.constant(g)], variables[:1])
    optimizer.apply([tf.constant(g)], variables[1:])
    theirs, ours = (v.numpy() for v in variables)
    np.testing.assert_allclose(theirs[:3] * (1 + 1e-7 / g[:3]), ours[:3], rtol=1e-5)
    assert ours[3] == theirs[3] == 0

    target = optimizer.to_keras()
    training = oracle(reference.AdaMax(), [np.zeros(4, np.float32)], [[g]] * 3, [])
    target.apply([tf.constant(g)], variables[1:])
    step = tf.function(lambda: target.apply([g], variables[1:]), jit_compile=True)
    step()
    np.testing.assert_allclose(variables[1], training.thetas[0], atol=1e-6)


class Subclass(keras.optimizers.Adam):
    """May compute anything."""


@pytest.mark.parametrize(
    "cls, source",
    [
        (keras_adam.Adam, keras.optimizers.SGD()),
        (keras_adam.Adam, keras.optimizers.Nadam()),
        (keras_adam.Adam, keras.optimizers.Adamax()),
        (keras_adam.AdaMax, keras.optimizers.Adam()),
        (keras_adam.Adam, keras_adam.Adam()),
        (keras_adam.Adam, Subclass()),
        (keras_adam.Adam, None),
    ],
)
def test_other_optimizers(cls, source):
    name = "Adamax" if cls is keras_adam.AdaMax else "Adam or keras.optimizers.AdamW"
    with pytest.raises(TypeError, match=f"{cls.__name__}.from_keras takes .*{name}"):
        cls.from_keras(source)


def test_callable_betas():
    with pytest.raises(ValueError, match="callable `beta_1`"):
        keras_adam.Adam.from_keras(keras.optimizers.Adam(beta_1=lambda: 0.9))


# In `fit`, and files.


def make_model(dtype=None, layer=keras.layers.Embedding):
    return cases.make_model(dtype, layer)


def fit(model, epochs):
    """Each batch's ids are distinct, or Keras would square their parts."""
    rng = np.random.default_rng(1)
    ids = np.concatenate([rng.permutation(20)[:16].reshape(4, 4) for _ in range(6)])
    y = np.sin(ids).mean(axis=1, keepdims=True)
    kwargs = {"batch_size": 4, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(ids, y, **kwargs).history["loss"]


def trained(optimizer=None, dtype=None):
    model = make_model(dtype)
    model.compile(optimizer=optimizer or keras.optimizers.Adam(0.01), loss="mse")
    fit(model, 2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of a model after two epochs, and the losses of the next ones."""
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model = trained()
    model.save(path)
    model.save_weights(path.with_suffix(".weights.h5"))
    return path, fit(model, 4)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("mode", ["exact", "dense"])
def test_fit_goes_on(mode, jit, saved):
    path, expected = saved
    model = keras.saving.load_model(path)
    if mode == "exact":
        # Rows as dense Adam's are read by our layer only: another model's variables.
        weights, optimizer = model.get_weights(), model.optimizer
        model = make_model(layer=keras_adam.Embedding)
        model.set_weights(weights)
    else:
        optimizer = model.optimizer
    ours = keras_adam.Adam.from_keras(optimizer, sparse_updates=mode)
    model.compile(optimizer=ours, loss="mse", jit_compile=jit)
    losses = fit(model, 2)
    model.compile(optimizer=ours.to_keras(), loss="mse")
    losses += fit(model, 2)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_a_layer_that_builds_rounds_nothing(dtype):
    """Under autocast, in which `predict` before `fit` has our layer build."""
    source = trained(keras.optimizers.Adam(0.01), dtype)
    model = make_model(dtype, keras_adam.Embedding)
    model.set_weights(source.get_weights())
    model.compile(optimizer=keras_adam.Adam.from_keras(source.optimizer), loss="mse")
    model.predict(cases.make_data()[0], verbose=0)
    old, new = (
        getattr(m.optimizer, "inner_optimizer", m.optimizer) for m in (source, model)
    )
    assert new.built
    for name in ("_momentums", "_velocities"):
        for a, b in zip(getattr(old, name), getattr(new, name), strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.any(a != tf.cast(tf.cast(a, dtype.split("_")[1]), a.dtype))


@pytest.mark.parametrize("as_string", [False, True])
def test_file(as_string, saved):
    path, expected = saved
    model = keras.saving.load_model(path, compile=False)
    ours = keras_adam.Adam.from_keras(
        str(path) if as_string else path, sparse_updates="dense"
    )
    model.compile(optimizer=ours, loss="mse")
    np.testing.assert_allclose(fit(model, 4), expected, rtol=2e-5)


def test_weights_file(saved):
    """What the error says works."""
    path, expected = saved
    path = path.with_suffix(".weights.h5")
    with pytest.raises(ValueError, match=r"nor its arguments.*model\.load_weights"):
        keras_adam.Adam.from_keras(path)
    model = make_model()
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    ours = keras_adam.Adam.from_keras(model.optimizer, sparse_updates="dense")
    model.compile(optimizer=ours, loss="mse")
    np.testing.assert_allclose(fit(model, 4), expected, rtol=2e-5)


def test_files_without_state(tmp_path):
    path = tmp_path / "model.keras"
    model = make_model()
    model.save(path)
    with pytest.raises(ValueError, match="was not compiled"):
        keras_adam.Adam.from_keras(path)
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    fit(model, 1)
    model.layers[0].trainable = False
    model.save(path)
    with pytest.raises(ValueError, match="no state for the model's trainable var"):
        keras_adam.Adam.from_keras(path)
    model.compile(optimizer=keras.optimizers.SGD(), loss="mse")
    fit(model, 1)
    model.save(path)
    with pytest.raises(TypeError, match=r"takes a keras\.optimizers\.Adam"):
        keras_adam.Adam.from_keras(path)
    with pytest.raises(ValueError, match=r"reads what `model\.save` writes"):
        keras_adam.Adam.from_keras(str(tmp_path / "ckpt-1"))


def test_is_not_saved_before_it_has_the_state(tmp_path, saved):
    path, expected = saved
    model = keras.saving.load_model(path)
    ours = keras_adam.Adam.from_keras(model.optimizer, sparse_updates="dense")
    model.compile(optimizer=ours, loss="mse")
    with pytest.raises(ValueError, match="would be saved without it"):
        model.save(tmp_path / "model.keras")
    ours.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(fit(again, 4), expected, rtol=2e-5)


@pytest.mark.parametrize("from_file", [False, True], ids=["object", "file"])
def test_loss_scale(from_file, tmp_path):
    """The scale reached goes on with the new optimizer."""
    source = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=2.0**40, dynamic_growth_steps=7
    )
    model = trained(source, dtype="mixed_float16")
    scale = float(source.dynamic_scale)
    assert scale < 2.0**40  # some steps overflowed
    if from_file:
        model.save(tmp_path / "model.keras")
        source = tmp_path / "model.keras"
    ours = keras_adam.Adam.from_keras(source, sparse_updates="dense")
    assert isinstance(ours, keras.optimizers.LossScaleOptimizer)
    assert isinstance(ours.inner_optimizer, keras_adam.Adam)
    assert ours.dynamic_growth_steps == 7
    weights = model.get_weights()
    ours.build(model.trainable_variables)
    assert float(ours.dynamic_scale) == scale
    old = model.optimizer.inner_optimizer
    for a, b in zip(ours.inner_optimizer._velocities, old._velocities):
        np.testing.assert_array_equal(a, b)
    model.compile(optimizer=model.optimizer, loss="mse")
    expected = fit(model, 1)
    model.set_weights(weights)
    model.compile(optimizer=ours, loss="mse")
    np.testing.assert_allclose(fit(model, 1), expected, rtol=1e-2)
    with pytest.raises(ValueError, match="`loss_scale_factor` has no effect"):
        keras_adam.Adam.from_keras(source, loss_scale_factor=2.0)


# name: (torch's, ours); README's table
TORCH = {
    "Adam": ({}, {}),
    "Adam, amsgrad": ({"amsgrad": True}, {"amsgrad": True}),
    "AdamW": ({"weight_decay": 0.25}, {"weight_decay": 0.25}),
    "SparseAdam": ({}, {"epsilon_hat": True, "sparse_updates": "lazy"}),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch(name):
    """README's arguments and its way to set a state go on as torch does."""
    torch = pytest.importorskip("torch", reason="needs torch, of the extra `tests`")
    theirs, ours = TORCH[name]
    thetas, gradients = cases.stream("repeats", FIRST + REST, "float64")
    sparse = name == "SparseAdam"
    parameters = [torch.tensor(x, requires_grad=True) for x in thetas]
    if sparse:
        parameters = parameters[:1]
    cls = getattr(torch.optim, name.split(",")[0])
    source = cls(parameters, lr=0.125, betas=(0.75, 0.984375), eps=1e-3, **theirs)

    def torch_steps(gradients):
        for (values, ids), vector in gradients:
            values, ids = torch.tensor(values), torch.tensor(ids)[None]
            g = torch.sparse_coo_tensor(ids, values, parameters[0].shape)
            parameters[0].grad = g if sparse else g.to_dense()
            parameters[-1].grad = (
                parameters[-1].grad if sparse else torch.tensor(vector)
            )
            source.step()

    torch_steps(gradients[:FIRST])
    variables = make_variables([p.detach().numpy().copy() for p in parameters])
    optimizer = keras_adam.Adam(0.125, 0.75, 0.984375, 1e-3, **ours)
    optimizer.build(variables)
    state = [FIRST, 0.125]
    for p in parameters:
        state += [source.state[p]["exp_avg"], source.state[p]["exp_avg_sq"]]
    if "amsgrad" in ours:
        state += [source.state[p]["max_exp_avg_sq"] for p in parameters]
    optimizer.load_own_variables({str(i): np.asarray(x) for i, x in enumerate(state)})
    for (values, ids), vector in gradients[FIRST:]:
        shape = tf.constant(variables[0].shape.as_list())
        gs = [tf.IndexedSlices(values, ids, shape), vector][: len(variables)]
        optimizer.apply(gs, variables)
    torch_steps(gradients[FIRST:])
    for variable, p in zip(variables, parameters):
        np.testing.assert_allclose(variable, p.detach().numpy(), atol=1e-6)
