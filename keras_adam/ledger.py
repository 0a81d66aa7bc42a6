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

# (plan, theta, state, owed) -> (theta, state), of tensors.
Settle = Callable[[Plan, Any, Sequence[Any], tails.Owed], tuple[Any, Sequence[Any]]]


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

    def since(self, last: tf.Tensor) -> tf.Tensor:
        """The rows of the ring for rows of a table last updated at these steps."""
        return tf.gather(self.ring, tf.cast(last, tf.int32) % LENGTH)

    def advance(
        self, t: tf.Tensor, lead: Any, beta_1: Any, decay: tf.Tensor | None
    ) -> None:
        """Adds step t, at which every row that is not updated is skipped."""
        places = (t - tf.range(1, self.plan.window + 1)) % LENGTH
        before = after = self.log_decay.read_value()
        if decay is not None:
            after = tails.add_log(before, decay)
            self.log_decay.assign(after)
        rows.scatter(
            self.ring,
            places,
            tails.advance(
                self.plan,
                tf.gather(self.ring, places),
                tf.cast(t, self.ring.dtype),
                lead,
                beta_1,
                decay,
                before,
                after,
            ),
        )


class Debts(NamedTuple):
    """One table's."""

    history: History
    settle: Settle
    last: tf.Variable  # the step of each row's last update
    t: tf.Tensor  # the steps done, int32

    @property
    def log_decay(self) -> tf.Tensor | None:
        return self.history.log_decay.read_value() if self.history.decays else None

    def gap(self, last: tf.Tensor) -> tf.Tensor:
        gap = self.t - tf.cast(last, tf.int32)
        return tf.cast(gap, self.history.ring.dtype)


def settled(
    settle: Settle,
    plan: Plan,
    theta: tf.Tensor,
    state: Sequence[tf.Tensor],
    history: tf.Tensor,
    gap: tf.Tensor,
    log_decay: tf.Tensor | None,
) -> tuple[tf.Tensor, Sequence[tf.Tensor]]:
    """Rows, and their state, as they would be had no step skipped them."""
    dtype = state[0].dtype
    owed = tails.owed(plan, history, gap, log_decay, len(theta.shape), dtype)
    return settle(plan, tf.cast(theta, dtype), state, owed)


def rows_now(
    table: tf.Variable, state: Sequence[tf.Variable], ids: tf.Tensor, debts: Debts
) -> tf.Tensor:
    """Rows of a table as dense Adam would have them now; writes nothing.

    Their gradient is the table's.
    """
    flat = tf.reshape(ids, [-1])
    flat, n = rows.padded_ids(flat)
    last = tf.gather(debts.last, flat)
    owed = (debts.history.since(last), debts.gap(last), debts.log_decay)
    state = [tf.gather(x, flat) for x in state]
    compute = rows.compiled(_rows_now, debts.settle, debts.history.plan)

    @tf.custom_gradient
    def bring_to_date(theta: tf.Tensor) -> Any:
        return compute(theta, state, *owed), lambda g: g

    theta = bring_to_date(tf.gather(table, flat))[:n]
    return tf.reshape(theta, tf.concat([tf.shape(ids), table.shape[1:]], axis=0))


def _rows_now(settle: Settle, plan: Plan, theta: Any, state: Any, *owed: Any) -> Any:
    now, _ = settled(settle, plan, theta, state, *owed)
    return tf.cast(now, theta.dtype)


def settle_table(
    table: tf.Variable, state: Sequence[tf.Variable], debts: Debts
) -> None:
    """Brings all rows to date, in a pass over the table."""
    theta, new = settled(
        debts.settle,
        debts.history.plan,
        table.read_value(),
        [x.read_value() for x in state],
        debts.history.since(debts.last),
        debts.gap(debts.last),
        debts.log_decay,
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
