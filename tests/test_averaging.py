"""Section 7.2's average: rows over long gaps, whoever takes it, and its callback."""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from cases import MODES, OPTIMIZERS, make_data, make_model

import keras_adam
from keras_adam import ledger, tails
from keras_adam.averaging import EvaluateAverages

JIT = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
ROWS, WIDTH, RATE = 40, 4, 0.01


@pytest.mark.parametrize("g", [0.0, 0.5, 0.99, 0.99999, 1.0])
def test_share(g):
    """In float32, from the first step on."""
    for t in (1, 2, 10, 1000, 10**6):
        for n in (0, 1, t // 2, t):
            terms = [g ** float(i) for i in range(t)] if t <= 1000 else None
            truth = n / t if g == 1 else -np.expm1(n * np.log(g or 1e-300))
            if g < 1:
                truth /= -np.expm1(t * np.log(g or 1e-300))
            if terms:
                np.testing.assert_allclose(truth, sum(terms[:n]) / sum(terms))
            found = tails.share(g, tf.constant(n), tf.constant(float(t)))
            np.testing.assert_allclose(found, truth, rtol=1e-6)


@pytest.fixture
def unswept(monkeypatch):
    monkeypatch.setattr(ledger, "sweep", lambda rows, t: tf.zeros([0], tf.int32))


def stream(steps):
    """Row 0 at the first step and the last; each other row at ever longer gaps."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    gradients = []
    for step in range(steps):
        ids = (ROWS * rng.random(6) ** 4).astype(np.int32) + 1
        ids = np.where(ids < ROWS - 2, ids, 1)  # the last two never
        ids[0] = 0 if step in (0, steps - 1) else 1
        values = 10 ** rng.uniform(-6, 1, (6, WIDTH)) * rng.choice([-1, 1], (6, WIDTH))
        gradients.append((values.astype(np.float32), ids))
    return table, gradients


def oracle(rule, table, **kwargs):
    options = {"learning_rate": RATE, "lazy": False, **kwargs}
    return reference.Training(rule, [table], [np.float64], **options)


def pair(table, make=keras_adam.Adam, **kwargs):
    variable = keras.Variable(table)
    optimizer = make(**{"learning_rate": RATE, "use_ema": True, **kwargs})
    optimizer.build([variable])
    return optimizer, variable


def stepper(optimizer, variable, jit=False):
    @tf.function(jit_compile=jit)
    def apply(values, ids):
        slices = tf.IndexedSlices(values, ids, tf.constant(variable.shape.as_list()))
        optimizer.apply([slices], [variable])

    return lambda g: apply(*map(tf.constant, g))


def average(optimizer):
    return optimizer._model_variables_moving_average[0].numpy()


@JIT
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adam", "adam_hat", "amsgrad", "adamax"])
@pytest.mark.parametrize(
    "options",
    [{"ema_momentum": 0.9}, {"ema_momentum": 0.999, "weight_decay": 0.5}],
    ids=["0.9", "0.999_decay"],
)
def test_long_gaps(unswept, options, name, mode, jit):
    """Gaps past the window, and averages taken in the middle."""
    make, rule = OPTIMIZERS[name]
    table, gradients = stream(600)
    training = oracle(rule, table, lazy=mode == "lazy", **options)
    optimizer, variable = pair(table, make, sparse_updates=mode, **options)
    assert mode == "dense" or optimizer._last[0] is not None
    step = stepper(optimizer, variable, jit)
    for t, gradient in enumerate(gradients, 1):
        step(gradient)
        training.apply([gradient])
        if t in (1, 2, 250, 600):
            [truth] = training.averages
            np.testing.assert_allclose(average(optimizer), truth, rtol=0, atol=5e-6)
    np.testing.assert_allclose(variable.numpy(), training.thetas[0], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 20.0}], ids=["", "decay"])
@pytest.mark.parametrize("mode", MODES)
def test_momentum_1_is_the_mean(mode, options):
    table, gradients = stream(120)
    training = oracle(reference.Adam(), table, lazy=mode == "lazy", **options)
    optimizer, variable = pair(table, sparse_updates=mode, ema_momentum=1.0, **options)
    step, thetas = stepper(optimizer, variable), []
    for gradient in gradients:
        step(gradient)
        training.apply([gradient])
        thetas.append(training.thetas[0])
    np.testing.assert_allclose(average(optimizer), np.mean(thetas, axis=0), atol=2e-6)


@JIT
@pytest.mark.parametrize("rate", [0.01, 10.0])
def test_weights_that_decay_faster_than_the_average_forgets(unswept, rate, jit):
    """By e^-100, of which the average's float32 knows nothing."""
    options = {"ema_momentum": 0.999, "weight_decay": 0.3 / rate, "learning_rate": rate}
    table, gradients = stream(300)
    training = oracle(reference.Adam(), table, **options)
    optimizer, variable = pair(table, **options)
    step = stepper(optimizer, variable, jit)
    for gradient in gradients:
        step(gradient)
        training.apply([gradient])
    atol = 1e-6 * max(1, rate)
    np.testing.assert_allclose(average(optimizer), training.averages[0], atol=atol)
    np.testing.assert_allclose(variable.numpy(), training.thetas[0], atol=5 * atol)


@JIT
@pytest.mark.parametrize("mode", MODES)
def test_steps_without_a_gradient_and_with_a_dense_one(unswept, mode, jit):
    """A step that leaves a table as it is counts in its average, as any other."""
    table, gradients = stream(8)
    training = oracle(reference.Adam(), table, lazy=mode == "lazy", ema_momentum=0.7)
    variable, other = keras.Variable(table), keras.Variable(np.ones(3, np.float32))
    optimizer = keras_adam.Adam(
        RATE, sparse_updates=mode, use_ema=True, ema_momentum=0.7
    )
    optimizer.build([variable, other])

    @tf.function(jit_compile=jit)
    def apply(values, ids, dense):
        g = tf.IndexedSlices(values, ids, tf.constant([ROWS, WIDTH]))
        if dense:
            g = tf.convert_to_tensor(g)
        optimizer.apply([g, tf.ones(3)], [variable, other])

    @tf.function(jit_compile=jit)
    def apply_none():
        optimizer.apply([tf.ones(3)], [other])

    for i, (values, ids) in enumerate(gradients):
        if i in (3, 4, 7):
            apply_none()
            training.calls += 1
            training._average(training.calls)
            continue
        apply(tf.constant(values), tf.constant(ids), i == 5)
        gradient = (values, ids)
        if i == 5:
            gradient = reference.densify(gradient, table.shape)[0]
        training.apply([gradient])
    np.testing.assert_allclose(average(optimizer), training.averages[0], atol=2e-6)


@JIT
@pytest.mark.parametrize("every", [None, 3], ids=["", "overwrite"])
def test_two_optimizer_steps_for_one_forward_pass(unswept, every, jit):
    """The first is none for the second table, and yet moves its average."""
    layers = [keras_adam.Embedding(4, 2, "ones") for _ in range(2)]
    for layer in layers:
        layer.build()
    tables = [layer.embeddings for layer in layers]
    options = {"ema_momentum": 0.5, "ema_overwrite_frequency": every}
    optimizer = keras_adam.Adam(RATE, use_ema=True, **options)
    optimizer.build(tables)

    @tf.function(jit_compile=jit)
    def step(ids):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(layer(ids) ** 2) for layer in layers])
        gradients = tape.gradient(loss, [x.value for x in tables])
        for g, table in zip(gradients, tables):
            optimizer.apply([g], [table])

    rules = [reference.Adam() for _ in tables]
    thetas = [np.ones((4, 2)) for _ in tables]
    states = [rule.init(x) for rule, x in zip(rules, thetas)]
    uncorrected = [np.zeros((4, 2)) for _ in tables]
    t = 0
    for ids in ([0, 1], [1, 2], [0, 1], [3, 3], [0, 1]):
        step(tf.constant(ids))
        counts = np.bincount(ids, minlength=4)[:, None]
        gradients = [2 * counts * x for x in thetas]
        for k, g in enumerate(gradients):
            t += 1
            thetas[k] = thetas[k] - rules[k].step(states[k], g, RATE, t)
            uncorrected = [(u + x) / 2 for u, x in zip(uncorrected, thetas)]
            if every and t % every == 0:
                thetas = [u / (1 - 0.5**t) for u in uncorrected]
    for k, table in enumerate(tables):
        np.testing.assert_allclose(table.numpy(), thetas[k], atol=2e-6)
        found = optimizer._model_variables_moving_average[k].numpy()
        np.testing.assert_allclose(found, uncorrected[k] / (1 - 0.5**t), atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_assigned_weights_count_from_then_on(unswept, mode):
    table, gradients = stream(6)
    training = oracle(reference.Adam(), table, lazy=mode == "lazy", ema_momentum=0.7)
    optimizer, variable = pair(table, sparse_updates=mode, ema_momentum=0.7)
    step = stepper(optimizer, variable)
    for i, gradient in enumerate(gradients):
        if i == 4:
            variable.assign(np.full_like(table, 3.0))
            training.thetas = [np.full(table.shape, 3.0)]
        step(gradient)
        training.apply([gradient])
    np.testing.assert_allclose(average(optimizer), training.averages[0], atol=2e-6)


@JIT
@pytest.mark.parametrize("mode", MODES)
def test_constrained_weights_are_averaged(mode, jit):
    """What the constraint left, so that the average holds to it too."""
    table, gradients = stream(12)
    table = 0.05 * np.abs(table)
    training = oracle(
        *(reference.Adam(), table),
        lazy=mode == "lazy",
        ema_momentum=0.7,
        constraint=lambda x: np.maximum(x, 0),
    )
    variable = keras.Variable(table)
    variable.constraint = keras.constraints.NonNeg()
    optimizer = keras_adam.Adam(
        RATE, sparse_updates=mode, use_ema=True, ema_momentum=0.7
    )
    optimizer.build([variable])
    step = stepper(optimizer, variable, jit)
    for gradient in gradients:
        step(gradient)
        training.apply([gradient])
    assert np.any(training.thetas[0] == 0)
    np.testing.assert_allclose(variable.numpy(), training.thetas[0], atol=2e-6)
    np.testing.assert_allclose(average(optimizer), training.averages[0], atol=2e-6)
    optimizer.finalize_variable_values([variable])
    assert variable.numpy().min() >= 0


@JIT
@pytest.mark.parametrize("mode", MODES)
def test_resumed_bit_for_bit(mode, jit):
    table, gradients = stream(40)
    optimizer, variable = pair(table, sparse_updates=mode)
    step = stepper(optimizer, variable, jit)
    for gradient in gradients[:20]:
        step(gradient)
    store = {}
    optimizer.save_own_variables(store)
    again, copy = pair(variable.numpy(), sparse_updates=mode)
    again.load_own_variables(store)
    step_again = stepper(again, copy, jit)
    for gradient in gradients[20:]:
        step(gradient)
        step_again(gradient)
    np.testing.assert_array_equal(variable.numpy(), copy.numpy())
    np.testing.assert_array_equal(average(optimizer), average(again))


@pytest.mark.parametrize("source", [*MODES, "keras"])
@pytest.mark.parametrize("mode", MODES)
def test_a_state_loads_into_other_modes(mode, source):
    """Its average, too, goes on from there; also into one that has trained."""
    table, gradients = stream(30)
    if source == "keras":
        first = keras.optimizers.Adam(RATE, epsilon=1e-8, use_ema=True)
        variable = keras.Variable(table)
        first.build([variable])
    else:
        first, variable = pair(table, sparse_updates=source)
    step = stepper(first, variable)
    for gradient in gradients[:20]:
        step(gradient)
    store = {}
    first.save_own_variables(store)
    theta, a = variable.numpy(), average(first)
    then, copy = pair(table, sparse_updates=mode)
    stepper(then, copy)(gradients[0])
    copy.assign(theta)
    then.load_own_variables(store)
    np.testing.assert_array_equal(copy.numpy(), theta)
    np.testing.assert_array_equal(average(then), a)

    training = oracle(reference.Adam(), table, lazy=mode == "lazy", ema_momentum=0.99)
    training.thetas, training.calls = [theta.astype(float)], 20
    m, v = (x.numpy().astype(float) for x in then._state(0))
    training.states = [{"m": m, "v": v}]
    training.uncorrected = [a * (1 - 0.99**20)]
    step = stepper(then, copy)
    for gradient in gradients[20:]:
        step(gradient)
        training.apply([gradient])
    np.testing.assert_allclose(average(then), training.averages[0], atol=2e-6)


def test_no_step_no_average():
    """Accumulated gradients that made no update yet leave the weights alone."""
    table, gradients = stream(2)
    optimizer, variable = pair(table, gradient_accumulation_steps=3)
    step = stepper(optimizer, variable)
    for gradient in gradients:
        step(gradient)
    optimizer.finalize_variable_values([variable])
    np.testing.assert_array_equal(variable.numpy(), table)


# `fit`.


def compiled(mode="exact", wrap=lambda x: x, jit=False, layer=keras_adam.Embedding):
    model = make_model(layer=layer)
    optimizer = keras_adam.Adam(
        0.05, sparse_updates=mode, use_ema=True, ema_momentum=0.9
    )
    model.compile(optimizer=wrap(optimizer), loss="mse", jit_compile=jit)
    return model


def averages(model):
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return [x.numpy() for x in optimizer._model_variables_moving_average]


class Watch(keras.callbacks.Callback):
    """The weights before and after each evaluation, and in it the averages."""

    def __init__(self):
        super().__init__()
        self.kept, self.inside, self.averages = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        # After the evaluation: what it should have found.
        np.testing.assert_array_equal(self.inside[-1][0], averages(self.model)[0])
        for a, b in zip(self.model.get_weights(), self.kept[-1]):
            np.testing.assert_array_equal(a, b)
        self.averages.append((averages(self.model), logs["val_loss"]))

    def on_test_batch_begin(self, batch, logs=None):
        self.inside.append([x.numpy() for x in self.model.weights])

    def on_train_batch_end(self, batch, logs=None):
        if batch == 5:  # the last of an epoch
            self.kept.append(self.model.get_weights())


WRAPS = {"": lambda x: x, "scaled": keras.optimizers.LossScaleOptimizer}


def fit(model, *callbacks, epochs=3):
    x, y = make_data()
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=list(callbacks),
    )
    return model


def loss_of(weights):
    """Of weights, by NumPy."""
    ids, y = make_data()
    table, kernel, bias = (w.astype(float) for w in weights)
    return np.mean((table[ids].mean(axis=1) @ kernel + bias - y) ** 2)


@JIT
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("mode", MODES)
def test_evaluate_averages(mode, wrap, jit):
    watch = Watch()
    model = fit(compiled(mode, WRAPS[wrap], jit), EvaluateAverages(), watch)
    assert len(watch.averages) == 3
    for weights, loss in watch.averages:
        np.testing.assert_allclose(loss, loss_of(weights), rtol=1e-5)
    for a, b in zip(model.get_weights(), averages(model)):  # Keras's end of `fit`
        np.testing.assert_array_equal(a, b)
    x, y = make_data()
    before = model.get_weights()
    model.layers[-1].bias.assign([5.0])
    found = model.predict(x, verbose=0, callbacks=[EvaluateAverages()])
    np.testing.assert_allclose(np.mean((found - y) ** 2), loss_of(before), rtol=1e-5)
    assert model.layers[-1].bias.numpy() == 5.0


class Settle(keras.callbacks.Callback):
    def on_test_begin(self, logs=None):
        self.model.optimizer.settle()


@JIT
@pytest.mark.parametrize("layer", [keras.layers.Embedding, keras_adam.Embedding])
@pytest.mark.parametrize("mode", MODES)
def test_keras_swap_ema_weights(mode, layer, jit):
    """Keras's own callback, with either kind of layer."""
    kept = []

    class Keep(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            kept.append([x.numpy() for x in self.model.trainable_variables])

        def on_epoch_end(self, epoch, logs=None):
            np.testing.assert_allclose(logs["val_loss"], loss_of(kept[-1]), rtol=1e-4)
            for a, b in zip(kept[-1], averages(self.model)):
                np.testing.assert_allclose(a, b, atol=1e-6)

    swapped = fit(
        compiled(mode, jit=jit, layer=layer), keras.callbacks.SwapEMAWeights(), Keep()
    )
    # Swapping settles, and Keras's layer then reads rows that owe nothing.
    plain = fit(compiled(mode, jit=jit, layer=layer), Settle())
    for a, b in zip(swapped.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-5)


class Stop(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["fit", "evaluate", "dropped", "another"])
@pytest.mark.parametrize("mode", ["exact", "dense"])
def test_an_interrupted_evaluation(mode, how):
    model, callback = compiled(mode), EvaluateAverages()
    x, y = make_data()
    for i in range(6):
        model.train_on_batch(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
    before = model.get_weights()
    with pytest.raises(KeyboardInterrupt):
        model.evaluate(x, y, verbose=0, callbacks=[callback, Stop()])
    assert np.abs(model.get_weights()[0] - before[0]).max() > 1e-3
    if how == "fit":
        model.stop_training = False
        callback.set_model(model)
    elif how == "another":
        other = EvaluateAverages()
        model.evaluate(x, y, verbose=0, callbacks=[other])  # is no training
        assert np.abs(model.get_weights()[0] - before[0]).max() > 1e-3
        other.on_train_begin()
    elif how == "evaluate":
        model.evaluate(x, y, verbose=0, callbacks=[callback])
    else:
        callback._kept = None  # as when it ends
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


@JIT
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_owe_are_evaluated_up_to_date(mode, jit):
    """Nothing but the callback settles here."""
    losses = []
    x, y = make_data()
    for settle in (False, True):
        model = compiled(mode, jit=jit)
        for i in range(6):  # the rows of a batch each
            model.train_on_batch(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
        if settle:
            model.optimizer.settle()
        callback = EvaluateAverages()
        losses.append(model.evaluate(x, y, verbose=0, callbacks=[callback]))
    a = averages(model)
    np.testing.assert_allclose(losses, [loss_of(a)] * 2, rtol=1e-5)


def interrupted():
    model, callback = compiled(), EvaluateAverages()
    x, y = make_data()
    for i in range(6):
        model.train_on_batch(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
    with pytest.raises(KeyboardInterrupt):
        model.evaluate(x, y, verbose=0, callbacks=[callback, Stop()])
    return model, callback


def test_weights_trained_or_loaded_after_an_interruption_stay():
    model, callback = interrupted()
    x, y = make_data()
    model.train_on_batch(x, y)
    trained = model.get_weights()
    callback.set_model(model)
    for a, b in zip(model.get_weights(), trained):
        np.testing.assert_array_equal(a, b)

    model, callback = interrupted()
    loaded = [w + 1 for w in model.get_weights()]
    model.set_weights(loaded)
    callback._kept = None  # as when it ends
    for a, b in zip(model.get_weights(), loaded):
        np.testing.assert_array_equal(a, b)


def test_one_of_two_callbacks_ends_while_the_other_evaluates():
    model, callback = interrupted()
    x, y = make_data()
    inside, kept, during = model.get_weights(), [callback], []

    class End(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            if kept:
                kept.pop()._kept = None
            during.append(model.get_weights())

    loss = model.evaluate(x, y, verbose=0, callbacks=[EvaluateAverages(), End()])
    np.testing.assert_allclose(loss, loss_of(inside), rtol=1e-5)
    for a, b in zip(during[-1], inside):
        np.testing.assert_array_equal(a, b)
    assert np.abs(model.get_weights()[0] - inside[0]).max() > 1e-3  # put back


def test_an_evaluation_within_another():
    model, x, y = compiled(), *make_data()
    model.train_on_batch(x[:8], y[:8])
    before, during = model.get_weights(), []

    class Within(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            model.predict(x, verbose=0, callbacks=[EvaluateAverages()])
            during.append(model.get_weights())

    model.evaluate(x, y, verbose=0, callbacks=[EvaluateAverages(), Within()])
    for a, b, average in zip(model.get_weights(), before, averages(model)):
        np.testing.assert_array_equal(a, b)
        assert all(np.array_equal(w, average) for w in [x.pop(0) for x in during])


def test_nothing_is_put_back_by_a_traced_step():
    model, callback = interrupted()
    inside = model.get_weights()

    @tf.function(autograph=False)
    def step():
        callback._kept = None  # as the garbage collector may at any time
        return tf.constant(0)

    step()
    weights = [w + 1 for w in model.get_weights()]
    assert np.abs(weights[0] - 1 - inside[0]).max() > 1e-3  # put back, once
    model.set_weights(weights)
    step()
    for a, b in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(use_ema=True),
        lambda: keras_adam.Adam(),
        lambda: keras.optimizers.LossScaleOptimizer(keras_adam.Adam()),
    ],
)
def test_another_optimizer_is_refused(optimizer):
    model = make_model()
    model.compile(optimizer=optimizer(), loss="mse")
    with pytest.raises(ValueError, match=r"EvaluateAverages.*use_ema=True.*Received"):
        fit(model, EvaluateAverages())


def test_half_precision_weights_come_back():
    """SwapEMAWeights cannot add float32 averages to them, and says so."""
    model = make_model(dtype="bfloat16")
    model.compile(optimizer=keras_adam.Adam(0.05, use_ema=True), loss="mse")
    x, y = make_data()
    model.train_on_batch(x, y)
    before = model.get_weights()
    model.evaluate(x, y, verbose=0, callbacks=[EvaluateAverages()])
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)
    with pytest.raises((TypeError, ValueError), match="bfloat16"):
        model.evaluate(x, y, verbose=0, callbacks=[keras.callbacks.SwapEMAWeights()])
