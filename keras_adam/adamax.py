"""Algorithm 2: its rule as pure functions of tensors, and class AdaMax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_adam.backend import Optimizer, tails, tf
from keras_adam.base import Step, moving_average
from keras_adam.migration import AdaMaxMigration


class AdaMaxScalars(NamedTuple):
    """What `adamax` needs beside a variable's own state; scalars of one step."""

    alpha: tf.Tensor  # alpha / (1 - beta_1^t)
    beta_1: float | tf.Tensor
    one_minus_beta_1: tf.Tensor
    beta_2: tf.Tensor


def adamax(
    theta: tf.Tensor,
    g: tf.Tensor,
    state: Sequence[tf.Tensor],
    s: AdaMaxScalars,
    once: Callable[[Any], Any] = lambda x: x,
) -> tuple[tf.Tensor, Sequence[tf.Tensor]]:
    """One step of Algorithm 2. `once` is told what two results share."""
    m, u = state
    m = once(moving_average(m, g, s.beta_1, s.one_minus_beta_1))
    u = once(ops.maximum(s.beta_2 * u, ops.abs(g)))
    # Where u is 0 there is no step, but a NaN must show; XLA's maximum may lose it.
    still = u == 0
    step = ops.where(still, 0 * m, m) / ops.where(still, ops.ones_like(u), u)
    return theta - s.alpha * step, (m, u)


def adamax_tail(
    plan: tails.Plan, state: Sequence[tf.Tensor], owed: tails.Owed
) -> tf.Tensor:
    """What `adamax` with g = 0 takes off theta in all steps since the last update."""
    m, u = state
    [[c]] = owed.polynomials
    return c * ops.divide_no_nan(m, u)


@keras.saving.register_keras_serializable(package="keras_adam")
class AdaMax(AdaMaxMigration, Optimizer):
    r"""AdaMax, Algorithm 2 of Kingma & Ba, with right and row-cost embeddings.

    ```
    m = beta_1 * m + (1 - beta_1) * g
    u = max(beta_2 * u, |g|)
    theta = theta - learning_rate / (1 - beta_1^t) * m / u
    ```

    There is no epsilon: where u is 0, as it is before the first gradient that is not,
    the step is 0. m and u are kept in float32 (float64 for float64 variables), or in
    `moments_dtype`, whatever the variable's dtype; the step is computed in at least
    float32 and cast once.

    Args:
        learning_rate: The paper's alpha, finite and at least 0 (0.002, the paper's;
            0.001 in `keras.optimizers.Adamax`): a float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments.
        beta_1: Decay rate of m, in [0, 1): a float, a `LearningRateSchedule`, or
            a callable of the step, counted from 0. With a schedule the
            correction is 1 - prod(beta_1,i): what section 3 derives, for betas
            that change.
        beta_2: Decay rate of u, in [0, 1).
        sparse_updates: What to do with the `tf.IndexedSlices` an embedding
            gives: `"exact"`, `"lazy"` or `"dense"`, as in `keras_adam.Adam`.
            `"exact"` needs beta_1 < beta_2 on TensorFlow, and is refused where what
            a row owes would fade too slowly to be added up.
        stochastic_rounding, moments_dtype, seed: As in `keras_adam.Adam`. In
            bfloat16 u and the step are off by 2.2%, root mean square.
        **base: Arguments of `keras.optimizers.Optimizer`: see
            `keras_adam.optimizer.RowOptimizer` for what each does, and costs,
            with embeddings.

    Raises:
        ValueError: An argument is outside its range, or `sparse_updates="exact"`
            does not hold for these betas; in a step, gradients that do not fit their
            variables.
        NotImplementedError: Several replicas of a strategy that is not a
            `tf.distribute.MirroredStrategy` or `MultiWorkerMirroredStrategy`; or
            `sparse_updates="lazy"` with Keras on JAX, where gradients are dense.

    Source: arXiv 1412.6980, Algorithm 2 and section 7.1.
    """

    rule = staticmethod(adamax)
    tail = staticmethod(adamax_tail)

    def __init__(
        self,
        learning_rate: Any = 0.002,
        beta_1: float | Callable[[Any], Any] = 0.9,
        beta_2: float = 0.999,
        *,
        sparse_updates: str = "exact",
        stochastic_rounding: bool = False,
        moments_dtype: str | None = None,
        seed: int = 0,
        **base: Any,
    ) -> None:
        if "epsilon" in base:
            raise ValueError(
                "AdaMax has no `epsilon`: where u is 0, the step is. Received: "
                f"epsilon={base['epsilon']!r}. Leave it out; for an optimizer of "
                "Keras's use `AdaMax.from_keras`."
            )
        super().__init__(
            *(learning_rate, beta_1, beta_2, sparse_updates),
            stochastic_rounding=stochastic_rounding,
            moments_dtype=moments_dtype,
            seed=seed,
            **base,
        )
        self._check_exact()

    def _build_state(self, variables: list[Any]) -> None:
        self._m, self._u = self.add_optimizer_variables(variables, ["momentum", "norm"])

    def _state(self, i: int) -> list[Any]:
        return [self._m[i], self._u[i]]

    def _scalars(self, step: Step) -> AdaMaxScalars:
        return AdaMaxScalars(
            alpha=step.alpha / step.correction_1,
            beta_1=step.beta_1,
            one_minus_beta_1=step.one_minus_beta_1,
            beta_2=ops.convert_to_tensor(step.beta_2, step.t.dtype),
        )

    def _make_plan(self, beta_1: float) -> tails.Plan:
        return tails.Plan(
            beta_1,
            self.beta_2,
            ratio=beta_1 / self.beta_2 if beta_1 < self.beta_2 else 1.0,
            grows=True,
            decays=False,
            corrected=False,
            schedule=callable(self.beta_1),
        )

    def _lead(self, s: AdaMaxScalars) -> tf.Tensor:
        return s.alpha

    def _has_kernel(self) -> bool:
        # The kernel divides by u + epsilon: where u is 0, m must be, too. And where
        # u falls fast, it loses m's digits.
        beta_1 = self.beta_1
        falls = not callable(beta_1) and beta_1 < self.beta_2
        return falls and self.beta_2 >= 0.5

    @staticmethod
    def _kernel(
        variable: tf.Variable, g: tf.Tensor, state: Sequence[tf.Variable], s: Any
    ) -> None:
        zero, one = tf.zeros((), g.dtype), tf.ones((), g.dtype)
        tf.raw_ops.ResourceApplyAdaMax(
            var=variable.handle,
            m=state[0].handle,
            v=state[1].handle,
            beta1_power=zero,  # the correction is in alpha already
            lr=s.alpha,
            beta1=one - s.one_minus_beta_1,
            beta2=s.beta_2,
            # Below the last digit of any u above 1e-30.
            epsilon=tf.constant(np.finfo(g.dtype.as_numpy_dtype).tiny, g.dtype),
            grad=g,
        )
