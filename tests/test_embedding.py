"""The Embedding layer: a drop-in, and rows as they are now."""

import functools
import gc
import warnings
import weakref

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from cases import EXECUTIONS, make_data, make_model

import keras_adam
from keras_adam import rows

JIT = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
EPOCHS = 4


def compiled(optimizer, layer=keras_adam.Embedding, jit=False, **kwargs):
    model = make_model(layer=layer)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=jit, **kwargs)
    return model


def adam(mode="exact", **kwargs):
    return keras_adam.Adam(0.01, sparse_updates=mode, **kwargs)


def fit(model, epochs=EPOCHS, **kwargs):
    x, y = make_data()
    return model.fit(
        x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0, **kwargs
    )


def test_it_is_keras_embedding():
    ours = keras_adam.Embedding(7, 3, mask_zero=True, name="ours")
    theirs = keras.layers.Embedding(7, 3, mask_zero=True, name="theirs")
    ids = np.array([[0, 3, -1], [6, 6, 2]])
    for layer in (ours, theirs):
        layer.build()
    ours.set_weights(theirs.get_weights())
    for given in (
        ids.astype("int32"),
        ids.astype("int64"),
        ids.astype("float32"),
        ids[0],
        ids[None],
    ):
        np.testing.assert_array_equal(ours(given), theirs(given))
    np.testing.assert_array_equal(ours.compute_mask(ids), theirs.compute_mask(ids))
    ragged = tf.ragged.constant([[1, 2], [3]])
    np.testing.assert_array_equal(ours(ragged).values, theirs(ragged).values)
    for layer in (ours, theirs):
        layer.mask_zero = False  # Keras has no mask of sparse ids
    sparse = tf.sparse.from_dense(np.abs(ids))
    np.testing.assert_allclose(ours(sparse), theirs(sparse))
    ours.mask_zero = True
    config = keras.saving.serialize_keras_object(ours)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is keras_adam.Embedding
    assert copy.get_config() == ours.get_config()
    assert ours.count_params() == 21


@JIT
def test_ids_of_unknown_rank(jit):
    """As `tf.numpy_function` gives them."""
    ids, y = np.arange(12, dtype=np.int32).reshape(6, 2), np.ones([6, 4], np.float32)
    data = tf.data.Dataset.from_tensor_slices((ids, y)).batch(2)
    data = data.map(lambda a, b: (tf.numpy_function(lambda a: a, [a], tf.int32), b))
    assert data.element_spec[0].shape.rank is None

    class Model(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.table = layer(20, 4, embeddings_initializer="ones")

        def call(self, ids):
            return tf.ensure_shape(tf.reduce_sum(self.table(ids), 1), [None, 4])

    tables = []
    for layer, optimizer in (
        (keras_adam.Embedding, adam(epsilon=1e-7, epsilon_hat=True)),
        (keras.layers.Embedding, keras.optimizers.Adam(0.01)),  # no id repeats
    ):
        model = Model(layer)
        model(ids)
        model.compile(optimizer=optimizer, loss="mse", jit_compile=jit)
        model.fit(data, epochs=3, verbose=0)
        tables.append(model.table.embeddings.numpy())
    assert np.abs(tables[0] - 1).max() > 0.01
    # The layer sees what Keras's sees, and Keras's Adam is dense Adam.
    np.testing.assert_allclose(*tables, rtol=0, atol=1e-5)


def test_its_text_has_the_rows_as_they_are_now():
    model = compiled(adam())
    fit(model, epochs=1)
    model.train_on_batch(np.zeros([1, 4], np.int32), np.ones([1, 1]))
    table = model.layers[0].embeddings
    stands = np.array(tf.convert_to_tensor(table._value))
    text = repr(table)
    values = table.numpy()
    assert np.abs(values - stands).max() > 1e-4
    # It prints them as NumPy does.
    assert str(values) in text and str(stands) not in text


@JIT
@pytest.mark.parametrize("mode", ["exact", "lazy", "dense", "keras", "sgd"])
def test_any_optimizer(mode, jit):
    """Trains as with Keras's layer; in exact mode as dense Adam does with it."""
    make = {"keras": lambda: keras.optimizers.Adam(0.01), "sgd": lambda: "sgd"}
    ours = compiled(make.get(mode, lambda: adam(mode))(), jit=jit)
    as_dense = "dense" if mode == "exact" else mode
    theirs = compiled(
        make.get(mode, lambda: adam(as_dense))(), keras.layers.Embedding, jit
    )
    a, b = fit(ours), fit(theirs)
    np.testing.assert_allclose(a.history["loss"], b.history["loss"], rtol=1e-5)
    for x, y in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-6)


@JIT
@pytest.mark.parametrize("when", ["after", "before"])
def test_evaluate_and_predict_read_rows_as_they_are_now(jit, when):
    """Also those that were compiled before the first step; they write nothing."""
    x, y = make_data()
    model, dense = compiled(adam(), jit=jit), compiled(adam("dense"), jit=jit)
    if when == "before":
        for m in (model, dense):
            m.evaluate(x, y, verbose=0)
            m.predict(x, verbose=0)
    for i in range(10):
        for m in (model, dense):
            m.train_on_batch(x[i : i + 1], y[i : i + 1])
    table = model.layers[0].embeddings.value
    before = table.numpy()
    found = model.evaluate(x, y, verbose=0), model.predict(x, verbose=0)
    np.testing.assert_array_equal(table.numpy(), before)
    assert np.abs(before - dense.layers[0].embeddings.numpy()).max() > 1e-3
    np.testing.assert_allclose(found[0], dense.evaluate(x, y, verbose=0), rtol=1e-5)
    np.testing.assert_allclose(found[1], dense.predict(x, verbose=0), atol=1e-5)


def test_a_reader_traced_too_early_is_told():
    model = make_model(layer=keras_adam.Embedding)
    read = tf.function(model)
    read(make_data()[0])
    with pytest.warns(UserWarning, match=r"traced before.*optimizer\.build"):
        adam().build(model.trainable_variables)


def test_a_model_never_compiled_that_predicted_too_early_is_told_of():
    model = compiled(adam())
    part = keras.Model(model.inputs, model.layers[0].output)
    x, _ = make_data()
    part.predict(x, verbose=0)
    with pytest.warns(UserWarning, match=r"traced before.*optimizer\.build"):
        fit(model, 1)


@pytest.mark.parametrize("kept", [False, True])
def test_evaluate_after_compile_reads_for_the_new_optimizer(kept):
    """The old one may live on, in a reference cycle or in somebody's hands."""
    x, y = make_data()
    losses = []
    for mode in ("exact", "dense"):
        first = adam(mode)
        model = compiled(first)
        fit(model, 1)
        if not kept:
            del first
        gc.disable()
        try:
            model.compile(optimizer=adam(mode), loss="mse")
            found = [model.evaluate(x, y, verbose=0)]
            history = model.fit(
                *(x[:8], y[:8]), batch_size=2, epochs=3, shuffle=False, verbose=0
            )
            found += [*history.history["loss"], model.evaluate(x, y, verbose=0)]
            for i in range(6):
                model.train_on_batch(x[i : i + 1], y[i : i + 1])
            found += [model.evaluate(x, y, verbose=0)]
        finally:
            gc.enable()
        losses.append(found)
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_reader_for_another_optimizer_is_told_of():
    model = compiled(adam())
    fit(model, 1)
    x, _ = make_data()
    part = keras.Model(model.inputs, model.layers[0].output)
    part.predict(x, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, 1)
    model.compile(optimizer=adam(), loss="mse")
    with pytest.warns(UserWarning, match=r"traced before.*make_predict_function"):
        fit(model, 1)
    part.make_predict_function(force=True)
    for i in range(6):
        model.train_on_batch(*(a[i : i + 1] for a in make_data()))
    now = part.predict(x, verbose=0)
    np.testing.assert_allclose(now, model.get_weights()[0][x], atol=1e-7)


def test_a_model_of_its_own_optimizer_that_predicted_is_told_of():
    model = compiled(adam())
    part = keras.Model(model.inputs, model.layers[0].output)
    part.compile(optimizer=adam(), loss="mse")
    part.predict(make_data()[0], verbose=0)
    with pytest.warns(UserWarning, match=r"traced before.*make_predict_function"):
        fit(model, 1)


@JIT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_outlives_a_model(jit, dtype):
    """TensorFlow keeps custom gradients for ever, with all that they know."""
    x, y = make_data()
    layer = functools.partial(keras_adam.Embedding, dtype=dtype)
    model = compiled(adam(), layer, jit=jit)
    fit(model, 1)
    model.compile(optimizer=adam(), loss="mse", jit_compile=jit)
    fit(model, 1, validation_data=(x, y))
    model.predict(x, verbose=0)
    variables = [*model.variables, *model.optimizer.variables]
    alive = [weakref.ref(rows.components(v.value)[0]) for v in variables]
    assert all(v() is not None for v in alive)
    del model, variables
    keras.backend.clear_session()
    gc.collect()
    assert all(v() is None for v in alive)


class Branches(keras.layers.Layer):
    def __init__(self, embedding, both):
        super().__init__()
        self.embedding, self.both = embedding, both

    def build(self, shape):
        self.embedding.build()

    def call(self, x):
        def other():
            rows = self.embedding((x + 1) % 20)
            return rows / 2 if self.both else tf.zeros_like(rows)

        even = keras.ops.sum(x) % 2 == 0
        return keras.ops.cond(even, lambda: self.embedding(x), other)

    def compute_output_shape(self, shape):
        return *shape, 4


@JIT
@pytest.mark.parametrize("both", [False, True])
def test_in_a_branch(jit, both):
    x, _ = make_data()
    ends = []
    for mode, cls in (
        ("exact", keras_adam.Embedding),
        ("dense", keras.layers.Embedding),
    ):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input(x.shape[1:], dtype="int32"),
                Branches(cls(20, 4), both),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(optimizer=adam(mode), loss="mse", jit_compile=jit)
        losses = fit(model, 2).history["loss"]
        ends.append([*losses, *map(np.sum, model.get_weights())])
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-6)


def test_nothing_is_told_without_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = compiled(adam())
        x, _ = make_data()
        model.predict(x, verbose=0)
        fit(model, 1)
        other = make_model(layer=keras_adam.Embedding)
        other.predict(x, verbose=0)  # not compiled: compile drops the function
        other.compile(optimizer=adam(), loss="mse")
        gc.collect()
        fit(other, 1)
        # Compiled anew, after all of Keras's functions.
        fit(other, 1, validation_data=make_data())
        other.predict(x, verbose=0)
        other.compile(optimizer=adam(), loss="mse")
        other.evaluate(*make_data(), verbose=0)
        fit(other, 1)


class Outer(keras.Model):
    """Its layers are called by another model, which has no optimizer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.inner(x, training=True) - y) ** 2)
        variables = self.inner.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def by_loop(model, mode, jit):
    optimizer = adam(mode)

    @tf.function(jit_compile=jit)
    def step(x, y):  # builds the optimizer, and so is traced twice
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    x, y = make_data()
    batches = [slice(i, i + 2) for i in range(0, 48, 2)]
    return [float(step(tf.constant(x[b]), tf.constant(y[b]))) for b in batches]


@JIT
@pytest.mark.parametrize("how", ["layer", "inner", "loop"])
def test_optimizers_in_turn_of_one_table(how, jit):
    """Each is built in the first step, by `apply`."""
    losses = []
    for mode in ("exact", "dense"):
        model, found = make_model(layer=keras_adam.Embedding), []
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for _ in range(3):
                if how == "loop":
                    found += by_loop(model, mode, jit)
                    continue
                if how == "layer":  # under a new model
                    keras.utils.set_random_seed(1)
                    pooled = keras.layers.Flatten()(model.layers[0].output)
                    outer = keras.Model(model.inputs, keras.layers.Dense(1)(pooled))
                else:
                    outer = Outer(model)
                outer.compile(adam(mode), "mse", jit_compile=jit)
                found += fit(outer, 2).history["loss"]
                del outer
        losses.append(found)
    np.testing.assert_allclose(*losses, rtol=2e-5)


class Twice(keras.Model):
    """One table read twice, and once as the output's matrix if tied."""

    def __init__(self, tied):
        super().__init__()
        self.embed = keras_adam.Embedding(20, 8)
        self.tied = tied
        self.dense = keras.layers.Dense(1)

    def call(self, ids):
        state = keras.ops.mean(self.embed(ids[:, :2]), axis=1)
        state = state * keras.ops.mean(self.embed(ids[:, 2:]), axis=1)
        if self.tied:
            table = keras.ops.convert_to_tensor(self.embed.embeddings)
            state = keras.ops.matmul(state, keras.ops.transpose(table))
        return self.dense(state)


@JIT
@pytest.mark.parametrize("tied", [False, True], ids=["shared", "tied"])
def test_shared_tables(tied, jit):
    found = []
    for mode in ("exact", "dense"):
        keras.utils.set_random_seed(0)
        model = Twice(tied)
        model(make_data()[0])
        model.compile(optimizer=adam(mode), loss="mse", jit_compile=jit)
        found.append((fit(model).history["loss"], model.get_weights()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)


@JIT
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_tied_table_is_cast_as_keras_casts_it(policy, jit):
    """In a model's `call`, its matrix has the dtype of what it is multiplied with."""
    found = {}
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        for layer in (keras_adam.Embedding, keras.layers.Embedding):

            class Tied(keras.Model):
                def __init__(self):
                    super().__init__()
                    self.embed = layer(20, 8)  # noqa: B023

                def call(self, ids):
                    state = tf.reduce_mean(self.embed(ids), axis=1)
                    table = self.embed.embeddings
                    return tf.matmul(state, table, transpose_b=True)

            keras.utils.set_random_seed(0)
            model, (x, _) = Tied(), make_data()
            model.compile(optimizer=adam("dense"), loss="mse", jit_compile=jit)
            y = np.eye(20)[x[:, 0]]
            history = model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
            found[layer] = history.history["loss"], model(x).dtype
    finally:
        keras.config.set_dtype_policy(before)
    ours, theirs = found.values()
    assert ours[1] == theirs[1] == policy.split("_")[1]
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3)


@JIT
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("other", ["sgd", "dense", "lazy"])
def test_another_optimizer_of_the_same_table(other, order, jit):
    """In the same step, before the one or after it."""
    layer = keras_adam.Embedding(6, 2, "ones")
    layer.build()
    table = layer.embeddings
    exact = keras_adam.Adam(0.1)
    second = {
        "sgd": lambda: keras.optimizers.SGD(0.3),
        "dense": lambda: keras_adam.Adam(0.02, sparse_updates="dense"),
        "lazy": lambda: keras_adam.Adam(0.02, sparse_updates="lazy"),
    }[other]()
    for optimizer in (second, exact):
        optimizer.build([table])

    @tf.function(jit_compile=jit)
    def step(ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(ids))
        g = tape.gradient(loss, table.value)
        for x in (second, exact) if order == "before" else (exact, second):
            x.apply([g], [table])

    def training(rate, lazy):
        return reference.Training(
            reference.Adam(),
            [np.ones((6, 2))],
            [np.float64],
            lazy=lazy,
            learning_rate=rate,
        )

    first, then, moved = training(0.1, False), training(0.02, other == "lazy"), 0.0
    # A step does not depend on the weights, so both come on top of one another. Row 0
    # is in each batch, and row t at step t, or has no moments: the exact optimizer adds
    # them to its batches, and a lazy one takes them for the batch's.
    for ids in ([1, 2, 2, 0], [0, 1, 1, 0], [5, 5, 0, 2], [4, 0, 4, 4]):
        step(tf.constant(ids))
        g = np.ones((len(ids), 2)), np.array(ids)
        first.apply([g])
        then.apply([g])
        moved += 0.3 * np.bincount(ids, minlength=6)[:, None]
    by_other = moved if other == "sgd" else 1 - then.thetas[0]
    truth = first.thetas[0] - by_other
    np.testing.assert_allclose(table.numpy(), truth, rtol=0, atol=3e-6)


@JIT
def test_a_step_goes_on_from_what_the_forward_pass_read(monkeypatch, jit):
    """It does not gather the rows once more."""
    gathers = []
    monkeypatch.setattr(rows, "gather", lambda *args: gathers.append(args))
    fit(compiled(adam(use_ema=True, weight_decay=0.1), jit=jit), 1)
    assert not gathers


def test_a_stateless_call_reads_the_values_it_is_given():
    model, other = compiled(adam()), compiled(adam())
    fit(model)
    x, _ = make_data()
    values = [v.value for v in other.trainable_variables]
    y, _ = model.stateless_call(values, [], x)
    np.testing.assert_allclose(y, other(x), rtol=1e-6)


@JIT
@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight_decay": 0.1},
        {"gradient_accumulation_steps": 3},
        {"use_ema": True, "ema_momentum": 0.9},
        {"global_clipnorm": 0.1},
        {"learning_rate": keras.optimizers.schedules.CosineDecay(0.01, 96)},
        {"amsgrad": True},
        {"beta_1": 0.9, "beta_2": 0.95},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_options_in_fit(kwargs, jit):
    kwargs = {"learning_rate": 0.01, **kwargs}
    found = []
    for mode in ("exact", "dense"):
        model = compiled(keras_adam.Adam(sparse_updates=mode, **kwargs), jit=jit)
        found.append((fit(model).history["loss"], model.get_weights()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)


@JIT
def test_a_rate_that_a_callback_lowers(jit):
    found = []
    for mode in ("exact", "dense"):
        model = compiled(adam(mode), jit=jit)
        lower = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 / 3**epoch)
        found.append(fit(model, callbacks=[lower]).history["loss"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("steps", ["eager", "graph"])
@JIT
def test_gradients_of_a_function_of_their_own(jit, steps):
    """Handed on to a step that is not compiled with them, as in loops by hand."""

    def train(model, optimizer, dense):
        optimizer.build(model.trainable_variables)
        x, y = make_data()

        @tf.function(jit_compile=jit)
        def gradients(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
            return tape.gradient(loss, [v.value for v in model.trainable_variables])

        def step(x, y):
            grads = gradients(x, y)
            if dense:
                grads = [tf.convert_to_tensor(g) for g in grads]
            optimizer.apply(grads, model.trainable_variables)

        run = step if steps == "eager" else tf.function(step)
        for i in range(0, len(x), 2):
            run(tf.constant(x[i : i + 2]), tf.constant(y[i : i + 2]))
        return model.get_weights()

    ours = keras_adam.Adam(0.01, epsilon=1e-7, epsilon_hat=True)
    ours = train(make_model(layer=keras_adam.Embedding), ours, dense=False)
    theirs = keras.optimizers.Adam(0.01, epsilon=1e-7)
    theirs = train(make_model(layer=keras.layers.Embedding), theirs, dense=True)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)


def test_an_eager_forward_pass_and_a_compiled_step():
    layer = keras_adam.Embedding(5, 2, "ones")
    layer.build()
    table = layer.embeddings
    optimizer = keras_adam.Adam(0.1)
    optimizer.build([table])
    step = tf.function(lambda g: optimizer.apply([g], [table]))
    captured = {}
    training = reference.Training(
        reference.Adam(), [np.ones((5, 2))], [np.float64], lazy=False, learning_rate=0.1
    )
    for ids in ([1, 2, 2], [0], [2, 4]):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(tf.constant(ids)))
        captured["g"] = tape.gradient(loss, table.value)
        step(captured["g"])
        training.apply([(np.ones((len(ids), 2)), np.array(ids))])
    np.testing.assert_allclose(table.numpy(), training.thetas[0], atol=2e-6)
    tf.function(lambda: optimizer.apply([captured["g"]], [table]))()
    training.apply([(np.ones((2, 2)), np.array([2, 4]))])
    np.testing.assert_allclose(table.numpy(), training.thetas[0], atol=2e-6)


@pytest.mark.parametrize("how", ["loop", "function"])
def test_one_gradient_applied_several_times(how):
    layer = keras_adam.Embedding(5, 2, "ones")
    layer.build()
    table = layer.embeddings
    optimizer = keras_adam.Adam(0.1)
    optimizer.build([table])

    @tf.function
    def step(ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(ids))
        g = tape.gradient(loss, table.value)

        def apply(i):
            optimizer.apply([g], [table])
            return i + 1

        if how == "loop":
            tf.while_loop(lambda i: i < 3, apply, [0])
        else:
            again = tf.function(apply)
            again(again(again(tf.constant(0))))

    training = reference.Training(
        reference.Adam(), [np.ones((5, 2))], [np.float64], lazy=False, learning_rate=0.1
    )
    for ids in ([1, 2, 2], [0, 1]):
        step(tf.constant(ids))
        for _ in range(3):
            training.apply([(np.ones((len(ids), 2)), np.array(ids))])
    np.testing.assert_allclose(table.numpy(), training.thetas[0], atol=2e-6)


def test_a_function_that_outlives_the_optimizer():
    layer = keras_adam.Embedding(5, 2, "ones")
    layer.build()
    optimizer = keras_adam.Adam(0.1)
    optimizer.build([layer.embeddings])
    read = tf.function(lambda ids: layer(ids))
    read(tf.constant([1]))
    for ids in ([0, 1], [2], [2]):
        g = tf.IndexedSlices(tf.ones((len(ids), 2)), tf.constant(ids), [5, 2])
        optimizer.apply([g], [layer.embeddings])
    del optimizer
    gc.collect()
    with tf.GradientTape() as tape:
        found = read(tf.constant([1]))
    np.testing.assert_array_equal(found, layer.embeddings.numpy()[1:2])
    g = tf.convert_to_tensor(tape.gradient(found, layer.embeddings.value))
    np.testing.assert_array_equal(g[:, 0], [0, 1, 0, 0, 0])


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("exact", "float32"),
        ("exact", "bfloat16"),
        ("lazy", "float32"),
        (None, "float32"),
    ],
)
def test_a_layer_mapped_over_examples(mode, dtype, execution):
    """Each with another number of rows. vectorized_map has no custom gradients."""
    layer = keras_adam.Embedding(6, 2, "ones", dtype=dtype)
    layer.build()
    table = layer.embeddings
    if mode:
        ema = mode == "lazy"  # or no row owes
        optimizer = keras_adam.Adam(0.125, sparse_updates=mode, use_ema=ema)
        optimizer.build([table])
        for ids in ([0, 1], [2, 3]):
            g = tf.IndexedSlices(tf.ones((2, 2), dtype), tf.constant(ids), [6, 2])
            optimizer.apply([g], [table])

    @EXECUTIONS[execution]
    def run(ids):
        with tf.GradientTape() as tape:
            rows = keras.ops.vectorized_map(layer, ids)
            loss = tf.reduce_sum(tf.cast(rows, tf.float32))
        g = tape.gradient(loss, table.value)
        return rows, tf.convert_to_tensor(tf.cast(g, tf.float32))

    ids = np.array([[0, 1, 1], [2, 3, 4]], np.int32)
    found, g = run(tf.constant(ids))
    if mode == "exact":
        assert np.all(table.value.numpy()[0] != found[0, 0])  # it owes
    truth = table.numpy().astype(np.float32)[ids]
    atol = 2e-7 if dtype == "float32" else 4e-3
    np.testing.assert_allclose(tf.cast(found, tf.float32), truth, rtol=0, atol=atol)
    np.testing.assert_array_equal(g[:, 0], [1, 2, 1, 1, 1, 0])


def test_run_eagerly():
    a = fit(compiled(adam(), run_eagerly=True), 1).history["loss"]
    b = fit(compiled(adam("dense"), jit=True), 1).history["loss"]
    np.testing.assert_allclose(a, b, rtol=1e-5)


@JIT
def test_a_constraint(jit):
    """Reads the whole table at each step, so the step is dense there."""
    found = []
    for mode in ("exact", "dense"):
        keras.utils.set_random_seed(0)
        layer = keras_adam.Embedding(20, 8, embeddings_constraint="unit_norm")
        model = keras.Sequential(
            [layer, keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
        )
        model.compile(optimizer=adam(mode), loss="mse", jit_compile=jit)
        found.append(fit(model).history["loss"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "mixed_float16"])
@JIT
def test_half_precision(dtype, jit):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        found = []
        for mode in ("exact", "dense"):
            model = compiled(adam(mode), jit=jit)
            assert model.layers[0](np.array([[1]])).dtype == dtype.split("_")[-1]
            found.append(fit(model).history["loss"])
    finally:
        keras.config.set_dtype_policy(policy)
    np.testing.assert_allclose(found[0], found[1], rtol=0.05)
    assert found[0][-1] < found[0][0]


@JIT
@pytest.mark.parametrize("layer", [keras.layers.Embedding, keras_adam.Embedding])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_repeats_of_half_precision_are_summed_in_float32(dtype, layer, jit):
    """5,001 ones are 256 in bfloat16; what float16 holds no more is no infinity."""
    layer = layer(4, 2, dtype=dtype)
    layer.build()
    optimizer = keras_adam.Adam(0.1)
    optimizer.build([layer.embeddings])

    @tf.function(jit_compile=jit)
    def step(ids, scale):
        with tf.GradientTape() as tape:
            loss = scale * tf.reduce_sum(tf.cast(layer(ids), "float32"))
        g = tape.gradient(loss, layer.embeddings.value)
        optimizer.apply([g], [layer.embeddings])

    m = np.zeros(4)
    for ids, scale in ((5001 * [0], 1.0), ([1, 3, 1], 2.0**15)):
        step(tf.constant(ids), tf.constant(scale))
        m = 0.9 * m + 0.1 * scale * np.bincount(ids, minlength=4)
    optimizer.settle()
    for column in optimizer._state(0)[0].numpy().T:
        np.testing.assert_allclose(column, m, rtol=1e-5)
    assert np.all(np.isfinite(layer.embeddings.numpy().astype(np.float32)))


def test_lora_and_quantization_are_keras_own():
    layer = keras_adam.Embedding(20, 8)
    with pytest.raises(ValueError, match="isn't yet built"):
        layer.enable_lora(2)
    layer.build()
    layer.enable_lora(2)
    assert layer(np.array([[1, 2]])).shape == (1, 2, 8)


@pytest.mark.parametrize("change", ["lora", "int8"])
def test_lora_and_quantization_begin_with_rows_as_they_are_now(change):
    x, y = make_data()
    found = []
    for mode in ("exact", "dense"):
        model = compiled(adam(mode))
        for i in range(8):
            model.train_on_batch(x[i : i + 1], y[i : i + 1])
        layer = model.layers[0]
        if change == "lora":
            layer.enable_lora(2)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers that have none
                model.quantize("int8")
            assert layer.quantization_mode == "int8"
            assert keras.backend.standardize_dtype(layer._embeddings.dtype) == "int8"
        found.append(layer(x).numpy())
    # A last digit of int8 may differ.
    atol = 1e-6 if change == "lora" else np.abs(found[1]).max() / 120
    np.testing.assert_allclose(*found, atol=atol)


@JIT
def test_saved_and_loaded(tmp_path, jit):
    x, _ = make_data()
    model = compiled(adam(), jit=jit)
    fit(model, 1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.jit_compile = jit
    assert type(loaded.layers[0]) is keras_adam.Embedding
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6
    )
    fit(model, 1)
    fit(loaded, 1)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mixed_layer_in_a_float64_model_has_states_of_float64_built():
    model = keras.Sequential(
        [
            keras.Input([4], dtype="int32"),
            keras_adam.Embedding(20, 8, dtype="mixed_float16"),
            keras.layers.GlobalAveragePooling1D(dtype="float64"),
            keras.layers.Dense(1, dtype="float64"),
        ]
    )
    model.compile(optimizer=adam(use_ema=True), loss="mse")
    model.predict(make_data()[0], verbose=0)
    optimizer = model.optimizer
    for i, dtype in enumerate(("float32", "float64", "float64")):
        average = optimizer._model_variables_moving_average[i]
        assert {x.dtype for x in (*optimizer._state(i), average)} == {dtype}


def test_a_mixed_layer_in_a_float32_model_reads_rows_as_they_are_now():
    """Keras would hand such a layer a cast copy of the table."""
    x, y = make_data()

    def layer(*args, **kwargs):
        return keras_adam.Embedding(*args, **{**kwargs, "dtype": "mixed_bfloat16"})

    model = compiled(adam(), layer)
    for i in range(6):
        model.train_on_batch(x[i : i + 1], y[i : i + 1])
    table = model.layers[0].embeddings
    found, direct = model.predict(x, verbose=0), model.layers[0](x)
    stale = table.value.numpy()
    model.optimizer.settle()
    assert np.abs(table.value.numpy() - stale).max() > 1e-2
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=2e-2)
    np.testing.assert_allclose(
        tf.cast(direct, "float32"), tf.cast(model.layers[0](x), "float32"), atol=1e-3
    )


def _step(model, optimizer, x, y, variables):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    optimizer.apply(tape.gradient(loss, variables), variables)
    return loss


@JIT
def test_a_step_without_the_table_may_be_compiled_first(jit):
    """As in alternating training: the layer has said that it goes by rows."""
    found = []
    for mode in ("exact", "dense"):
        model = make_model(layer=keras_adam.Embedding)
        optimizer = adam(mode)
        optimizer.build(model.trainable_variables)
        x, y = make_data(4)

        step = functools.partial(_step, model, optimizer, x, y)
        variables = model.trainable_variables
        few, every = (
            tf.function(functools.partial(step, v), jit_compile=jit)
            for v in (variables[1:], variables)
        )
        found.append([float(f()) for f in (few, every, few, few, every, every)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
