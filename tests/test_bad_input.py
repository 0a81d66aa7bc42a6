"""What comes in wrong: the right result, or an error that says what and what to do.

Each in eager mode, in graph mode and under XLA, where it can differ. See also
`test_optimizer.py` (exact mode's conditions, integer variables,
`overwrite_with_gradient`), `test_ledger.py` (two exact optimizers of one table) and
`test_rows.py` (ids outside a table under XLA).
"""

import json
import math

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import EXECUTIONS

import keras_adam

NAN = float("nan")
CLASSES = pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdaMax])
MODES = pytest.mark.parametrize("mode", cases.MODES)
EXECUTION = pytest.mark.parametrize("execution", EXECUTIONS)

# name: (arguments, what the error says)
ARGUMENTS = {
    "rate": ({"learning_rate": -0.1}, "learning_rate.*-0.1"),
    "beta_1": ({"beta_1": 1.0}, r"beta_1.*\[0, 1\).*1.0"),
    "beta_1_in_float32": ({"beta_1": 1 - 1e-8}, "beta_1.*float32.*0.99999999"),
    "beta_1_nan": ({"beta_1": NAN}, "beta_1.*nan"),
    "beta_2": ({"beta_2": -0.5}, r"beta_2.*\[0, 1\).*-0.5"),
    "sparse_updates": ({"sparse_updates": "lzy"}, "sparse_updates.*lazy.*lzy"),
    "rate_nan": ({"learning_rate": NAN}, "learning_rate.*finite.*nan"),
    "rate_inf": ({"learning_rate": math.inf}, "learning_rate.*finite.*inf"),
    "rate_array": ({"learning_rate": np.array([0.1])}, "learning_rate.*float"),
    "rate_bool": ({"learning_rate": True}, "learning_rate.*float.*True"),
    "rate_text": ({"learning_rate": "0.1"}, "learning_rate.*float.*0.1"),
    "beta_1_text": ({"beta_1": "0.9"}, r"beta_1.*\[0, 1\).*'0.9'"),
    "beta_1_none": ({"beta_1": None}, r"beta_1.*\[0, 1\).*None"),
    "beta_1_bool": ({"beta_1": False}, r"beta_1.*\[0, 1\).*False"),
    "beta_1_array": ({"beta_1": np.array([0.9, 0.9])}, r"beta_1.*\[0, 1\).*array"),
    "beta_1_tensor": ({"beta_1": tf.constant(0.9)}, r"beta_1.*\[0, 1\).*Tensor"),
    "beta_2_callable": ({"beta_2": lambda t: 0.9}, r"beta_2.*\[0, 1\).*function"),
    "beta_2_nan": ({"beta_2": NAN}, r"beta_2.*\[0, 1\).*nan"),
    "decay_negative": ({"weight_decay": -0.1}, "weight_decay.*at least 0.*-0.1"),
    "decay_nan": ({"weight_decay": NAN}, "weight_decay.*finite.*nan"),
    "decay_text": ({"weight_decay": "a"}, "weight_decay.*number.*'a'"),
    "clipnorm_negative": ({"clipnorm": -1.0}, "clipnorm.*at least 0.*-1.0"),
    "clipvalue_nan": ({"clipvalue": NAN}, "clipvalue.*finite.*nan"),
    "global_clipnorm": ({"global_clipnorm": "a"}, "global_clipnorm.*number.*'a'"),
    "two_clips": ({"clipnorm": 1.0, "clipvalue": 1.0}, "Only one of"),
    "scale_0": ({"loss_scale_factor": 0.0}, "loss_scale_factor.*above 0.*0.0"),
    "scale_nan": ({"loss_scale_factor": NAN}, "loss_scale_factor.*finite.*nan"),
    "steps_half": ({"gradient_accumulation_steps": 2.5}, "steps.*integer.*2.5"),
    "steps_1": ({"gradient_accumulation_steps": 1}, "steps.*>= 2.*1"),
    "ema_nan": ({"use_ema": True, "ema_momentum": NAN}, "ema_momentum.*nan"),
    "ema_above_1": ({"use_ema": True, "ema_momentum": 1.5}, "ema_momentum.*1.5"),
    "ema_text": ({"use_ema": True, "ema_momentum": "a"}, "ema_momentum.*'a'"),
    "rounding_none": ({"stochastic_rounding": None}, "rounding.*True or False.*None"),
    "rounding_text": ({"stochastic_rounding": "a"}, "rounding.*True or False.*'a'"),
    "moments_half": ({"moments_dtype": "float16"}, "moments_dtype.*one of.*float16"),
    "moments_dtype": ({"moments_dtype": np.dtype("float64")}, "moments_dtype.*float64"),
    "mode_array": ({"sparse_updates": np.array(["exact"])}, "sparse_updates.*array"),
    "mode_tensor": ({"sparse_updates": tf.constant("a")}, "sparse_updates.*Tensor"),
    "ema_flag": ({"use_ema": "False"}, "use_ema.*True or False.*'False'"),
    "ema_flag_nan": ({"use_ema": NAN}, "use_ema.*True or False.*nan"),
    "seed_bool": ({"seed": True}, "seed.*integer.*True"),
    "seed_half": ({"seed": 0.5}, "seed.*integer.*0.5"),
    "every": ({"use_ema": True, "ema_overwrite_frequency": 0.5}, "frequency.*0.5"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@CLASSES
def test_arguments(cls, name):
    kwargs, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        cls(**kwargs)


@CLASSES
def test_arguments_as_keras_takes_them(cls):
    off = dict.fromkeys(("weight_decay", "clipnorm", "clipvalue", "global_clipnorm"))
    ours = cls(**dict.fromkeys(off, False), seed=np.int64(7))
    theirs = cls(**off, seed=7, name=ours.name)
    assert ours.get_config() == theirs.get_config()
    variable = table()
    ours.apply([slices([0])], [variable])
    ours.apply([], [variable])
    assert int(ours.iterations) == 1


@EXECUTION
@CLASSES
def test_numpy_numbers(cls, execution):
    """As Python's own, of the weight's dtype."""
    ends = []
    for number in (float, np.float64):
        options = {"weight_decay": 0.1, "global_clipnorm": 0.5, "ema_momentum": 0.9}
        options = {name: number(x) for name, x in options.items()}
        every = np.int64(2) if number is np.float64 else 2
        optimizer = cls(0.1, use_ema=True, ema_overwrite_frequency=every, **options)
        variable = table()
        optimizer.build([variable])
        if number is np.float64:
            optimizer.weight_decay = np.float64(0.1)
        take(execution, optimizer, [slices([0, 3])], [variable], n=3)
        ends.append(variable.numpy())
        json.dumps({name: optimizer.get_config()[name] for name in options})
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("name", ["epsilon_hat", "bias_correction", "amsgrad"])
@pytest.mark.parametrize("value", ["False", None, [0.5]])
def test_flags(name, value):
    with pytest.raises(ValueError, match=f"{name}.*True or False"):
        keras_adam.Adam(**{name: value})
    assert keras_adam.Adam(**{name: np.bool_(True)})


def test_adamax_has_no_epsilon():
    with pytest.raises(ValueError, match=r"AdaMax has no `epsilon`.*1e-07.*from_keras"):
        keras_adam.AdaMax(epsilon=1e-7)
    with pytest.raises(ValueError, match=r"AdaMax has no `epsilon`.*from_keras"):
        keras_adam.AdaMax.from_config(keras.optimizers.Adamax().get_config())


@pytest.mark.parametrize(
    "beta_1, message",
    [
        (lambda step: 1.5, r"beta_1\(0\).*\[0, 1\).*1.5"),
        (lambda step: -0.5, r"beta_1\(0\).*-0.5"),
        (lambda step: NAN, r"beta_1\(0\).*nan"),
        (lambda: 0.9, "`beta_1`, if callable, must take the step.*raised"),
        (lambda step: "a", "`beta_1`, if callable, must take the step.*raised"),
    ],
)
@MODES
@CLASSES
def test_schedules_of_beta_1(cls, mode, beta_1, message):
    with pytest.raises(ValueError, match=message):
        cls(beta_1=beta_1, sparse_updates=mode).build([table()])


@EXECUTION
@CLASSES
@pytest.mark.parametrize("gradient", [1.0, [1.0], [[1.0, 1.0]]])
def test_gradients_that_are_no_tensors(cls, execution, gradient):
    optimizer, variable = cls(), table()
    with pytest.raises(ValueError, match=r"must have the shape \(4, 2.*not broadcast"):
        take(execution, optimizer, [gradient], [variable])
    np.testing.assert_array_equal(variable.numpy(), 1)


@pytest.mark.parametrize("epsilon", ["1e-8", None, True, math.inf, np.ones(2)])
def test_epsilon(epsilon):
    with pytest.raises(ValueError, match=r"epsilon.*number above 0.*1e-8"):
        keras_adam.Adam(epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 1e-40, -1e-8, NAN])
def test_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match=f"epsilon.*{epsilon}.*1e-8"):
        keras_adam.Adam(epsilon=epsilon)


def table(rows=4, **kwargs):
    return keras.Variable(np.ones((rows, 2), np.float32), name="table", **kwargs)


def slices(ids, values=None, **kwargs):
    ids = tf.constant(ids, **kwargs)
    values = tf.ones((ids.shape[0], 2)) if values is None else tf.constant(values)
    return tf.IndexedSlices(values, ids, tf.constant([4, 2]))


def take(execution, optimizer, gradients, variables, n=1):
    step = EXECUTIONS[execution](lambda: optimizer.apply(gradients, variables))
    for _ in range(n):
        step()


SHAPE = r"table must have the shape.*not broadcast.*Received: "
INDICES = "IndexedSlices of table.*vector of int32 or int64.*Received: "
GRADIENTS = {
    "vector": (lambda: tf.ones(2), SHAPE + r"\(2,\)"),
    "scalar": (lambda: tf.ones(()), SHAPE + r"\(\)"),
    "narrow": (lambda: tf.ones((4, 1)), SHAPE + r"\(4, 1\)"),
    "wide": (lambda: tf.ones((4, 3)), SHAPE + r"\(4, 3\)"),
    "rank_3": (lambda: tf.ones((1, 4, 2)), SHAPE + r"\(1, 4, 2\)"),
    "narrow_rows": (lambda: slices([0, 1], np.ones((2, 1), "f")), SHAPE + r"\(2, 1\)"),
    "wide_rows": (lambda: slices([0, 1], np.ones((2, 3), "f")), SHAPE + r"\(2, 3\)"),
    "complex": (lambda: tf.ones((4, 2), tf.complex64), "table must be real.*complex64"),
    "bool": (lambda: tf.ones((4, 2), tf.bool), "table must be real.*bool"),
    "text": (lambda: tf.fill((4, 2), "a"), "table must be real.*string"),
    "float_ids": (lambda: slices([0.0]), INDICES + ".*float32"),
    "uint8_ids": (lambda: slices([0], dtype="uint8"), INDICES + ".*uint8"),
    "ids_of_rank_2": (
        lambda: slices([[0]], np.ones((1, 1, 2), "f")),
        INDICES + r".*\(1, 1\)",
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
@EXECUTION
def test_gradients(name, execution):
    """Nothing is broadcast or cut off, and the weights stay as they were."""
    make, message = GRADIENTS[name]
    for options in ({}, {"gradient_accumulation_steps": 2}):
        variable, optimizer = table(), keras_adam.Adam(0.1, **options)
        optimizer.build([variable])
        with pytest.raises(ValueError, match=f"(?s){message}"):
            take(execution, optimizer, [make()], [variable])
        assert np.all(variable.numpy() == 1) and int(optimizer.iterations) == 0


@pytest.mark.parametrize(
    "make", [lambda: np.ones((4, 2)), lambda: tf.ones((4, 2), tf.int32)]
)
@EXECUTION
def test_gradients_of_other_types(make, execution):
    """float64 and integers have the values they have."""
    variable, optimizer = table(), keras_adam.Adam(0.1)
    take(execution, optimizer, [make()], [variable])
    np.testing.assert_allclose(variable.numpy(), 0.9, rtol=1e-6)


@EXECUTION
@CLASSES
def test_decay_of_all_the_weights(cls, execution):
    """An error where a step can raise one; XLA knows none, and makes it NaN."""
    variable, optimizer = table(), cls(0.5, weight_decay=1.0)
    take(execution, optimizer, [slices([0])], [variable])
    optimizer.learning_rate = 1.0
    if execution == "xla":
        take(execution, optimizer, [slices([0])], [variable])
        assert np.isnan(variable.numpy()[2:]).all()  # row 1 was swept, and owes none
        return
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        take(execution, optimizer, [slices([0])], [variable])
    assert "`learning_rate` * `weight_decay` must stay below 1" in str(error.value)


@MODES
@EXECUTION
@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("cls", ["adam", "adamax"])
def test_gradients_that_are_not_finite(bad, execution, mode, cls):
    """As in dense Adam: the numbers they are for become NaN, and no others."""
    make, rule = cases.OPTIMIZERS[cls]
    values = np.array([[bad, 1.0], [1.0, -1.0], [2.0, 1.0]], np.float32)
    ids, start = [0, 1, 1], np.ones((4, 2), np.float32)
    variable = table()
    optimizer = make(learning_rate=0.125, sparse_updates=mode)
    optimizer.build([variable])
    take(execution, optimizer, [slices(ids, values)], [variable], n=3)
    with np.errstate(invalid="ignore"):
        training = cases.oracle(rule, [start], [[(values, ids)]] * 3, mode=mode)
    truth = training.thetas[0]
    assert np.isnan(truth).sum() == 1
    np.testing.assert_allclose(variable.numpy(), truth, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_who_says_that_something_is_not_finite(jit):
    """The callback TerminateOnNaN, in `fit`; TensorFlow's checks, in eager mode."""
    x, y = cases.make_data()
    y = np.where(np.arange(len(y))[:, None] == 20, np.inf, y)  # of the third batch

    def fit(cls=keras_adam.Adam, y=y, eager=False, **kwargs):
        model = cases.make_model()
        compiled = {"run_eagerly": True} if eager else {"jit_compile": jit}
        model.compile(optimizer=cls(0.01), loss="mse", **compiled)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, **kwargs)
        return int(model.optimizer.iterations)

    assert fit() == 6
    assert fit(callbacks=[keras.callbacks.TerminateOnNaN()]) == 3
    if not jit:
        tf.debugging.enable_check_numerics()
        try:
            for cls in (keras_adam.Adam, keras_adam.AdaMax):
                assert fit(cls, y=np.where(np.isfinite(y), y, 0), eager=True) == 6
                with pytest.raises(tf.errors.InvalidArgumentError, match="Infinity"):
                    fit(cls, eager=True)
        finally:
            tf.debugging.disable_check_numerics()


@MODES
@pytest.mark.parametrize("ids", [[-1], [1, 7]])
@EXECUTION
def test_ids_outside_the_table(ids, execution, mode):
    variable = table()
    optimizer = keras_adam.Adam(0.1, sparse_updates=mode)
    optimizer.build([variable])
    truth = np.ones((4, 2))
    if execution != "xla" and not (mode == "dense" and ids == [-1]):
        with pytest.raises(tf.errors.InvalidArgumentError, match=str(ids[-1])):
            take(execution, optimizer, [slices(ids)], [variable])
    else:
        take(execution, optimizer, [slices(ids)], [variable])
        truth[[i for i in ids if 0 <= i < 4]] = 0.9
    np.testing.assert_allclose(variable.numpy(), truth, rtol=1e-6)


@MODES
@EXECUTION
def test_tables_without_rows(execution, mode):
    variable, other = table(rows=0), table()
    optimizer = keras_adam.Adam(0.1, sparse_updates=mode)
    optimizer.build([variable, other])
    none = tf.IndexedSlices(
        tf.ones((0, 2)), tf.zeros([0], tf.int32), tf.constant([0, 2])
    )
    take(execution, optimizer, [none, slices([0])], [variable, other], n=2)
    optimizer.settle()
    assert variable.numpy().shape == (0, 2)
    np.testing.assert_allclose(other.numpy()[0], 0.8, rtol=1e-6)


@EXECUTION
def test_scalar_variables(execution):
    variable, optimizer = keras.Variable(1.0, name="scale"), keras_adam.Adam(0.1)
    take(execution, optimizer, [tf.ones(())], [variable], n=2)
    np.testing.assert_allclose(variable.numpy(), 0.8, rtol=1e-6)
    row = tf.IndexedSlices(tf.ones(1), tf.constant([0]), tf.constant([1]))
    with pytest.raises(ValueError, match="IndexedSlices of scale"):
        take(execution, optimizer, [row], [variable])


@pytest.mark.parametrize("dtype", ["complex64", "bool"])
@CLASSES
def test_variables_that_are_not_real(cls, dtype):
    variable = keras.Variable(np.ones(2), dtype=dtype, name="odd")
    with pytest.raises(ValueError, match=f"odd.*{dtype}.*trainable=False"):
        cls().build([variable])


@MODES
@EXECUTION
def test_missing_gradients(execution, mode):
    """One is a warning, and no step for its variable; all are an error."""
    first, second = table(), table()
    optimizer = keras_adam.Adam(0.1, sparse_updates=mode)
    optimizer.build([first, second])
    with pytest.raises(ValueError, match="No gradients provided"):
        take(execution, optimizer, [None, None], [first, second])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        take(execution, optimizer, [None, slices([0])], [first, second])
    assert np.all(first.numpy() == 1)
    np.testing.assert_allclose(second.numpy()[0], 0.9, rtol=1e-6)
    with pytest.raises(ValueError, match="Received: 1 gradients for 2 variables"):
        take(execution, optimizer, [slices([0])], [first, second])


def test_frozen_variables():
    """They are no part of it; and those that thaw later need a new `compile`."""
    model = cases.make_model()
    table = model.layers[0]
    table.trainable = False
    model.compile(optimizer=keras_adam.Adam(0.1), loss="mse")
    before = table.embeddings.numpy()
    model.fit(*cases.make_data(), verbose=0)
    np.testing.assert_array_equal(table.embeddings.numpy(), before)
    table.trainable = True
    with pytest.raises(
        ValueError, match=r"(?s)Unknown variable.*recreate a new optimizer"
    ):
        model.optimizer.apply(
            [tf.ones(v.shape) for v in model.trainable_variables],
            model.trainable_variables,
        )


@MODES
@EXECUTION
def test_native_variables(execution, mode):
    """Those of TensorFlow that the variables it was built for hold."""
    variable, optimizer = table(), keras_adam.Adam(0.1, sparse_updates=mode)
    optimizer.build([variable])
    take(execution, optimizer, [slices([0])], [variable.value])
    np.testing.assert_allclose(variable.numpy()[0], 0.9, rtol=1e-6)


def test_other_variables_than_it_was_built_for():
    """Added later, or of a second model, or given twice."""
    first, second, optimizer = table(), table(), keras_adam.Adam()
    optimizer.build([first])
    for variables in ([first, second], [second]):
        with pytest.raises(ValueError, match=r"(?s)Unknown variable.*new optimizer"):
            optimizer.apply([tf.ones((4, 2))] * len(variables), variables)
        with pytest.raises(ValueError, match=r"(?s)Unknown variable.*new optimizer"):
            native = [v.value for v in variables]
            optimizer.apply([tf.ones((4, 2))] * len(variables), native)
    optimizer.apply([], [second])  # takes no step
    assert np.all(first.numpy() == 1)
    for twice in ([first, first], [first, first.value]):
        with pytest.raises(ValueError, match=r"given twice.*table.*Give each once"):
            keras_adam.Adam().build(twice)
        with pytest.raises(ValueError, match=r"given twice.*table.*Give each once"):
            optimizer.apply([tf.ones((4, 2))] * 2, twice)


def test_one_optimizer_of_two_models():
    optimizer = keras_adam.Adam(0.01)
    models = [cases.make_model(), cases.make_model()]
    for model in models:
        model.compile(optimizer=optimizer, loss="mse")
    models[0].fit(*cases.make_data(), verbose=0)
    with pytest.raises(ValueError, match=r"(?s)Unknown variable.*new optimizer"):
        models[1].fit(*cases.make_data(), verbose=0)


@pytest.mark.parametrize("before, after", [(None, 0.5), (0.5, None), (0.1, 0.5)])
@MODES
@EXECUTION
def test_weight_decay_set_after_build(execution, mode, before, after):
    """Another value is taken from then on; exact mode cannot begin or end with it."""
    variable = table()
    optimizer = keras_adam.Adam(0.125, sparse_updates=mode, weight_decay=before)
    optimizer.build([variable])
    take(execution, optimizer, [slices([0])], [variable])
    optimizer.weight_decay = after
    if mode == "exact" and None in (before, after):
        with pytest.raises(ValueError, match=r"weight_decay.*0\.0 is one.*\"dense\""):
            take(execution, optimizer, [slices([1])], [variable], n=2)
        return
    take(execution, optimizer, [slices([1])], [variable], n=2)
    rule = cases.OPTIMIZERS["adam"][1]
    training = cases.oracle(
        *(rule, [np.ones((4, 2), np.float32)], []), mode=mode, weight_decay=before or 0
    )
    training.apply([(np.ones((1, 2)), [0])])
    training.weight_decay = after or 0
    for _ in range(2):
        training.apply([(np.ones((1, 2)), [1])])
    np.testing.assert_allclose(variable.numpy(), training.thetas[0], atol=1e-6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("beta_1", 0.5),
        ("beta_2", 0.99),
        ("epsilon", 0.1),
        ("epsilon_hat", True),
        ("bias_correction", False),
        ("use_ema", False),
        ("ema_momentum", 0.5),
    ],
)
@MODES
def test_arguments_changed_after_build(mode, name, value):
    """As Keras's are, from then on; but not those that rows owe by."""
    variable = table()
    optimizer = keras_adam.Adam(0.125, sparse_updates=mode, use_ema=True)
    optimizer.build([variable])
    optimizer.apply([slices([0])], [variable])
    setattr(optimizer, name, value)
    if mode == "exact" or (mode == "lazy" and "ema" in name):
        with pytest.raises(ValueError, match=rf"`{name}` cannot.*{value}.*\"dense\""):
            optimizer.apply([slices([1])], [variable])
    else:
        optimizer.apply([slices([1])], [variable])


def test_an_exclusion_after_build():
    variable = table()
    optimizer = keras_adam.Adam(0.125, weight_decay=0.1)
    optimizer.build([variable])
    optimizer.exclude_from_weight_decay(var_names=["table"])
    with pytest.raises(ValueError, match=r"for table none.*exclude_from.*before"):
        optimizer.apply([slices([1])], [variable])


@MODES
def test_an_exclusion_after_build_of_what_owes_nothing(mode):
    """As in Keras, which so goes on after `load_model`."""
    variables = [table(), keras.Variable(np.ones(3, np.float32), name="bias")]
    optimizer = keras_adam.Adam(0.125, sparse_updates=mode, weight_decay=0.5)
    optimizer.build(variables)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    thetas = [np.ones((4, 2), np.float32), np.ones(3, np.float32)]
    training = cases.oracle(
        *(cases.OPTIMIZERS["adam"][1], thetas, []),
        mode=mode,
        weight_decay=0.5,
        decayed=[0],
    )
    bias = np.float32([1, -2, 3])
    for ids in ([0], [1], [1, 3]):
        optimizer.apply([slices(ids), tf.constant(bias)], variables)
        training.apply([(np.ones((len(ids), 2)), ids), bias])
    for variable, theta in zip(variables, training.thetas):
        np.testing.assert_allclose(variable.numpy(), theta, atol=1e-6)


class Clip(keras.constraints.Constraint):
    def __call__(self, x):
        return tf.clip_by_value(x, -0.5, 0.5)


@MODES
def test_a_constraint_set_after_build(mode):
    """It holds from then on, for the whole table, as in dense Adam."""
    variable = table()
    optimizer = keras_adam.Adam(0.125, sparse_updates=mode)
    optimizer.build([variable])
    rule = cases.OPTIMIZERS["adam"][1]
    training = cases.oracle(rule, [np.ones((4, 2), np.float32)], [], mode=mode)
    for ids, limit in (([0], None), ([1], 0.5), ([1], 0.5), ([0, 1], 0.5)):
        if limit:
            variable.constraint = Clip()
            training.constraint = lambda x: np.clip(x, -0.5, 0.5)
        optimizer.apply([slices(ids)], [variable])
        training.apply([(np.ones((len(ids), 2)), ids)])
    np.testing.assert_allclose(variable.numpy(), training.thetas[0], atol=1e-6)
