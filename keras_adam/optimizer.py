"""The way of a gradient from Keras to a rule, of rows or dense, on TensorFlow.

With `dense.py`, the only file that knows the internals of Keras's optimizers.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_adam import ledger, owners, rows
from keras_adam.accumulation import Accumulation
from keras_adam.averaging import Averages
from keras_adam.base import BaseOptimizer, state_dtype
from keras_adam.checks import check_gradient, path
from keras_adam.exact import ExactRows, native
from keras_adam.owners import tf_variable
from keras_adam.rows import Rows
from keras_adam.tails import Plan
from keras_adam.update import Rule, compile_assign, takes_kernel, update


class RowOptimizer(Accumulation, Averages, ExactRows, BaseOptimizer):
    """What Adam and AdaMax share: all but the rule.

    A gradient's way: repeated ids are summed; then it is unscaled, accumulated,
    clipped; then weight decay, the rule, the average. Each option of
    `keras.optimizers.Optimizer` works with embeddings; beside the batch's rows
    these cost:

    - `weight_decay` (at least 0; decoupled, as Keras's: theta - learning_rate *
      weight_decay * theta): nothing. In lazy mode it reaches the batch's rows only;
      in exact mode all rows, and learning_rate * weight_decay must stay below 1: an
      error, or under XLA, which knows none, NaN.
    - `clipnorm`, `global_clipnorm`, `clipvalue` (at least 0, one of them): nothing.
      They see the summed gradient.
    - `loss_scale_factor` (above 0): nothing.
    - `gradient_accumulation_steps` (at least 2): a micro-step its rows, and the last
      one of a step the rows of all. Under XLA, where shapes are static, the last one
      costs the whole table if the step touched more rows than that many times its own
      ids, as where it is smaller than the others. In lazy mode a step updates the rows
      its micro-steps touched. Memory: Keras's accumulator, as large as the table, and
      8 bytes a row.
    - `keras.optimizers.LossScaleOptimizer` around it: its own search for
      overflow costs the whole table, and may miss one in a repeated id.
    - `use_ema` (section 7.2's bias-corrected average, see `averaging.py`, with
      `ema_momentum` in [0, 1]): in lazy and exact mode the batch's rows; in exact mode
      where weights decay faster than the average forgets (learning_rate * weight_decay
      above 1 - ema_momentum), also a pass over the table now and then. `settle` brings
      averages to date.
    - a layer's `embeddings_constraint`: the whole table, every step. In exact mode
      the step itself is then a dense one.

    Exact mode keeps 4 bytes more a row, and some megabytes an optimizer. Rows of
    float16 and bfloat16 tables are then rounded when they are touched, and not at
    every step. A step in which a table has no gradient at all is no step for it,
    as in Keras, and costs exact mode a pass over the table.

    A subclass gives `rule`, `tail`, `_make_plan`, `_build_state`, `_state`, `_scalars`,
    `_lead`, `_has_kernel` and `_kernel`.
    """

    rule: Rule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Whether there are several, each with copies of all variables.
        self._replicas: bool = self._distribution_strategy.num_replicas_in_sync > 1
        self.steps_under_way = 0  # of several replicas, as many as are in `apply`

    # What a subclass gives.

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
        self._check_strategy()
        super().build(variables)
        self._build_touched(variables)
        # A plain object keeps Keras and TensorFlow from saving what it holds.
        self._untracked = types.SimpleNamespace(
            workspaces=[
                rows.Workspace(native(v), copies=len(self._state(i)) + 1)
                if len(v.shape)
                else None
                for i, v in enumerate(variables)
            ],
            compiled=compile_assign(),
        )
        self._build_ledger(variables)
        owners.settle_when_set(self._iterations, self)

    def _check_strategy(self) -> None:
        strategy = self._distribution_strategy
        mirrored = (
            tf.distribute.MirroredStrategy,
            tf.distribute.MultiWorkerMirroredStrategy,
        )
        if isinstance(strategy, tf.distribute.TPUStrategy):
            raise NotImplementedError(
                f"{type(self).__name__} does not train with tf.distribute.TPUStrategy. "
                'Use tf.distribute.OneDeviceStrategy("/TPU:0") and jit_compile=True '
                "for one core of a TPU, or Keras on JAX with keras.distribution for "
                "more."
            )
        if self._replicas and not isinstance(strategy, mirrored):
            raise NotImplementedError(
                f"{type(self).__name__} trains on several replicas with "
                "tf.distribute.MirroredStrategy and MultiWorkerMirroredStrategy. "
                f"Received: {strategy}. Use one of these, or one replica."
            )
        if self._replicas and tf.distribute.get_strategy() is not strategy:
            raise ValueError(
                f"{type(self).__name__} was made in the scope of {strategy}, and is "
                "built outside of it. Build it in `with strategy.scope():`, as "
                "`model.compile` and `model.fit` do."
            )
        if self._replicas and not tf.distribute.in_cross_replica_context():
            raise ValueError(
                f"{type(self).__name__} is built by one of several replicas. Build it "
                "before: `with strategy.scope(): optimizer.build(variables)`."
            )

    def _on_each_replica(self, f: Callable[[], None]) -> None:
        """Calls f, which sees the copies of one replica, for each of them."""
        strategy = self._distribution_strategy
        inside = tf.distribute.has_strategy() and (
            not tf.distribute.in_cross_replica_context()
        )
        if not self._replicas or inside:
            f()
            return
        anchor = tf_variable(self._iterations)
        with strategy.scope():
            strategy.extended.update(anchor, lambda _: f(), group=False)

    def _decays(self, variable: Any) -> bool:
        return self.weight_decay is not None and self._use_weight_decay(
            tf_variable(variable)
        )

    def _var_key(self, variable: Any) -> Any:
        return super()._var_key(tf_variable(variable))

    # The way of a gradient.

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Takes a step: see `keras.optimizers.Optimizer`."""
        self.steps_under_way += 1
        try:
            super().apply(grads, trainable_variables)
        finally:
            self.steps_under_way -= 1

    def _overwrite_variables_directly_with_gradients(
        self, grads: Any, variables: Any
    ) -> tuple[list[Any], list[Any]]:
        # The first place Keras gives after `build` and before it scales: here
        # repeats are summed, so that all that follows is right.
        grads, variables = super()._overwrite_variables_directly_with_gradients(
            grads, variables
        )
        for g, v in zip(grads, variables):
            check_gradient(g, v)
        grads = self._reduced([_cast(g, v) for g, v in zip(grads, variables)])
        return [self._summed(g, v) for g, v in zip(grads, variables)], variables

    def _reduced(self, grads: list[Any]) -> list[Any]:
        """Summed over all replicas; each then takes the same step on its copies."""
        if not self._replicas or not grads:
            return grads
        context = tf.distribute.get_replica_context()
        if context is None:
            raise ValueError(
                f"{type(self).__name__} takes each replica's gradients, and sums them. "
                "Call `apply` in a function that `strategy.run` runs."
            )
        return list(context.all_reduce(tf.distribute.ReduceOp.SUM, grads))

    def _summed(self, g: Any, variable: Any) -> tf.Tensor | Rows:
        if not isinstance(g, tf.IndexedSlices):
            return g
        values = g.values
        mode = self._mode(variable)
        if mode == "dense":
            return tf.math.unsorted_segment_sum(values, g.indices, variable.shape[0])
        i = self._get_variable_index(variable)
        at_once = not self.gradient_accumulation_steps
        more = None
        if mode == "exact":
            reading = self._reading_of(i, g)
            if at_once and reading is not None:
                return Rows(values, reading.ids, reading.lengthened)
            more = ledger.sweep(variable.shape[0], tf.cast(self.iterations, tf.int32))
        d = rows.distinct(g.indices, self._untracked.workspaces[i].places, more)
        return rows.sum_repeats(values, d, room=at_once)

    def _backend_apply_gradients(self, grads: Any, trainable_variables: Any) -> None:
        steps = self.gradient_accumulation_steps
        if steps:
            due = (self._iterations + 1) % steps == 0
            self._accumulate(grads, trainable_variables, due)
        else:
            self._update(grads, trainable_variables)

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        values = [g.values if isinstance(g, Rows) else g for g in grads]
        values = super()._clip_gradients(values)
        return [
            g._replace(values=x) if isinstance(g, Rows) else x
            for x, g in zip(values, grads)
        ]

    def _update(self, grads: list[Any], variables: list[Any]) -> None:
        if callable(self.beta_1):
            self._count_beta_1(native(self._correction_1))
        self._backend_update_step(
            self._clip_gradients(grads), variables, self.learning_rate
        )

    def _backend_update_step(
        self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any
    ) -> None:
        indices = [self._get_variable_index(v) for v in trainable_variables]
        self._check_unchanged()
        for i, g in zip(indices, grads):
            if isinstance(g, Rows) and self._last[i] is not None:
                self._note_by_rows(i)
        scalars: dict[Any, Any] = {}
        for i, g, variable in zip(indices, grads, trainable_variables):
            dtype = state_dtype(variable.dtype)
            decays = self._decays(variable)
            if decays != self._untracked.decays[i] and i in self._untracked.by_rows:
                raise ValueError(
                    "`weight_decay` cannot be switched on or off after the optimizer "
                    f"was built, because rows owe it. Received: weight_decay="
                    f"{self.weight_decay!r}, and for {path(variable)} "
                    f"{'some' if decays else 'none'}. Give it to the optimizer when it "
                    "is made (0.0 is one), call `exclude_from_weight_decay` before "
                    '`build`, or use `sparse_updates="dense"`. A model of '
                    "`load_model`, which builds it, goes on so: load it with "
                    "compile=False, compile it with a new optimizer that excludes, "
                    "`build` that, and `model.load_weights` the same file."
                )
            state = [native(x) for x in self._state(i)]
            tables = [native(variable), *state]
            kernel = self._has_kernel() and takes_kernel(g, tables, decays)
            if (dtype, kernel) not in scalars:
                step = self._step(learning_rate, dtype, kernel)
                scalars[dtype, kernel] = step.alpha, self._scalars(step)
            alpha, s = scalars[dtype, kernel]
            decay = self._decay(alpha) if decays else None
            update(
                *(tables[0], g, state, s, decay),
                rule=self.rule,
                kernel=self._kernel if kernel else None,
                copies=self._untracked.workspaces[i].copies
                if isinstance(g, Rows)
                else [],
                compiled=self._untracked.compiled,
                once=self._once,
                keys=self._rounding_keys(i),
                **self._settled_rows(i, g),
            )
        self._end_step(dict(zip(indices, grads)), learning_rate)
        if self.use_ema:
            self._average(dict(zip(indices, grads)))

    def finalize_variable_values(self, var_list: Any) -> None:
        self.settle()
        if self.use_ema and self.built and self._steps_done():  # or there is none yet
            known = self._trainable_variables_indices
            super().finalize_variable_values(
                [v for v in var_list if self._var_key(v) in known]
            )

    def save_own_variables(self, store: Any) -> None:
        self.settle()
        super().save_own_variables(store)

    def _row_state(self) -> list[Any]:
        return [*self._touched_state(), *(x for x in self._last if x is not None)]

    def _load_row_state(self, marks: list[Any] | None) -> None:
        if marks is not None:
            self._load_touched(marks)
        # What is saved is up to date. Loaded as it was, it lacks the step of each row's
        # update if the table had dense gradients only.
        every = range(len(self._last))
        self._mark(self._untracked.by_rows if marks is None else every)

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Any
    ) -> None:
        self._on_each_replica(lambda: self._overwrite(trainable_variables))


def _cast(g: Any, variable: Any) -> Any:
    """In the rules' dtype; and of its shape, where TensorFlow knows not even a rank."""
    sparse = isinstance(g, tf.IndexedSlices)
    x = tf.cast(g.values if sparse else g, state_dtype(variable.dtype))
    if x.shape.rank is None:
        shape = [None, *variable.shape[1:]] if sparse else variable.shape
        x = tf.ensure_shape(x, shape)
    return tf.IndexedSlices(x, g.indices, g.dense_shape) if sparse else x
