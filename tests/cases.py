"""The one table of cases that all optimizers run through."""

import keras
import ml_dtypes
import numpy as np
import reference
import tensorflow as tf

import keras_adam


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """start * factor^step; as beta_1, section 4's decay."""

    def __init__(self, start, factor=0.5):
        self.start = start
        self.factor = factor

    def __call__(self, step):
        return self.start * self.factor ** keras.ops.cast(step, "float32")

    def get_config(self):
        return {"start": self.start, "factor": self.factor}


def halving(start, factor=0.5):
    """The same in NumPy."""
    return lambda step: start * factor**step


# name: (ours, the oracle's)
OPTIMIZERS = {
    "adam": (lambda **k: keras_adam.Adam(**k), reference.Adam()),
    "adam_hat": (
        lambda **k: keras_adam.Adam(epsilon=1e-7, epsilon_hat=True, **k),
        reference.Adam(epsilon=1e-7, epsilon_hat=True),
    ),
    "adam_betas": (
        lambda **k: keras_adam.Adam(beta_1=0.5, beta_2=0.95, epsilon=1e-3, **k),
        reference.Adam(beta_1=0.5, beta_2=0.95, epsilon=1e-3),
    ),
    "adam_beta_1_0": (lambda **k: keras_adam.Adam(beta_1=0.0, **k), reference.Adam(0)),
    "adam_uncorrected": (
        lambda **k: keras_adam.Adam(bias_correction=False, **k),
        reference.Adam(bias_correction=False),
    ),
    "adam_beta_1_schedule": (
        lambda **k: keras_adam.Adam(beta_1=Halving(0.75), **k),
        reference.Adam(beta_1=halving(0.75)),
    ),
    "amsgrad": (
        lambda **k: keras_adam.Adam(beta_2=0.9, amsgrad=True, **k),
        reference.Adam(beta_2=0.9, amsgrad=True),
    ),
    "adamax": (lambda **k: keras_adam.AdaMax(**k), reference.AdaMax()),
    "adamax_betas": (
        lambda **k: keras_adam.AdaMax(beta_1=0.5, beta_2=0.9, **k),
        reference.AdaMax(beta_1=0.5, beta_2=0.9),
    ),
    "adamax_beta_1_schedule": (
        lambda **k: keras_adam.AdaMax(beta_1=Halving(0.75), **k),
        reference.AdaMax(beta_1=halving(0.75)),
    ),
}

# Exact in float32, in which Keras keeps it.
LEARNING_RATE = 0.125

MODES = ("exact", "lazy", "dense")


def _ids(low, high, n):
    return lambda rng, step: rng.integers(low, high, n)


# name: (shape of the table, ids of a step)
PATTERNS = {
    "repeats": ((12, 4), _ids(0, 6, 9)),
    "distinct": ((12, 4), lambda rng, step: rng.permutation(12)[:5]),
    "one_row_repeated": ((12, 4), _ids(3, 4, 7)),
    "all_rows": ((12, 4), lambda rng, step: rng.permutation(12)),
    "empty": ((12, 4), lambda rng, step: np.arange(4 if step % 2 else 0)),
    "one_row_table": ((1, 3), _ids(0, 1, 3)),
    "rank_1": ((12,), _ids(0, 6, 9)),
    "rank_3": ((7, 3, 2), _ids(0, 5, 6)),
    "ragged": ((12, 4), lambda rng, step: rng.integers(0, 12, 3 + step % 2)),
    "last_rows": ((12, 4), _ids(10, 12, 5)),
}

EXECUTIONS = {
    "eager": lambda f: f,
    "graph": tf.function,
    "xla": lambda f: tf.function(f, jit_compile=True),
}

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}

# name: (ours, the oracle's)
OPTIONS = {
    "weight_decay": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "clipnorm": ({"clipnorm": 0.5}, {"clipnorm": 0.5}),
    "clipvalue": ({"clipvalue": 0.1}, {"clipvalue": 0.1}),
    "global_clipnorm": ({"global_clipnorm": 0.5}, {"global_clipnorm": 0.5}),
    "loss_scale": ({"loss_scale_factor": 64.0}, {"loss_scale_factor": 64.0}),
    "accumulation": (
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 3},
    ),
    "accumulation_clip_decay": (
        {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5, "weight_decay": 0.1},
        {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5, "weight_decay": 0.1},
    ),
    "ema": (
        {"use_ema": True, "ema_momentum": 0.7},
        {"ema_momentum": 0.7},
    ),
    "ema_overwrite": (
        {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 3},
        {"ema_momentum": 0.7, "ema_overwrite_frequency": 3},
    ),
    "ema_accumulation": (
        {"use_ema": True, "gradient_accumulation_steps": 2},
        {"ema_momentum": 0.99, "gradient_accumulation_steps": 2},
    ),
    "ema_overwrite_accumulation_clip": (
        {
            "use_ema": True,
            "ema_momentum": 0.7,
            "ema_overwrite_frequency": 2,
            "gradient_accumulation_steps": 2,
            "clipnorm": 0.5,
        },
        {
            "ema_momentum": 0.7,
            "ema_overwrite_frequency": 2,
            "gradient_accumulation_steps": 2,
            "clipnorm": 0.5,
        },
    ),
    "ema_decay": (
        {"use_ema": True, "ema_momentum": 0.7, "weight_decay": 0.1},
        {"ema_momentum": 0.7, "weight_decay": 0.1},
    ),
    "schedule": (
        {"learning_rate": Halving(0.125)},
        {"learning_rate": halving(0.125)},
    ),
    "callable": ({"learning_rate": lambda: 0.03125}, {"learning_rate": 0.03125}),
}


def stream(pattern, steps, dtype="float32", id_dtype="int32", seed=0):
    """The first weights of a table and a vector, and the gradients of each step.

    Gradients span magnitudes at which epsilon matters and at which it does not,
    and are exact in their dtype.
    """
    rng = np.random.default_rng(seed)
    shape, ids_of = PATTERNS[pattern]
    shapes = [shape, (5,)]
    as_dtype = DTYPES[dtype]
    low = -3.0 if dtype == "float16" else -8.0

    def normal(shape):
        scale = 10 ** rng.uniform(low, 0.5, shape[-1:] if len(shape) > 1 else shape)
        return (scale * rng.standard_normal(shape)).astype(as_dtype)

    thetas = [rng.standard_normal(s).astype(as_dtype) for s in shapes]
    gradients = []
    for step in range(steps):
        ids = ids_of(rng, step).astype(id_dtype)
        gradients.append([(normal((len(ids), *shape[1:])), ids), normal(shapes[1])])
    return thetas, gradients


def train(make, execution, thetas, gradients, before_build=None):
    """Trains with one of ours; returns the optimizer and its variables."""
    variables = []
    for name, x in zip(("table", "vector"), thetas):
        with keras.name_scope(f"{'first' if name == 'table' else 'second'}_layer"):
            variables.append(keras.Variable(x, dtype=x.dtype.name, name=name))
    optimizer = make()
    if before_build:
        before_build(optimizer, variables)
    optimizer.build(variables)

    def apply(values, ids, vector):
        table = variables[0]
        slices = tf.IndexedSlices(values, ids, tf.constant(table.shape.as_list()))
        optimizer.apply([slices, vector], variables)

    apply = EXECUTIONS[execution](apply)
    for (values, ids), vector in gradients:
        apply(tf.constant(values), tf.constant(ids), tf.constant(vector))
    return optimizer, variables


def oracle(rule, thetas, gradients, *, mode, **options):
    training = reference.Training(
        rule,
        thetas,
        [x.dtype for x in thetas],
        lazy=mode == "lazy",
        **{"learning_rate": LEARNING_RATE, **options},
    )
    for g in gradients:
        training.apply(g)
    return training


def check(optimizer, variables, training):
    """Weights and state are the oracle's, to the rounding of their dtypes."""
    for i, variable in enumerate(variables):
        dtype = DTYPES[variable.dtype]
        # Half-precision weights were rounded at each step: one digit may differ.
        eps = float(ml_dtypes.finfo(dtype).eps)
        half = dtype in (np.float16, ml_dtypes.bfloat16)
        state_dtype = np.float32 if half else dtype
        state_eps = float(np.finfo(state_dtype).eps)
        exact = optimizer.sparse_updates == "exact"
        np.testing.assert_allclose(
            variable.numpy().astype(np.float64),
            training.thetas[i],
            # Exact rows are rounded when they are touched, not at each step.
            rtol=(4 if exact else 2) * eps if half else 8 * eps,
            # The oracle's own 1 - beta^t is good to 1e-13, a tail to 1e-5.
            atol=max(40 * LEARNING_RATE * state_eps, 1e-6 if exact else 1e-13),
            err_msg="theta",
        )
        for ours, (name, value) in zip(
            optimizer._state(i), training.states[i].items(), strict=True
        ):
            assert ours.dtype == np.dtype(state_dtype).name
            # Averages round to a digit of the largest gradient they have seen.
            peak = training.peaks[i] ** (2 if name.startswith("v") else 1)
            error = np.abs(ours.numpy() - value)
            bound = 200 * state_eps * np.abs(value) + 8 * state_eps * peak
            assert np.all(error <= bound), (name, error.max(), ours.numpy(), value)


def make_model(dtype=None, layer=keras.layers.Embedding):
    """A small model around an embedding, the same weights each time."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([4], dtype="int32"),
            layer(20, 8, dtype=dtype),
            keras.layers.GlobalAveragePooling1D(dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )


def make_data(n=48):
    """Ids, and the mean of a number each id stands for."""
    rng = np.random.default_rng(0)
    meaning = rng.standard_normal((20, 1)).astype(np.float32)
    ids = rng.integers(0, 20, (n, 4))
    return ids, meaning[ids].mean(axis=1)
