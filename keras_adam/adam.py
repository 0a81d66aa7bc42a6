"""Algorithm 1: its rule as pure functions of tensors, and class Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_adam.backend import Optimizer, tails, tf
from keras_adam.base import Step, moving_average, one_minus_power
from keras_adam.checks import check_epsilon, check_flags
from keras_adam.migration import AdamMigration


class AdamScalars(NamedTuple):
    """What `adam` needs beside a variable's own state; scalars of one step."""

    alpha: tf.Tensor  # alpha * sqrt(1 - beta_2^t) / (1 - beta_1^t)
    epsilon: tf.Tensor  # epsilon hat
    beta_1: float | tf.Tensor
    one_minus_beta_1: tf.Tensor
    beta_2: float
    one_minus_beta_2: tf.Tensor


def adam(
    theta: tf.Tensor,
    g: tf.Tensor,
    state: Sequence[tf.Tensor],
    s: AdamScalars,
    once: Callable[[Any], Any] = lambda x: x,
) -> tuple[tf.Tensor, Sequence[tf.Tensor]]:
    """One step of Algorithm 1 in the order before section 2.1.

    A third state, if there is one, is AMSGrad's maximum of v. `once` is told what two
    results share.
    """
    m, v, *v_max = state
    m = once(moving_average(m, g, s.beta_1, s.one_minus_beta_1))
    v = once(moving_average(v, g * g, s.beta_2, s.one_minus_beta_2))
    v_max = [once(ops.maximum(x, v)) for x in v_max]
    r = ops.sqrt(v_max[0] if v_max else v)
    return theta - s.alpha * m / (r + s.epsilon), (m, v, *v_max)


def adam_tail(
    plan: tails.Plan, state: Sequence[tf.Tensor], owed: tails.Owed
) -> tf.Tensor:
    """What `adam` with g = 0 takes off theta in all steps since the last update."""
    m, v, *v_max = state
    r = ops.sqrt(v_max[0] if v_max else v)
    return tails.tail(owed, m, r, plan.epsilon)


@keras.saving.register_keras_serializable(package="keras_adam")
class Adam(AdamMigration, Optimizer):
    r"""Adam, Algorithm 1 of Kingma & Ba, with right and row-cost embeddings.

    ```
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g^2
    m_hat = m / (1 - beta_1^t)
    v_hat = v / (1 - beta_2^t)
    theta = theta - learning_rate * m_hat / (sqrt(v_hat) + epsilon)
    ```

    m and v are kept in float32 (float64 for float64 variables), or in
    `moments_dtype`, whatever the variable's dtype; the step is computed in at least
    float32 and cast once.

    Args:
        learning_rate: The paper's alpha, finite and at least 0: a float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments.
        beta_1: Decay rate of m, in [0, 1): a float, a `LearningRateSchedule`, or
            a callable of the step, counted from 0. With a schedule the first
            correction is 1 - prod(beta_1,i): what section 3 derives, for betas
            that change.
        beta_2: Decay rate of v, in [0, 1).
        epsilon: At least 1e-30. Algorithm 1's epsilon, added to sqrt(v_hat). (Keras's
            Adam has the other one: see `epsilon_hat`.)
        sparse_updates: What to do with the `tf.IndexedSlices` an embedding
            gives; repeated ids are summed first in each.
            `"exact"`: dense Adam's trajectory for every row, at the cost of the
            rows a batch touches. A row that no batch touches goes on moving by
            its momentum; what that makes is added up when the row is next
            touched (see `keras_adam.tails`), or read by `keras_adam.Embedding`,
            or for all rows by `settle`. Needs, on TensorFlow, beta_1 <
            sqrt(beta_2), or with amsgrad beta_1 < 1, and is refused where what
            a row owes would fade too slowly to be added up.
            `"lazy"`: update m, v and theta of the batch's rows only, with the
            global step's bias correction. Rows not in the batch stand still,
            which is not dense Adam's trajectory.
            `"dense"`: dense Adam's result for every row, at the cost of the
            whole table.
        epsilon_hat: If True, `epsilon` is the paper's epsilon hat (the formula
            before section 2.1), added to sqrt(v) and not to sqrt(v_hat).
            `epsilon=1e-7, epsilon_hat=True` is what `keras.optimizers.Adam`
            computes for dense gradients of float32 and float64 variables (of these
            with betas rounded to float32).
        bias_correction: If False, m_hat = m and v_hat = v (figure 4).
        amsgrad: If True, the largest v so far takes the place of v (Reddi et
            al., "On the Convergence of Adam and Beyond").
        stochastic_rounding: If True, new bfloat16 and float16 weights are rounded
            up or down at random, right on average (see `keras_adam.rounding`). To
            nearest, steps below half a last digit are lost: 0.2 to 0.4% of a
            bfloat16 weight. In exact mode a row is rounded when it is touched, and by
            `settle` if it owes; `keras_adam.Embedding` reads it to nearest, and what
            `ema_overwrite_frequency` writes is to nearest. Weights of other dtypes
            are as ever, at no cost.
        moments_dtype: None, "float32" or "bfloat16": what m and v are kept in; the
            arithmetic stays in float32. None is float32, and float64 for float64
            variables. "bfloat16" takes half the memory; m and v are then always
            rounded stochastically, or v would stand still with beta_2 = 0.999. They
            are right on average; with gradients of noise v is off by 3.5%, root mean
            square, and the step by 1.8%; with amsgrad the largest v is the largest of
            those, and grows (after 6,000 steps of noise it is 3.6% too large).
            (`examples/imdb_embedding.py`: test accuracy 0.8858 with either.) Outside
            XLA dense variables then miss TensorFlow's fused kernel. A saved state
            loads with another `moments_dtype`, rounded to nearest.
        seed: An integer; of stochastic rounding. Each seed rounds the same step
            alike each time, in graph mode and under XLA, so that a training can be
            repeated, and one that was saved goes on bit for bit.
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

    Source: arXiv 1412.6980, Algorithm 1 and sections 2, 3 and 4.
    """

    rule = staticmethod(adam)
    tail = staticmethod(adam_tail)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float | Callable[[Any], Any] = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        *,
        sparse_updates: str = "exact",
        stochastic_rounding: bool = False,
        moments_dtype: str | None = None,
        seed: int = 0,
        epsilon_hat: bool = False,
        bias_correction: bool = True,
        amsgrad: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(
            *(learning_rate, beta_1, beta_2, sparse_updates),
            stochastic_rounding=stochastic_rounding,
            moments_dtype=moments_dtype,
            seed=seed,
            **base,
        )
        check_epsilon(epsilon)
        check_flags(
            epsilon_hat=epsilon_hat, bias_correction=bias_correction, amsgrad=amsgrad
        )
        self.epsilon = epsilon
        self.epsilon_hat = epsilon_hat
        self.bias_correction = bias_correction
        self.amsgrad = amsgrad
        self._check_exact()

    def _build_state(self, variables: list[Any]) -> None:
        self._momentums, self._velocities = self.add_optimizer_variables(
            variables, ["momentum", "velocity"]
        )
        if self.amsgrad:
            self._velocity_hats = self.add_optimizer_variables(
                variables, "velocity_hat"
            )

    def _state(self, i: int) -> list[Any]:
        hats = [self._velocity_hats[i]] if self.amsgrad else []
        return [self._momentums[i], self._velocities[i], *hats]

    def _scalars(self, step: Step) -> AdamScalars:
        c_1 = c_2 = ops.ones_like(step.t)
        if self.bias_correction:
            c_1 = step.correction_1
            c_2 = one_minus_power(step.beta_2, step.t)
        return AdamScalars(
            alpha=step.alpha * ops.sqrt(c_2) / c_1,
            epsilon=self.epsilon
            * (ops.ones_like(c_2) if self.epsilon_hat else ops.sqrt(c_2)),
            beta_1=step.beta_1,
            one_minus_beta_1=step.one_minus_beta_1,
            beta_2=step.beta_2,
            one_minus_beta_2=ops.convert_to_tensor(1 - step.beta_2, step.t.dtype),
        )

    def _make_plan(self, beta_1: float) -> tails.Plan:
        ratio = beta_1
        if not self.amsgrad:
            root = math.sqrt(self.beta_2)
            ratio = beta_1 / root if beta_1 < root else 1.0
        return tails.Plan(
            beta_1,
            self.beta_2,
            ratio,
            decays=not self.amsgrad,
            corrected=self.bias_correction and not self.epsilon_hat,
            schedule=callable(self.beta_1),
            epsilon=self.epsilon,
        )

    def _lead(self, s: AdamScalars) -> tf.Tensor:
        return s.alpha * (self.epsilon / s.epsilon)

    def _has_kernel(self) -> bool:
        # The kernel knows 1 - beta_2 to 5 digits; the correction cancels that.
        # Nor a small v beside a large one before, where beta_2 is small.
        return self.bias_correction and not self.amsgrad and self.beta_2 >= 0.5

    @staticmethod
    def _kernel(
        variable: tf.Variable, g: tf.Tensor, state: Sequence[tf.Variable], s: Any
    ) -> None:
        # The corrections are in alpha and epsilon already: powers of 0.
        zero, one = tf.zeros((), g.dtype), tf.ones((), g.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=state[0].handle,
            v=state[1].handle,
            beta1_power=zero,
            beta2_power=zero,
            lr=s.alpha,
            beta1=one - s.one_minus_beta_1,
            beta2=one - s.one_minus_beta_2,
            epsilon=s.epsilon,
            grad=g,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "epsilon": self.epsilon,
            "epsilon_hat": self.epsilon_hat,
            "bias_correction": self.bias_correction,
            "amsgrad": self.amsgrad,
        }
