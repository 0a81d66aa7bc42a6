"""Random optimizers and trainings for `test_properties.py`.

A program is what a compiled step holds: hyperparameters, shapes, dtype. A case is
what goes through it: ids, gradients, a number of steps. Compiling takes a second,
a case 30 ms, so many cases go through a program, whose variables are reset between.
"""

import dataclasses
import math

import hypothesis
import keras
import numpy as np
import tensorflow as tf
from cases import DTYPES, EXECUTIONS, Halving
from hypothesis import strategies as st

import keras_adam
from keras_adam import ledger


@dataclasses.dataclass(frozen=True)
class Program:
    cls: str
    rule: dict  # arguments of both ours and the oracle's
    factor: float | None  # beta_1 falls by it each step
    rate: float
    fall: float | None  # the rate falls by it each step
    base: dict  # arguments of Keras's base
    dtype: str
    shape: tuple
    count: int  # ids a batch
    empties: bool  # whether some batches have none
    swept: bool  # whether rows without a gradient are updated in turn
    mode: str
    execution: str


def _float32(x):
    return float(np.float32(x))


@st.composite
def programs(draw, mode, execution):
    """Programs; exact mode's go up to the edge: the window is 4,600 steps there."""
    cls = draw(st.sampled_from(["Adam", "AdaMax"]))
    dtype = draw(st.sampled_from(["float32", "float64", "bfloat16", "float16"]))
    amsgrad = cls == "Adam" and draw(st.booleans())
    least = [] if mode == "exact" and not amsgrad else [0.0]  # beta_1 must be below
    beta_2 = draw(
        st.floats(0.5, 0.999)
        | st.floats(1, 6).map(lambda x: 1 - 10**-x)
        | st.sampled_from([0.999, *least])
    )
    # Where steps grow while a row rests, they soon leave float16's numbers.
    falling = mode == "exact" or dtype == "float16"
    near = st.floats(0.5, 2.4 if falling else 6).map(lambda x: 1 - 10**-x)
    beta_1 = draw(st.floats(0, 0.9) | near | st.just(0.0))
    if falling and not amsgrad:
        beta_1 *= math.sqrt(beta_2) if cls == "Adam" else beta_2
    # Schedules are float32: in float64 one whose values are exact in both.
    factors = st.sampled_from([0.5, 1.0])
    if dtype != "float64":
        factors |= st.floats(0.5, 1)
    factor = draw(st.none() | factors)
    if factor is not None:
        beta_1 = _float32(beta_1)
    rule = {"beta_1": beta_1, "beta_2": beta_2}
    if cls == "Adam":
        rule["epsilon"] = 10 ** draw(st.floats(-9, -1))
        rule["amsgrad"] = amsgrad
        rule["epsilon_hat"] = draw(st.booleans())
        rule["bias_correction"] = draw(st.booleans())
    base = {}
    for name, values in {
        "weight_decay": st.floats(1e-3, 0.5),
        "loss_scale_factor": st.sampled_from([0.5, 2.0, 1024.0]),
        "gradient_accumulation_steps": st.integers(2, 4),
        "clip": st.sampled_from(["clipnorm", "global_clipnorm", "clipvalue"]),
        "ema": st.floats(0.1, 4).map(lambda x: 1 - 10**-x),
    }.items():
        if draw(st.integers(0, 2)):
            continue
        value = draw(values)
        if name == "clip":
            base[value] = 10 ** draw(st.floats(-3, 1))
        elif name == "ema":
            base.update(use_ema=True, ema_momentum=value)
            if draw(st.booleans()):
                base["ema_overwrite_frequency"] = draw(st.integers(1, 5))
        else:
            base[name] = value
    program = Program(
        cls,
        rule,
        factor,
        _float32(10 ** draw(st.floats(-4, 0))),
        draw(st.none() | (factors if dtype == "float64" else st.floats(0.9, 1))),
        base,
        dtype,
        draw(st.sampled_from([(12, 4), (1, 3), (9,), (7, 3, 2), (30, 1), (5, 5)])),
        draw(st.integers(1, 12)),
        draw(st.booleans()),
        draw(st.booleans()),
        mode,
        execution,
    )
    try:
        _optimizer(program)
    except ValueError as error:  # exact mode does not take betas of all windows
        hypothesis.assume("costs too much" not in str(error))
        raise
    return program


def _optimizer(p):
    rule = dict(p.rule)
    if p.factor is not None:
        rule["beta_1"] = Halving(rule["beta_1"], p.factor)
    rate = p.rate if p.fall is None else Halving(p.rate, p.fall)
    cls = getattr(keras_adam, p.cls)
    return cls(learning_rate=rate, sparse_updates=p.mode, **rule, **p.base)


@dataclasses.dataclass(frozen=True)
class Case:
    steps: int
    ids: str
    low: float  # log10 of the least scale of gradients
    high: float
    one_sign: bool
    seed: int


def case(seed):
    """A case; one in eight of many steps, in which rows rest for long."""
    rng = np.random.default_rng(seed)
    return Case(
        int(rng.integers(30, 120) if rng.random() < 1 / 8 else rng.integers(1, 20)),
        str(rng.choice(["any", "few", "one", "last", "distinct", "gap"])),
        float(rng.uniform(-7, 0)),
        float(rng.uniform(0, 2)),
        bool(rng.random() < 0.5),
        seed,
    )


def stream(program, case):
    """The first weights of a table and a vector, and the gradients of each step."""
    rng = np.random.default_rng([case.seed, 1])
    as_dtype, n, rows = DTYPES[program.dtype], program.count, program.shape[0]
    low = max(case.low, -3) if program.dtype == "float16" else case.low

    def normal(shape):
        x = 10 ** rng.uniform(low, case.high, shape) * rng.standard_normal(shape)
        return (np.abs(x) if case.one_sign else x).astype(as_dtype)

    def ids_of(step):
        if program.empties and rng.random() < 0.3:
            return np.arange(0)
        kind = case.ids
        if kind == "distinct" and n <= rows:
            return rng.permutation(rows)[:n]
        if kind == "few":
            return rng.integers(0, 1 + rows // 2, n)
        if kind == "one" or (kind == "gap" and step):
            return np.full(n, rows // 3)
        if kind == "last":
            return rng.integers(max(0, rows - 2), rows, n)
        return rng.integers(0, rows, n)

    thetas = [rng.standard_normal(s).astype(as_dtype) for s in (program.shape, (5,))]
    gradients = []
    # What is below float32's least number no step in float32 knows: end before.
    beta_2, steps = program.rule["beta_2"], case.steps
    if beta_2:
        steps = min(steps, int(-14 / math.log10(beta_2)))
    accumulate = program.base.get("gradient_accumulation_steps", 1)
    for step in range(steps):
        ids = ids_of(step).astype(np.int32)
        values = normal((len(ids), *program.shape[1:]))
        vector = normal((5,))
        if beta_2 < 0.1:
            # m is divided by one step's sum: that must not lose digits by cancelling.
            if step % accumulate == 0:
                signs = [rng.choice([-1, 1], s) for s in (program.shape, (5,))]
            of_table, of_vector = (x.astype(as_dtype) for x in signs)
            values, vector = np.abs(values) * of_table[ids], np.abs(vector) * of_vector
        gradients.append([(values, ids), vector])
    return thetas, gradients


class Compiled:
    """One of ours with a compiled step, to train again and again."""

    def __init__(self, program, monkeypatch):
        p = self.program = program
        # Where a test sets it to none, only a gap shortens what a row owes.
        if not p.swept:
            none = tf.zeros([0], tf.int32)
            monkeypatch.setattr(ledger, "sweep", lambda rows, t: none + 0)
        shapes = (p.shape, (5,))
        self.variables = [
            keras.Variable(np.zeros(s), dtype=p.dtype, name=f"v{len(s)}{i}")
            for i, s in enumerate(shapes)
        ]
        self.optimizer = _optimizer(p)
        self.optimizer.build(self.variables)

        def apply(values, ids, vector):
            g = tf.IndexedSlices(values, ids, tf.constant(p.shape))
            self.optimizer.apply([g, vector], self.variables)

        if p.execution == "graph":
            self.step = tf.function(
                apply,
                input_signature=[
                    tf.TensorSpec([None, *p.shape[1:]], p.dtype),
                    tf.TensorSpec([None], tf.int32),
                    tf.TensorSpec([5], p.dtype),
                ],
            )
        else:
            self.step = EXECUTIONS[p.execution](apply)

    def train(self, thetas, gradients):
        """The trained weights, and their averages, as NumPy has them in float64."""
        optimizer = self.optimizer
        optimizer.settle()
        for x in optimizer.variables:
            if x is not optimizer._learning_rate:
                x.assign(np.zeros(x.shape))
        for history in getattr(optimizer, "_histories", []):
            for x in history.variables:
                x.assign(tf.zeros_like(x))
        for variable, theta in zip(self.variables, thetas):
            variable.assign(theta)
        for (values, ids), vector in gradients:
            self.step(tf.constant(values), tf.constant(ids), tf.constant(vector))
        found = [*self.variables]
        if optimizer.use_ema:
            found += optimizer._model_variables_moving_average
        return [x.numpy().astype(np.float64) for x in found]
