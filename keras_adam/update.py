"""One variable's step: which execution of the rule, chosen in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_adam import rounding, rows
from keras_adam.rows import Rows

# (theta, g, state, scalars) -> (theta, state), of tensors.
Rule = Callable[..., tuple[Any, Sequence[Any]]]


def takes_kernel(g: tf.Tensor | Rows, tables: Sequence[Any], decays: bool) -> bool:
    """Whether TensorFlow's own fused kernel is to stand in for the rule.

    Outside XLA it is the fastest there is (the rule compiled takes a tenth longer on
    16 variables of 1,000,000), but it knows one dtype only, and no
    decay: a second pass over a variable, next to nothing over rows. Under XLA
    the rule itself becomes one fusion a variable, as fast.
    """
    values = g.values if isinstance(g, Rows) else g
    return (
        len({tf.as_dtype(x.dtype) for x in (values, *tables)}) == 1
        and (isinstance(g, Rows) or not decays)
        and not rows.in_xla()
    )


def update(
    variable: tf.Variable,
    g: tf.Tensor | Rows,
    state: Sequence[tf.Variable],
    scalars: Any,
    decay: tf.Tensor | None,
    *,
    rule: Rule,
    kernel: Callable[..., None] | None,
    copies: Sequence[tf.Variable],
    compiled: Callable[..., None],
    keys: Sequence[tf.Tensor | None],
    values: Sequence[tf.Tensor] | None = None,
    average: Callable[[tf.Tensor], None] | None = None,
    once: Callable[[tf.Tensor], tf.Tensor],
) -> None:
    """Takes one step on a variable, or on some of its rows, in place.

    Args:
        variable: The weights, of any float dtype.
        g: Their gradient, in the dtype of the state.
        state: The rule's state variables, shaped like `variable`.
        scalars: The rule's last argument.
        decay: The share of the weights to take off first.
        rule: What to compute.
        kernel: A kernel that computes it, if `takes_kernel`.
        copies: For `Rows` and a kernel: `Workspace.copies`.
        compiled: From `compile_assign`.
        keys: By which to round the new weights and state: `rounding.cast`'s.
        values: For `Rows`: those of theta and the state, if not what the variables
            hold.
        average: For `Rows`: called with the new theta, to be averaged.
        once: `rows.once`.
    """
    tables = [variable, *state]
    if isinstance(g, Rows):
        values = [*(values or rows.gather(tables, g))]
        if kernel is None:
            rule = functools.partial(rule, once=once)
            values = _apply(rule, values, g.values, scalars, decay)
        else:
            values[0] = _decayed(values[0], decay)
            for copy, value in zip(copies, values):
                copy.assign(value)
            kernel(copies[0], g.values, copies[1:], scalars)
            values = [copy.read_value() for copy in copies]
        if any(key is not None for key in keys):
            dtypes = tuple(x.dtype.name for x in tables)
            values = rows.compiled(_rounded, dtypes)(values, keys, g.lengthened)
        for x, value in zip(tables, values):
            rows.scatter(x, g.ids, value)
        if average is not None:
            average(values[0])
    elif kernel is not None:
        kernel(variable, g, state, scalars)
    elif rows.in_xla() or tf.executing_eagerly():  # eager: to be stepped through
        _assign(rule, tables, g, scalars, decay, keys)
    else:
        compiled(rule, tables, g, scalars, decay, keys)


def _decayed(theta: tf.Tensor, decay: tf.Tensor | None) -> tf.Tensor:
    return theta if decay is None else theta - theta * decay


def _apply(rule: Rule, tables: Any, g: Any, scalars: Any, decay: Any) -> list[Any]:
    theta, *state = [tf.cast(x, g.dtype) for x in tables]
    theta = _decayed(theta, decay)
    theta, new = rule(theta, g, state, scalars)
    return [theta, *new]


def _rounded(dtypes: Any, values: Any, keys: Any, ids: Any) -> list[Any]:
    return [rounding.cast(x, d, k, ids) for x, d, k in zip(values, dtypes, keys)]


def _assign(
    rule: Rule, tables: Any, g: Any, scalars: Any, decay: Any, keys: Any
) -> None:
    values = _apply(rule, tables, g, scalars, decay)
    for x, value, key in zip(tables, values, keys):
        x.assign(rounding.cast(value, x.dtype.name, key))


def compile_assign() -> Any:
    """The rule over whole variables as one fusion each, for outside XLA.

    Not one for all optimizers: a trace does not outlive the variables it saw.
    """
    return tf.function(_assign, jit_compile=True)
