"""A good Keras citizen: saving, callbacks, mixed precision, errors, retraces."""

import gc
import json
import pathlib
import warnings

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import Halving, make_data, make_model

import keras_adam

ROOT = pathlib.Path(__file__).parents[1]
CLASSES = pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdaMax])
MODES = pytest.mark.parametrize("mode", cases.MODES)
JIT = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])

keras.saving.register_keras_serializable(package="tests")(Halving)


@keras.saving.register_keras_serializable(package="tests")
def falling_beta(step):
    return 0.9 * 0.5 ** keras.ops.cast(step, "float32")


def compiled(optimizer, jit=False, dtype=None, **kwargs):
    model = make_model(dtype)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=jit, **kwargs)
    return model


def fit(model, epochs=1, **kwargs):
    return model.fit(
        *make_data(), batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs
    )


def assert_same(model, other, trained=False):
    """Bit for bit; once both have trained on a GPU, but for the order of its sums."""
    in_order = not (trained and tf.config.list_physical_devices("GPU"))
    for a, b in zip(
        model.get_weights() + [v.numpy() for v in model.optimizer.variables],
        other.get_weights() + [v.numpy() for v in other.optimizer.variables],
        strict=True,
    ):
        if in_order:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


CONFIGS = {
    "adam": lambda: keras_adam.Adam(),
    "adam_all": lambda: keras_adam.Adam(
        learning_rate=0.01,
        beta_1=0.8,
        beta_2=0.95,
        epsilon=1e-5,
        sparse_updates="dense",
        epsilon_hat=True,
        bias_correction=False,
        amsgrad=True,
        weight_decay=0.1,
        clipnorm=1.0,
        name="mine",
    ),
    "adam_schedules": lambda: keras_adam.Adam(
        keras.optimizers.schedules.CosineDecay(0.1, 100), beta_1=Halving(0.75)
    ),
    "adam_callable_beta": lambda: keras_adam.Adam(beta_1=falling_beta),
    "adam_options": lambda: keras_adam.Adam(
        0.01, use_ema=True, ema_momentum=0.9, gradient_accumulation_steps=2
    ),
    "adam_moments": lambda: keras_adam.Adam(
        0.01, amsgrad=True, stochastic_rounding=True, moments_dtype="bfloat16", seed=3
    ),
    "adamax": lambda: keras_adam.AdaMax(0.01, beta_2=0.95, global_clipnorm=1.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name):
    optimizer = CONFIGS[name]()
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(optimizer)
    # Keras keeps a rate in float32.
    assert copy.get_config() == optimizer.get_config()
    assert keras.optimizers.get(keras.optimizers.serialize(optimizer)).name == (
        optimizer.name
    )
    assert type(optimizer).from_config(config["config"]).beta_2 == optimizer.beta_2


@JIT
@pytest.mark.parametrize("how", ["keras", "weights", "checkpoint"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_continues_bit_for_bit(tmp_path, name, how, jit):
    model = compiled(CONFIGS[name](), jit)
    fit(model)
    if how == "keras":
        model.save(tmp_path / "model.keras")
        copy = keras.models.load_model(tmp_path / "model.keras")
        assert type(copy.optimizer) is type(model.optimizer)
        copy.jit_compile = jit
    else:
        copy = compiled(CONFIGS[name](), jit)
        copy.optimizer.build(copy.trainable_variables)
        if how == "weights":
            model.save_weights(tmp_path / "model.weights.h5")
            copy.load_weights(tmp_path / "model.weights.h5")
        else:
            path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(
                str(tmp_path / "checkpoint")
            )
            tf.train.Checkpoint(model=copy, optimizer=copy.optimizer).restore(
                path
            ).assert_existing_objects_matched()
    assert_same(model, copy)
    fit(model, 2)
    fit(copy, 2)
    assert_same(model, copy, trained=True)


def test_what_is_saved_is_what_keras_saves(tmp_path):
    """The memory that rows work in is not among it."""
    saved = []
    for i, optimizer in enumerate(
        [
            keras.optimizers.Adam(),
            keras_adam.Adam(sparse_updates="lazy"),
            keras_adam.Adam(),
        ]
    ):
        model = compiled(optimizer, jit=True)
        fit(model)
        path = tf.train.Checkpoint(model.optimizer).save(str(tmp_path / str(i)))
        saved.append(
            sorted(
                shape
                for key, shape in tf.train.list_variables(path)
                if key.endswith("VARIABLE_VALUE")
            )
        )
    assert saved[0] == saved[1]
    # In exact mode also the steps of the rows' last updates, and the history.
    assert len(saved[2]) == len(saved[0]) + len(model.trainable_variables) + 2


@JIT
@pytest.mark.parametrize("new", cases.MODES)
@pytest.mark.parametrize("old", ["keras", *cases.MODES])
def test_a_state_loads_into_another_mode(tmp_path, old, new, jit):
    """And a row is then behind by nothing."""
    make = {"keras": lambda: keras.optimizers.Adam(0.01)}
    for mode in cases.MODES:
        make[mode] = lambda mode=mode: keras_adam.Adam(0.01, sparse_updates=mode)
    model, copy = compiled(make[old](), jit), compiled(make[new](), jit)
    fit(model)
    copy.optimizer.build(copy.trainable_variables)
    model.save_weights(tmp_path / "model.weights.h5")
    copy.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(model.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    n = len(copy.trainable_variables)
    for a, b in zip(
        model.optimizer.variables[: 2 + 2 * n],
        copy.optimizer.variables[: 2 + 2 * n],
        strict=True,
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    before = copy.get_weights()
    copy.optimizer.settle()
    for a, b in zip(before, copy.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(copy.optimizer.iterations) == 6


@pytest.mark.parametrize("width", [(2,), ()], ids=["rank_2", "rank_1"])
@pytest.mark.parametrize("old", ["keras", "dense", "exact"])
def test_sums_of_another_mode_are_the_rows_that_lazy_mode_updates(old, width):
    """A row that has momentum, but nothing accumulated, stands still."""

    def make(mode):
        cls = keras.optimizers.Adam if mode == "keras" else keras_adam.Adam
        own = {} if mode == "keras" else {"sparse_updates": mode}
        variable = keras.Variable(np.ones((6, *width), np.float32))
        optimizer = cls(0.1, epsilon=1e-8, gradient_accumulation_steps=2, **own)
        optimizer.build([variable])
        return optimizer, variable

    def step(optimizer, variable, id):
        values, shape = tf.ones((1, *width)), tf.constant([6, *width])
        slices = tf.IndexedSlices(values, tf.constant([id]), shape)
        optimizer.apply([slices], [variable])

    first, whole, second = make(old), make("dense"), make("lazy")
    for id in (5, 0, 1):
        step(*first, id)
        step(*whole, id)
    store = {}
    first[0].save_own_variables(store)
    second[1].assign(first[1].numpy())
    second[0].load_own_variables(store)
    still = second[1].numpy()[2:]
    assert np.all(still[-1] < 0.95)
    step(*second, 0)
    step(*whole, 0)
    found = second[1].numpy()
    np.testing.assert_allclose(found[:2], whole[1].numpy()[:2], rtol=1e-5)
    assert np.all(found[1] < 0.95)
    np.testing.assert_array_equal(found[2:], still)


@pytest.mark.parametrize("new", cases.MODES)
@pytest.mark.parametrize("old", ["keras", *cases.MODES])
@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 4}, {"use_ema": True, "weight_decay": 0.1}],
    ids=["accumulation", "ema_decay"],
)
def test_a_state_in_the_middle_loads_into_another_mode(options, old, new):
    """With all that was accumulated; and goes on as dense Adam does."""

    def make(mode, table, bias):
        cls = keras.optimizers.Adam if mode == "keras" else keras_adam.Adam
        own = {} if mode == "keras" else {"sparse_updates": mode}
        variables = [keras.Variable(table), keras.Variable(bias, name="bias")]
        optimizer = cls(0.1, epsilon=1e-8, **own, **options)
        if "weight_decay" in options:
            optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.build(variables)
        return optimizer, variables

    def step(optimizer, variables, k):
        ids = tf.constant([k % 3, 3])
        slices = tf.IndexedSlices(tf.ones((2, 2)) * (k + 1), ids, tf.constant([6, 2]))
        optimizer.apply([slices, tf.ones(3)], variables)

    table, bias = np.ones((6, 2), np.float32), np.ones(3, np.float32)
    first, variables = make(old, table, bias)
    whole, all_along = make("lazy" if new == "lazy" else "dense", table, bias)
    for k in range(6):
        step(first, variables, k)
        step(whole, all_along, k)
    store = {}
    first.save_own_variables(store)
    second, copies = make(new, *(v.numpy() for v in variables))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_own_variables(store)
    if (old == "lazy") != (new == "lazy"):
        whole, all_along = make(old, table, bias)  # what that trained so far
        for k in range(6):
            step(whole, all_along, k)
        assert int(second.iterations) == int(whole.iterations)
        for a, b in zip(copies, all_along):
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)
        return
    for k in range(6, 12):
        step(second, copies, k)
        step(whole, all_along, k)
    # Keras knows 1 - beta_2 to five digits, and so does the kernel that rows take, and
    # dense steps with weight decay do not.
    kernel = "weight_decay" in options and old != new
    atol = 1e-5 if old == "keras" else 5e-6 if kernel else 2e-7
    for a, b in zip(copies, all_along):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-6, atol=atol)


def test_another_rule_s_state_is_not_taken_for_ours():
    variables = [keras.Variable(np.ones((6, 2), np.float32))]
    other = keras.optimizers.Adam(amsgrad=True)
    other.build(variables)
    other.apply([tf.ones((6, 2))])
    store = {}
    other.save_own_variables(store)
    ours = keras_adam.Adam()
    ours.build(variables)
    with pytest.raises(
        ValueError, match=r"variable.*velocity.*\(6,\).*\(6, 2\).*alone"
    ):
        ours.load_own_variables(store)
    assert int(ours.iterations) == 0
    assert np.all(ours._velocities[0].numpy() == 0)


@pytest.mark.parametrize("accumulate", [None, 2])
@pytest.mark.parametrize("mode", cases.MODES)
def test_state_tree(mode, accumulate):
    """Keras finds each variable under a name of its own."""
    optimizer = keras_adam.Adam(
        sparse_updates=mode, gradient_accumulation_steps=accumulate
    )
    model = compiled(optimizer)
    fit(model)
    tree = model.get_state_tree(value_format="numpy_array")["optimizer_variables"]
    leaves = tree.values()
    while any(isinstance(x, dict) for x in leaves):
        leaves = [
            y for x in leaves for y in (x.values() if isinstance(x, dict) else [x])
        ]
    assert len(leaves) == len(optimizer.variables)


@pytest.mark.parametrize("layer", [keras.layers.Embedding, keras_adam.Embedding])
def test_a_state_tree_goes_to_an_optimizer_built_by_hand(layer):
    """Keras finds each variable by its path, whoever had it built."""
    trees, models = [], []
    for built in (False, True):
        keras.backend.clear_session()  # as in another process, layers have these names
        model = make_model(layer=layer)
        model.compile(optimizer=keras_adam.Adam(0.01), loss="mse")
        if built:
            model.optimizer.build(model.trainable_variables)
            model.set_state_tree(trees[0])
        else:
            fit(model)
        trees.append(model.get_state_tree(value_format="numpy_array"))
        models.append(model)
    first, second = (m.optimizer.variables for m in models)
    assert [x.path for x in first] == [x.path for x in second]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(second[2])


def test_keras_adam_state_has_the_same_places():
    """So that a saved state of keras.optimizers.Adam loads, position by position."""
    shapes = []
    for cls in (keras.optimizers.Adam, keras_adam.Adam):
        optimizer = cls(amsgrad=True, use_ema=True)
        optimizer.build(make_model().trainable_variables)
        shapes.append(
            [(v.name.split("_")[-1], v.shape, v.dtype) for v in optimizer.variables]
        )
    assert shapes[0] == shapes[1][: len(shapes[0])]
    # What comes after is `last_step`: see `load_own_variables`.
    assert {name for name, *_ in shapes[1][len(shapes[0]) :]} == {"step"}


@JIT
@CLASSES
def test_dense_parity_with_keras(cls, jit):
    """epsilon=1e-7, epsilon_hat=True is what keras.optimizers.Adam computes."""
    theirs, ours = keras.optimizers.Adamax(0.01, epsilon=1e-30), cls(0.01)
    if cls is keras_adam.Adam:
        theirs = keras.optimizers.Adam(0.01, epsilon=1e-7)
        ours = cls(0.01, epsilon=1e-7, epsilon_hat=True)
    rng = np.random.default_rng(0)
    first = rng.standard_normal((6, 5)).astype(np.float32)
    gs = rng.standard_normal((100, 6, 5)) * 10.0 ** rng.uniform(-8, 1, (6, 5))
    weights = []
    for optimizer in (theirs, ours):
        variable = keras.Variable(first)
        optimizer.build([variable])

        apply = tf.function(optimizer.apply, jit_compile=jit)
        for g in gs:
            apply([tf.constant(g, tf.float32)])
        weights.append(variable.numpy())
    np.testing.assert_allclose(*weights, rtol=1e-5, atol=5e-6)


@JIT
@MODES
@CLASSES
def test_fit_learns_and_traces_once(cls, mode, jit):
    traces = []

    class Counted(cls):
        def _scalars(self, step):
            traces.append(step)
            return super()._scalars(step)

    model = compiled(Counted(0.05, sparse_updates=mode), jit)
    before = model.evaluate(*make_data(), verbose=0)
    fit(model)
    n = len(traces)
    fit(model, 30)
    assert len(traces) == n
    assert model.evaluate(*make_data(), verbose=0) < 0.3 * before


@JIT
@MODES
def test_mixed_float16(mode, jit):
    """A LossScaleOptimizer, its scale, and its skipping of what overflows."""
    optimizer = keras_adam.Adam(0.05, sparse_updates=mode)
    model = compiled(optimizer, jit, dtype="mixed_float16")
    scaled = model.optimizer
    if not isinstance(scaled, keras.optimizers.LossScaleOptimizer):
        scaled = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer=scaled, loss="mse", jit_compile=jit)
    before = model.evaluate(*make_data(), verbose=0)
    fit(model, 30)
    assert model.evaluate(*make_data(), verbose=0) < 0.3 * before

    weights = model.get_weights()
    x, y = make_data(8)
    scale = float(scaled.dynamic_scale.numpy())
    model.train_on_batch(x, y * np.inf)
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(scaled.dynamic_scale.numpy()) == scale / 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@JIT
@CLASSES
def test_half_precision_models_learn(cls, dtype, jit):
    model = compiled(cls(0.05), jit, dtype=dtype)
    assert model.layers[0].embeddings.dtype == dtype
    before = model.evaluate(*make_data(), verbose=0)
    fit(model, 30)
    assert model.evaluate(*make_data(), verbose=0) < 0.5 * before


@JIT
def test_reduce_lr_on_plateau(jit):
    model = compiled(keras_adam.Adam(0.5), jit)
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.5, patience=1, min_delta=1e9
    )
    history = fit(model, 4, callbacks=[plateau]).history
    assert history["learning_rate"] == [0.5, 0.5, 0.25, 0.125]
    model.optimizer.learning_rate = 0.0
    weights = model.get_weights()
    fit(model)
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_second_model_after_the_first_is_gone():
    for _ in range(2):
        model = compiled(keras_adam.Adam(amsgrad=True, sparse_updates="dense"))
        fit(model)
        del model
        gc.collect()


def test_use_ema_ends_with_the_average():
    model = compiled(keras_adam.Adam(0.1, use_ema=True, ema_momentum=0.5))
    fit(model, 2)
    for v, average in zip(
        model.trainable_variables,
        model.optimizer._model_variables_moving_average,
        strict=True,
    ):
        np.testing.assert_array_equal(v.numpy(), average.numpy())


def test_constraint():
    model = make_model()
    table = model.layers[0].embeddings
    table.constraint = keras.constraints.NonNeg()
    model.compile(optimizer=keras_adam.Adam(0.1), loss="mse")
    fit(model)
    assert table.numpy().min() == 0


def test_run_eagerly():
    weights = []
    for eagerly in (False, True):
        model = compiled(keras_adam.Adam(0.1), run_eagerly=eagerly)
        fit(model)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_shared_table_and_scalar():
    """One table read twice, and a weight without a shape."""

    class Scale(keras.layers.Layer):
        def build(self, _):
            self.scale = self.add_weight(shape=(), initializer="ones")

        def call(self, x):
            return x * self.scale

    keras.utils.set_random_seed(0)
    table = keras.layers.Embedding(20, 8)
    a, b = keras.Input([2], dtype="int32"), keras.Input([3], dtype="int32")
    flat = keras.layers.Flatten()
    x = keras.layers.Concatenate()([flat(table(a)), flat(table(b))])
    model = keras.Model([a, b], Scale()(keras.layers.Dense(1)(x)))
    model.compile(optimizer=keras_adam.Adam(0.05), loss="mse")
    ids, y = make_data()
    x = [ids[:, :2], ids[:, 1:]]
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=40, batch_size=8, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.3 * before


def test_overwrite_with_gradient():
    """Keras gives such a variable no slots and writes its gradient into it."""
    table = keras.Variable(np.ones((5, 2), np.float32))
    other = keras.Variable(np.zeros(3, np.float32))
    other.overwrite_with_gradient = True
    optimizer = keras_adam.Adam(0.1, amsgrad=True, use_ema=True)
    optimizer.build([other, table])
    slices = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1]), tf.constant([5, 2]))
    optimizer.apply([tf.constant([1.0, 2.0, 3.0]), slices], [other, table])
    optimizer.finalize_variable_values([other, table])
    np.testing.assert_array_equal(other.numpy(), [1, 2, 3])
    np.testing.assert_allclose(table.numpy()[1], 0.9, rtol=1e-6)


def as_rows(g):
    return (
        g if g is None else tf.IndexedSlices(g, tf.constant([0, 1]), tf.constant([2]))
    )


@pytest.mark.parametrize("give", [lambda g: g, as_rows], ids=["dense", "rows"])
def test_no_gradient_at_the_last_micro_step_leaves_nothing_behind(give):
    """As in Keras, whose accumulators all start anew then."""
    a, b = (keras.Variable(np.ones(2, np.float32)) for _ in range(2))
    optimizer = keras_adam.Adam(0.1, beta_1=0.0, gradient_accumulation_steps=2)
    optimizer.build([a, b])
    one = tf.ones(2)
    optimizer.apply([one, give(one)], [a, b])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([one, None], [a, b])
    optimizer.apply([one, give(-one)], [a, b])
    optimizer.apply([one, give(0 * one)], [a, b])
    # The mean of -1 and 0 at step 2, v's first.
    v_hat = 0.001 * 0.5**2 / (1 - 0.999**2)
    np.testing.assert_allclose(b.numpy(), 1 + 0.1 * 0.5 / np.sqrt(v_hat), rtol=1e-4)


def test_eager_steps_of_many_shapes_do_not_warn(caplog):
    variables = [keras.Variable(np.ones(n + 1, np.float32)) for n in range(12)]
    optimizer = keras_adam.Adam(amsgrad=True)
    optimizer.build(variables)
    for _ in range(2):
        optimizer.apply([tf.ones_like(v.value) for v in variables])
    assert "retracing" not in caplog.text


def test_mixed_micro_steps_lose_nothing():
    """Within one accumulated step, slices and a dense gradient of one table."""
    optimizer = keras_adam.Adam(0.1, beta_1=0.0, gradient_accumulation_steps=2)
    table = keras.Variable(np.ones((3, 1), np.float32))
    optimizer.build([table])
    optimizer.apply([tf.constant([[1.0], [0.0], [2.0]])], [table])
    slices = tf.IndexedSlices(tf.ones((1, 1)), tf.constant([1]), tf.constant([3, 1]))
    optimizer.apply([slices], [table])
    np.testing.assert_allclose(table.numpy(), np.full((3, 1), 0.9), rtol=1e-6)
    optimizer.apply([slices], [table])
    optimizer.apply([slices], [table])
    np.testing.assert_allclose(table.numpy()[::2], np.full((2, 1), 0.9), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras_adam.Adam(beta_1=0.9, beta_2=0.81),
        lambda: keras_adam.Adam(beta_1=0.95, beta_2=0.9),
        lambda: keras_adam.Adam(beta_1=0.0, beta_2=0.0),
        lambda: keras_adam.AdaMax(beta_1=0.9, beta_2=0.9),
        lambda: keras_adam.Adam(beta_1=0.99984, beta_2=0.9999, amsgrad=True),
    ],
)
def test_exact_says_for_which_betas_it_is_not(make):
    with pytest.raises(ValueError, match=r"exact.*beta_1=0\.\d+.*\"dense\""):
        make()


def test_exact_says_for_which_beta_1_schedule_it_is_not():
    optimizer = keras_adam.Adam(
        beta_1=lambda step: 1 - 0.5 ** keras.ops.cast(step + 1, "float32")
    )
    for _ in range(2):  # what was refused has made nothing
        with pytest.raises(ValueError, match=r"beta_1.*Received"):
            optimizer.build([keras.Variable([[1.0]])])
        assert not optimizer.built
    scalar = keras.Variable(1.0)  # owes nothing
    optimizer.build([scalar])
    optimizer.apply([tf.constant(1.0)], [scalar])
    np.testing.assert_allclose(scalar.numpy(), 0.999, rtol=1e-6)


@JIT
def test_a_beta_1_schedule_that_exceeds_what_was_found(jit):
    """At steps 3,861 to 4,809, none of which was looked at."""

    def beta_1(step):
        step = keras.ops.cast(step, "int64")
        return tf.where((step > 3860) & (step < 4810), 0.99, 0.9)

    table = keras.Variable(np.ones((6, 2), np.float32))
    optimizer = keras_adam.Adam(beta_1=beta_1)
    optimizer.build([table])
    apply = tf.function(
        lambda ids: optimizer.apply(
            [tf.IndexedSlices(tf.ones((1, 2)), ids, tf.constant([6, 2]))], [table]
        ),
        jit_compile=jit,
    )
    optimizer.iterations.assign(3860)
    apply(tf.constant([0]))
    assert np.all(np.isfinite(table.numpy()))
    if jit:  # where there are no errors
        apply(tf.constant([1]))
        apply(tf.constant([2]))
        assert np.all(np.isnan(table.numpy()[1]))
    else:
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"exceeded.*\"dense"):
            apply(tf.constant([1]))


def test_the_boundaries_of_a_beta_1_schedule_are_looked_at():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [3860, 4810], [0.9, 0.99, 0.9]
    )
    optimizer = keras_adam.Adam(beta_1=schedule)
    optimizer.build([keras.Variable(np.ones((6, 2), np.float32))])
    assert abs(optimizer._plan.beta_1 - 0.99) < 1e-6


@CLASSES
def test_only_float_variables(cls):
    with pytest.raises(ValueError, match=r"counts.*int32.*trainable=False"):
        cls().build([keras.Variable([1, 2], dtype="int32", name="counts")])


def test_import_and_fit_warn_of_nothing():
    model = compiled(keras_adam.Adam())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        fit(model)
