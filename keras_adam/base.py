"""What Adam and AdaMax share on every backend: arguments, state, a step's scalars."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_adam import checks, rounding

SPARSE_UPDATES = ("exact", "lazy", "dense")


def require_tensorflow(module: str) -> None:
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ImportError(
            f"{module} needs Keras on TensorFlow. Received: the backend {backend!r}. "
            "Set the environment variable KERAS_BACKEND before Keras is imported."
        )


class Step(NamedTuple):
    """What every rule needs to know of the step at hand; scalars."""

    alpha: Any
    beta_1: Any
    one_minus_beta_1: Any
    correction_1: Any  # 1 - beta_1^t, or 1 - prod(beta_1,i)
    beta_2: float
    t: Any  # counted from 1


def state_dtype(dtype: Any) -> str:
    """The dtype of moments and arithmetic: at least float32."""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def rounded(dtype: str, beta: float) -> float:
    """A beta as a kernel takes it, in the variable's dtype.

    One that knows 0.999 as 0.99900001 is Adam for that beta, and needs its
    correction.
    """
    return float(np.dtype(dtype).type(beta))


def one_minus_power(beta: float, t: Any) -> Any:
    """1 - beta^t; the direct form loses the first steps' digits in float32."""
    return -keras.ops.expm1(t * math.log(beta)) if beta else keras.ops.ones_like(t)


def moving_average(old: Any, new: Any, beta: Any, one_minus_beta: Any) -> Any:
    """beta * old + (1 - beta) * new, from the one that weighs more.

    From old, it would lose a small new one where beta is small; from new, digits of
    1 - beta where that is.
    """
    if not isinstance(beta, float):  # a schedule's
        ops, from_old = keras.ops, beta >= 0.5
        near, far = ops.where(from_old, old, new), ops.where(from_old, new, old)
        return near + (far - near) * ops.where(from_old, one_minus_beta, beta)
    if beta >= 0.5:
        return old + (new - old) * one_minus_beta
    return new + (old - new) * beta


def share(momentum: float, n: Any, t: Any) -> Any:
    """What the last n of t steps weigh in the average of section 7.2."""
    n, t = keras.ops.cast(n, t.dtype), keras.ops.maximum(t, 1)
    if momentum == 1:
        return n / t
    weight = one_minus_power(momentum, n) / one_minus_power(momentum, t)
    return keras.ops.where(n > 0, weight, keras.ops.zeros_like(weight))


def shapes(variables: Any) -> list[tuple[int, ...]]:
    return [tuple(v.shape) for v in variables]


def _counts(x: Any) -> bool:
    """Whether it counts steps, as those of exact mode do."""
    return str(x.dtype) in ("uint32", "int32", "int64")


def constrained(variable: Any) -> bool:
    return getattr(variable, "constraint", None) is not None


@contextlib.contextmanager
def uncast(variables: Iterable[Any]) -> Iterator[None]:
    """Where Keras's variables have their own dtype and value, also under autocast."""
    before = [(v, v._autocast) for v in variables if isinstance(v, keras.Variable)]
    for v, _ in before:
        v._autocast = False
    try:
        yield
    finally:
        for v, autocast in before:
            v._autocast = autocast


class BaseOptimizer(keras.optimizers.Optimizer):
    """What Adam and AdaMax share, but for the way of a gradient to the rule.

    A subclass gives `_build_state`, `_state` and `_scalars`.
    """

    def __init__(
        self,
        learning_rate: Any,
        beta_1: float | Callable[[Any], Any],
        beta_2: float,
        sparse_updates: str,
        *,
        stochastic_rounding: bool = False,
        moments_dtype: str | None = None,
        seed: int = 0,
        **base: Any,
    ) -> None:
        checks.check_learning_rate(learning_rate)
        if not callable(beta_1):
            checks.check_range("beta_1", beta_1)
        checks.check_range("beta_2", beta_2)
        text = isinstance(sparse_updates, str)
        if not text or sparse_updates not in SPARSE_UPDATES:
            raise ValueError(
                f"`sparse_updates` must be one of {SPARSE_UPDATES}. Received: "
                f"sparse_updates={sparse_updates!r}."
            )
        checks.check_rounding(stochastic_rounding, moments_dtype, seed)
        super().__init__(learning_rate=learning_rate, **checks.checked_base(base))
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.sparse_updates = sparse_updates
        self.stochastic_rounding = stochastic_rounding
        self.moments_dtype = moments_dtype
        self.seed = int(seed)
        self._dtype_of_added: str | None = None

    # What a subclass gives.

    def _check_exact(self, variables: Any = ()) -> None:
        """Raises where exact mode does not hold, before anything is made."""
        raise NotImplementedError

    def _build_state(self, variables: list[Any]) -> None:
        """Creates the state variables."""
        raise NotImplementedError

    def _state(self, i: int) -> list[Any]:
        """The state variables of the i-th variable."""
        raise NotImplementedError

    def _scalars(self, step: Step) -> Any:
        """The rule's last argument."""
        raise NotImplementedError

    # State.

    def build(self, variables: list[Any]) -> None:
        """Creates the state, all 0."""
        if self.built:
            return
        checks.check_variables(variables)
        checks.check_distinct(variables, [*map(self._var_key, variables)])
        self._check_exact(variables)
        super().build(variables)
        self._dtype_of_added = self.moments_dtype
        self._build_state(variables)
        self._dtype_of_added = None
        if callable(self.beta_1):
            dtypes = {state_dtype(v.dtype) for v in variables}
            self._correction_1 = self.add_variable(
                (), dtype=max(dtypes), name="beta_1_correction"
            )

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Takes a step: see `keras.optimizers.Optimizer`."""
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            checks.check_counts(grads, trainable_variables)
            keys = [*map(self._var_key, trainable_variables)]
            checks.check_distinct(trainable_variables, keys)
        super().apply(grads, trainable_variables)

    def _check_variables_are_known(self, variables: Any) -> None:
        """Keras's own error holds values, which graphs of Keras 3.10 do not know."""
        known = self._trainable_variables_indices
        checks.check_known([v for v in variables if self._var_key(v) not in known])

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        # Averages need the digits that a half-precision weight does without.
        dtype = self._dtype_of_added or state_dtype(dtype or keras.backend.floatx())
        variable = super().add_variable(shape, initializer, dtype=dtype, **kwargs)
        variable._autocast = False  # a layer may have this built
        return variable

    def _rounding_keys(self, i: int, use: int = 0) -> list[Any]:
        """`rounding.cast`'s, of the i-th variable and of its state, for this step.

        Args:
            use: What for: 0 is the step itself, 1 is to settle.
        """
        variables = [self._trainable_variables[i], *self._state(i)]
        # Moments in bfloat16 always: beta_2 = 0.999 takes off less than half a digit.
        narrow = [
            keras.backend.standardize_dtype(x.dtype) in rounding.BITS for x in variables
        ]
        narrow[0] &= self.stochastic_rounding
        return [
            rounding.key(self.iterations, self.seed, i, k, use) if x else None
            for k, x in enumerate(narrow)
        ]

    def _row_state(self) -> list[Any]:
        """The last of `variables`: a vector for some tables each, by mode."""
        return []

    def _load_row_state(self, marks: list[Any] | None) -> None:
        """Sets it, after all else was loaded.

        Args:
            marks: Of each variable's rows, whether they have accumulated gradients;
                empty, if that was not saved; None, if it is loaded already.
        """

    def load_own_variables(self, store: Any) -> None:
        """Loads a state, also one that was saved in another mode, or by Keras.

        An empty one, or that of an optimizer that was not built, is skipped with a
        warning, as in Keras; and so is every one where this optimizer is not built.
        Keras's averages (`use_ema`) are not what ours are: `from_keras` says when.
        Arrays have neither names nor kinds: a state of other arguments whose shapes are
        all the same, such as AdaMax's in Adam, cannot be told from one that fits.

        Raises:
            ValueError: The state does not fit. Nothing was loaded then.
        """
        n, own = len(store.keys()), self.variables
        if not self.built or n <= 2:  # steps and learning rate
            super().load_own_variables(store)
            return
        shared = own[: len(own) - len(self._row_state())]
        names = [str(i) for i in range(n)]
        if set(names) != set(store.keys()):
            raise self._misfit(f"what was saved is named {sorted(store.keys())}")
        stored = [store[name] for name in names]
        same = shapes(stored) == shapes(own)
        if same and list(map(_counts, stored)) == list(map(_counts, own)):
            super().load_own_variables(store)
            self._load_row_state(None)
            return
        while _counts(stored[-1]):
            stored.pop()
        for variable, value in zip(shared, stored):
            if variable.shape != tuple(value.shape):
                raise self._misfit(
                    f"{variable.path} has the shape {variable.shape}, and what was "
                    f"saved for it {tuple(value.shape)}"
                )
        if len(stored) < len(shared):
            raise self._misfit(f"nothing was saved for {shared[len(stored)].path}")
        marks = stored[len(shared) :]
        firsts = [tuple(v.shape[:1]) for v in self._trainable_variables]
        if shapes(marks) not in ([], firsts):
            raise self._misfit(
                f"after {shared[-1].path} it has vectors of the shapes "
                f"{shapes(own[len(shared) :])}, and saved were {shapes(marks)}"
            )
        for variable, value in zip(shared, stored):
            variable.assign(value)
        self._load_row_state(marks)

    def _misfit(self, what: str) -> ValueError:
        return ValueError(
            f"A saved state does not fit the optimizer {self.name!r}: {what}. It is "
            "of another optimizer, other arguments (a schedule, or none) or other "
            "variables (`trainable` may have changed after it was built), and nothing "
            "of it was loaded. Build this one as that one was, or load the weights "
            "alone: `keras.models.load_model(path, compile=False)`, or "
            "`model.load_weights(path)` before `model.compile`."
        )

    # A step's scalars.

    def _beta_1(self) -> Any:
        assert callable(self.beta_1)
        return self.beta_1(self.iterations)

    def _count_beta_1(self, correction: Any) -> None:
        """Counts the step at hand in 1 - prod(beta_1,i)."""
        # What the recurrence of m gives for gradients of 1.
        c = keras.ops.convert_to_tensor(correction)
        correction.assign(c + (1 - c) * (1 - keras.ops.cast(self._beta_1(), c.dtype)))

    def _step(self, learning_rate: Any, dtype: str, kernel: bool = False) -> Step:
        t = keras.ops.cast(self.iterations, dtype) + 1
        alpha = keras.ops.convert_to_tensor(learning_rate, dtype)
        beta_1, beta_2 = self.beta_1, float(self.beta_2)
        if kernel:
            beta_2 = rounded(dtype, beta_2)
        if callable(beta_1):
            c_1 = keras.ops.cast(self._correction_1, dtype)
            beta_1 = keras.ops.cast(self._beta_1(), dtype)
            return Step(alpha, beta_1, 1 - beta_1, c_1, beta_2, t)
        beta_1 = rounded(dtype, beta_1) if kernel else float(beta_1)
        rest = keras.ops.convert_to_tensor(1 - beta_1, dtype)
        return Step(alpha, beta_1, rest, one_minus_power(beta_1, t), beta_2, t)

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
            "stochastic_rounding": self.stochastic_rounding,
            "moments_dtype": self.moments_dtype,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        if isinstance(config.get("beta_1"), dict):
            config["beta_1"] = keras.saving.deserialize_keras_object(
                config["beta_1"], custom_objects=custom_objects
            )
        return super().from_config(config, custom_objects=custom_objects)
