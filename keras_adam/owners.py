"""Which optimizer knows what a table's rows owe, and who has it called."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_adam import checks


def tf_variable(variable: Any) -> Any:
    """A `keras.Variable`'s `tf.Variable`; `value` may be a cast of it."""
    return variable._value if isinstance(variable, keras.Variable) else variable


class _Settled:
    """A `keras.Variable` whose rows are brought to date by NumPy and assignment.

    That is `numpy()`, `np.array(variable)`, and so `get_weights` and saving; its text;
    and `assign`, `assign_add`, `assign_sub`, so that what was owed up to then is not
    owed by the new values. TensorFlow's own reads of it, and assignments in a function,
    see what stands in the table.
    """

    def numpy(self) -> Any:
        settle(self)
        return super().numpy()  # type: ignore[misc]

    def __array__(self, dtype: Any = None) -> Any:
        settle(self)
        return super().__array__(dtype)  # type: ignore[misc]

    def __repr__(self) -> str:
        if tf.executing_eagerly():  # or it has no values
            settle(self)
        return super().__repr__()

    def assign(self, value: Any) -> Any:
        settle(self)
        return super().assign(value)  # type: ignore[misc]

    def assign_add(self, value: Any) -> Any:
        settle(self)
        return super().assign_add(value)  # type: ignore[misc]

    def assign_sub(self, value: Any) -> Any:
        settle(self)
        return super().assign_sub(value)  # type: ignore[misc]


class _Count:
    """An optimizer's count of steps. What rows owe is paid before it is set by hand."""

    _keras_adam_owner: weakref.ref[Any]

    def assign(self, value: Any) -> Any:
        owner = self._keras_adam_owner()
        if owner is None:
            return super().assign(value)  # type: ignore[misc]
        assign = super().assign  # type: ignore[misc]
        return owner.set_count(lambda: assign(value))

    def assign_add(self, value: Any) -> Any:
        owner, new = self._keras_adam_owner(), self + value
        if owner is not None and owner.steps_under_way:  # Keras counts them
            return super().assign(new)  # type: ignore[misc]
        return self.assign(new)


class _SettledAverage:
    """The same for an average, whose `value` Keras's SwapEMAWeights takes."""

    _keras_adam_owner: weakref.ref[Any]

    @property
    def value(self) -> Any:
        owner = self._keras_adam_owner()
        if owner is not None and tf.executing_eagerly():
            owner.settle()
        return super().value  # type: ignore[misc]


@functools.cache
def _settled_class(mixin: Any, cls: Any) -> Any:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def set_owner(variable: Any, optimizer: Any) -> None:
    """From now on this optimizer knows what the variable's rows owe."""
    old = [x for x in _owners(variable) if x is not optimizer]
    with tf.init_scope():
        for x in old:
            x.settle()
            x.forget_readings()  # which keep the graph that was traced last
    known = tf_variable(variable)
    known._keras_adam_owners = [weakref.ref(x) for x in (*old, optimizer)]
    readers = getattr(known, "_keras_adam_readers", [])
    if readers and optimizer.sparse_updates == "exact":
        gc.collect()
        # What is being traced is traced anew, since it has variables made.
        now = [] if tf.executing_eagerly() else _graphs()
        if any(x.goes_on(optimizer) and x.graph() not in now for x in readers):
            warnings.warn(
                f"A tf.function that reads {checks.path(variable)} was traced before "
                f"its optimizer was built, and will go on reading rows without what "
                f"{optimizer.name} owes them. Build the optimizer first: "
                "`optimizer.build(model.trainable_variables)`; or trace the function "
                "again, as `model.make_predict_function(force=True)` does Keras's.",
                stacklevel=4,
            )
        known._keras_adam_readers = []


def _graphs() -> list[Any]:
    """That being traced, and those around it."""
    graphs = [tf.compat.v1.get_default_graph()]
    while hasattr(graphs[-1], "outer_graph"):
        graphs.append(graphs[-1].outer_graph)
    return graphs


def optimizer_of(model: Any) -> Any:
    optimizer = getattr(model, "optimizer", None)
    return getattr(optimizer, "inner_optimizer", optimizer)


class _Reader(NamedTuple):
    """A graph that reads a table; all are weak references, or None."""

    graph: Any
    owner: Any  # of the table, as the graph knows
    model: Any  # whose function it is, if it is one of Keras's
    optimizer: Any  # the model's, then

    def goes_on(self, owner: Any) -> bool:
        """Whether it will read for another than this owner."""
        if self.graph() is None or (self.owner and self.owner() is owner):
            return False
        if self.model is None:
            return True
        model, optimizer = self.model(), self.optimizer and self.optimizer()
        # `compile` drops the functions (but TensorFlow may keep `predict`'s).
        return model is not None and optimizer_of(model) is optimizer


def note_reader(variable: Any, model: Any, owner: Any) -> None:
    """The graph that is being traced reads the variable, and knows no other owner.

    Args:
        variable: A table.
        model: The outermost layer that is called.
        owner: Of the variable, or None.
    """
    variable, graphs = tf_variable(variable), _graphs()
    keras_own = any(x.name.startswith("one_step_on_data") for x in graphs[:-1])
    of = (model, optimizer_of(model)) if keras_own else (None, None)
    references = [x if x is None else weakref.ref(x) for x in (graphs[0], owner, *of)]
    readers = getattr(variable, "_keras_adam_readers", [])
    readers = [x for x in readers if x.graph() is not None]
    variable._keras_adam_readers = [*readers, _Reader(*references)]


def set_model(owner: Any, model: Any) -> None:
    """The owner is the model's optimizer."""
    owner._untracked.model = weakref.ref(model)


def is_for(owner: Any, model: Any) -> bool:
    """Whether the owner, if there is one, was the model's optimizer."""
    of = getattr(owner and owner._untracked, "model", None)
    return owner is None or (of is not None and of() is model)


def settle(variable: Any) -> None:
    """Has all that own or owned the variable bring its rows to date."""
    for x in _owners(variable):
        x.forget_readings()
        if tf.executing_eagerly():
            x.settle()


def keep(*variables: Any) -> None:
    """For functions that are being traced: they may outlive the optimizer."""
    for graph in _graphs()[:-1]:
        graph._keras_adam_kept = [*getattr(graph, "_keras_adam_kept", []), variables]


def owner(variable: Any) -> Any:
    """The exact optimizer that owns the variable, the one built last, or None."""
    known = getattr(tf_variable(variable), "_keras_adam_owners", [])
    return known[-1]() if known else None


def _owners(variable: Any) -> list[Any]:
    """All that live and own or owned it: steps of theirs that are compiled go on."""
    known = getattr(tf_variable(variable), "_keras_adam_owners", [])
    return [x for x in (reference() for reference in known) if x is not None]


def settle_when_read(variable: Any) -> None:
    """Has the owner called when the variable's values are taken."""
    if isinstance(variable, keras.Variable) and not isinstance(variable, _Settled):
        cls = _settled_class(_Settled, type(variable))  # type: ignore[arg-type]
        variable.__class__ = cls


def settle_when_set(count: Any, optimizer: Any) -> None:
    """Has the optimizer called when its count of steps is set."""
    count._keras_adam_owner = weakref.ref(optimizer)
    count.__class__ = _settled_class(_Count, type(count))  # type: ignore[arg-type]


def settle_when_taken(average: Any, optimizer: Any) -> None:
    """Has the optimizer called when the values of its average are taken."""
    average._keras_adam_owner = weakref.ref(optimizer)
    average.__class__ = _settled_class(_SettledAverage, type(average))  # type: ignore[arg-type]
