"""Exact mode's side of an optimizer: which rows it brings to date, and when."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_adam import ledger, rows
from keras_adam.rows import Rows
from keras_adam.tails import Plan


def state_dtype(dtype: Any) -> str:
    """The dtype of moments and arithmetic: at least float32."""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def check_range(name: str, value: float) -> None:
    if not 0 <= np.float32(value) < 1:
        raise ValueError(
            f"`{name}` must be in [0, 1), in float32 too. Received: {name}={value!r}. "
            "It is the share of the old average that each step keeps."
        )


def native(variable: Any) -> Any:
    """A `keras.Variable`'s `tf.Variable`; `value` may be a cast of it."""
    return variable._value if isinstance(variable, keras.Variable) else variable


def rounded(dtype: str, beta: float) -> float:
    """A beta as a kernel takes it, in the variable's dtype.

    One that knows 0.999 as 0.99900001 is Adam for that beta, and needs its
    correction.
    """
    return float(np.dtype(dtype).type(beta))


@functools.cache  # a plan takes a millisecond, and eager steps ask for it often
def _rounded_plan(plan: Plan, dtype: str) -> Plan:
    beta_1, beta_2 = (rounded(dtype, beta) for beta in (plan.beta_1, plan.beta_2))
    return dataclasses.replace(plan, beta_1=beta_1, beta_2=beta_2)


class ExactRows:
    """What `RowOptimizer` does beyond its own in `sparse_updates="exact"`.

    A row is brought to date when a batch touches it: by the `Embedding` layer,
    which reads it (`read`), or else by the update. `settle` brings all to date.
    """

    # From `RowOptimizer` and its subclasses.
    tail: ledger.Tail
    beta_1: float | Callable[[Any], Any]
    sparse_updates: str
    built: bool
    use_ema: bool
    weight_decay: Any
    iterations: Any
    add_variable: Callable[..., Any]
    _untracked: types.SimpleNamespace
    _trainable_variables: list[Any]
    _get_variable_index: Callable[[Any], int]
    _make_plan: Callable[[float], Plan]
    _state: Callable[[int], list[Any]]
    _step: Callable[..., Any]
    _scalars: Callable[[Any], Any]
    _lead: Callable[[Any], Any]
    _has_kernel: Callable[[], bool]
    _decays: Callable[[Any], bool]

    def _build_ledger(self, variables: list[Any]) -> None:
        """Creates the steps of the rows' last updates, and what they mean."""
        vars(self._untracked).update(
            by_rows=set(),  # indices of the variables that are updated row by row
            not_by_rows=set(),  # of those that some compiled step updates whole
            readings={},  # index: the last `ledger.Reading` in the graph being traced
            rounded={},  # index: whether steps know the betas as the kernel does
            decays=[self._decays(v) for v in variables],
            settlers={},  # index, rounded: `ledger.settle_theta` and `_state`, compiled
        )
        self._last = [
            self.add_variable(v.shape[:1], dtype="uint32", name="last_step")
            if self._mode(v) == "exact" and len(v.shape)
            else None
            for v in variables
        ]
        owned = [v for v, last in zip(variables, self._last) if last is not None]
        if not owned:
            return
        kinds = {self._decays(v) for v in owned}
        self._plan = self._make_plan(self._largest_beta_1())
        dtype = max(state_dtype(v.dtype) for v in owned)
        self._histories = [
            ledger.History(self._plan, kind, dtype) for kind in sorted(kinds)
        ]
        for v in owned:
            ledger.set_owner(v, self)
            if getattr(v, "_keras_adam_by_rows", False):  # keras_adam.Embedding's
                self._note_by_rows(self._get_variable_index(v))

    def _check_exact(self) -> None:
        """Raises where exact mode does not hold; with a schedule, `build` does."""
        if self.sparse_updates == "exact" and not callable(self.beta_1):
            self._make_plan(self.beta_1)

    def _mode(self, variable: Any) -> str:
        """`sparse_updates`, but where something reads the whole table each step."""
        whole = self.use_ema or getattr(variable, "constraint", None) is not None
        exact = self.sparse_updates == "exact"
        return "dense" if exact and whole else self.sparse_updates

    def _largest_beta_1(self) -> float:
        """Of a schedule: over steps that lie ever further apart."""
        if not callable(self.beta_1):
            return self.beta_1
        steps = {0, *(round(1.25**k) for k in range(63))}
        with tf.init_scope():
            largest = max(float(self.beta_1(tf.constant(k))) for k in steps)
        check_range("beta_1", largest)
        return largest

    def _note_by_rows(self, i: int) -> None:
        """From now on the i-th variable is updated row by row."""
        variable = self._trainable_variables[i]
        if ledger.owner(variable) is not self:
            raise ValueError(
                f"{variable.path} is trained by two optimizers with "
                '`sparse_updates="exact"`, of which only the one built last knows '
                'what its rows owe. Use "lazy" or "dense" in one of them.'
            )
        if i in self._untracked.by_rows:
            return
        if i in self._untracked.not_by_rows:
            raise ValueError(
                f"{variable.path} has a sparse gradient in this step, and had a "
                "dense one or none in a step that was compiled before, which may "
                "run again and does not know what its rows owe. Received: "
                'sparse_updates="exact". Use keras_adam.Embedding, or call the '
                "compiled step with the sparse gradient first, or use "
                'sparse_updates="lazy" or "dense".'
            )
        self._untracked.by_rows.add(i)
        ledger.settle_when_read(variable)
        with tf.init_scope():
            last = native(self._last[i])
            if tf.reduce_max(last) < tf.cast(self.iterations, last.dtype):
                # Not one row was updated at the last step, so it was a dense one.
                last.assign(tf.fill(last.shape, tf.cast(self.iterations, last.dtype)))

    def _tables(self, i: int) -> list[tf.Variable]:
        return [native(x) for x in (self._trainable_variables[i], *self._state(i))]

    def _debts(self, i: int, as_kernel: bool | None = None) -> ledger.Debts:
        """What the i-th variable's rows owe, by the betas of the kernel or the rule."""
        variable = self._trainable_variables[i]
        dtype = state_dtype(variable.dtype)
        if as_kernel is None:
            as_kernel = (
                self._has_kernel() and dtype == variable.dtype and not rows.in_xla()
            )
            self._untracked.rounded[i] = as_kernel
        plan = self._plan
        if as_kernel:
            plan = _rounded_plan(plan, dtype)
        decays = self._untracked.decays[i]
        [history] = [h for h in self._histories if h.decays == decays]
        t = tf.cast(self.iterations, tf.int32)
        return ledger.Debts(history, plan, self.tail, native(self._last[i]), t)

    def _reading_of(self, i: int, g: tf.IndexedSlices) -> ledger.Reading | None:
        """The forward pass's reading of the rows g is the gradient of, in its order."""
        reading = self._untracked.readings.get(i)
        if reading is None or tf.executing_eagerly():
            return None
        if g.values.graph is not reading.ids.graph:
            return None
        op = g.indices.op
        same = op.type == "Reshape" and op.inputs[0] is reading.lengthened
        return reading if same else None

    def _settled_rows(self, i: int, g: Any) -> Any:
        """The rows a gradient is for, brought to date; None: as they stand."""
        reading = self._untracked.readings.pop(i, None)
        if i not in self._untracked.by_rows:
            return None
        if not isinstance(g, Rows):
            self._settle(i)
            return None
        if reading is not None and g.ids is reading.ids:
            return reading.values
        debts = self._debts(i)
        *values, last = rows.gather([*self._tables(i), debts.last], g)
        return debts.settled(values, last)

    def _end_step(self, grads: dict[int, Any], learning_rate: Any) -> None:
        """Notes which rows the step updated, and what it adds to others' debts."""
        by_rows = self._untracked.by_rows
        if not tf.executing_eagerly():
            exact = {i for i, last in enumerate(self._last) if last is not None}
            self._untracked.not_by_rows |= exact - by_rows
        t = self.iterations + 1
        for i in by_rows:
            g = grads.get(i)
            if g is None:  # no gradient is no step, not a gradient of 0
                self._settle(i)
            ids = g.ids if isinstance(g, Rows) else None
            ledger.mark(self._debts(i), ids, t, self._tables(i))
        debts = {self._untracked.decays[i]: i for i in by_rows}
        tables = [x for i in by_rows for x in self._tables(i)]
        t = tf.cast(rows.after(tf.cast(t, tf.uint32), *tables), tf.int32)
        for i in debts.values():
            d = self._debts(i)
            dtype = d.history.ring.dtype.name
            step = self._step(learning_rate, dtype, self._untracked.rounded[i])
            d.history.advance(
                d.plan,
                t,
                self._lead(self._scalars(step)),
                1 - step.one_minus_beta_1 if callable(self.beta_1) else None,
                step.alpha * self.weight_decay if d.history.decays else None,
            )

    def _settle(self, i: int) -> None:
        settlers = self._untracked.settlers
        as_kernel = self._untracked.rounded.get(i, False)
        # Compiling takes longer than a pass over a small table does.
        large = self._trainable_variables[i].shape.num_elements() > 1e6

        def settler(f: Callable[..., None]) -> Any:
            def settle() -> None:
                f(self._tables(i), self._debts(i, as_kernel))

            return tf.function(settle, jit_compile=True) if large else settle

        if (i, as_kernel) not in settlers:
            both = ledger.settle_theta, ledger.settle_state
            settlers[i, as_kernel] = [settler(f) for f in both]
        for settle in settlers[i, as_kernel]:
            settle()

    def settle(self) -> None:
        """Brings all rows of all tables to date, in two passes over what is behind.

        With `sparse_updates="exact"` a row that no batch has touched for a while
        stands as it was, and what dense Adam would have done to it since is owed.
        This pays it. It is called at the end of `fit`, and by `numpy()`,
        `get_weights`, saving and assignment of a table. Call it before other code
        reads or changes a table outside a step, such as `tf.train.Checkpoint`,
        `model.export`, or `tf.norm(layer.embeddings)` in a callback.
        """
        if not self.built:
            return
        for i, last in enumerate(self._last):
            if last is None:
                continue
            last = native(last)
            t = tf.cast(self.iterations, last.dtype)
            by_rows = i in self._untracked.by_rows or tf.reduce_max(last) == t
            if by_rows and tf.reduce_min(last) < t:
                self._settle(i)
        for history in getattr(self, "_histories", []):
            history.log_decay.assign(tf.zeros_like(history.log_decay))

    def forget_reading(self, variable: Any) -> None:
        """What a forward pass read of it may not be what an update finds."""
        self._untracked.readings.pop(self._get_variable_index(variable), None)

    def __del__(self) -> None:
        # The tables live on: pay, before what is owed is forgotten.
        if hasattr(self, "_histories") and not sys.is_finalizing():
            with tf.init_scope():
                self.settle()

    def read(self, variable: Any, ids: tf.Tensor) -> tf.Tensor:
        """Rows of a table as dense Adam would have them now; writes nothing.

        Args:
            variable: A variable this optimizer owns: `ledger.owner(variable)`.
            ids: Rows' numbers, int32 or int64, of any shape.
        """
        i = self._get_variable_index(variable)
        self._note_by_rows(i)
        places = self._untracked.workspaces[i].places
        out, reading = ledger.read(self._tables(i), ids, places, self._debts(i))
        self._untracked.readings[i] = reading
        return out
