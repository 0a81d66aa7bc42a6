"""The way of a gradient from Keras to a rule on JAX, where all gradients are dense.

With `optimizer.py`, the only file that knows the internals of Keras's optimizers.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_adam import rounding
from keras_adam.base import BaseOptimizer, constrained, share, state_dtype
from keras_adam.checks import check_gradient


class DenseOptimizer(BaseOptimizer):
    """What `keras_adam.optimizer.RowOptimizer` is on TensorFlow, for dense gradients.

    JAX has no sparse gradients: that of an embedding is as large as its table, and a
    step moves every row, which is what `sparse_updates="exact"` and "dense" promise.
    "lazy" would move other rows than on TensorFlow, and raises an error.

    A gradient's way: it is unscaled, accumulated, clipped; then weight decay, the rule,
    the average of section 7.2. All in the state's dtype, and cast once at the end.
    """

    rule: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.sparse_updates == "lazy":
            raise NotImplementedError(
                '`sparse_updates="lazy"` needs sparse gradients, and Keras on JAX '
                "gives dense ones, which move every row. Received: "
                'sparse_updates="lazy". Use "exact" (for a saved model, load it with '
                "`compile=False` and compile it anew), or the TensorFlow backend."
            )

    def _check_exact(self, variables: Any = ()) -> None:
        """Exact mode holds for all betas where every step is a dense one."""

    def _overwrite_variables_directly_with_gradients(
        self, grads: Any, variables: Any
    ) -> tuple[list[Any], list[Any]]:
        # The first place Keras gives after `build` and before it scales.
        grads, variables = super()._overwrite_variables_directly_with_gradients(
            grads, variables
        )
        for g, v in zip(grads, variables):
            check_gradient(g, v)
        pairs = zip(grads, variables)
        return [ops.cast(g, state_dtype(v.dtype)) for g, v in pairs], variables

    def _backend_apply_gradients(self, grads: Any, trainable_variables: Any) -> None:
        steps = self.gradient_accumulation_steps
        if not steps:
            self._update(grads, trainable_variables)
            return
        # JAX has no branch that writes: take the step, and back if it was none.
        done = (self._iterations + 1) % steps == 0
        sums = self._accumulated_gradients
        for g, v in zip(grads, trainable_variables):
            total = sums[self._get_variable_index(v)]
            total.assign(total + g)
        means = [sums[self._get_variable_index(v)] / steps for v in trainable_variables]
        skip = {id(x) for x in (self._iterations, *sums)}
        state = [*self._trainable_variables, *self.variables]
        before = [(x, x.value) for x in state if id(x) not in skip]
        self._update(means, trainable_variables)
        for x, old in before:
            x.assign(ops.where(done, x.value, old))
        for total in sums:
            if total is not None:
                total.assign(ops.where(done, 0.0, total.value))

    def _update(self, grads: list[Any], variables: list[Any]) -> None:
        if callable(self.beta_1):
            self._count_beta_1(self._correction_1)
        scalars: dict[str, Any] = {}
        for g, variable in zip(self._clip_gradients(grads), variables):
            dtype = state_dtype(variable.dtype)
            if dtype not in scalars:
                step = self._step(self.learning_rate, dtype)
                scalars[dtype] = step.alpha, self._scalars(step)
            self._update_variable(g, variable, *scalars[dtype])
        if self.use_ema:
            self._average()

    def _update_variable(self, g: Any, variable: Any, alpha: Any, scalars: Any) -> None:
        theta = ops.cast(variable, g.dtype)
        if self.weight_decay is not None and self._use_weight_decay(variable):
            theta = theta - theta * (alpha * self.weight_decay)
        i = self._get_variable_index(variable)
        tables = [variable, *self._state(i)]
        values = [ops.cast(x, g.dtype) for x in tables[1:]]
        theta, values = self.rule(theta, g, values, scalars)
        for x, value, key in zip(tables, (theta, *values), self._rounding_keys(i)):
            x.assign(rounding.cast(value, x.dtype, key))

    def _average(self) -> None:
        t = self.iterations + 1
        for variable, average in zip(
            self._trainable_variables, self._model_variables_moving_average
        ):
            if average is None:
                continue
            theta = ops.convert_to_tensor(variable)
            if constrained(variable):
                theta = variable.constraint(theta)  # as Keras will after the step
            old = ops.convert_to_tensor(average)
            weight = share(self.ema_momentum, 1, ops.cast(t, old.dtype))
            average.assign(old + (ops.cast(theta, old.dtype) - old) * weight)
            if self.ema_overwrite_frequency:
                overwrite = t % self.ema_overwrite_frequency == 0
                new = ops.cast(average, theta.dtype)
                variable.assign(ops.where(overwrite, new, variable.value))

    def finalize_variable_values(self, var_list: Any) -> None:
        # After a step that failed there is no value.
        done = self.built and self._iterations._value is not None
        if done and int(ops.convert_to_tensor(self.iterations)):
            super().finalize_variable_values(var_list)

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Any
    ) -> None:
        known = self._trainable_variables_indices
        for v in trainable_variables:
            i = known.get(self._var_key(v))
            if i is not None and self._model_variables_moving_average[i] is not None:
                average = self._model_variables_moving_average[i]
                # Not the average's own memory, which a step gives away.
                v.assign(ops.copy(ops.convert_to_tensor(average)))

    def settle(self) -> None:
        """Nothing: on JAX every step moves all rows."""
