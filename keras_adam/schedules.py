"""The schedules of the paper: alpha / sqrt(t), beta_1 * lambda^(t - 1)."""

from __future__ import annotations

import math
from typing import Any

import keras

from keras_adam.checks import check_range, is_number

__all__ = ["ExponentialBetaDecay", "InverseSqrtDecay"]


@keras.saving.register_keras_serializable(package="keras_adam")
class InverseSqrtDecay(keras.optimizers.schedules.LearningRateSchedule):
    """alpha / sqrt(t), the learning rate of theorem 4.1 and of section 6.1.

    ```
    learning_rate = initial_learning_rate / sqrt(step + 1)
    ```

    The step is counted from 0, as Keras does, and the paper's t from 1. With
    `gradient_accumulation_steps` Keras counts micro-steps here (but updates for
    `ExponentialBetaDecay`). Called with a step, of any shape, it gives float32.

    Args:
        initial_learning_rate: alpha, the rate at the first step; not negative.

    Raises:
        ValueError: If `initial_learning_rate` is no number, negative or not finite.

    Source: Kingma & Ba, arXiv 1412.6980, section 4.
    """

    def __init__(self, initial_learning_rate: float) -> None:
        super().__init__()
        if not (
            is_number(initial_learning_rate) and 0 <= initial_learning_rate < math.inf
        ):
            raise ValueError(
                "`initial_learning_rate` must be a finite number, and not negative. "
                f"Received: initial_learning_rate={initial_learning_rate!r}."
            )
        self.initial_learning_rate = initial_learning_rate

    def __call__(self, step: Any) -> Any:
        t = keras.ops.cast(step, "float32") + 1
        return self.initial_learning_rate * keras.ops.rsqrt(t)

    def get_config(self) -> dict[str, Any]:
        return {"initial_learning_rate": self.initial_learning_rate}


@keras.saving.register_keras_serializable(package="keras_adam")
class ExponentialBetaDecay(keras.optimizers.schedules.LearningRateSchedule):
    """beta_1 * lambda^(t - 1), the decay of beta_1 in theorem 4.1.

    ```
    beta_1 = initial_beta_1 * decay_rate ** step
    ```

    The step is counted from 0, and the paper's t from 1. For the argument `beta_1`
    of `keras_adam.Adam` and `keras_adam.AdaMax`. Called with a step, of any shape, it
    gives float32.

    Args:
        initial_beta_1: beta_1 at the first step, in [0, 1), in float32 too.
        decay_rate: The paper's lambda, in (0, 1]; also such as 1 - 1e-8, which
            float32 does not know.

    Raises:
        ValueError: If an argument is no number, or out of its range.

    Source: Kingma & Ba, arXiv 1412.6980, section 4.
    """

    def __init__(
        self, initial_beta_1: float = 0.9, decay_rate: float = 1 - 1e-8
    ) -> None:
        super().__init__()
        check_range("initial_beta_1", initial_beta_1)
        if not (is_number(decay_rate) and 0 < decay_rate <= 1):
            raise ValueError(
                "`decay_rate` must be in (0, 1]: beta_1 must not grow. Received: "
                f"decay_rate={decay_rate!r}."
            )
        self.initial_beta_1 = initial_beta_1
        self.decay_rate = decay_rate

    def __call__(self, step: Any) -> Any:
        log = math.log(self.decay_rate)
        return self.initial_beta_1 * keras.ops.exp(
            log * keras.ops.cast(step, "float32")
        )

    def get_config(self) -> dict[str, Any]:
        return {"initial_beta_1": self.initial_beta_1, "decay_rate": self.decay_rate}
