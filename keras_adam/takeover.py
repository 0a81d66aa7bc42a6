"""What one optimizer can take over from another: arguments, state, and when not."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
import numpy as np

from keras_adam.base import constrained, shapes, state_dtype, uncast
from keras_adam.checks import path

# Lists of every optimizer's, of a variable's state each, beside its rule's.
STATE = ("_accumulated_gradients", "_model_variables_moving_average")
BASE = (
    *("name", "weight_decay", "clipnorm", "global_clipnorm", "clipvalue"),
    *("use_ema", "ema_momentum", "ema_overwrite_frequency"),
    *("loss_scale_factor", "gradient_accumulation_steps"),
)


def load(path: str) -> Any:
    """The optimizer of a saved model."""
    if not path.endswith(".keras"):
        raise ValueError(
            "`from_keras` reads what `model.save` writes to a `.keras` file. A "
            "`.weights.h5` file or a TensorFlow checkpoint does not say which "
            f"optimizer its state is of, nor its arguments. Received: {path!r}. "
            "Compile a model with Keras's optimizer as it was, call "
            "`model.optimizer.build(model.trainable_variables)` and "
            "`model.load_weights(path)`, and give `from_keras` the model's optimizer."
        )
    skipped = "Skipping variable loading for optimizer"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=skipped)
        try:
            model = keras.saving.load_model(path)
        except (ValueError, UserWarning) as error:
            if skipped not in str(error):
                raise
            raise ValueError(
                "The file's optimizer has no state for the model's trainable "
                "variables: it was saved before it was built, or `trainable` has "
                f"changed since. Received: {path!r}. Load the model, and give "
                f"`from_keras` its optimizer, to start without moments. {error}"
            ) from error
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            "The file's model was not compiled, and has no optimizer. Received: "
            f"{path!r}. Save a model that was compiled and trained."
        )
    return model.optimizer


def number(x: Any) -> float:
    """Of a variable or tensor, or a number as it is."""
    return float(x.numpy() if hasattr(x, "numpy") else x)


def arguments(optimizer: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """What an optimizer was made with, and its learning rate now."""
    rate = optimizer._learning_rate  # `learning_rate` is the value of a schedule
    result = {name: getattr(optimizer, name) for name in (*BASE, *names)}
    for name in ("beta_1", "beta_2", "epsilon"):  # Keras takes constant tensors
        if name in names and not callable(result[name]):
            result[name] = number(result[name])
    return {"learning_rate": rate if callable(rate) else number(rate), **result}


def check(old: Any, new: Any, call: str) -> None:
    """Raises unless `new` can go on from the state of `old`."""
    t, received = updates(old), f"after {updates(old)} steps"
    if not int(keras.ops.convert_to_numpy(old.variables[0])):
        return
    steps = old.gradient_accumulation_steps
    if (steps or 1) != (new.gradient_accumulation_steps or 1):
        raise ValueError(
            "`gradient_accumulation_steps` decides what counts as a step, and cannot "
            "change between them. Received: gradient_accumulation_steps="
            f"{new.gradient_accumulation_steps!r}, and {steps!r} before, {received}."
        )
    if getattr(new, "amsgrad", False) and not old.amsgrad:
        raise ValueError(
            "`amsgrad=True` needs the largest v so far, which was not kept. Received: "
            f"amsgrad=True, and False before, {received}. Leave it as it was."
        )
    if not new.use_ema:
        return
    remedy = f"`{call}(..., use_ema=False)` drops the average."
    if not old.use_ema or old.ema_momentum != new.ema_momentum:
        raise ValueError(
            "An average of the weights begins with their training, and keeps its "
            f"momentum. Received: use_ema=True, ema_momentum={new.ema_momentum!r}; "
            f"before use_ema={old.use_ema!r}, ema_momentum={old.ema_momentum!r}, "
            f"{received}. Leave them as they were."
        )
    bound = [v for v in old._trainable_variables if constrained(v)]
    if steps or bound:
        what = f"{path(bound[0])}'s constraint" if bound else None
        raise ValueError(
            "With `use_ema` Keras averages the weights at each micro-step and before "
            "their constraints, and keras_adam at each step and after them. Received: "
            f"use_ema=True, {what or f'gradient_accumulation_steps={steps}'}. {remedy}"
        )
    g = old.ema_momentum
    if not forgotten(old, g, t):
        wait = "There is no step at which it is"
        if g < 1:
            wait = f"Go on until step {when(old, g):,}, when it is"
        raise ValueError(
            "Keras's average of the weights is section 7.2's but for a share of the "
            "first weights, ema_momentum^t, for which it is not corrected, and they "
            f"are not kept. Received: use_ema=True, ema_momentum={g!r}, a share of "
            f"{g**t:.2g} {received}. {wait} rounded away. {remedy}"
        )


def _half_a_digit(optimizer: Any) -> float:
    """Of the most precise state."""
    dtypes = (state_dtype(v.dtype) for v in optimizer._trainable_variables)
    return min(float(np.finfo(d).eps) for d in dtypes) / 2


def when(optimizer: Any, *betas: float) -> int:
    """The step from which on 1 - beta^t is 1 to rounding, for each of them."""
    log = math.log(_half_a_digit(optimizer))
    return max(math.ceil(log / math.log(x)) if x else 1 for x in betas)


def forgotten(optimizer: Any, beta: float, t: int) -> bool:
    """Whether step t is such a step."""
    return beta < 1 and t >= when(optimizer, beta)


def updates(optimizer: Any) -> int:
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def places(source: Any, target: Any, variables: list[Any]) -> list[int]:
    """Of each variable, its index in the source: itself, or else by their order."""
    theirs = source._trainable_variables
    known = {target._var_key(v): i for i, v in enumerate(theirs)}
    places = [known.get(target._var_key(v)) for v in variables]
    found = [place for place in places if place is not None]
    if found and len(found) == len(places):
        left = [path(v) for i, v in enumerate(theirs) if i not in found]
        if left:
            warnings.warn(
                f"{target.name} is built without variables that Keras's optimizer "
                f"has state for, which it forgets: {left}. Set `trainable=True` on "
                "them before it is built, to keep it.",
                stacklevel=4,
            )
        return found
    if not found and shapes(theirs) == shapes(variables):
        return list(range(len(theirs)))
    names = [path(v) for v, place in zip(variables, places) if place is None]
    raise ValueError(
        f"Keras's optimizer has no state for some variables. Received: {names}; it was "
        f"built for {[path(v) for v in theirs]}. Build for the same variables, or for "
        "those of another model with the same shapes in the same order. To train more "
        "variables than before, begin with an optimizer without state."
    )


def copy_steps(source: Any, target: Any) -> None:
    """The count of steps, or with `gradient_accumulation_steps` of micro-steps."""
    _copy(source.variables[0], target.variables[0])


def _copy(old: Any, new: Any) -> None:
    """Not what it holds itself: on JAX a step gives that away."""
    with uncast([old]):
        value = keras.ops.cast(keras.ops.convert_to_tensor(old), new.dtype)
    new.assign(keras.ops.copy(value))


def copy_exclusions(source: Any, target: Any) -> None:
    """What neither decays, if something was excluded."""
    if hasattr(source, "_exclude_from_weight_decay"):
        pattern = source._exclude_from_weight_decay_pattern
        names = [pattern.pattern] if pattern else None
        target.exclude_from_weight_decay(var_names=names)
        target._exclude_from_weight_decay = set(source._exclude_from_weight_decay)


def copy_state(source: Any, target: Any, places: Any, moments: tuple[str, ...]) -> None:
    """Steps, moments, averages and accumulated gradients, in the target's dtype.

    Args:
        source: A built optimizer.
        target: Another.
        places: Of each of its variables, the index in the source.
        moments: Attributes that hold a list of a variable's state each.
    """
    copy_steps(source, target)
    for name in (*moments, *STATE):
        olds, news = getattr(source, name, None), getattr(target, name, None)
        if olds is None or news is None:
            continue
        for place, new in zip(places, news, strict=True):
            if new is not None:  # as are those of the scales of float8 layers
                _copy(olds[place], new)
