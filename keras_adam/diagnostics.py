"""Callbacks that read optimizer state and never write it."""

from __future__ import annotations

import csv
import functools
import math
import numbers
import os
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_adam.adam import Adam
from keras_adam.adamax import AdaMax
from keras_adam.base import Step, one_minus_power, require_tensorflow, state_dtype
from keras_adam.exact import native
from keras_adam.owners import optimizer_of

__all__ = ["StepDiagnostics"]

require_tensorflow(__name__)

ADAMAX_FIGURES = ["effective_step_mean", "effective_step_max", "no_gradient_share"]
FIGURES = [*ADAMAX_FIGURES, "signal_to_noise", "epsilon_share"]
HEADER = ["step", "variable", *FIGURES]

# Coordinates that are reduced at a time: they stay in the processor's cache, and no
# intermediate result is as large as a table.
CHUNK = 2**19
# Of more coordinates XLA makes up for the time it takes to compile: half a second, to
# save a millisecond a million.
LARGE = 10_000_000


class StepDiagnostics(keras.callbacks.Callback):
    r"""Logs, every so often, how Adam or AdaMax moves each trainable variable.

    ```
    r = sqrt(v_hat)          with amsgrad of the largest v so far
    effective_step_mean      |m_hat| / (r + epsilon), which is |delta| / learning_rate;
    effective_step_max         AdaMax: |m| / ((1 - beta_1^t) * u)
    no_gradient_share        of the coordinates, those with m = v = 0 (or u)
    signal_to_noise          the mean of |m_hat| / r, 0 where r is 0
    epsilon_share            of the coordinates, those at which epsilon > r
    ```

    All are numbers without a unit, of the state that the logged update left. The
    effective step is what it did to the weights, but for the learning rate and weight
    decay. It lies near 1 where gradients agree, and near 0 where they are noise or
    epsilon dominates. Coordinates with m = v = 0 have had no gradient, or none for so
    long that it has decayed to 0. `no_gradient_share` counts them; all other figures
    leave them out, and are 0 if no coordinate is left. With `epsilon_hat`, epsilon is
    compared with what it is added to, sqrt(v). AdaMax has neither v nor epsilon, and
    so not the last two figures.

    In exact mode m and v of all rows are brought to date as they are read. In lazy mode
    rows that were not in the batch stand still, and so does a dense variable without
    a gradient; their effective step is the one their m and v would make. TensorFlow's
    kernel rounds beta_2, which puts figures off by 1e-5 at most if it is 0.999.

    Empty variables and those without a state are passed over.

    The callback writes to no weight or state. A log reads all of m and v once (on
    a large table about half as long as a step of `keras.optimizers.Adam` takes), and
    compiles that the first time. Between logs nothing is read.

    Args:
        every: Updates from one log to the next, by `optimizer.iterations`, which
            counts on over epochs and calls of `fit`. Where Keras calls back less
            often (`steps_per_execution`), the next update that it calls back after.
        csv_path: A file to append to: under a header, a line for each update logged
            and variable, with the columns `step`, `variable` (its path), and those
            above, empty where there is no figure. It is closed after each log.
        log_dir: A folder for TensorBoard, for scalars named
            `effective_step_mean/dense/kernel`, etc. Writing them needs TensorFlow only.

    Raises:
        ValueError: `every` is not a positive int, `csv_path` or `log_dir` is not a
            path, or both are missing; at the start of `fit`, the file at `csv_path`
            has another header.
        TypeError: At the start of `fit`, the model's optimizer is neither
            `keras_adam.Adam` nor `AdaMax`, nor a `LossScaleOptimizer` around one.
        OSError: At the start of `fit`, the folder of `csv_path` is not there.

    Source: arXiv 1412.6980, sections 2.1 (effective step, signal-to-noise ratio) and
    6.3 (v_hat vanishes, epsilon dominates); section 7.1 for AdaMax.
    """

    def __init__(
        self,
        every: int,
        csv_path: str | os.PathLike[str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        whole = isinstance(every, numbers.Integral) and not isinstance(every, bool)
        if not whole or every < 1:
            raise ValueError(
                "`every`, the number of updates from one log to the next, must be a "
                f"positive int. Received: every={every!r}. Use 100, for example."
            )
        for name, path in (("csv_path", csv_path), ("log_dir", log_dir)):
            if not isinstance(path, str | os.PathLike | None):
                raise ValueError(
                    f"`{name}` must be a path or None. Received: {name}={path!r}."
                )
        if csv_path is None and log_dir is None:
            raise ValueError(
                "There is nowhere to log to. Received: csv_path=None, log_dir=None. "
                "Give a file as `csv_path`, or a folder for TensorBoard as `log_dir`."
            )
        self.every, self.csv_path, self.log_dir = int(every), csv_path, log_dir
        self._optimizer: Any = None
        self._compiled: dict[Any, Callable[[], tf.Tensor]] = {}
        self._writer: Any = None
        self._aim(0, 0)

    def on_train_begin(self, logs: Any = None) -> None:
        optimizer = optimizer_of(self.model)
        if not isinstance(optimizer, (Adam, AdaMax)):
            raise TypeError(
                "StepDiagnostics reads the state of keras_adam's optimizers. Received: "
                f"a model with optimizer={optimizer!r}. Compile it with "
                "keras_adam.Adam or keras_adam.AdaMax, or leave this callback out."
            )
        if optimizer is not self._optimizer:
            self._optimizer, self._compiled = optimizer, {}
        if self.csv_path is not None:
            with open(self.csv_path, "a+", newline="") as file:
                file.seek(0)
                header = next(csv.reader(file), None)
                if header is None:
                    csv.writer(file).writerow(HEADER)
                elif header != HEADER:
                    raise ValueError(
                        "`csv_path` is a file with another header. Received: "
                        f"csv_path={self.csv_path!r}, which begins with {header!r}. "
                        "Give another path, or remove the file."
                    )
        if self.log_dir is not None:
            self._writer = tf.summary.create_file_writer(os.fspath(self.log_dir))

    # Not on_train_batch_end: with a callback that has it, Keras waits for each step's
    # loss before it starts the next step.

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._aim(0, self._optimizer._steps_done())

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch >= self._next_batch:
            self._look(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._look(0)

    def on_train_end(self, logs: Any = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _look(self, batch: int) -> None:
        step = self._optimizer._steps_done()
        if step >= self._next_step:
            self._log(step)
        self._aim(batch, step)

    def _aim(self, batch: int, step: int) -> None:
        """Says at which step the next log is due, and so when to look for it."""
        self._next_step = step - step % self.every + self.every
        self._next_batch = batch + self._next_step - step

    def _log(self, step: int) -> None:
        variables = self._optimizer._trainable_variables
        all_figures = [
            (v.path, self._figures(i))
            for i, v in enumerate(variables)
            # What is overwritten with its gradient has no state.
            if v.shape.num_elements() and self._optimizer._state(i)[0] is not None
        ]
        if self.csv_path is not None:
            with open(self.csv_path, "a", newline="") as file:
                writer = csv.DictWriter(file, HEADER, restval="")
                for path, values in all_figures:
                    texts = {name: f"{x:.7g}" for name, x in values.items()}
                    writer.writerow({"step": step, "variable": path, **texts})
        if self._writer is not None:
            # As tf.summary.scalar, which needs the tensorboard package.
            scalar = tf.compat.v1.SummaryMetadata(data_class=1)
            scalar.plugin_data.plugin_name = "scalars"
            with self._writer.as_default(step), tf.summary.record_if(True):
                for path, values in all_figures:
                    for name, x in values.items():
                        x = tf.constant(x, tf.float32)
                        tf.summary.write(f"{name}/{path}", x, metadata=scalar)
            self._writer.flush()

    def _figures(self, i: int) -> dict[str, float]:
        optimizer = self._optimizer
        # What the trace depends on, as does what rows owe.
        key = i, _owes(optimizer, i), optimizer._untracked.rounded.get(i)
        if key not in self._compiled:
            size = optimizer._trainable_variables[i].shape.num_elements()
            # Not a lambda: TensorFlow would take those of all variables for one
            # function, and warn that it is traced again and again.
            self._compiled[key] = tf.function(
                functools.partial(figures, optimizer, i),
                jit_compile=size > LARGE,
                autograph=False,
            )
        values = self._compiled[key]().numpy().tolist()
        return dict(zip(FIGURES, values))


def _owes(optimizer: Any, i: int) -> bool:
    """Whether rows of the i-th variable's moments are not up to date."""
    return optimizer.sparse_updates == "exact" and i in optimizer._untracked.by_rows


def figures(optimizer: Any, i: int) -> tf.Tensor:
    """`FIGURES`, or `ADAMAX_FIGURES`, of the i-th variable, in float64."""
    tables = [native(x).read_value() for x in optimizer._state(i)]
    dtype = tf.as_dtype(state_dtype(optimizer._trainable_variables[i].dtype))
    size = tables[0].shape.num_elements()
    owes = _owes(optimizer, i)
    if owes:
        debts = optimizer._debts(i, optimizer._untracked.rounded.get(i, False))
        tables.append(debts.last.read_value())
    else:
        tables = [tf.reshape(x, [-1, math.gcd(size, 64)]) for x in tables]

    t = tf.cast(optimizer.iterations, dtype)
    if callable(optimizer.beta_1):
        correction_1 = tf.cast(optimizer._correction_1, dtype)
    else:
        correction_1 = one_minus_power(optimizer.beta_1, t)
    # At a learning rate of 1; the share of the new gradient does not matter.
    one = tf.ones_like(t)
    s = optimizer._scalars(Step(one, one, one, correction_1, optimizer.beta_2, t))

    def chunk(start: Any, rows: int) -> tuple[tf.Tensor, tf.Tensor]:
        """The largest step of some rows, and the sums of all that is averaged."""
        values = [
            tf.slice(x, [start, *[0] * (len(x.shape) - 1)], [rows, *x.shape[1:]])
            for x in tables
        ]
        if owes:
            *values, last = values
            values = debts.state(values, last)
        m, v, *v_max = [tf.cast(x, dtype) for x in values]
        if isinstance(optimizer, Adam):
            r = tf.sqrt(v_max[0] if v_max else v)
            had_gradient = (m != 0) | (r != 0)
            step = s.alpha * tf.abs(m) / (r + s.epsilon)
            ratio = s.alpha * tf.math.divide_no_nan(tf.abs(m), r)
            terms = [had_gradient, step, ratio, had_gradient & (s.epsilon > r)]
        else:
            step = s.alpha * tf.math.divide_no_nan(tf.abs(m), v)
            terms = [(m != 0) | (v != 0), step]
        return tf.reduce_max(step), tf.stack([_sum(tf.cast(x, dtype)) for x in terms])

    n = tables[0].shape[0]
    rows = min(n, max(1, CHUNK * n // size))
    first = n % rows or rows
    most, sums = chunk(0, first)
    if first < n:

        def add(start: Any, most: Any, sums: Any) -> Any:
            more_most, more = chunk(start, rows)
            return start + rows, tf.maximum(most, more_most), sums + more

        state = tf.constant(first), most, sums
        _, most, sums = tf.while_loop(lambda start, *_: start < n, add, state)
    count, *totals = tf.unstack(sums)
    mean, *others = [tf.math.divide_no_nan(x, count) for x in totals]
    none = (size - count) / size
    return tf.stack([mean, tf.cast(most, mean.dtype), none, *others])


def _sum(x: tf.Tensor) -> tf.Tensor:
    """In float64 over the rows; XLA adds in order, and float32 would lose digits.

    In float32 within a row, as float64 would take twice as long.
    """
    of_rows = tf.reduce_sum(x, axis=list(range(1, len(x.shape))))
    return tf.reduce_sum(tf.cast(of_rows, tf.float64))
