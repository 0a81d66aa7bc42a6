"""Exact mode's state: when each row was last updated, and what steps since owe it."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_adam import rows, tails
from keras_adam.tails import Plan

# Steps a history goes back. `sweep` lets no row stay behind for longer.
LENGTH = 65536

# (plan, state, owed) -> (what to take off theta, state), of tensors.
Tail = Callable[[Plan, Sequence[Any], tails.Owed], tuple[Any, Sequence[Any]]]


class History(tf.Module):
    """What a row owes, for each step at which it may have been updated last.

    A ring: what is owed since step t0 stands at t0 modulo its length. Keras does
    not save it, since `settle` is called first; `tf.train.Checkpoint` does.

    Args:
        plan: The plan of the tails.
        decays: Whether it is for tables with weight decay.
        dtype: Of the numbers.
    """

    def __init__(self, plan: Plan, decays: bool, dtype: str) -> None:
        super().__init__(name="history")
        self.plan = plan
        with tf.init_scope():
            self.ring = tf.Variable(
                tf.zeros([LENGTH, plan.columns + 4 * decays], dtype), trainable=False
            )
            self.log_decay = tf.Variable(tf.zeros([2], dtype), trainable=False)
        self.decays = decays

    def advance(
        self, t: tf.Tensor, lead: Any, beta_1: Any, decay: tf.Tensor | None
    ) -> None:
        """Adds step t, at which every row that is not updated is skipped."""
        places = (t - tf.range(1, self.plan.window + 1)) % LENGTH
        before = self.log_decay.read_value() if self.decays else None
        advance = rows.compiled(tails.advance, self.plan)
        new, after = advance(
            *(tf.gather(self.ring, places), tf.cast(t, self.ring.dtype)),
            *(lead, beta_1, decay, before),
        )
        rows.scatter(self.ring, places, new)
        if self.decays:
            self.log_decay.assign(after)


class Debts(NamedTuple):
    """One table's."""

    history: History
    tail: Tail
    last: tf.Variable  # the step of each row's last update
    t: tf.Tensor  # the steps done, int32

    def of(self, last: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
        """The first arguments of `tails.owed`, for rows last updated at these steps."""
        last = tf.cast(last, tf.int32)
        gap = tf.cast(self.t - last, self.history.ring.dtype)
        log_decay = self.history.log_decay.read_value() if self.history.decays else None
        return tf.gather(self.history.ring, last % LENGTH), gap, log_decay


class Reading(NamedTuple):
    """Rows read by a forward pass, for the update after it to go on from."""

    ids: tf.Tensor  # `[k]`, lengthened
    count: tf.Tensor  # without that
    theta: tf.Tensor  # `[k, ...]`, brought to date
    state: list[tf.Tensor]  # not brought to date
    last: tf.Tensor  # `[k]`
    owed: tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]


def settled(
    tail: Tail,
    plan: Plan,
    theta: tf.Tensor,
    state: Sequence[tf.Tensor],
    *debts: tf.Tensor | None,
) -> tuple[tf.Tensor, Sequence[tf.Tensor]]:
    """Rows, and their state, as they would be had no step skipped them."""
    theta = tf.cast(theta, state[0].dtype)
    paid, state = _pay(tail, plan, theta, state, *debts)
    return theta - paid, state


def _pay(
    tail: Tail, plan: Plan, theta: Any, state: Any, *debts: Any
) -> tuple[Any, Any]:
    """What to take off theta, and the state then; theta only for weight decay."""
    owed = tails.owed(plan, *debts, len(state[0].shape), state[0].dtype)
    paid, state = tail(plan, state, owed)
    return paid if owed.decay is None else paid + theta * owed.decay, state


def _paid(*args: Any) -> Any:
    return _pay(*args)[0]


def read(
    table: tf.Variable,
    state: Sequence[tf.Variable],
    ids: tf.Tensor,
    places: tf.Variable,
    debts: Debts,
) -> tuple[tf.Tensor, Reading]:
    """Rows as dense Adam would have them now; writes nothing.

    Args:
        table: The table.
        state: The rule's state variables.
        ids: Of any shape.
        places: `rows.Workspace(table).places`.
        debts: What the rows owe.
    """
    flat = tf.reshape(ids, [-1])
    d = rows.distinct(flat, places, sweep(table.shape[0], debts.t))
    k = rows.lengthened(d.ids)
    last = tf.gather(debts.last, k)
    theta, *values = (tf.gather(x, k) for x in (table, *state))
    owed = debts.of(last)
    # Only what is owed is compiled: theta has a gradient to let through.
    paid = rows.compiled(_paid, debts.tail, debts.history.plan)
    now = tf.cast(theta, values[0].dtype)
    now -= paid(tf.stop_gradient(now) if owed[2] is not None else None, values, *owed)
    out = _repeat(tf.cast(now, table.dtype), d.place)
    out = tf.reshape(out, tf.concat([tf.shape(ids), table.shape[1:]], axis=0))
    reading = Reading(k, tf.shape(d.ids)[0], tf.stop_gradient(now), values, last, owed)
    return tf.ensure_shape(out, [*ids.shape, *table.shape[1:]]), reading


@tf.custom_gradient
def _repeat(x: tf.Tensor, place: tf.Tensor) -> Any:
    """`tf.gather` whose gradient is dense."""
    n = tf.shape(x)[0]
    return tf.gather(x, place), lambda g: (
        tf.math.unsorted_segment_sum(g, place, n),
        None,
    )


def settle_table(
    table: tf.Variable, state: Sequence[tf.Variable], debts: Debts
) -> None:
    """Brings all rows to date, in a pass over the table."""
    values = [x.read_value() for x in (table, *state)]
    theta, new = settled(
        debts.tail,
        debts.history.plan,
        values[0],
        values[1:],
        *debts.of(debts.last.read_value()),
    )
    table.assign(tf.cast(theta, table.dtype))
    for x, value in zip(state, new):
        x.assign(value)
    debts.last.assign(tf.fill(debts.last.shape, tf.cast(debts.t, debts.last.dtype)))


def sweep(table_rows: int, t: tf.Tensor) -> tf.Tensor:
    """Rows to update at step t beside the batch's, with a gradient of 0.

    A row in this many is swept at each step, so that none falls behind by more
    than the history goes back.
    """
    n = -(-table_rows // (LENGTH - 1))
    steps = -(-table_rows // n)
    return ((t % steps) * n + tf.range(n)) % table_rows


class _Settled:
    """A `keras.Variable` whose rows are brought to date when its values are taken.

    Saving, `get_weights` and NumPy take them here.
    """

    _keras_adam_owner: weakref.ref[Any]

    def _bring_to_date(self) -> None:
        owner = self._keras_adam_owner()
        if owner is not None and tf.executing_eagerly():
            owner.settle()

    def numpy(self) -> Any:
        self._bring_to_date()
        return super().numpy()  # type: ignore[misc]

    def __array__(self, dtype: Any = None) -> Any:
        self._bring_to_date()
        return super().__array__(dtype)  # type: ignore[misc]

    def assign(self, value: Any) -> Any:
        # What is owed up to now is not owed by the new values.
        self._bring_to_date()
        return super().assign(value)  # type: ignore[misc]


@functools.cache
def _settled_class(cls: type) -> type:
    return type(cls.__name__, (_Settled, cls), {"__module__": cls.__module__})


def set_owner(variable: Any, optimizer: Any) -> None:
    """From now on this optimizer knows what the variable's rows owe."""
    old = owner(variable)
    if old is not None and old is not optimizer:
        with tf.init_scope():
            old.settle()
    variable._keras_adam_owner = weakref.ref(optimizer)
    readers = getattr(variable, "_keras_adam_readers", [])
    if readers:
        gc.collect()
        if any(graph() is not None for graph in readers):
            warnings.warn(
                f"A tf.function that reads {variable.path} was traced before its "
                f"optimizer was built, and will go on reading rows without what "
                f"{optimizer.name} owes them. Build the optimizer first: "
                "`optimizer.build(model.trainable_variables)`.",
                stacklevel=4,
            )
        variable._keras_adam_readers = []


def note_read(variable: Any) -> None:
    """The graph being traced reads the variable, and knows no owner."""
    graph = weakref.ref(tf.compat.v1.get_default_graph())
    readers = getattr(variable, "_keras_adam_readers", [])
    variable._keras_adam_readers = [*readers, graph]


def owner(variable: Any) -> Any:
    """The exact optimizer that owns the variable, or None."""
    reference = getattr(variable, "_keras_adam_owner", None)
    return reference and reference()


def settle_when_read(variable: Any) -> None:
    """Has the owner called when the variable's values are taken."""
    if isinstance(variable, keras.Variable) and not isinstance(variable, _Settled):
        variable.__class__ = _settled_class(type(variable))
