"""The bias-corrected temporal average of section 7.2.

With theta_t the weights after step t and g the momentum, the paper's average is

    avg_t = g * avg_{t-1} + (1 - g) * theta_t,    avg_0 = 0,

and the one to use is the corrected avg_t / (1 - g^t). That one is kept here, so that
whoever takes it gets it right. g is the argument `ema_momentum`, 0.99 in Keras; the
paper takes beta_2, 0.999. In the average the last n of t steps weigh

    share(g, n, t) = (1 - g^n) / (1 - g^t),    with g = 1 n / t,

so a step is average + (theta_t - average) * share(g, 1, t), and n steps at which
theta stood still are that with share(g, n, t). (g = 1 gives the mean of the weights of
all steps, Polyak-Ruppert averaging, from which section 7.2 starts.)
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import keras
import tensorflow as tf

from keras_adam import rows
from keras_adam.base import constrained, require_tensorflow, share
from keras_adam.exact import native
from keras_adam.owners import optimizer_of, tf_variable
from keras_adam.rows import Rows

__all__ = ["EvaluateAverages"]

require_tensorflow(__name__)


class Averages:
    """What `RowOptimizer` does for `use_ema`, beside `ExactRows`, which owes averages.

    t counts updates: with `gradient_accumulation_steps` a micro-step is none.
    """

    # From `RowOptimizer`.
    built: bool
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    sparse_updates: str
    iterations: Any
    _untracked: Any
    _trainable_variables: list[Any]
    _model_variables_moving_average: list[Any]
    _get_variable_index: Callable[[Any], int]
    _kind: Callable[[int], Any]
    _settle: Callable[..., None]
    settle: Callable[[], None]

    def _steps_done(self) -> int:
        return int(tf.convert_to_tensor(self.iterations))  # of replicas, the first's

    def _average(self, grads: dict[int, Any]) -> None:
        """Averages what the step left, but for the rows that `update` has averaged."""
        by_rows = self._untracked.by_rows
        for i, average in enumerate(self._model_variables_moving_average):
            done = isinstance(grads.get(i), Rows)
            stands = i not in grads and self.sparse_updates == "lazy"
            if average is not None and not (i in by_rows and (done or stands)):
                average, variable = native(average), self._trainable_variables[i]
                theta = native(variable)
                if constrained(variable):
                    theta = variable.constraint(theta)  # as Keras will after the step
                theta = tf.cast(theta, average.dtype)
                t = tf.cast(self.iterations + 1, average.dtype)
                weight = share(self.ema_momentum, 1, t)
                average.assign(average + (theta - average) * weight)
        for kind, history in self._untracked.histories.items():
            if history.decays:
                # `tails.add_decay`'s sum: a difference of two such would lose digits.
                large = history.log_decay[2] > 64
                rows.run_if(large, functools.partial(self._settle_in_step, kind))
        if self.ema_overwrite_frequency:
            t = self.iterations + 1
            rows.run_if(t % self.ema_overwrite_frequency == 0, self._overwrite_in_step)

    def _settle_in_step(self, kind: Any) -> None:
        for i in self._untracked.by_rows:
            if self._kind(i) == kind:
                self._settle(i, ahead=1)
        log_decay = self._untracked.histories[kind].log_decay
        log_decay.assign(tf.zeros_like(log_decay))

    def _overwrite_in_step(self) -> None:
        for i in self._untracked.by_rows:
            self._settle(i, ahead=1)
        self._overwrite(self._trainable_variables)

    def _overwrite(self, variables: Any) -> None:
        """Gives weights the values of their averages, which are up to date."""
        for variable in variables:
            average = self._model_variables_moving_average[
                self._get_variable_index(variable)
            ]
            if average is not None:
                table = native(variable)
                table.assign(tf.cast(native(average), table.dtype))


class Kept:
    """Weights' own values while they hold their averages; put back once, or at its end.

    Only callbacks keep it.
    """

    # By optimizer.
    all: ClassVar[Any] = weakref.WeakValueDictionary()
    # Of each weight itself, its value, its average.
    _weights: Sequence[tuple[tf.Variable, tf.Tensor, tf.Variable]] = ()

    def __init__(self, optimizer: Any) -> None:
        optimizer.settle()
        self._optimizer, self._step = optimizer, optimizer._steps_done()
        weights = []
        for pair in zip(
            optimizer._trainable_variables,
            optimizer._model_variables_moving_average,
            strict=True,
        ):
            if pair[1] is not None:
                copies = (rows.components(tf_variable(v)) for v in pair)
                weights += [(x, x.read_value(), a) for x, a in zip(*copies)]
        self._weights = weights
        self.all[optimizer] = self
        optimizer._overwrite_model_variables_with_average_value(
            optimizer._trainable_variables
        )

    def _untouched(self) -> Iterator[tuple[tf.Variable, tf.Tensor]]:
        """Weights that still hold the averages, and their own values."""
        if self._optimizer._steps_done() == self._step:
            for x, value, average in self._weights:
                inside = tf.cast(average, x.dtype)
                if tf.reduce_all((x == inside) | ((x != x) & (inside != inside))):
                    yield x, value

    def stand(self) -> bool:
        """Whether all of the weights are averages, and none has been put back."""
        return 0 < len(self._weights) == len([*self._untouched()])

    def put_back(self) -> None:
        with tf.init_scope():  # the garbage collector may come while a step is traced
            for x, value in self._untouched():
                x.assign(value)
        self._weights = ()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.put_back()


class EvaluateAverages(keras.callbacks.Callback):
    """Evaluates and predicts with the averaged weights, section 7.2's.

    ```
    model.compile(optimizer=keras_adam.Adam(use_ema=True), loss="mse")
    model.fit(x, y, validation_data=(x, y), callbacks=[EvaluateAverages()])
    ```

    While `evaluate` or `predict` runs, in `fit` or by itself, the weights hold their
    averages; then they get their own values back, bit for bit. (Keras's SwapEMAWeights
    adds and subtracts, which rounds them, and takes no half-precision weights.) That
    takes the memory of the weights once more. If an evaluation is interrupted, they
    get them back at this callback's next event, or when it ends, or when training
    starts with another, unless they have been trained or loaded since: Python ends it
    only after the `except` block, and an interactive session only with the next
    error. `on_test_end()` gives them back at once; have it called before you save
    weights or train on without such a callback. At the end of `fit` Keras makes the
    averages the weights.

    Between evaluations the model holds its own weights, and so does a file that
    `ModelCheckpoint` writes then, with the averages in its optimizer: load that, and
    evaluate it with this callback too. What `EarlyStopping` restores are an epoch's own
    weights without their averages, which stay those of the last step: evaluate that
    without this callback, or keep the best epoch with `ModelCheckpoint`.

    Args: None.

    Raises:
        ValueError: The model's optimizer is not one of `keras_adam`'s with `use_ema`.

    Source: arXiv 1412.6980, section 7.2.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: Kept | None = None
        self._took = False  # by this callback, and not by one that is at it

    def set_model(self, model: Any) -> None:
        self._put_back()
        super().set_model(model)
        self._optimizer()

    def _optimizer(self) -> Any:
        optimizer = optimizer_of(self.model)
        if not isinstance(optimizer, Averages) or not optimizer.use_ema:
            raise ValueError(
                "EvaluateAverages needs an optimizer that averages the weights, such "
                f"as keras_adam.Adam(use_ema=True). Received: {optimizer!r}."
            )
        return optimizer

    def _take_averages(self) -> None:
        self._put_back()
        optimizer = self._optimizer()
        if not optimizer.built or not optimizer._steps_done():
            return  # no step, no average
        self._kept = Kept.all.get(optimizer)
        self._took = not (self._kept and self._kept.stand())
        if self._took:
            self._put_back_all()
            self._kept = Kept(optimizer)

    def _put_back(self) -> None:
        if self._kept and self._took:
            self._kept.put_back()
        self._kept = None  # if it was the last to know of it, puts back too

    def _put_back_all(self) -> None:
        self._put_back()
        kept = Kept.all.get(self._optimizer())
        if kept:
            kept.put_back()

    def on_test_begin(self, logs: Any = None) -> None:
        self._take_averages()

    def on_test_end(self, logs: Any = None) -> None:
        self._put_back()

    def on_predict_begin(self, logs: Any = None) -> None:
        self._take_averages()

    def on_predict_end(self, logs: Any = None) -> None:
        self._put_back()

    def on_train_begin(self, logs: Any = None) -> None:
        self._put_back_all()

    def on_train_batch_begin(self, batch: Any, logs: Any = None) -> None:
        self._put_back_all()
