"""Exact mode's state: when each row was last updated, and what steps since owe it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_adam import rounding, rows, tails
from keras_adam.base import share, state_dtype
from keras_adam.tails import Plan

# Steps a history goes back. `sweep` lets no row stay behind for longer.
LENGTH = 65536

# (plan, state, owed) -> what to take off theta, of tensors.
Tail = Callable[[Plan, Sequence[Any], tails.Owed], Any]


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
        with tf.init_scope():
            self._ring = tf.Variable(
                tf.zeros([LENGTH, plan.columns + 2 * plan.logs * decays], dtype),
                trainable=False,
            )
            logs = plan.logs if decays else 2
            self._log_decay = tf.Variable(tf.zeros([logs], dtype), trainable=False)
        self.decays = decays

    @property
    def ring(self) -> tf.Variable:
        return rows.local(self._ring)

    @property
    def log_decay(self) -> tf.Variable:
        return rows.local(self._log_decay)

    def advance(
        self, plan: Plan, t: tf.Tensor, lead: Any, beta_1: Any, decay: tf.Tensor | None
    ) -> None:
        """Adds step t, at which every row that is not updated is skipped."""
        places = (t - tf.range(1, plan.window + 1)) % LENGTH
        before = self.log_decay.read_value() if self.decays else None
        advance = rows.compiled(tails.advance, plan)
        new, after = advance(
            *(tf.gather(self.ring, places), tf.cast(t, self.ring.dtype)),
            *(lead, beta_1, decay, before),
        )
        rows.scatter(self.ring, places, new)
        if self.decays:
            self.log_decay.assign(after)


class Debts(NamedTuple):
    """One table's. In lazy mode, without a history, only its average owes."""

    history: History | None
    plan: Plan | None
    tail: Tail
    last: tf.Variable  # the step of each row's last update
    t: tf.Tensor  # the steps done, int32
    momentum: float | None = None  # of the average, if there is one
    keys: Sequence[Any] = ()  # by which to round what is settled

    def settled(self, values: list[tf.Tensor], last: tf.Tensor) -> list[tf.Tensor]:
        """Rows as they would be had no step skipped them.

        Args:
            values: Rows of theta and of the state, or whole tables.
            last: Their steps of last update.
        """
        if self.history is None:
            return values
        return [self.theta(values, last), *self.state(values[1:], last)]

    def theta(self, values: list[tf.Tensor], last: tf.Tensor) -> tf.Tensor:
        compute = rows.compiled(_theta, self.tail, self.plan)
        return compute(values[0], values[1:], *self._of(last))

    def state(self, values: list[tf.Tensor], last: tf.Tensor) -> list[tf.Tensor]:
        # Moments may be kept in fewer digits than are reckoned with.
        m, v, *others = [tf.cast(x, state_dtype(x.dtype)) for x in values]
        return [*rows.compiled(_state, self.plan)([m, v], *self._of(last)), *others]

    def average(
        self,
        average: tf.Tensor,
        values: Sequence[tf.Tensor],
        last: tf.Tensor,
        new: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The weights' average as it would be had no step skipped the rows.

        Args:
            average: As it was at the steps of last update.
            values: Of theta and of the state, from then.
            last: These steps.
            new: The rows' theta after one step more, to be averaged too.
        """
        compute = rows.compiled(_average, self.tail, self.plan, self.momentum)
        history, gap, log = self._of(last)
        gap = gap if self.history else tf.cast(gap, average.dtype)
        t = tf.cast(self.t, gap.dtype)
        return compute(average, values[0], values[1:], history, gap, log, t, new)

    def _of(self, last: tf.Tensor) -> tuple[Any, tf.Tensor, tf.Tensor | None]:
        last = tf.cast(last, tf.int32)
        # Never negative, even where the count of steps was set back by hand.
        gap = tf.maximum(self.t - last, 0)
        if self.history is None:
            return None, gap, None
        gap = tf.cast(gap, self.history.ring.dtype)
        log_decay = self.history.log_decay.read_value() if self.history.decays else None
        return tf.gather(self.history.ring, last % LENGTH), gap, log_decay


def _theta(
    tail: Tail, plan: Plan, theta: Any, state: Any, history: Any, gap: Any, log: Any
) -> Any:
    dtype = tf.as_dtype(state_dtype(theta.dtype))
    theta, *state = [tf.cast(x, dtype) for x in (theta, *state)]
    owed = tails.owed(plan, history, gap, log, len(theta.shape), dtype)
    return theta - _paid(tail, plan, theta, state, owed)


def _paid(tail: Tail, plan: Plan, theta: Any, state: Any, owed: tails.Owed) -> Any:
    paid = tail(plan, state, owed)
    return paid if owed.decay is None else paid + theta * owed.decay


def _state(plan: Plan, state: Any, history: Any, gap: Any, log: Any) -> list[Any]:
    m, v = state
    owed = tails.owed(plan, history, gap, log, len(m.shape), m.dtype)
    return [m * owed.m, v * owed.v]


def _average(
    tail: Tail,
    plan: Plan | None,
    momentum: float,
    average: Any,
    theta: Any,
    state: Any,
    history: Any,
    gap: Any,
    log: Any,
    t: Any,
    new: Any,
) -> Any:
    dtype, rank = average.dtype, len(average.shape)
    theta, *state = [tf.cast(x, dtype) for x in (theta, *state)]
    weight = tf.cast(share(momentum, gap, t), dtype)
    weight = tf.reshape(weight, [-1] + [1] * (rank - 1))
    average += (theta - average) * weight
    if plan is not None:
        owed = tails.owed(plan, history, gap, log, rank, dtype, t)
        average -= _paid(tail, plan, theta, state, owed)
    if new is not None:
        weight = tf.cast(share(momentum, 1, t + 1), dtype)
        average += (tf.cast(new, dtype) - average) * weight
    return average


class Reading(NamedTuple):
    """Rows that a forward pass read, for the update after it to go on from."""

    ids: tf.Tensor  # distinct
    lengthened: tf.Tensor  # `[k]`, with as much of row 0 as is left over
    values: list[tf.Tensor]  # of theta and the state, `[k, ...]`, brought to date
    stored: list[tf.Tensor]  # the same as they stand
    last: tf.Tensor  # `[k]`, the steps of their last update


def read(
    tables: list[tf.Variable], ids: tf.Tensor, places: tf.Variable, debts: Debts
) -> tuple[tf.Tensor, Reading | None]:
    """Rows as dense Adam would have them now; writes nothing.

    Of half precision there is no reading: gradients have the rows' dtype, in which
    those of an id that repeats must not be summed, but are left to the update.

    Args:
        tables: Theta and the state.
        ids: Of any shape.
        places: `rows.Workspace(table).places`.
        debts: What the rows owe.
    """
    shape, dtype = tables[0].shape, tables[0].dtype
    if _mapped():
        return _read_each(tables, ids, debts), None
    d = rows.distinct(tf.reshape(ids, [-1]), places, sweep(shape[0], debts.t))
    if rows.in_xla():
        # The gradient has these ids, and may leave XLA: none is past the table's end.
        inside = tf.where(d.ids < shape[0], d.ids, 0)
        d = d._replace(lengthened=inside)
    values = [tf.gather(x, d.lengthened) for x in tables]
    # The rows' gradient is the table's: what is owed does not depend on the batch.
    detached = [rows.once(tf.stop_gradient(x), debts.t) for x in values]
    last = tf.gather(debts.last, d.lengthened)
    now = [rows.once(x, debts.t) for x in debts.settled(detached, last)]
    theta, reading = tf.cast(now[0], dtype), None
    if state_dtype(dtype) == dtype:
        out = _repeat(values[0], theta, d.place)
        reading = Reading(d.ids, d.lengthened, now, detached, last)
    else:
        stored = tf.gather(tables[0], tf.reshape(ids, [-1]))
        out = _in_place_of(stored, tf.gather(theta, d.place))
    out = tf.reshape(out, tf.concat([tf.shape(ids), shape[1:]], axis=0))
    if ids.shape.rank is not None:
        out = tf.ensure_shape(out, [*ids.shape, *shape[1:]])
    return out, reading


def _mapped() -> bool:
    """Whether `tf.vectorized_map` traces this."""
    return "loop_body" in tf.get_current_name_scope().split("/")


def gather(table: tf.Variable, ids: tf.Tensor) -> tf.Tensor:
    """Rows as they stand in the table."""
    # Under XLA `tf.vectorized_map` cannot map a gather from a variable itself.
    return tf.gather(table.read_value() if _mapped() and rows.in_xla() else table, ids)


def _read_each(tables: list[tf.Variable], ids: tf.Tensor, debts: Debts) -> tf.Tensor:
    """For `tf.vectorized_map`, which has no custom gradients, and where each
    example would have another number of distinct rows."""
    flat = tf.reshape(ids, [-1])
    *values, last = (gather(x, flat) for x in (*tables, debts.last))
    now = debts.theta([tf.stop_gradient(x) for x in values], last)
    out = tf.stop_gradient(tf.cast(now, tables[0].dtype))
    out += values[0] - tf.stop_gradient(values[0])  # 0, and the gradient's way
    return tf.reshape(out, tf.concat([tf.shape(ids), tables[0].shape[1:]], axis=0))


@rows.registered
@tf.custom_gradient  # type: ignore[untyped-decorator]
def _repeat(theta: tf.Tensor, now: tf.Tensor, place: tf.Tensor) -> Any:
    """`tf.gather(now, place)`, with the gradient of theta there, as a tensor."""

    def gradient(g: tf.Tensor) -> Any:
        return rows.segment_sum(g, place, now), None, None

    return tf.gather(now, place), gradient


@rows.registered
@tf.custom_gradient  # type: ignore[untyped-decorator]
def _in_place_of(stored: tf.Tensor, now: tf.Tensor) -> Any:
    """The rows as they are now, with the gradient of those that are stored."""
    return tf.identity(now), lambda g: (g, None)


def settle_average(
    average: tf.Variable, tables: list[tf.Variable], debts: Debts
) -> None:
    """Brings the average of all rows to date; in exact mode both others must follow."""
    values = [_untaped(x) for x in tables[: None if debts.history else 1]]
    value = debts.average(average.read_value(), values, debts.last.read_value())
    average.assign(value)
    if debts.history is None:
        mark(debts, None, debts.t, [average])


def settle_theta(tables: list[tf.Variable], debts: Debts) -> None:
    """Brings the weights of all rows to date; `settle_state` must follow.

    Not one function: the weights need the state as it was, and XLA would copy it.
    """
    values = [_untaped(x) for x in tables]
    theta = debts.theta(values, debts.last.read_value())
    tables[0].assign(rounding.cast(theta, tables[0].dtype.name, debts.keys[0]))


def _untaped(x: tf.Variable) -> tf.Tensor:
    # It may be run by the garbage collector, at any time.
    return tf.raw_ops.ReadVariableOp(resource=x.handle, dtype=x.dtype)


def settle_state(tables: list[tf.Variable], debts: Debts) -> None:
    """Brings the state of all rows to date."""
    values = [x.read_value() for x in tables[1:]]
    values = debts.state(values, debts.last.read_value())
    for x, value, key in zip(tables[1:3], values, debts.keys[1:]):
        x.assign(rounding.cast(value, x.dtype.name, key))
    mark(debts, None, debts.t, tables)


def mark(debts: Debts, ids: tf.Tensor | None, t: tf.Tensor, tables: Any) -> None:
    """These rows, or all, were updated at step t, and are written already."""
    t = rows.after(tf.cast(t, tf.uint32), *tables)
    if ids is None:
        t = tf.cast(t, debts.last.dtype)
        debts.last.assign(tf.fill(debts.last.shape, t))
    else:
        rows.scatter(debts.last, ids, tf.fill(tf.shape(ids), t))


def sweep(table_rows: int, t: tf.Tensor) -> tf.Tensor:
    """Rows to update at step t beside the batch's, with a gradient of 0.

    A row in this many is swept at each step, so that none falls behind by more
    than the history goes back.
    """
    n = -(-table_rows // (LENGTH - 1))
    steps = -(-table_rows // n)
    return ((t % steps) * n + tf.range(n)) % table_rows
