"""The way of a gradient from Keras to a rule.

The only file that knows the internals of Keras's optimizers.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_adam import ledger, rows
from keras_adam.rows import Rows
from keras_adam.tails import Plan, one_minus_power
from keras_adam.update import (
    Rule,
    Step,
    compile_assign,
    takes_kernel,
    update,
)

SPARSE_UPDATES = ("exact", "lazy", "dense")


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


class RowOptimizer(keras.optimizers.Optimizer):
    """What Adam and AdaMax share: all but the rule.

    A gradient's way: repeated ids are summed; then it is unscaled, accumulated,
    clipped; then weight decay, the rule, the average. Each option of
    `keras.optimizers.Optimizer` works with embeddings; beside the batch's rows
    these cost:

    - `weight_decay` (decoupled, theta - learning_rate * weight_decay * theta,
      as Keras's): nothing. In lazy mode it reaches the batch's rows only.
    - `clipnorm`, `global_clipnorm`, `clipvalue`: nothing. They see the summed
      gradient.
    - `loss_scale_factor`: nothing.
    - `gradient_accumulation_steps`: an accumulator as large as the table. In
      graph mode a micro-step costs its rows, and the last one of a step also a
      pass over one number a row; under XLA each costs the whole table. In lazy
      mode a step updates the rows its micro-steps touched.
    - `keras.optimizers.LossScaleOptimizer` around it: its own search for
      overflow costs the whole table, and may miss one in a repeated id.
    - `use_ema`, and a layer's `embeddings_constraint`: the whole table, every
      step.

    A subclass gives `rule`, `tail`, `_make_plan`, `_build_state`, `_state`, `_scalars`,
    `_lead`, `_has_kernel` and `_kernel`.
    """

    rule: Rule
    tail: ledger.Tail

    def __init__(
        self,
        learning_rate: Any,
        beta_1: float | Callable[[Any], Any],
        beta_2: float,
        sparse_updates: str,
        **base: Any,
    ) -> None:
        if isinstance(learning_rate, (int, float)) and not learning_rate >= 0:
            raise ValueError(
                "`learning_rate` must not be negative: the step already goes down "
                f"the gradient. Received: learning_rate={learning_rate!r}."
            )
        if not callable(beta_1):
            check_range("beta_1", beta_1)
        check_range("beta_2", beta_2)
        if sparse_updates not in SPARSE_UPDATES:
            raise ValueError(
                f"`sparse_updates` must be one of {SPARSE_UPDATES}. Received: "
                f"sparse_updates={sparse_updates!r}."
            )
        super().__init__(learning_rate=learning_rate, **base)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.sparse_updates = sparse_updates

    # What a subclass gives.

    def _build_state(self, variables: list[Any]) -> None:
        """Creates the state variables."""
        raise NotImplementedError

    def _state(self, i: int) -> list[Any]:
        """The state variables of the i-th variable."""
        raise NotImplementedError

    def _scalars(self, step: Step) -> Any:
        """The rule's last argument."""
        raise NotImplementedError

    def _make_plan(self, beta_1: float) -> Plan:
        """What the tails look like, beta_1 being at most this."""
        raise NotImplementedError

    def _lead(self, scalars: Any) -> Any:
        """`tails.advance`'s, of the rule's last argument."""
        raise NotImplementedError

    def _has_kernel(self) -> bool:
        """Whether `_kernel` computes `rule`."""
        raise NotImplementedError

    @staticmethod
    def _kernel(
        variable: tf.Variable, g: tf.Tensor, state: Sequence[tf.Variable], scalars: Any
    ) -> None:
        """TensorFlow's own fused kernel."""
        raise NotImplementedError

    # State.

    def build(self, variables: list[Any]) -> None:
        """Creates the state, all 0."""
        if self.built:
            return
        for v in variables:
            if "float" not in keras.backend.standardize_dtype(v.dtype):
                raise ValueError(
                    "Only variables of a float dtype can be trained. Received: "
                    f"{v.name} of dtype {v.dtype}. Set `trainable=False` on it."
                )
        if self._distribution_strategy.num_replicas_in_sync > 1:
            raise NotImplementedError(
                f"{type(self).__name__} does not train on several replicas yet. "
                f"Received: {self._distribution_strategy}. Build the model and the "
                "optimizer outside its scope, or use keras.optimizers.Adam there."
            )
        super().build(variables)
        self._build_state(variables)
        if callable(self.beta_1):
            dtypes = {state_dtype(v.dtype) for v in variables}
            self._correction_1 = self.add_variable(
                (), dtype=max(dtypes), name="beta_1_correction"
            )
        self._touched = []
        if self.gradient_accumulation_steps and self.sparse_updates != "dense":
            self._touched = [
                self.add_variable(v.shape[:1], dtype="float32", name="touched")
                for v in variables
            ]
        # A plain object keeps Keras and TensorFlow from saving what it holds.
        self._untracked = types.SimpleNamespace(
            workspaces=[
                rows.Workspace(_native(v), copies=len(self._state(i)) + 1)
                if len(v.shape)
                else None
                for i, v in enumerate(variables)
            ],
            compiled=compile_assign(),
            by_rows=set(),
            not_by_rows=set(),
            readings={},
            rounded={},
            settlers={},
        )
        self._build_ledger(variables)

    def _build_ledger(self, variables: list[Any]) -> None:
        """For each variable, when each row was last updated; and what that means."""
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

    def _check_exact(self) -> None:
        """Raises where exact mode does not hold; with a schedule, `build` does."""
        if self.sparse_updates == "exact" and not callable(self.beta_1):
            self._make_plan(self.beta_1)

    def _mode(self, variable: Any) -> str:
        """`sparse_updates`, but where something reads the whole table each step."""
        whole = self.use_ema or getattr(variable, "constraint", None) is not None
        exact = self.sparse_updates == "exact"
        return "dense" if exact and whole else self.sparse_updates

    def _decays(self, variable: Any) -> bool:
        return self.weight_decay is not None and self._use_weight_decay(
            _native(variable)
        )

    def _largest_beta_1(self) -> float:
        """Of a schedule: over steps that lie ever further apart."""
        if not callable(self.beta_1):
            return self.beta_1
        steps = {0, *(round(1.25**k) for k in range(63))}
        with tf.init_scope():
            largest = max(float(self.beta_1(tf.constant(k))) for k in steps)
        check_range("beta_1", largest)
        return largest

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        # Averages need the digits that a half-precision weight does without.
        dtype = state_dtype(dtype or keras.backend.floatx())
        return super().add_variable(shape, initializer, dtype=dtype, **kwargs)

    # The way of a gradient.

    def _overwrite_variables_directly_with_gradients(
        self, grads: Any, variables: Any
    ) -> tuple[list[Any], list[Any]]:
        # The first place Keras gives after `build` and before it scales: here
        # repeats are summed, so that all that follows is right.
        grads, variables = super()._overwrite_variables_directly_with_gradients(
            grads, variables
        )
        return [self._summed(g, v) for g, v in zip(grads, variables)], variables

    def _summed(self, g: Any, variable: Any) -> tf.Tensor | Rows:
        dtype = state_dtype(variable.dtype)
        if not isinstance(g, tf.IndexedSlices):
            return tf.cast(g, dtype)
        values = tf.cast(g.values, dtype)
        mode = self._mode(variable)
        if mode == "dense":
            return tf.math.unsorted_segment_sum(values, g.indices, variable.shape[0])
        i = self._get_variable_index(variable)
        at_once = not self.gradient_accumulation_steps
        more = None
        if mode == "exact":
            reading = self._untracked.readings.get(i)
            if at_once and reading is not None and _is_gradient_of(g, reading):
                return Rows(values, reading.ids, reading.lengthened)
            more = ledger.sweep(variable.shape[0], tf.cast(self.iterations, tf.int32))
        d = rows.distinct(g.indices, self._untracked.workspaces[i].places, more)
        return rows.sum_repeats(values, d, room=at_once)

    def _backend_apply_gradients(self, grads: Any, trainable_variables: Any) -> None:
        if self.gradient_accumulation_steps:
            self._accumulate(grads, trainable_variables)
        else:
            self._update(grads, trainable_variables)
        if self.use_ema:
            self._update_model_variables_moving_average(self._trainable_variables)
            if self.ema_overwrite_frequency:
                keras.ops.cond(
                    (self.iterations + 1) % self.ema_overwrite_frequency == 0,
                    lambda: self._overwrite_model_variables_with_average_value(
                        self._trainable_variables
                    ),
                    lambda: None,
                )

    def _accumulate(self, grads: list[Any], variables: list[Any]) -> None:
        steps = self.gradient_accumulation_steps
        indices = [self._get_variable_index(v) for v in variables]
        sums = [self._accumulated_gradients[i].value for i in indices]
        marks = [self._touched[i].value if self._touched else None for i in indices]
        for g, total, mark in zip(grads, sums, marks):
            if isinstance(g, Rows):
                total.scatter_add(tf.IndexedSlices(g.values, g.ids))
                rows.scatter(mark, g.ids, tf.ones_like(g.ids))
            else:
                total.assign_add(g)
                if mark is not None:
                    mark.assign(tf.ones_like(mark))

        def step() -> None:
            means = [
                (rows.marked(total, mark) if isinstance(g, Rows) else total) / steps
                for g, total, mark in zip(grads, sums, marks)
            ]
            self._update(means, variables)
            for g, total in zip(means, sums):
                if isinstance(g, Rows):
                    rows.scatter(total, g.ids, tf.zeros_like(g.values))
            # What has no gradient now starts anew too, as in Keras.
            done = {i for i, g in zip(indices, means) if isinstance(g, Rows)}
            for i, total in enumerate(self._accumulated_gradients):
                if i not in done:
                    total.assign(tf.zeros_like(total.value))
            for mark in self._touched:
                mark.assign(tf.zeros_like(mark.value))

        keras.ops.cond((self._iterations + 1) % steps == 0, step, lambda: None)

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        values = [g.values if isinstance(g, Rows) else g for g in grads]
        values = super()._clip_gradients(values)
        return [
            g._replace(values=x) if isinstance(g, Rows) else x
            for x, g in zip(values, grads)
        ]

    def _update(self, grads: list[Any], variables: list[Any]) -> None:
        if callable(self.beta_1):
            # The recurrence of m for gradients of 1 gives 1 - prod(beta_1,i).
            c = self._correction_1
            c.assign_add((1 - c) * (1 - keras.ops.cast(self._beta_1(), c.dtype)))
        self._backend_update_step(
            self._clip_gradients(grads), variables, self.learning_rate
        )

    def _beta_1(self) -> Any:
        assert callable(self.beta_1)
        return self.beta_1(self.iterations)

    def _step(self, learning_rate: Any, dtype: str, kernel: bool) -> Step:
        t = tf.cast(self.iterations, dtype) + 1
        alpha = tf.cast(learning_rate, dtype)
        beta_1, beta_2 = self.beta_1, self.beta_2
        if kernel:
            [beta_2] = self._rounded(dtype, beta_2)
        if callable(beta_1):
            c_1 = tf.cast(self._correction_1, dtype)
            return Step(alpha, 1 - tf.cast(self._beta_1(), dtype), c_1, beta_2, t)
        if kernel:
            [beta_1] = self._rounded(dtype, beta_1)
        one_minus_beta_1 = tf.constant(1 - beta_1, dtype)
        return Step(alpha, one_minus_beta_1, one_minus_power(beta_1, t), beta_2, t)

    def _backend_update_step(
        self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any
    ) -> None:
        indices = [self._get_variable_index(v) for v in trainable_variables]
        for i, g in zip(indices, grads):
            if isinstance(g, Rows) and self._last[i] is not None:
                self._note_by_rows(i)
        scalars: dict[Any, Any] = {}
        updates = []
        for i, g, variable in zip(indices, grads, trainable_variables):
            native = _native(variable)
            dtype = state_dtype(variable.dtype)
            decays = self._decays(variable)
            kernel = self._has_kernel() and takes_kernel(g, variable, decays)
            if (dtype, kernel) not in scalars:
                step = self._step(learning_rate, dtype, kernel)
                scalars[dtype, kernel] = step.alpha, self._scalars(step)
            alpha, s = scalars[dtype, kernel]
            decay = alpha * self.weight_decay if decays else None
            state = [_native(x) for x in self._state(i)]
            kwargs = {
                "rule": self.rule,
                "kernel": self._kernel if kernel else None,
                "copies": self._untracked.workspaces[i].copies
                if isinstance(g, Rows)
                else [],
                "compiled": self._untracked.compiled,
                "values": self._settled_rows(i, g),
            }
            updates.append((native, (g, state, s, decay), kwargs))
        tf.__internal__.distribute.interim.maybe_merge_call(
            _update_all, self._distribution_strategy, updates
        )
        self._end_step(dict(zip(indices, grads)), learning_rate)

    # Rows that a step skips: exact mode.

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
                'sparse_updates="exact". Make a new optimizer, or use '
                'sparse_updates="lazy" or "dense".'
            )
        self._untracked.by_rows.add(i)
        ledger.settle_when_read(variable)
        with tf.init_scope():
            last = _native(self._last[i])
            if tf.reduce_max(last) < tf.cast(self.iterations, last.dtype):
                # Not one row was updated at the last step, so it was a dense one.
                last.assign(tf.fill(last.shape, tf.cast(self.iterations, last.dtype)))

    def _tables(self, i: int) -> list[tf.Variable]:
        return [_native(x) for x in (self._trainable_variables[i], *self._state(i))]

    def _debts(self, i: int, rounded: bool | None = None) -> ledger.Debts:
        """What the i-th variable's rows owe, by the betas of the kernel or the rule."""
        variable = self._trainable_variables[i]
        dtype = state_dtype(variable.dtype)
        if rounded is None:
            rounded = (
                self._has_kernel() and dtype == variable.dtype and not rows.in_xla()
            )
            self._untracked.rounded[i] = rounded
        plan = self._plan
        if rounded:
            beta_1, beta_2 = self._rounded(dtype, plan.beta_1, plan.beta_2)
            plan = dataclasses.replace(plan, beta_1=beta_1, beta_2=beta_2)
        [history] = [h for h in self._histories if h.decays == self._decays(variable)]
        t = tf.cast(self.iterations, tf.int32)
        return ledger.Debts(history, plan, self.tail, _native(self._last[i]), t)

    @staticmethod
    def _rounded(dtype: str, *betas: float) -> list[float]:
        # A kernel takes betas in the variable's dtype: one that knows 0.999
        # as 0.99900001 is Adam for that beta, and needs its correction.
        return [float(np.dtype(dtype).type(beta)) for beta in betas]

    def _settled_rows(self, i: int, g: Any) -> list[tf.Tensor] | None:
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
        debts = {self._decays(self._trainable_variables[i]): i for i in by_rows}
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
        if i not in settlers:
            settlers[i] = tf.function(
                lambda: ledger.settle_table(
                    self._tables(i),
                    self._debts(i, self._untracked.rounded.get(i, False)),
                ),
                jit_compile=True,
            )
        settlers[i]()

    def settle(self) -> None:
        """Brings all rows of all tables to date, in one pass over what is behind.

        With `sparse_updates="exact"` a row that no batch has touched for a while
        stands as it was, and what dense Adam would have done to it since is owed.
        This pays it. It is called at the end of `fit`, and whenever a table's values
        are taken: by saving, by callbacks, by `get_weights` or NumPy. Call it
        before other code reads the table, such as `tf.train.Checkpoint` and
        `model.export` in the middle of a training.
        """
        if not self.built:
            return
        for i, last in enumerate(self._last):
            if last is None:
                continue
            last = _native(last)
            t = tf.cast(self.iterations, last.dtype)
            by_rows = i in self._untracked.by_rows or tf.reduce_max(last) == t
            if by_rows and tf.reduce_min(last) < t:
                self._settle(i)
        for history in getattr(self, "_histories", []):
            history.log_decay.assign(tf.zeros_like(history.log_decay))

    def __del__(self) -> None:
        # The tables live on: pay, before what is owed is forgotten.
        if getattr(self, "built", False) and not sys.is_finalizing():
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

    def finalize_variable_values(self, var_list: Any) -> None:
        super().finalize_variable_values(var_list)
        self.settle()

    def save_own_variables(self, store: Any) -> None:
        self.settle()
        super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Loads a state, also one that was saved in another mode, or by Keras.

        Saved rows are up to date, so all they lack is the step of their update.
        """
        last = [x for x in self._last if x is not None] if self.built else []
        rest = self.variables[: len(self.variables) - len(last)]
        tables = [v for v in self._trainable_variables if len(v.shape)]
        others = {len(rest), len(rest) + len(tables)} - {len(self.variables)}
        if not self.built or len(store.keys()) not in others:
            super().load_own_variables(store)
            return
        for i, variable in enumerate(rest):
            variable.assign(store[str(i)])
        for x in last:
            x.assign(tf.fill(x.shape, tf.cast(self._iterations, x.dtype)))

    # The average.

    def _update_model_variables_moving_average(self, trainable_variables: Any) -> None:
        for variable, average in zip(
            trainable_variables, self._model_variables_moving_average
        ):
            if average is not None:
                first = keras.ops.equal(self.iterations, 0)
                momentum = tf.constant(self.ema_momentum, average.dtype)
                keep = tf.where(first, tf.zeros_like(momentum), momentum)
                value = tf.cast(_native(variable), average.dtype)
                average.assign(average * keep + value * (1 - keep))

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Any
    ) -> None:
        for variable, average in zip(
            trainable_variables, self._model_variables_moving_average
        ):
            if average is not None:
                self._distribution_strategy.extended.update(
                    _native(variable),
                    lambda a, b: a.assign(tf.cast(b, a.dtype)),
                    args=(_native(average),),
                )

    # Serialization.

    def get_config(self) -> dict[str, Any]:
        beta_1 = self.beta_1
        if callable(beta_1):
            beta_1 = keras.saving.serialize_keras_object(beta_1)
        return {
            **super().get_config(),
            "beta_1": beta_1,
            "beta_2": self.beta_2,
            "sparse_updates": self.sparse_updates,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        if isinstance(config.get("beta_1"), dict):
            config["beta_1"] = keras.saving.deserialize_keras_object(
                config["beta_1"], custom_objects=custom_objects
            )
        return super().from_config(config, custom_objects=custom_objects)


def _native(variable: Any) -> Any:
    """A `keras.Variable`'s `tf.Variable`."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _is_gradient_of(g: tf.IndexedSlices, reading: ledger.Reading) -> bool:
    """Whether g is the gradient of these rows, each in its place."""
    if tf.executing_eagerly() or g.values.graph is not reading.ids.graph:
        return False
    op = g.indices.op
    return op.type == "Reshape" and op.inputs[0] is reading.lengthened


def _update_all(strategy: Any, updates: list[Any]) -> None:
    for variable, args, kwargs in updates:
        strategy.extended.update(
            variable, update, args=args, kwargs=kwargs, group=False
        )
