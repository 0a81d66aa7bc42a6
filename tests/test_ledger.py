"""Exact mode over long trainings, and whoever reads or writes a table in between."""

import functools
import gc
import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from cases import EXECUTIONS, make_data, make_model

import keras_adam
from keras_adam import ledger

JIT = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
ROWS, WIDTH, STEPS, IDS = 5000, 16, 2000, 64


class WarmUpCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A rate of 0.01 after 200 steps, falling to 0 at step 2,000."""

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        fall = 0.5 * (1 + keras.ops.cos(np.pi * (step - 200) / (STEPS - 200)))
        return 0.01 * keras.ops.where(step < 200, step / 200, fall)

    def get_config(self):
        return {}


def warm_up_cosine(step):
    fall = 0.5 * (1 + np.cos(np.pi * (step - 200) / (STEPS - 200)))
    return 0.01 * (step / 200 if step < 200 else fall)


def stream(steps=STEPS):
    """Zipf ids with repeats, and gradients of 1e-10 to 1e2."""
    rng = np.random.default_rng(0)
    cdf = np.cumsum(1 / np.arange(1, ROWS + 1))
    names = rng.permutation(ROWS)
    table = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    gradients = []
    for _ in range(steps):
        ids = names[np.searchsorted(cdf, rng.random(IDS) * cdf[-1])]
        values = 10 ** rng.uniform(-10, 2, (IDS, WIDTH))
        values *= rng.choice([-1, 1], (IDS, WIDTH))
        gradients.append((values.astype(np.float32), ids.astype(np.int32)))
    return table, gradients


def go_on(optimizer, variable, gradients, jit, between=lambda step: None):
    @tf.function(jit_compile=jit)
    def apply(values, ids):
        slices = tf.IndexedSlices(values, ids, tf.constant([ROWS, WIDTH]))
        optimizer.apply([slices], [variable])

    for step, (values, ids) in enumerate(gradients):
        between(step)
        apply(tf.constant(values), tf.constant(ids))


def train(optimizer, table, gradients, jit, **kwargs):
    variable = keras.Variable(table)
    optimizer.build([variable])
    go_on(optimizer, variable, gradients, jit, **kwargs)
    return variable


def oracle(table, gradients, rule=None, rate=warm_up_cosine, weight_decay=0.0):
    training = reference.Training(
        rule or reference.Adam(),
        [table],
        [np.float64],
        lazy=False,
        learning_rate=rate,
        weight_decay=weight_decay,
    )
    for g in gradients:
        training.apply([g])
    return training.thetas[0]


LONG = {
    "adam": (keras_adam.Adam, {}, reference.Adam()),
    "adam_hat": (
        keras_adam.Adam,
        {"epsilon": 1e-7, "epsilon_hat": True},
        reference.Adam(epsilon=1e-7, epsilon_hat=True),
    ),
    "amsgrad": (keras_adam.Adam, {"amsgrad": True}, reference.Adam(amsgrad=True)),
    "adamax": (keras_adam.AdaMax, {}, reference.AdaMax()),
}


@pytest.mark.parametrize("weight_decay", [None, 0.01])
@pytest.mark.parametrize("name", LONG)
def test_long_training(name, weight_decay, monkeypatch, capsys):
    """As near to the oracle as dense Adam in float32; lazy beside them.

    Also where no sweep shortens the gaps. At step 1,200 the rate is set by hand.
    """
    cls, kwargs, rule = LONG[name]
    table, gradients = stream()

    def rate(step):
        return warm_up_cosine(step) if step < 1200 else 3e-3

    truth = oracle(table, gradients, rule, rate, weight_decay or 0.0)

    def error(mode, jit):
        optimizer = cls(1.0, sparse_updates=mode, weight_decay=weight_decay, **kwargs)

        def between(step):
            if step <= 1200:
                optimizer.learning_rate = rate(step)

        variable = train(optimizer, table, gradients, jit, between=between)
        return np.abs(variable.numpy() - truth).max()

    errors = {mode: error(mode, False) for mode in ("dense", "lazy", "exact")}
    errors["exact, xla"] = error("exact", True)
    if weight_decay and name in ("adam", "adamax"):
        monkeypatch.setattr(ledger, "sweep", lambda rows, t: tf.zeros([0], tf.int32))
        for jit in (False, True):
            errors[f"exact, unswept, {jit=}"] = error("exact", jit)
    with capsys.disabled():
        print(f"\n{name} {weight_decay=} largest error: {errors}")
    assert errors.pop("lazy") > 1e-2
    dense = errors.pop("dense")
    assert all(e <= 2 * dense + 1e-6 for e in errors.values())


@JIT
def test_a_schedule_given_as_such(jit):
    table, gradients = stream(600)
    truth = oracle(table, gradients)
    optimizer = keras_adam.Adam(WarmUpCosine())
    variable = train(optimizer, table, gradients, jit)
    np.testing.assert_allclose(variable.numpy(), truth, atol=1e-5)


RESUME = """
import sys, numpy as np, test_ledger, keras, keras_adam, tensorflow as tf
folder, jit = sys.argv[1], sys.argv[2] == "True"
table, gradients = test_ledger.stream()
optimizer, variable = test_ledger.saved_pair(table)
state = np.load(folder + "/state.npz")
variable.assign(state["table"])
optimizer.load_own_variables({k: v for k, v in state.items() if k != "table"})
test_ledger.go_on(optimizer, variable, gradients[700:], jit)
np.save(folder + "/resumed.npy", variable.numpy())
"""


def saved_pair(table):
    optimizer = keras_adam.Adam(WarmUpCosine(), weight_decay=0.01)
    variable = keras.Variable(table)
    optimizer.build([variable])
    return optimizer, variable


@JIT
def test_resumed_in_a_new_process(tmp_path, jit):
    """Saved at step 700 of 2,000: bit for bit the run that saved and went on."""
    table, gradients = stream()
    optimizer, variable = saved_pair(table)
    go_on(optimizer, variable, gradients[:700], jit)
    store = {"table": variable.numpy()}
    optimizer.save_own_variables(store)
    np.savez(tmp_path / "state.npz", **store)
    go_on(optimizer, variable, gradients[700:], jit)
    went_on = variable.numpy()

    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    subprocess.run(
        [sys.executable, "-c", RESUME, str(tmp_path), str(jit)],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    np.testing.assert_array_equal(np.load(tmp_path / "resumed.npy"), went_on)

    optimizer, variable = saved_pair(table)
    go_on(optimizer, variable, gradients, jit)
    truth = oracle(table, gradients, weight_decay=0.01)
    for other in (went_on, variable.numpy()):
        np.testing.assert_allclose(other, truth, rtol=0, atol=2e-5)


# Small tables, by hand.

SHAPE = tf.constant([6, 2])


def slices(ids):
    return tf.IndexedSlices(tf.ones((len(ids), 2)), tf.constant(ids), SHAPE)


def pair(**kwargs):
    variable = keras.Variable(np.ones((6, 2), np.float32), name="table")
    optimizer = keras_adam.Adam(0.1, **kwargs)
    optimizer.build([variable])
    return optimizer, variable


def dense(steps, start=1.0, weight_decay=0.0):
    """The oracle after steps whose ids are given, None being a dense 0."""
    training = reference.Training(
        reference.Adam(),
        [np.full((6, 2), start)],
        [np.float64],
        lazy=False,
        learning_rate=0.1,
        weight_decay=weight_decay,
    )
    for ids in steps:
        training.apply([(np.ones((len(ids), 2)), np.array(ids, int))])
    return training.thetas[0]


def close(variable, truth):
    np.testing.assert_allclose(variable.numpy(), truth, rtol=0, atol=2e-6)


@pytest.fixture
def unswept(monkeypatch):
    monkeypatch.setattr(ledger, "sweep", lambda rows, t: tf.zeros([0], tf.int32))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_settle_pays_once(unswept, execution):
    optimizer, variable = pair(weight_decay=0.1)
    run = EXECUTIONS[execution](lambda g: optimizer.apply([g], [variable]))
    steps = [[0, 1], [2, 2, 3], [0], [3], [3]]
    for ids in steps:
        run(slices(ids))
    stale = variable.value.numpy()
    truth = dense(steps, weight_decay=0.1)
    assert np.abs(stale - truth).max() > 1e-2
    optimizer.settle()
    first = variable.value.numpy()
    np.testing.assert_allclose(first, truth, rtol=0, atol=2e-6)
    optimizer.settle()
    np.testing.assert_array_equal(variable.value.numpy(), first)
    run(slices([1]))
    close(variable, dense([*steps, [1]], weight_decay=0.1))


def apply(optimizer, variables, gradients):
    optimizer.apply(gradients, variables)


@JIT
def test_a_step_without_the_table_is_no_step_for_it(unswept, jit):
    """As in Keras, where a variable without a gradient stands still."""
    table = keras.Variable(np.ones((6, 2), np.float32))
    other = keras.Variable(np.ones(3, np.float32))
    models = {}
    for mode in ("exact", "dense"):
        optimizer = keras_adam.Adam(0.1, sparse_updates=mode)
        pair = [keras.Variable(table), keras.Variable(other)]
        optimizer.build(pair)

        both, one = (
            tf.function(functools.partial(apply, optimizer, v), jit_compile=jit)
            for v in (pair, pair[1:])
        )
        for ids in ([0, 1], [1], None, [2], None, None, [0]):
            if ids is None:
                one([tf.ones(3)])
            else:
                both([slices(ids), tf.ones(3)])
        models[mode] = pair[0].numpy()
    np.testing.assert_allclose(models["exact"], models["dense"], rtol=0, atol=1e-6)


def test_many_large_tables_do_not_warn(caplog):
    """What brings them to date is compiled, for each."""
    shape = 1000, 1010
    variables = [keras.Variable(np.ones(shape, np.float32)) for _ in range(6)]
    optimizer = keras_adam.Adam(0.1)
    optimizer.build(variables)
    truth = reference.Training(
        *(reference.Adam(), [np.ones((2, 1))], ["float32"]),
        lazy=False,
        learning_rate=0.1,
    )
    for row in (1, 2):
        g = tf.IndexedSlices(tf.ones([1, 1010]), tf.constant([row]), tf.constant(shape))
        optimizer.apply([g] * 6, variables)
        truth.apply([(np.ones((1, 1)), [row - 1])])
    optimizer.settle()
    for variable in variables:
        now = variable.numpy()[1:3, :1]
        np.testing.assert_allclose(now, truth.thetas[0], rtol=0, atol=2e-6)
    assert "retracing" not in caplog.text


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dense_and_sparse_gradients_of_one_table(unswept, execution):
    optimizer, variable = pair()
    run = EXECUTIONS[execution](lambda g: optimizer.apply([g], [variable]))
    for ids in ([0, 1], [1], [2]):
        run(slices(ids))
    run(tf.convert_to_tensor(slices([3, 3])))
    run(slices([1]))
    close(variable, dense([[0, 1], [1], [2], [3, 3], [1]]))


def test_dense_steps_before_the_first_sparse_one(unswept):
    optimizer, variable = pair()
    optimizer.apply([tf.convert_to_tensor(slices([0, 4]))], [variable])
    for ids in ([1], [2]):
        optimizer.apply([slices(ids)], [variable])
    close(variable, dense([[0, 4], [1], [2]]))


def test_a_compiled_dense_step_before_the_first_sparse_one_is_refused():
    optimizer, variable = pair()
    run = tf.function(lambda g: optimizer.apply([g], [variable]))
    run(tf.convert_to_tensor(slices([0, 4])))
    with pytest.raises(ValueError, match=r'sparse gradient.*"dense", or "lazy"'):
        run(slices([1]))


def test_two_exact_optimizers_of_one_table_are_refused(unswept):
    first, variable = pair()
    for ids in ([0], [1]):
        first.apply([slices(ids)], [variable])
    second = keras_adam.Adam(0.1)
    second.build([variable])  # settles what the first one owes
    np.testing.assert_allclose(
        variable.value.numpy(), dense([[0], [1]]), rtol=0, atol=2e-6
    )
    second.apply([slices([2])], [variable])
    with pytest.raises(ValueError, match=r"table.*two optimizers"):
        first.apply([slices([0])], [variable])


@JIT
def test_steps_compiled_for_another_optimizer_lose_nothing(unswept, jit):
    """They are not refused; what they owe is paid all the same."""
    first, variable = pair()
    step = tf.function(lambda g: first.apply([g], [variable]), jit_compile=jit)
    step(slices([0]))
    second = keras_adam.Adam(0.1)
    second.build([variable])
    for ids in ([1], [1]):
        step(slices(ids))
    steps = [[0], [1], [1]]
    assert np.abs(variable.value.numpy() - dense(steps)).max() > 1e-2
    close(variable, dense(steps))


def test_optimizers_one_after_the_other(unswept):
    """What the one before owes is paid when the next is built; both live."""
    x, y = make_data()
    found = []
    for mode in ("exact", "dense"):
        model = make_model(layer=keras_adam.Embedding)
        before = []
        for rate in (0.1, 0.01):
            before.append(keras_adam.Adam(rate, sparse_updates=mode))
            model.compile(optimizer=before[-1], loss="mse")
            model.fit(x, y, batch_size=2, shuffle=False, verbose=0)
            for i in range(3):
                model.train_on_batch(x[i : i + 2], y[i : i + 2])
            model.evaluate(x, y, verbose=0)
        found.append(model.get_weights())
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)


@pytest.mark.parametrize("how", ["numpy", "array", "get_weights", "save", "settle"])
def test_whoever_takes_the_values_gets_them_to_date(unswept, tmp_path, how):
    model = make_model()
    model.compile(optimizer=keras_adam.Adam(0.01), loss="mse")
    x, y = make_data()
    for i in range(6):  # train_on_batch does not end as fit does
        model.train_on_batch(x[i : i + 2], y[i : i + 2])
    table = model.layers[0].embeddings
    stale = table.value.numpy()
    if how == "numpy":
        found = table.numpy()
    elif how == "array":
        found = np.array(table)
    elif how == "get_weights":
        found = model.get_weights()[0]
    elif how == "settle":
        model.optimizer.settle()
        found = table.value.numpy()
    else:
        model.save(tmp_path / "model.keras")
        found = keras.models.load_model(tmp_path / "model.keras").get_weights()[0]
    assert np.abs(found - stale).max() > 1e-3
    np.testing.assert_array_equal(found, table.value.numpy())


def test_an_optimizer_that_is_dropped_pays(unswept):
    optimizer, variable = pair()
    for ids in ([0], [1]):
        optimizer.apply([slices(ids)], [variable])
    del optimizer
    gc.collect()
    np.testing.assert_allclose(
        variable.value.numpy(), dense([[0], [1]]), rtol=0, atol=2e-6
    )


def test_a_state_just_loaded_is_settled(unswept):
    """Before any step of the optimizer that it was loaded into."""
    optimizer, variable = pair()
    steps = [[0, 1], [2], [3]]
    for ids in steps:
        optimizer.apply([slices(ids)], [variable])
    other, copy = pair()
    with tempfile.TemporaryDirectory() as folder:
        path = tf.train.Checkpoint(o=optimizer, v=variable.value).write(f"{folder}/c")
        tf.train.Checkpoint(o=other, v=copy.value).read(path).assert_consumed()
    assert np.abs(copy.value.numpy() - dense(steps)).max() > 1e-2
    other.settle()
    np.testing.assert_allclose(copy.value.numpy(), dense(steps), rtol=0, atol=2e-6)


def test_assigned_values_owe_nothing(unswept):
    """Momentum goes on from there, as with dense Adam."""
    optimizer, variable = pair()
    for ids in ([0], [1]):
        optimizer.apply([slices(ids)], [variable])
    variable.assign(np.full((6, 2), 5.0))
    np.testing.assert_array_equal(variable.numpy(), 5.0)
    optimizer.apply([slices([2])], [variable])
    other, whole = pair(sparse_updates="dense")
    for ids in ([0], [1]):
        other.apply([slices(ids)], [whole])
    whole.assign(np.full((6, 2), 5.0))
    other.apply([slices([2])], [whole])
    close(variable, whole.numpy())


class Seen(keras.callbacks.Callback):
    """What ModelCheckpoint and the like would write at each epoch's end."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())


@pytest.mark.parametrize("layer", [keras.layers.Embedding, keras_adam.Embedding])
@JIT
def test_callbacks_see_and_write_what_dense_adam_would(tmp_path, jit, layer):
    """ModelCheckpoint, BackupAndRestore, EarlyStopping, and a resumed `fit`."""
    x, y = make_data()

    def model(mode):
        model = make_model(layer=layer)
        optimizer = keras_adam.Adam(0.01, sparse_updates=mode)
        model.compile(optimizer=optimizer, loss="mse", jit_compile=jit)
        return model

    seen = Seen()
    written = str(tmp_path / "{epoch}.weights.h5")
    exact = model("exact")
    exact.fit(
        x,
        y,
        batch_size=2,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.ModelCheckpoint(written, save_weights_only=True),
            keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras")),
            keras.callbacks.EarlyStopping(restore_best_weights=True, monitor="loss"),
            seen,
        ],
    )
    for epoch in (1, 2, 3):
        other = model("exact")
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / f"{epoch}.weights.h5")
        loaded = keras.models.load_model(tmp_path / f"{epoch}.keras")
        for a, b, c in zip(
            seen.weights[epoch - 1], other.get_weights(), loaded.get_weights()
        ):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)
    loaded = keras.models.load_model(tmp_path / "1.keras")
    loaded.jit_compile = jit
    again = Seen()
    loaded.fit(
        x, y, batch_size=2, epochs=2, shuffle=False, verbose=0, callbacks=[again]
    )
    for a, b in zip(again.weights[1], seen.weights[2], strict=True):
        np.testing.assert_array_equal(a, b)

    if layer is keras_adam.Embedding:
        dense, whole = model("dense"), Seen()
        dense.fit(
            x, y, batch_size=2, epochs=3, shuffle=False, verbose=0, callbacks=[whole]
        )
        for a, b in zip(seen.weights, whole.weights, strict=True):
            for c, d in zip(a, b):
                np.testing.assert_allclose(c, d, rtol=0, atol=3e-6)


def test_backup_and_restore(tmp_path):
    """A `fit` that stops in its second epoch and starts again."""
    x, y = make_data()

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def fit(model, *callbacks):
        model.fit(
            x,
            y,
            batch_size=2,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[keras.callbacks.BackupAndRestore(tmp_path), *callbacks],
        )

    def model():
        model = make_model(layer=keras_adam.Embedding)
        model.compile(optimizer=keras_adam.Adam(0.01), loss="mse")
        return model

    stopped = model()
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, Stop())
    again = model()
    fit(again)
    once = model()
    once.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    assert int(again.optimizer.iterations) == int(once.optimizer.iterations) == 48
    for a, b in zip(again.get_weights(), once.get_weights()):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["assign_add", "assign_sub"])
def test_added_values_come_on_top_of_what_was_owed(unswept, how):
    optimizer, variable = pair()
    for ids in ([0], [1]):
        optimizer.apply([slices(ids)], [variable])
    getattr(variable, how)(np.ones((6, 2)))
    sign = 1 if how == "assign_add" else -1
    close(variable, dense([[0], [1]]) + sign)


def test_a_count_of_steps_set_back_by_hand(unswept):
    """Then no row is behind; with Keras's Adam such a restart works too."""
    optimizer, variable = pair()
    for ids in ([0], [1], [2], [0]):
        optimizer.apply([slices(ids)], [variable])
    optimizer.settle()
    optimizer.iterations.assign(0)
    moments = [x.numpy() for x in optimizer._state(0)]
    optimizer.apply([slices([1])], [variable])
    for before, after in zip(moments, optimizer._state(0)):
        assert np.abs(after.numpy()).max() <= max(1.0, np.abs(before).max())


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("how", ["assign", "assign_add"])
@pytest.mark.parametrize("to", [0, 2, 7, 300, 70_000])
def test_a_count_of_steps_set_by_hand(unswept, to, how, execution):
    """Rows owe what they did, and neither the steps left out nor those done again."""
    optimizer, variable = pair(weight_decay=0.1)
    training = reference.Training(
        reference.Adam(),
        [np.ones((6, 2))],
        [np.float64],
        lazy=False,
        learning_rate=0.1,
        weight_decay=0.1,
    )
    run = EXECUTIONS[execution](lambda g: optimizer.apply([g], [variable]))
    steps = ([0, 1], [2, 2, 3], [0], [3], [3], [1])
    for n, ids in enumerate(2 * steps):
        if n == len(steps):
            by = to - n if how == "assign_add" else to
            getattr(optimizer.iterations, how)(by)
            training.calls = to
        run(slices(ids))
        training.apply([(np.ones((len(ids), 2)), np.array(ids))])
    assert int(optimizer.iterations) == to + len(steps)
    # The kernel's 1 - beta_2 has 5 digits, and late corrections are 1.
    atol = 2e-6 if to < 1000 else 3e-5
    np.testing.assert_allclose(variable.numpy(), training.thetas[0], rtol=0, atol=atol)
    for x, name in zip(optimizer._state(0), "mv"):
        np.testing.assert_allclose(x.numpy(), training.states[0][name], atol=1e-6)


def test_a_count_of_steps_is_not_set_in_a_function():
    optimizer, variable = pair()
    set_count = tf.function(lambda: optimizer.iterations.assign(7))
    set_count()  # no row can owe yet
    assert int(optimizer.iterations) == 7
    optimizer.apply([slices([0])], [variable])
    with pytest.raises(ValueError, match="`iterations` is set in a function"):
        tf.function(lambda: optimizer.iterations.assign(0))()


@pytest.mark.parametrize("first", ["table", "state"])
def test_a_copy_of_all_values(unswept, first):
    """Taken when all is paid, and given back."""
    optimizer, variable = pair(weight_decay=0.1)
    steps = [[0, 1], [2, 2, 3], [0], [3], [3]]

    def go_on():
        for ids in steps:
            optimizer.apply([slices(ids)], [variable])

    go_on()
    state = optimizer.variables
    both = [variable, *state] if first == "table" else [*state, variable]
    optimizer.settle()
    copies = [x.numpy() for x in both]
    close(variable, dense(steps, weight_decay=0.1))
    go_on()
    for x, value in zip(both, copies):
        x.assign(value)
    go_on()
    close(variable, dense(2 * steps, weight_decay=0.1))


def test_a_state_of_dense_steps_loads_into_a_table_of_sparse_ones():
    """No row owes then, though no row's step of update was noted."""
    old, variable = pair()
    for _ in range(20):
        old.apply([tf.ones((6, 2))], [variable])
    store = {}
    old.save_own_variables(store)
    layer = keras_adam.Embedding(6, 2, weights=[variable.numpy()])
    layer.build()
    new = keras_adam.Adam(0.1)
    new.build([layer.embeddings])
    new.load_own_variables(store)
    new.settle()
    for before, after in zip(old._state(0), new._state(0)):
        np.testing.assert_array_equal(after.numpy(), before.numpy())
    new.apply([slices([1])], [layer.embeddings])
    close(layer.embeddings, dense([range(6)] * 20 + [[1]]))


@pytest.mark.parametrize(
    "dtypes, moments, jit",
    [
        (["float64", "float32"], None, False),
        (["float32", "float64"], None, False),
        (["float32", "bfloat16", "float64"], None, False),
        (["float32", "bfloat16", "float64"], None, True),
        (["float64", "float32"], "float32", False),
    ],
)
def test_tables_of_several_dtypes(unswept, dtypes, moments, jit):
    """Kernels know 1 - beta_2 to five digits of its dtype, the rule knows it better."""
    tables = [keras.Variable(np.ones((6, 2)), dtype=d, name=d) for d in dtypes]
    beta_2 = 1 - 1e-6
    optimizer = keras_adam.Adam(0.1, beta_2=beta_2, moments_dtype=moments)
    optimizer.build(tables)

    @tf.function(jit_compile=jit)
    def step(g):
        values = [tf.cast(g.values, d) for d in dtypes]
        optimizer.apply([tf.IndexedSlices(x, g.indices, SHAPE) for x in values], tables)

    steps = [[0, 5], *([k % 2 + 1] for k in range(30))]
    truth = reference.Training(
        reference.Adam(beta_2=beta_2),
        [np.ones((6, 2))],
        [np.float64],
        lazy=False,
        learning_rate=0.1,
    )
    for ids in steps:
        step(slices(ids))
        truth.apply([(np.ones((len(ids), 2)), np.array(ids))])
    for table in tables:
        tolerance = {"float64": 2e-5, "float32": 2e-5, "bfloat16": 2e-2}[table.dtype]
        np.testing.assert_allclose(
            table.numpy().astype(np.float64), truth.thetas[0], rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_built_with_a_layer_s_native_variable(unswept, execution):
    """As `tape.watched_variables()` gives it; the layer knows the same owner."""
    layer = keras_adam.Embedding(6, 2, "ones")
    layer.build()
    table = layer.embeddings
    optimizer = keras_adam.Adam(0.1)
    optimizer.build([table.value])

    @EXECUTIONS[execution]
    def step(ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(ids))
        [v] = tape.watched_variables()
        optimizer.apply([tape.gradient(loss, v)], [v])

    steps = [[0, 1], [1], [2, 2]]
    for ids in steps:
        step(tf.constant(ids))
    truth = dense(steps)
    np.testing.assert_allclose(layer(np.arange(6)), truth, rtol=0, atol=2e-6)
    close(table, truth)


def test_an_accumulating_state_loads_into_exact_mode():
    lazy, _ = pair(gradient_accumulation_steps=2, sparse_updates="lazy")
    exact, variable = pair(gradient_accumulation_steps=2)
    table = lazy._trainable_variables[0]
    for _ in range(40):
        lazy.apply([slices([0, 1])], [table])
    store = {}
    lazy.save_own_variables(store)
    exact.load_own_variables(store)
    assert int(exact.iterations) == 20
    assert np.all(exact._last[0].numpy() == 20)
    for _ in range(2):
        exact.apply([slices([0, 1])], [variable])
    assert np.abs(exact._state(0)[0].numpy()).max() <= 1.0
