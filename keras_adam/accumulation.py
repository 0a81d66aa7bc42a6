"""Gradients summed over micro-steps, at the cost of the rows that these touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_adam import rows
from keras_adam.exact import native, state_name
from keras_adam.rows import Rows


class Accumulation:
    """What `RowOptimizer` does for `gradient_accumulation_steps`.

    The sums are in Keras's accumulators. Which rows of them are not 0 stands in a list
    for each variable, as long as it has rows: its first `_counts[i]` places hold the
    rows that the micro-steps of the step at hand have touched, each once.
    """

    # From `RowOptimizer`.
    gradient_accumulation_steps: int | None
    sparse_updates: str
    add_variable: Callable[..., Any]
    _accumulated_gradients: list[Any]
    _get_variable_index: Callable[[Any], int]
    _update: Callable[..., None]
    _written: Callable[[int], list[tf.Variable]]

    def _build_touched(self, variables: list[Any]) -> None:
        self._touched: list[Any] = []  # 1 for each row that is in the list, or else 0
        self._listed: list[Any] = []
        self._counts: list[Any] = []
        if not self.gradient_accumulation_steps or self.sparse_updates == "dense":
            return
        kinds = {"touched": "float32", "touched_rows": rows.count_dtype()}
        self._touched, self._listed = (
            [
                self.add_variable(v.shape[:1], dtype=dtype, name=state_name(v, kind))
                for v in variables
            ]
            for kind, dtype in kinds.items()
        )
        counts = self.add_variable(
            (len(variables),), dtype=rows.count_dtype(), name="touched_counts"
        )
        self._counts = [counts]

    def _touched_state(self) -> list[Any]:
        return [*self._touched, *self._listed, *self._counts]

    def _load_touched(self, marks: list[Any]) -> None:
        """Sets it, after the sums were loaded: see `_load_row_state`."""
        counts = []
        for i, mark in enumerate(self._touched):
            total, listed = native(self._accumulated_gradients[i]), self._listed[i]
            axes = list(range(1, len(total.shape)))
            some = tf.reduce_any(total != 0, axis=axes) if axes else total != 0
            some = marks[i] if marks else tf.cast(some, mark.dtype)
            mark.assign(some)
            ids = tf.where(tf.reshape(some, [-1]) > 0)[:, 0]
            counts.append(tf.shape(ids)[0])
            if len(listed.shape):
                ids = tf.pad(ids, [[0, listed.shape[0] - counts[-1]]])
                listed.assign(tf.cast(ids, listed.dtype))
        for variable in self._counts:
            variable.assign(tf.cast(tf.stack(counts), variable.dtype))

    def _most(self, grads: dict[int, Any]) -> dict[int, Any]:
        """By the ids of the last micro-step, how many rows a step is to have at most.

        For XLA, which knows that when it compiles, but not how many there are; without
        the tables that have no more.
        """
        steps = self.gradient_accumulation_steps or 1
        found = {}
        for i, g in grads.items():
            if isinstance(g, Rows):
                n = g.ids.shape[0]
                if n is None or steps * n < self._accumulated_gradients[i].shape[0]:
                    found[i] = steps * tf.shape(g.ids)[0]
        return found

    def _accumulate(self, grads: list[Any], variables: list[Any], due: Any) -> None:
        """Adds gradients to the sums, and takes a step with these if it is due."""
        steps = self.gradient_accumulation_steps
        assert steps is not None
        indices = [self._get_variable_index(v) for v in variables]
        sums = [native(x) for x in self._accumulated_gradients]
        marks, lists = ([native(x) for x in y] for y in (self._touched, self._listed))
        counts = []
        if self._counts:
            counter = native(self._counts[0])
            counts = tf.unstack(tf.cast(counter, tf.int32))
        for i, g in zip(indices, grads):
            if isinstance(g, Rows):
                sums[i].scatter_add(tf.IndexedSlices(g.values, g.ids))
                counts[i] = rows.note(g.ids, marks[i], lists[i], counts[i])
                continue
            sums[i].assign_add(g)
            if marks and len(sums[i].shape):
                n = sums[i].shape[0]
                marks[i].assign(tf.ones_like(marks[i]))
                lists[i].assign(tf.cast(tf.range(n), lists[i].dtype))
                counts[i] = tf.constant(n)
        if counts:
            counter.assign(tf.cast(tf.stack(counts), counter.dtype))
        most = self._most(dict(zip(indices, grads)))

        def step(most: dict[int, Any]) -> None:
            means = [
                rows.listed(sums[i], lists[i], counts[i], most.get(i))
                if isinstance(g, Rows)
                else sums[i].read_value()
                for i, g in zip(indices, grads)
            ]
            self._update([total / steps for total in means], variables)
            touched = {i: g for i, g in zip(indices, means) if isinstance(g, Rows)}
            # What has no gradient now starts anew too, as in Keras.
            for i, total in enumerate(sums):
                if i not in touched:
                    for x in (total, *marks[i : i + 1]):
                        x.assign(tf.zeros_like(x))
                    continue
                ids = rows.ids_after(touched[i].ids, *self._written(i))
                for x in (total, marks[i]):
                    zeros = tf.zeros(
                        tf.concat([tf.shape(ids), x.shape[1:]], 0), x.dtype
                    )
                    rows.scatter(x, ids, zeros)
            if counts:
                counter.assign(tf.zeros_like(counter))

        if not rows.in_xla():
            keras.ops.cond(due, lambda: step({}), lambda: None)
        elif not most:
            rows.run_if(due, lambda: step({}))
        else:
            fit = tf.reduce_all([counts[i] <= n for i, n in most.items()])
            rows.run_if(due & fit, lambda: step(most))
            rows.run_if(due & ~fit, lambda: step({}))
