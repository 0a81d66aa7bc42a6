"""`tf.IndexedSlices` -> distinct rows with summed gradients; gather, scatter.

All but `listed` without `most` costs what the batch touches, never what the table
holds, in graph mode and under XLA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class Rows(NamedTuple):
    """The gradient of some rows of a table.

    Attributes:
        values: `[n, ...]`, one summed gradient a distinct row. Outside XLA there
            may be room after them, filled with 0.
        ids: `[n]`, the rows' numbers. Under XLA, where `n` is the number of
            ids before repeats were summed, the places left over hold a number
            past the end of the table, which `scatter` drops, and zero values.
        lengthened: As in `Distinct`; as many as there are values with their room.
    """

    values: tf.Tensor
    ids: tf.Tensor
    lengthened: tf.Tensor

    def __truediv__(self, scale: Any) -> Rows:
        return self._replace(values=self.values / scale)


def components(variable: Any) -> list[tf.Variable]:
    """A variable's copies, one for each replica in this process."""
    if isinstance(variable, tf.distribute.DistributedValues):
        return list(variable.values)
    return [variable]


def local(variable: Any) -> tf.Variable:
    """The copy of the replica that runs now; of the first one, outside of any."""
    if isinstance(variable, tf.distribute.DistributedValues):
        found = variable._get()
        # In a strategy's scope, outside of replicas, that is a copy of the values.
        return found if isinstance(found, tf.Variable) else variable._primary
    return variable


def in_xla() -> bool:
    """Whether the code now being traced is compiled by XLA."""
    return tf.__internal__.get_enclosing_xla_context() is not None


def out_of_place(table: Any) -> bool:
    """Whether single rows of a table cannot be reached where they are.

    A TPU has tiles of 8 x 128 numbers. Where rows are not a multiple of 128, its
    compiler keeps a table by columns, and copies it to gather from it and once more to
    scatter into it: six copies an Adam step. One over all rows makes one copy, of the
    gradient. (`tests/accelerators`; AdaMax gains nothing, and loses nothing.)
    """
    narrow = len(table.shape) > 0 and math.prod(table.shape[1:]) % 128 != 0
    return narrow and on_tpu()


def on_tpu() -> bool:
    return bool(tf.config.list_logical_devices("TPU"))


def on_accelerator() -> bool:
    return on_tpu() or bool(tf.config.list_logical_devices("GPU"))


def count_dtype() -> str:
    """Of variables that hold steps and places.

    TensorFlow keeps int32 variables in host memory, and workers, which send each
    other the first values, know no uint32.
    """
    workers = tf.distribute.MultiWorkerMirroredStrategy
    return "int64" if isinstance(tf.distribute.get_strategy(), workers) else "uint32"


class Workspace:
    """Variables that hold nothing between steps, and so are no saved state.

    Attributes:
        places: A vector as long as the table, in which `distinct` finds
            repeats under XLA.
        copies: Variables of any number of rows, for kernels that only work on
            variables, to work on a few rows.
    """

    def __init__(self, table: tf.Variable, copies: int) -> None:
        with tf.init_scope():
            self._places = tf.Variable(
                tf.zeros(table.shape[:1], count_dtype()), trainable=False
            )
            shape = table.shape[1:]
            self._copies = [
                tf.Variable(
                    tf.zeros([0, *shape], table.dtype),
                    shape=[None, *shape],
                    trainable=False,
                )
                for _ in range(copies)
            ]

    @property
    def places(self) -> tf.Variable:
        return local(self._places)

    @property
    def copies(self) -> list[tf.Variable]:
        return [local(x) for x in self._copies]


class Distinct(NamedTuple):
    """Which ids there are, and where.

    Attributes:
        ids: `[m]`, each id once. Under XLA, where m is n, the places left over hold
            a number past the end of the table, which `scatter` drops.
        place: `[n]`, for each of the ids given its place in `ids`; -1 for an id
            outside the table.
        lengthened: `ids`, outside XLA with as much of row 0 after them as makes
            for few lengths, because `compiled` compiles for each.
    """

    ids: tf.Tensor
    place: tf.Tensor
    lengthened: tf.Tensor


def distinct(
    ids: tf.Tensor, places: tf.Variable, more: tf.Tensor | None = None
) -> Distinct:
    """Finds repeats.

    Args:
        ids: `[n]`, int32 or int64.
        places: `Workspace(table).places`. Only used under XLA.
        more: Ids to have too, in no place.
    """
    count = tf.shape(ids)[0]
    if more is not None:
        ids = tf.concat([ids, tf.cast(more, ids.dtype)], axis=0)
    if not in_xla():
        ids, place = tf.unique(ids)
        return Distinct(ids, place[:count], lengthen(ids, place.shape[0]))
    # XLA's shapes are static, and a sort costs more than all the rest: let each
    # position write its number at its id (any writer may win) and read it back,
    # and the positions of one id agree on one place.
    rows = places.shape[0]
    position = tf.range(tf.shape(ids)[0])
    places.scatter_update(tf.IndexedSlices(tf.cast(position, places.dtype), ids))
    place = tf.cast(tf.gather(places, ids), tf.int32)
    # An id outside the table has read some other id's place: drop it.
    place = tf.where((ids >= 0) & (ids < rows), place, -1)
    ids = tf.where(place == position, ids, tf.cast(rows, ids.dtype))
    return Distinct(ids, place[:count], ids)


def sum_repeats(values: tf.Tensor, d: Distinct, room: bool = True) -> Rows:
    """Sums the values of equal ids, since no rule here is linear in them.

    Args:
        values: `[n, ...]`.
        d: `distinct` of their ids.
        room: Whether to leave room after the values, as for `lengthened` ids.
    """
    summed = segment_sum(values, d.place, d.lengthened)
    values = summed if room else summed[: tf.shape(d.ids)[0]]
    return Rows(values, d.ids, d.lengthened)


def segment_sum(values: tf.Tensor, place: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Sums the values of each place, of which there are as many as rows of `like`.

    Compiled, since TensorFlow's own kernel takes five times as long (8,192 rows of
    64 to 4,500 places: 0.8 ms, compiled 0.15 ms); where batches differ in length, with
    as many values more, in no place, as make for few lengths.
    """
    if values.shape[0] is None and not in_xla():
        more = _room(tf.shape(place)[0])
        shape = tf.concat([[more], tf.shape(values)[1:]], axis=0)
        values = tf.cond(
            more > 0,
            lambda: tf.concat([values, tf.zeros(shape, values.dtype)], axis=0),
            lambda: values,
        )
        place = tf.pad(place, [[0, more]], constant_values=-1)
    return compiled(_segment_sum)(values, place, like)


def _segment_sum(values: tf.Tensor, place: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    return tf.math.unsorted_segment_sum(values, place, tf.shape(like)[0])


def lengthen(ids: tf.Tensor, most: int | None = None) -> tf.Tensor:
    """`Distinct.lengthened`, of at most so many ids.

    That is up to 32 lengths, or 8 an octave where the most is not known.
    """
    return tf.pad(ids, [[0, _room(tf.shape(ids)[0], most)]])


def _room(n: tf.Tensor, most: int | None = None) -> tf.Tensor:
    """How much more than n, of at most so many, makes for few lengths."""
    if most is not None:
        unit = max(8, 2 ** (most.bit_length() - 5))
    else:
        octave = tf.math.log(tf.cast(tf.maximum(n, 64), tf.float32)) / np.log(2.0)
        unit = tf.cast(2.0 ** (tf.floor(octave + 1e-4) - 3), tf.int32)
    return (-n) % unit


@functools.cache
def compiled(f: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """f with its first arguments given, compiled by XLA where it is called outside.

    f is a function of tensors; it must hold no variables.
    """
    bound = functools.partial(f, *static)
    launched = tf.function(bound, jit_compile=True, autograph=False)

    def call(*args: Any) -> Any:
        # Eager: to be stepped through.
        return (bound if in_xla() or tf.executing_eagerly() else launched)(*args)

    return call


def registered(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, a `tf.custom_gradient`, as a function of its own where it is traced.

    TensorFlow keeps a custom gradient for ever, and with it the graph in which it was
    called, that is all variables of a model.
    """
    # What is traced may differ by `in_xla`, which TensorFlow does not tell apart.
    functions = {xla: tf.function(f, autograph=False) for xla in (False, True)}

    def call(*args: Any) -> Any:
        return (f if tf.executing_eagerly() else functions[in_xla()])(*args)

    return call


def after(x: tf.Tensor, *tables: tf.Variable) -> tf.Tensor:
    """x, of an unsigned dtype, not known before what was written to the tables.

    XLA only sees data flow: it may schedule a write to one variable before the
    last read of it for the tables' sake, and copies the variable then. So let x
    depend on the tables, in a way that it cannot see through: x | bits >= x.
    """
    if in_xla():
        for table in tables:
            if 0 in table.shape:
                continue
            bits = tf.cast(tf.reshape(table, [-1])[0], tf.float32)
            bits = tf.bitcast(bits, tf.uint32)
            x = tf.minimum(x, tf.bitwise.bitwise_or(x, bits))
    return x


def ids_after(ids: tf.Tensor, *tables: tf.Variable) -> tf.Tensor:
    """The same of ids, of either dtype."""
    return tf.cast(after(tf.cast(ids, tf.uint32), *tables), tf.int32)


def once(x: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    """x, computed once for all that reads it, where XLA compiles for a CPU.

    XLA computes what is cheap again in each reader, up to the gather that all of it
    came from, which then stands alone, as 64 scalar moves for a row of 64: few rows
    are on their way from memory at a time. With arithmetic in it the loop is of
    vectors (8,192 rows of 1,000,000 x 64: 4.8 to 2.4 ms a step). A division is not
    cheap, and no compiler can know that it is one by 1.

    Args:
        x: Of a float dtype.
        t: A count of steps, at least 0.
    """
    if not in_xla() or on_accelerator():
        return x
    return x / tf.cast(t >= 0, x.dtype)


def run_if(condition: Any, f: Callable[[], None]) -> None:
    """Calls f, which writes to variables, where the condition holds.

    For XLA a loop of 0 or 1 turns: it copies what a branch might write, every time.
    """

    def turn(_: Any) -> Any:
        f()
        return [tf.constant(False)]

    tf.while_loop(lambda go: go, turn, [tf.convert_to_tensor(condition)])


def note(
    ids: tf.Tensor, marks: tf.Variable, listed: tf.Variable, count: tf.Tensor
) -> tf.Tensor:
    """Adds distinct rows to a list of rows, without those that are in it.

    Args:
        ids: As `Rows.ids`.
        marks: 1 for the rows that are in it, 0 for the others.
        listed: Holds them in its first places.
        count: How many there are, int32.

    Returns:
        How many there are now.
    """
    table_rows = marks.shape[0]
    new = (tf.gather(marks, ids) == 0) & (ids < table_rows)
    if in_xla():
        place = count + tf.cumsum(tf.cast(new, tf.int32), exclusive=True)
        place = tf.where(new, place, table_rows)
    else:
        ids = tf.boolean_mask(ids, new)
        place = count + tf.range(tf.shape(ids)[0])
    scatter(listed, place, ids)
    ids = ids_after(ids, listed)
    scatter(marks, ids, tf.ones_like(ids))
    return count + tf.reduce_sum(tf.cast(new, tf.int32))


def listed(
    table: tf.Variable, rows: tf.Variable, count: tf.Tensor, most: Any = None
) -> Rows:
    """The rows of a table that are in the first places of a list.

    Args:
        table: The table.
        rows: The list, as long as the table.
        count: How many there are.
        most: Under XLA, at most how many, if not all; known when it compiles.
    """
    if in_xla():
        n = table.shape[0]
        most = n if most is None else tf.minimum(n, most)
        there = tf.range(most) < count
        ids = tf.where(there, tf.cast(rows[:most], tf.int32), n)
        there = tf.reshape(there, [-1] + [1] * (len(table.shape) - 1))
        return Rows(tf.where(there, tf.gather(table, ids), 0), ids, ids)
    ids = tf.cast(tf.gather(rows, tf.range(count)), tf.int32)
    longer = lengthen(ids)
    more = tf.shape(longer)[0] - tf.shape(ids)[0]
    values = tf.gather(table, ids)
    values = tf.pad(values, [[0, more], *[[0, 0]] * (len(table.shape) - 1)])
    return Rows(values, ids, longer)


def gather(tables: Sequence[tf.Variable], g: Rows) -> list[tf.Tensor]:
    """The rows of theta and of the state that a gradient is for, with its room."""
    ids = g.lengthened
    # While the forward pass still holds a read of the whole variable, a gather from
    # it copies it: wait for the gradient.
    with tf.control_dependencies([g.values]):
        theta = tf.gather(tables[0], ids)
    return [theta, *(tf.gather(x, ids) for x in tables[1:])]


def scatter(table: tf.Variable, ids: tf.Tensor, values: tf.Tensor) -> None:
    """Writes distinct rows into a table, in place; not the room after them."""
    if not in_xla():
        values = values[: tf.shape(ids)[0]]
    table.scatter_update(tf.IndexedSlices(tf.cast(values, table.dtype), ids))
    if not in_xla():
        # A scatter leaves the variable in a mode in which each later read of
        # it copies the whole table, be it Embedding's forward pass.
        tf.raw_ops.DisableCopyOnRead(resource=table.handle)
