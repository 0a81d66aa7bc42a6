"""`from_keras` and `to_keras`: on with Keras's optimizers, and back to them.

Keras's Adam and ours keep the same moments; what differs is what they make of them.
Where the two would go on otherwise, by more than rounding, a conversion is refused,
and the error names the argument and the remedy.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable
from typing import Any, ClassVar

import keras

from keras_adam import checks, takeover
from keras_adam.backend import tf
from keras_adam.base import state_dtype


class Migration:
    """What Adam and AdaMax share of it."""

    # Keras's optimizers of the same rule, and what these and ours have.
    _kinds: ClassVar[tuple[Any, ...]]
    _arguments: ClassVar[tuple[str, ...]] = ("beta_1", "beta_2")
    _moments: ClassVar[tuple[str, ...]]

    # From `BaseOptimizer`.
    name: str
    built: bool
    beta_1: Any
    beta_2: float
    variables: list[Any]
    _correction_1: Any
    _trainable_variables: list[Any]
    _var_key: Callable[[Any], Any]
    _load_row_state: Callable[[list[Any] | None], None]
    settle: Callable[[], None]

    # What `build` takes the state from; in a plain object, so that nobody tracks it.
    _waits = types.SimpleNamespace(source=None)

    @classmethod
    def from_keras(cls, optimizer: Any, **overrides: Any) -> Any:
        """A subclass says what becomes of its rule's arguments."""
        raise NotImplementedError

    @classmethod
    def _from_keras(cls, source: Any, overrides: dict[str, Any], **ours: Any) -> Any:
        if isinstance(source, (str, os.PathLike)):
            source = takeover.load(os.fspath(source))
        if isinstance(source, keras.optimizers.LossScaleOptimizer):
            return cls._from_loss_scale(source, overrides)
        if type(source) not in cls._kinds:
            names = " or ".join(f"keras.optimizers.{k.__name__}" for k in cls._kinds)
            raise TypeError(
                f"{cls.__name__}.from_keras takes a {names}, or the path of a `.keras` "
                f"file of a model compiled with one. Received: {source!r} of type "
                f"{type(source).__name__}. An optimizer of another rule has no state "
                f"to go on from: use keras_adam.{cls.__name__}(...), which starts anew."
            )
        theirs = takeover.arguments(source, cls._arguments)
        if callable(theirs["beta_1"]) or callable(theirs["beta_2"]):
            raise ValueError(
                "Keras's optimizer has a callable `beta_1` or `beta_2`, with which it "
                f"takes no step. Received: beta_1={theirs['beta_1']!r}, "
                f"beta_2={theirs['beta_2']!r}. Use numbers there; a schedule of the "
                "step can be given to `from_keras` as `beta_1`."
            )
        optimizer: Any = cls(**{**theirs, **ours, **overrides})
        takeover.copy_exclusions(source, optimizer)
        if source.built:
            takeover.check(source, optimizer, "from_keras")
            optimizer._waits = types.SimpleNamespace(source=source)
        takeover.copy_steps(source, optimizer)
        return optimizer

    @classmethod
    def _from_loss_scale(cls, source: Any, overrides: dict[str, Any]) -> Any:
        if overrides.get("loss_scale_factor") is not None:
            raise ValueError(
                "`loss_scale_factor` has no effect in a LossScaleOptimizer. Received: "
                f"loss_scale_factor={overrides['loss_scale_factor']!r}. Give "
                "`from_keras` its `inner_optimizer` to do without it."
            )
        scale = source.dynamic_scale if source.built else source.initial_scale
        return keras.optimizers.LossScaleOptimizer(
            cls.from_keras(source.inner_optimizer, **overrides),
            initial_scale=takeover.number(scale),
            dynamic_growth_steps=source.dynamic_growth_steps,
            name=source.name,
        )

    def build(self, variables: list[Any]) -> None:
        """Creates the state: all 0, or what `from_keras` was given."""
        source = self._waits.source
        if self.built or source is None:
            super().build(variables)  # type: ignore[misc]
            return
        # `fit` builds in a step that is being traced, and the state is taken once.
        once = tf.init_scope if tf is not None else contextlib.nullcontext
        with once():
            takeover.check(source, self, "from_keras")
        places = takeover.places(source, self, variables)
        excluded: set[Any] = getattr(self, "_exclude_from_weight_decay", set())
        for variable, place in zip(variables, places):
            if self._var_key(source._trainable_variables[place]) in excluded:
                excluded.add(self._var_key(variable))
        super().build(variables)  # type: ignore[misc]
        with once():
            takeover.copy_state(source, self, places, self._moments)
            if callable(self.beta_1):
                done = takeover.number(source.beta_1) ** takeover.updates(source)
                self._correction_1.assign(1 - done)
            self._load_row_state([])
        self._waits = types.SimpleNamespace(source=None)

    def save_own_variables(self, store: Any) -> None:
        if self._waits.source is not None:
            raise ValueError(
                f"{self.name} takes over Keras's state when it is built, and would be "
                "saved without it. Call `optimizer.build(model.trainable_variables)` "
                "first, or train."
            )
        super().save_own_variables(store)  # type: ignore[misc]

    def _to_keras(self, overrides: dict[str, Any], **theirs: Any) -> Any:
        if callable(self.beta_1) and "beta_1" not in overrides:
            raise ValueError(
                "Keras's `beta_1` is a constant, and this one a schedule. Received: "
                f"beta_1={self.beta_1!r}. Say with which one Keras goes on: "
                "`to_keras(beta_1=0.9)`."
            )
        variables = self._trainable_variables
        for v in variables:
            dtype = keras.backend.standardize_dtype(v.dtype)
            if state_dtype(dtype) != dtype:
                raise ValueError(
                    "Keras keeps the moments of half-precision variables in half "
                    "precision, which would round these. Received: "
                    f"{checks.path(v)} of dtype {dtype}. Use float32 variables, as "
                    'the dtype policies "mixed_float16" and "mixed_bfloat16" do.'
                )
        arguments = {**takeover.arguments(self, self._arguments), **theirs, **overrides}
        optimizer: Any = self._kinds[0](**arguments)
        takeover.check(self, optimizer, "to_keras")
        self.settle()
        takeover.copy_exclusions(self, optimizer)
        optimizer.build(variables)
        takeover.copy_state(self, optimizer, range(len(variables)), self._moments)
        return optimizer

    def _steps_to_hand_over(self) -> int:
        if not self.built:
            raise ValueError(
                "`to_keras` needs a built optimizer. Received: one that is not. Call "
                "`optimizer.build(model.trainable_variables)` first, or train."
            )
        return takeover.updates(self)


class AdamMigration(Migration):
    """Adam's."""

    epsilon: float
    epsilon_hat: bool
    bias_correction: bool

    _kinds = (keras.optimizers.Adam, keras.optimizers.AdamW)
    _arguments = ("beta_1", "beta_2", "epsilon", "amsgrad")
    _moments = ("_momentums", "_velocities", "_velocity_hats")

    @classmethod
    def from_keras(cls, optimizer: Any, **overrides: Any) -> Any:
        """An Adam that goes on as a `keras.optimizers.Adam` or `AdamW` would.

        ```
        adam = keras_adam.Adam.from_keras(model.optimizer)
        model.compile(optimizer=adam, loss="mse")
        ```

        It has the same arguments, with `epsilon_hat=True`, and when it is built, by
        `fit` or `build`, takes over the count of steps, moments, averages and
        accumulated gradients as they are then, in the dtype of its own (see
        `moments_dtype`). For dense gradients of float32 and float64 weights it then
        computes what Keras's would, to rounding. (For those of half precision and for
        an embedding's it is right where Keras's is not: see README.) Call `build`
        before a `tf.train.Checkpoint` of it is written, which would lack the state.

        With a `tf.distribute` strategy, call it in the strategy's scope. State goes to
        the same variables. If none of those it is built for are known, because they are
        of another model (say, with `keras_adam.Embedding`) or the state is from a
        file, it goes by their order, and their shapes must be equal.

        Args:
            optimizer: A `keras.optimizers.Adam` or `AdamW`, built or not; a
                `keras.optimizers.LossScaleOptimizer` around one, then the result
                is one too, with the scale reached (its count of steps until the scale
                grows begins anew; its `inner_optimizer` has `to_keras`); or the path of
                a `.keras` file as `model.save` writes it, which is loaded whole.
            **overrides: Arguments of this class, such as `sparse_updates="lazy"`, to
                take instead of Keras's. With a `beta_1` schedule the first correction
                goes on from Keras's beta_1^t. Another number is taken for that of all
                steps, as where it is set on Keras's optimizer: early in a training its
                bias correction is not that of the moments.

        Raises:
            TypeError: Another optimizer.
            ValueError: The file is no `.keras` file, or has no optimizer or no state
                for its variables. Or training could not go on as before: `use_ema`,
                where Keras's average is not yet section 7.2's to rounding
                (ema_momentum^t must be below half a digit: step 1,656 for 0.99), or
                with `gradient_accumulation_steps` or constraints, where it never is;
                an override that needs state from the first step (`amsgrad=True`,
                `use_ema=True`, another `ema_momentum` or
                `gradient_accumulation_steps`) after there were steps.

            When it is built: ValueError, if it is for variables without state. For
            state without variables there is a UserWarning.
        """
        return cls._from_keras(optimizer, overrides, epsilon_hat=True)

    def to_keras(self, **overrides: Any) -> Any:
        """A built `keras.optimizers.Adam` over the same variables that goes on.

        It takes the arguments, count of steps, moments, averages and accumulated
        gradients; rows are brought to date first (`settle`). Whatever
        `sparse_updates` was, it goes on as dense Adam, but for ids that repeat in a
        batch. Train with one of the two from then on.

        Args:
            **overrides: Arguments of `keras.optimizers.Adam`, for what has no
                equivalent there: `epsilon`, `beta_1`, `use_ema=False`. From then on
                they hold.

        Raises:
            ValueError: It is not built, or its variables are half-precision ones, or
                Keras would not go on as this does: `epsilon_hat=False`, unless
                beta_2^t is below half a digit (step 16,628 for 0.999), when both
                epsilons are one; `bias_correction=False`, unless beta_1^t is, too; a
                `beta_1` schedule; `use_ema` as in `from_keras`.
        """
        t = self._steps_to_hand_over()
        late = takeover.forgotten(self, self.beta_2, t)
        if not self.bias_correction:
            beta_1 = overrides.get("beta_1", self.beta_1)
            betas = [self.beta_2] if callable(beta_1) else [beta_1, self.beta_2]
            steps = takeover.when(self, *betas)
            if t < steps:
                raise ValueError(
                    "Keras's Adam always corrects the bias. Received: "
                    f"bias_correction=False after {t} steps. Go on until step "
                    f"{steps:,}, when the corrections are 1 to rounding."
                )
        elif not (self.epsilon_hat or late or "epsilon" in overrides):
            steps = takeover.when(self, self.beta_2)
            raise ValueError(
                "Keras's epsilon is the paper's epsilon hat, and Algorithm 1's is "
                "that times sqrt(1 - beta_2^t), no constant. Received: epsilon="
                f"{self.epsilon!r}, epsilon_hat=False after {t} steps. Say with which "
                f"one Keras goes on: `to_keras(epsilon={self.epsilon!r})`. From step "
                f"{steps:,} on both are the same, to rounding."
            )
        return self._to_keras(overrides)


class AdaMaxMigration(Migration):
    """AdaMax's."""

    _kinds = (keras.optimizers.Adamax,)
    _moments = ("_m", "_u")

    @classmethod
    def from_keras(cls, optimizer: Any, **overrides: Any) -> Any:
        """An AdaMax that goes on as a `keras.optimizers.Adamax` would.

        As `keras_adam.Adam.from_keras`, which see for arguments and errors, but for
        `epsilon`. Keras takes steps of m / (u + epsilon), with epsilon 1e-7, and this
        class those of Algorithm 2, m / u, which has no epsilon: they are longer by a
        factor of 1 + epsilon / u. That is rounding where the largest gradient so far
        is above 1, a thousandth where it is 1e-4, and where it is far below epsilon
        this class moves weights that Keras's lets stand.
        """
        return cls._from_keras(optimizer, overrides)

    def to_keras(self, **overrides: Any) -> Any:
        """A built `keras.optimizers.Adamax` over the same variables that goes on.

        As `keras_adam.Adam.to_keras`, which see, but for `epsilon`. Without the
        override `epsilon` it is 1e-33 (for float64 variables alone 1e-290), which
        changes no digit of u where there was a gradient above 1e-25 (1e-270), and
        keeps 0 / 0 off where there was none.
        """
        self._steps_to_hand_over()
        dtypes = {state_dtype(v.dtype) for v in self._trainable_variables}
        epsilon = 1e-33 if "float32" in dtypes else 1e-290
        return self._to_keras(overrides, epsilon=epsilon)
