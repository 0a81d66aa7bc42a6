"""What cannot be right is told before it does harm: arguments, and gradients."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

MOMENTS_DTYPES = (None, "float32", "bfloat16")


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_range(name: str, value: float) -> None:
    if not is_number(value) or not 0 <= np.float32(value) < 1:
        raise ValueError(
            f"`{name}` must be in [0, 1), in float32 too. Received: {name}={value!r}. "
            "It is the share of the old average that each step keeps. Convert tensors "
            "and arrays by `float`."
        )


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):  # "False" would be true
            raise ValueError(
                f"`{name}` must be True or False. Received: {name}={value!r}."
            )


def check_learning_rate(value: Any) -> None:
    """Of numbers; Keras checks the rest."""
    if is_number(value) and not 0 <= value < math.inf:
        raise ValueError(
            "`learning_rate` must be finite, and not negative: the step already goes "
            f"down the gradient. Received: learning_rate={value!r}."
        )


def check_epsilon(value: Any) -> None:
    if not is_number(value) or not 1e-30 <= value < math.inf:
        raise ValueError(
            "`epsilon` must be a number above 0, at least 1e-30, or a weight whose "
            "gradients were all 0 would become NaN. Received: "
            f"epsilon={value!r}. Use 1e-8, the paper's."
        )


def checked_base(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `keras.optimizers.Optimizer`, which takes them as they come."""
    arguments = dict(arguments)
    for name in ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm"):
        value = arguments.get(name)
        if value is False:  # as Keras takes it
            arguments[name] = None
        elif value is not None and not (is_number(value) and 0 <= value < math.inf):
            raise ValueError(
                f"`{name}` must be a finite number, at least 0, or None. Received: "
                f"{name}={value!r}."
            )
    for name, value in arguments.items():  # NumPy's dtypes would stay what they are
        if is_number(value):
            whole = isinstance(value, numbers.Integral)
            arguments[name] = int(value) if whole else float(value)
    check_flags(use_ema=arguments.get("use_ema", False))
    scale = arguments.get("loss_scale_factor")
    if scale is not None and not (is_number(scale) and 0 < scale < math.inf):
        raise ValueError(
            "`loss_scale_factor` must be a finite number above 0, or None. Received: "
            f"loss_scale_factor={scale!r}."
        )
    steps = arguments.get("gradient_accumulation_steps")
    if steps is not None and not isinstance(steps, numbers.Integral):
        raise ValueError(
            "`gradient_accumulation_steps` must be an integer >= 2, or None. Received: "
            f"gradient_accumulation_steps={steps!r}."
        )
    momentum = arguments.get("ema_momentum", 0.99)
    if arguments.get("use_ema") and not (is_number(momentum) and 0 <= momentum <= 1):
        raise ValueError(
            "`ema_momentum` must be in the range [0, 1]. Received: "
            f"ema_momentum={momentum!r}."
        )
    return arguments


def check_rounding(stochastic: Any, moments_dtype: Any, seed: Any) -> None:
    check_flags(stochastic_rounding=stochastic)
    strings = moments_dtype is None or isinstance(moments_dtype, str)
    if not strings or moments_dtype not in MOMENTS_DTYPES:
        raise ValueError(
            f"`moments_dtype` must be one of {MOMENTS_DTYPES}. Received: "
            f"moments_dtype={moments_dtype!r}. None keeps moments in float32, and "
            "those of float64 variables in float64."
        )
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise ValueError(
            "`seed`, of stochastic rounding, must be an integer: the same one "
            f"rounds alike each time. Received: seed={seed!r}. Use 0, the default."
        )


def check_variables(variables: Sequence[Any]) -> None:
    for v in variables:
        if "float" not in keras.backend.standardize_dtype(v.dtype):
            raise ValueError(
                "Only variables of a float dtype can be trained. Received: "
                f"{v.name} of dtype {v.dtype}. Set `trainable=False` on it."
            )


def check_distinct(variables: Sequence[Any], keys: Sequence[Any]) -> None:
    if len({*keys}) < len(keys):
        raise ValueError(
            "A variable was given twice, and would take two steps at once. Received: "
            f"{[v.name for v in variables]}. Give each once, with its whole gradient."
        )


def check_counts(grads: Sequence[Any], variables: Sequence[Any]) -> None:
    if len(grads) and len(grads) != len(variables):  # of none, Keras takes no step
        raise ValueError(
            "There must be one gradient, or None, for each variable. Received: "
            f"{len(grads)} gradients for {len(variables)} variables."
        )


def path(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))


def check_known(unknown: Sequence[Any]) -> None:
    if unknown:
        raise ValueError(
            "Unknown variables: this optimizer can only be called for those it was "
            "built with. Received: "
            f"{', '.join(map(path, unknown))}. For "
            "another set of variables, or another model, recreate a new optimizer. "
            "Where `trainable` has changed since, call `model.compile` again."
        )


def check_gradient(g: Any, variable: Any) -> None:
    """Raises where TensorFlow would broadcast, cut off or say something obscure."""
    sparse = hasattr(g, "indices") and hasattr(g, "values")
    values, wanted = g.values if sparse else g, tuple(variable.shape)
    if not hasattr(values, "shape") or not hasattr(values, "dtype"):
        values = keras.ops.convert_to_tensor(values)  # a list, say
    dtype = keras.backend.standardize_dtype(values.dtype)
    if "float" not in dtype and "int" not in dtype:
        raise ValueError(
            f"The gradient of {variable.name} must be real. Received: dtype {dtype}."
        )
    shape = _known(values.shape)
    if sparse:
        ids, places = g.indices.dtype, _known(g.indices.shape)
        vector = places is None or len(places) == 1
        if not wanted or not vector or ids not in ("int32", "int64"):
            raise ValueError(
                f"The tf.IndexedSlices of {variable.name}, of the shape {wanted}, need "
                "a vector of int32 or int64 as `indices`, one for each of their "
                f"`values`. Received: indices of the shape {places} and dtype {ids}."
            )
        wanted = (None, *wanted[1:])
    if shape is None:
        return
    pairs = zip(shape, wanted)
    if len(shape) != len(wanted) or any(None not in p and p[0] != p[1] for p in pairs):
        raise ValueError(
            f"The gradient of {variable.name} must have the shape {wanted}, and is not "
            f"broadcast. Received: {shape}."
        )


def _known(shape: Any) -> tuple[int | None, ...] | None:
    """Of tensors whose shape may not be known before they are."""
    return None if getattr(shape, "rank", 0) is None else tuple(shape)
