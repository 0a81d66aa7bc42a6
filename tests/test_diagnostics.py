"""Figures of the callback against NumPy, and what it leaves alone."""

import csv
import types

import cases
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import keras_adam
from keras_adam import diagnostics
from keras_adam.diagnostics import StepDiagnostics
from keras_adam.exact import native

TABLE, VECTOR = "first_layer/table", "second_layer/vector"


def read(path):
    """{(step, variable): {column: float, or None where it is empty}}."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    return {
        (int(line.pop("step")), line.pop("variable")): {
            name: float(text) if text else None for name, text in line.items()
        }
        for line in lines
    }


def steps(path):
    return sorted({step for step, _ in read(path)})


def log(optimizer, path):
    """The figures of each variable now, from the callback's file."""
    callback = StepDiagnostics(1, path)
    callback.set_model(types.SimpleNamespace(optimizer=optimizer))
    callback.on_train_begin()
    callback.on_epoch_end(0)
    step = int(optimizer.iterations)
    found = read(path)
    assert {s for s, _ in found} == {step}
    return {variable: figures for (_, variable), figures in found.items()}


class Recording:
    """A rule of the oracle that keeps its last |delta| / alpha."""

    def __init__(self, rule):
        self.rule = rule
        self.deltas = []

    def init(self, theta):
        return self.rule.init(theta)

    def step(self, s, g, alpha, t):
        delta = self.rule.step(s, g, alpha, t)
        self.deltas.append(np.abs(delta / alpha))
        return delta


def expected(rule, state, t, delta):
    """The figures, in float64; delta None: the step that the state would make."""
    c_1 = 1 - np.prod([rule.beta_1(i) for i in range(t)])
    c_2 = 1 - rule.beta_2**t
    m, v = np.abs(state["m"]), state.get("v_max", state.get("v", state.get("u")))
    has = (m > 0) | (v > 0)
    figures = {"signal_to_noise": None, "epsilon_share": None}
    if isinstance(rule, reference.Adam):
        if not rule.bias_correction:
            c_1 = c_2 = 1.0
        m_hat, r = m / c_1, np.sqrt(v / c_2)
        epsilon = rule.epsilon / (np.sqrt(c_2) if rule.epsilon_hat else 1)
        if delta is None:
            delta = m_hat / (r + epsilon)
        ratio = np.divide(m_hat, r, out=np.zeros(m.shape), where=r > 0)
        figures["signal_to_noise"] = ratio[has].mean()
        figures["epsilon_share"] = (epsilon > r)[has].mean()
    elif delta is None:
        delta = np.divide(m / c_1, v, out=np.zeros(m.shape), where=v > 0)
    assert not delta[~has].any()
    return figures | {
        "effective_step_mean": delta[has].mean(),
        "effective_step_max": delta.max(),
        "no_gradient_share": 1 - has.mean(),
    }


def check(found, figures):
    assert found.keys() == figures.keys()
    for name, x in figures.items():
        assert found[name] == (None if x is None else pytest.approx(x, 2e-5)), name


# (optimizer, mode, execution, dtype, options)
TRAININGS = [
    *((name, "exact", "eager", "float32", {}) for name in cases.OPTIMIZERS),
    ("adam", "exact", "graph", "float32", {}),
    ("adam", "exact", "xla", "float32", {}),
    ("adam", "exact", "eager", "float64", {}),
    ("adam", "exact", "eager", "bfloat16", {}),
    ("adam_hat", "lazy", "graph", "float32", {}),
    ("adamax", "lazy", "xla", "float32", {}),
    ("amsgrad", "dense", "xla", "float32", {}),
    ("adamax", "dense", "graph", "float32", {}),
    (
        "adam",
        "exact",
        "eager",
        "float32",
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "clipnorm": 0.5},
    ),
]


@pytest.mark.parametrize(
    ("name", "mode", "execution", "dtype", "options"),
    TRAININGS,
    ids=lambda x: x if isinstance(x, str) else "_".join(x) or "plain",
)
def test_figures(tmp_path, name, mode, execution, dtype, options):
    """They are the oracle's, and whoever reads them writes nothing, not one bit."""
    ours, rule = cases.OPTIMIZERS[name]
    thetas, gradients = cases.stream("ragged", 6, dtype=dtype, seed=3)
    for (values, _), vector in gradients:
        # Some gradients so small that epsilon dominates, and exact in their dtype.
        values[:, 0] *= values.dtype.type(2**-20)
        vector[0] *= vector.dtype.type(2**-20)

    def make():
        kwargs = {"learning_rate": cases.LEARNING_RATE, "sparse_updates": mode}
        return ours(**kwargs, **options)

    optimizer, variables = cases.train(make, execution, thetas, gradients)
    stored = [native(x) for x in (*variables, *optimizer.variables)]
    before = [x.numpy() for x in stored]
    found = log(optimizer, tmp_path / "log.csv")
    assert all(np.array_equal(x, y.numpy()) for x, y in zip(before, stored))

    recording = Recording(rule)
    training = cases.oracle(recording, thetas, gradients, mode=mode, **options)
    t = 6 // options.get("gradient_accumulation_steps", 1)
    for i, path in enumerate((TABLE, VECTOR)):
        # Lazy rows that are not in the batch do not step.
        delta = None if (mode, path) == ("lazy", TABLE) else recording.deltas[i - 2]
        figures = expected(rule, training.states[i], t, delta)
        check(found[path], figures)
        if i == 0:
            # Rows that owe, that never had a gradient, and that epsilon dominates.
            assert 0 < figures["no_gradient_share"] < 0.5
            if isinstance(rule, reference.Adam):
                assert 0.1 < figures["epsilon_share"] < 0.9
            if mode == "exact":
                last = native(optimizer._last[0]).numpy()
                assert 0 < np.sum((last < t) & (last > 0))


# Rows of the table: 1 by 1; 2 + 5 + 5.
@pytest.mark.parametrize(("chunk", "jit"), [(4, False), (20, True)])
def test_chunks(tmp_path, monkeypatch, chunk, jit):
    """The figures of a table that is read piece by piece."""
    thetas, gradients = cases.stream("ragged", 6, seed=3)
    optimizer, _ = cases.train(keras_adam.Adam, "graph", thetas, gradients)
    whole = log(optimizer, tmp_path / "whole.csv")
    monkeypatch.setattr(diagnostics, "CHUNK", chunk)
    if jit:
        monkeypatch.setattr(diagnostics, "LARGE", 0)
    pieces = log(optimizer, tmp_path / "pieces.csv")
    for path in (TABLE, VECTOR):
        assert pieces[path] == pytest.approx(whole[path], 1e-6), path


def test_many_coordinates(tmp_path):
    """Sums keep their digits where one float32 sum would stop at 2^24."""
    n = 2**24 + 2**22
    table = keras.Variable(np.zeros([n], np.float32), name="table")
    optimizer = keras_adam.Adam(sparse_updates="dense", epsilon=1e-30)
    optimizer.build([table])
    m, v = (native(x) for x in optimizer._state(0))
    m.assign(tf.fill([n], 0.01))
    v.assign(tf.where(tf.range(n) < 2**22, 0.0, 0.01))
    m.assign(tf.where(tf.range(n) < 2**22, 0.0, 0.01))
    optimizer.iterations.assign(1)
    found = log(optimizer, tmp_path / "log.csv")["table"]
    assert found["no_gradient_share"] == pytest.approx(0.2, 1e-6)
    # m_hat = 0.01 / 0.1, v_hat = 0.01 / 0.001
    assert found["effective_step_mean"] == pytest.approx(0.1 / 10**0.5, 1e-5)


def test_no_gradient_at_all(tmp_path):
    """Nothing is left to be averaged: 0, not NaN."""
    zeros = np.zeros([3, 2], np.float32)
    table = keras.Variable(zeros, name="table")
    optimizer = keras_adam.Adam()
    optimizer.build([table])
    optimizer.apply([tf.constant(zeros)])
    [figures] = log(optimizer, tmp_path / "log.csv").values()
    assert figures == dict.fromkeys(diagnostics.FIGURES, 0) | {"no_gradient_share": 1}


def test_variables_without_state_are_passed_over(tmp_path):
    """An empty one, and one that Keras overwrites with its gradient."""
    variables = [
        keras.Variable(np.zeros([0, 2], np.float32), name="empty"),
        keras.Variable(np.ones(2, np.float32), name="overwritten"),
        keras.Variable(np.ones(2, np.float32), name="weights"),
    ]
    variables[1].overwrite_with_gradient = True
    optimizer = keras_adam.Adam(sparse_updates="lazy")
    optimizer.build(variables)
    optimizer.apply([tf.ones(v.shape) for v in variables])
    assert list(log(optimizer, tmp_path / "log.csv")) == ["weights"]


def fit(optimizer, callbacks, epochs=2, jit=False, model=None, **kwargs):
    """8 batches an epoch, of ids that leave most rows at rest."""
    if model is None:
        model = cases.make_model(layer=keras_adam.Embedding)
        model.compile(optimizer, "mse", jit_compile=jit, **kwargs)
    x, y = cases.make_data()
    x[::2] %= 10
    model.fit(
        *(x, y),
        epochs=epochs,
        batch_size=6,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )
    return model


@pytest.mark.parametrize(
    ("make", "jit"),
    [
        (lambda: keras_adam.Adam(0.01), False),
        (lambda: keras_adam.Adam(0.01), True),
        (lambda: keras_adam.AdaMax(0.01, sparse_updates="lazy"), False),
        (lambda: keras_adam.AdaMax(0.01, sparse_updates="dense"), True),
    ],
    ids=["exact_graph", "exact_xla", "lazy_graph", "dense_xla"],
)
def test_fit_is_the_same(tmp_path, make, jit):
    """To the last bit, with a log after each step."""
    models = []
    for callbacks in ([], [StepDiagnostics(1, tmp_path / "log.csv")]):
        model = fit(make(), callbacks, jit=jit)
        variables = [*model.trainable_variables, *model.optimizer.variables]
        models.append([x.numpy() for x in variables])
    assert all(np.array_equal(x, y) for x, y in zip(*models, strict=True))
    assert steps(tmp_path / "log.csv") == list(range(1, 17))


@pytest.mark.parametrize(
    ("steps_per_execution", "first", "second"),
    [(1, [3, 6, 9, 12, 15], [18, 21, 24]), (4, [4, 8, 12, 16], [20, 24])],
    ids=["one_by_one", "steps_per_execution"],
)
def test_every(tmp_path, monkeypatch, steps_per_execution, first, second):
    """Every 3 of 16 steps, over epochs; then 8 steps more."""
    looks = []
    look = StepDiagnostics._look
    monkeypatch.setattr(
        StepDiagnostics, "_look", lambda self, batch: looks.append(look(self, batch))
    )
    path = tmp_path / "log.csv"
    callback = StepDiagnostics(3, path)
    model = fit(
        keras_adam.Adam(0.01), [callback], steps_per_execution=steps_per_execution
    )
    assert steps(path) == first
    # Nothing is read at other steps, but at the ends of the epochs.
    assert len(looks) <= len(first) + 2

    fit(None, [callback], epochs=1, model=model)
    assert steps(path) == first + second
    # `fit` has settled all rows, which changes no figure.
    for i, variable in enumerate(model.trainable_variables):
        now = callback._figures(i)
        assert read(path)[24, variable.path] == pytest.approx(now, 2e-5)


def test_csv(tmp_path):
    path = tmp_path / "log.csv"
    optimizer = keras_adam.AdaMax(sparse_updates="dense")
    model = fit(optimizer, [StepDiagnostics(8, path)])
    lines = path.read_text().splitlines()
    assert lines[0] == (
        "step,variable,effective_step_mean,effective_step_max,no_gradient_share,"
        "signal_to_noise,epsilon_share"
    )
    paths = [v.path for v in model.trainable_variables]
    names = [tuple(line.split(",")[:2]) for line in lines[1:]]
    assert names == [(str(step), path) for step in (8, 16) for path in paths]
    for line in lines[1:]:
        mean, most, none, *rest = line.split(",")[2:]
        assert 0 < float(mean) <= float(most) < 1.5 and 0 <= float(none) < 1
        assert rest == ["", ""]


class Killed(Exception):
    pass


def test_a_killed_run_leaves_its_logs(tmp_path):
    def kill(batch, logs):
        if batch == 5:
            raise Killed

    path = tmp_path / "log.csv"
    killer = keras.callbacks.LambdaCallback(on_train_batch_end=kill)
    callbacks = [StepDiagnostics(2, path, tmp_path / "events"), killer]
    with pytest.raises(Killed):
        fit(keras_adam.Adam(sparse_updates="dense"), callbacks)
    assert steps(path) == [2, 4]
    assert {step for step, _ in events(tmp_path / "events")} == {2, 4}


def events(folder):
    """{(step, tag): value} of TensorBoard's scalars."""
    found = {}
    for path in folder.iterdir():
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    return found


@pytest.mark.parametrize("make", [keras_adam.Adam, keras_adam.AdaMax])
def test_tensorboard(tmp_path, make):
    """It gets what the file gets, whatever other callbacks want recorded."""
    callback = StepDiagnostics(8, tmp_path / "log.csv", tmp_path / "events")
    with tf.summary.record_if(False):
        fit(make(sparse_updates="dense"), [callback])
    expected = {
        (step, f"{name}/{variable}"): x
        for (step, variable), figures in read(tmp_path / "log.csv").items()
        for name, x in figures.items()
        if x is not None
    }
    assert len(expected) == 2 * 3 * (5 if make is keras_adam.Adam else 3)
    assert events(tmp_path / "events") == pytest.approx(expected, 1e-6)


def test_loss_scale_optimizer(tmp_path):
    """Its inner optimizer's figures. The scale, a power of 2, changes no bit."""
    logs = []
    for i, wrap in enumerate((lambda x: x, keras.optimizers.LossScaleOptimizer)):
        path = tmp_path / f"{i}.csv"
        optimizer = wrap(keras_adam.Adam(0.01, sparse_updates="lazy"))
        model = fit(optimizer, [StepDiagnostics(8, path)])
        logs.append([read(path)[16, v.path] for v in model.trainable_variables])
    for plain, scaled in zip(*logs, strict=True):
        assert scaled == pytest.approx(plain, 1e-4)


def test_a_log_of_many_variables_does_not_warn(tmp_path, caplog):
    variables = [keras.Variable(np.ones(n + 1, np.float32)) for n in range(12)]
    optimizer = keras_adam.Adam()
    optimizer.build(variables)
    optimizer.apply([tf.ones_like(v.value) for v in variables])
    assert len(log(optimizer, tmp_path / "log.csv")) == 12
    assert "retracing" not in caplog.text


def test_no_folder(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        fit(keras_adam.Adam(), [StepDiagnostics(1, tmp_path / "nowhere" / "x.csv")])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"every": 0, "csv_path": "x"}, "`every`.*positive int.*every=0.*Use 100"),
        ({"every": -5, "csv_path": "x"}, "every=-5"),
        ({"every": 2.5, "csv_path": "x"}, r"every=2\.5"),
        ({"every": True, "csv_path": "x"}, "every=True"),
        ({"every": 1, "csv_path": 3.5}, "`csv_path` must be a path.*3.5"),
        ({"every": 10}, "csv_path=None, log_dir=None.*Give a file"),
    ],
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        StepDiagnostics(**kwargs)


def test_foreign_file(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("epoch,loss\n0,1.5\n")
    with pytest.raises(ValueError, match=r"log\.csv.*epoch.*another path"):
        fit(keras_adam.Adam(), [StepDiagnostics(1, path)])
    assert path.read_text() == "epoch,loss\n0,1.5\n"


@pytest.mark.parametrize("wrap", [lambda x: x, keras.optimizers.LossScaleOptimizer])
def test_foreign_optimizer(tmp_path, wrap):
    path = tmp_path / "log.csv"
    with pytest.raises(TypeError, match=r"adam\.Adam object.*keras_adam\.Adam or"):
        fit(wrap(keras.optimizers.Adam()), [StepDiagnostics(1, path)])
    assert not path.exists()
