"""Which rows an optimizer brings to date, and when: in exact mode, or for averages."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from keras_adam import ledger, owners, rows
from keras_adam.base import constrained, rounded, state_dtype
from keras_adam.checks import check_range, path
from keras_adam.owners import tf_variable
from keras_adam.rows import Rows
from keras_adam.tails import Plan


def state_name(variable: Any, kind: str) -> str:
    """The name of a variable's state of this kind, as Keras's names are."""
    return f"{path(variable).replace('/', '_').replace(':', '_')}_{kind}"


def native(variable: Any) -> Any:
    """Its `tf.Variable`; of one with a copy for each replica, this replica's."""
    return rows.local(tf_variable(variable))


@functools.cache  # a plan takes a millisecond, and eager steps ask for it often
def _rounded_plan(plan: Plan, dtype: str) -> Plan:
    beta_1, beta_2 = (rounded(dtype, beta) for beta in (plan.beta_1, plan.beta_2))
    return dataclasses.replace(plan, beta_1=beta_1, beta_2=beta_2)


def _checked(x: tf.Tensor, holds: tf.Tensor, *what: Any) -> tf.Tensor:
    """x, or an error that says what; under XLA, that knows none, NaN."""
    assertion = tf.debugging.Assert(holds, what)
    with tf.control_dependencies([] if assertion is None else [assertion]):
        return tf.where(holds, x, math.nan)


class ExactRows:
    """What `RowOptimizer` does beyond its own in `sparse_updates="exact"`.

    A row is brought to date when a batch touches it: by the `Embedding` layer,
    which reads it (`read`), or else by the update. `settle` brings all to date. In
    lazy mode with `use_ema` the same is done for the average, which alone owes.
    """

    # From `RowOptimizer` and its subclasses.
    tail: ledger.Tail
    beta_1: float | Callable[[Any], Any]
    sparse_updates: str
    built: bool
    use_ema: bool
    ema_momentum: float
    _model_variables_moving_average: list[Any]
    weight_decay: Any
    iterations: Any
    variables: list[Any]
    add_variable: Callable[..., Any]
    _untracked: types.SimpleNamespace
    _trainable_variables: list[Any]
    _get_variable_index: Callable[[Any], int]
    _make_plan: Callable[[float], Plan]
    _state: Callable[[int], list[Any]]
    _step: Callable[..., Any]
    _scalars: Callable[[Any], Any]
    _lead: Callable[[Any], Any]
    _has_kernel: Callable[[], bool]
    _decays: Callable[[Any], bool]
    _rounding_keys: Callable[..., list[Any]]
    _replicas: bool
    _plan: Plan
    _on_each_replica: Callable[[Callable[[], None]], None]

    def _build_ledger(self, variables: list[Any]) -> None:
        """Creates the steps of the rows' last updates, and what they mean."""
        vars(self._untracked).update(
            by_rows=set(),  # indices of the variables that are updated row by row
            not_by_rows=set(),  # of those that some compiled step updates whole
            readings={},  # index: the last in the graph being traced, `_writers` then
            rounded={},  # index: whether steps know the betas as the kernel does
            decays=[self._decays(v) for v in variables],
            arguments=self._reckoned_with(),
            settlers={},  # arguments of `_settle`: what it calls, compiled
        )
        self._last = [
            self.add_variable(
                v.shape[:1], dtype=rows.count_dtype(), name=state_name(v, "last_step")
            )
            if self._owes(v)
            else None
            for v in variables
        ]
        owned = {i: v for i, v in enumerate(variables) if self._last[i] is not None}
        histories: dict[Any, ledger.History] = {}
        if owned and self.sparse_updates == "exact":
            self._plan = dataclasses.replace(self._plan, momentum=self._momentum())
            for kind in sorted({self._kind(i) for i in owned}):
                decays, dtype, _ = kind
                histories[kind] = ledger.History(self._plan, decays, dtype)
            self._histories = [*histories.values()]
        self._untracked.histories = histories
        for i, v in owned.items():
            if self.use_ema:
                owners.settle_when_taken(self._average_of(v), self)
            owners.set_owner(v, self)
            if getattr(v, "_keras_adam_by_rows", False):  # keras_adam.Embedding's
                self._note_by_rows(i)

    def _check_exact(self, variables: Sequence[Any] = ()) -> None:
        """Plans the tails, or raises; with a schedule, where these variables owe."""
        exact, schedule = self.sparse_updates == "exact", callable(self.beta_1)
        if exact and (not schedule or any(map(self._owes, variables))):
            self._plan = self._make_plan(self._largest_beta_1())
        elif schedule and variables:
            self._beta_1_at(0)

    def _mode(self, variable: Any) -> str:
        """`sparse_updates`, but where something reads the whole table each step."""
        whole = (
            constrained(variable) or rows.out_of_place(variable) or 0 in variable.shape
        )
        exact = self.sparse_updates == "exact"
        return "dense" if exact and whole else self.sparse_updates

    def _owes(self, variable: Any) -> bool:
        """Whether its rows, or those of its average, are brought to date one by one."""
        if getattr(variable, "overwrite_with_gradient", False):  # Keras's, of float8
            return False
        mode = self._mode(variable)
        lazy = mode == "lazy" and self.use_ema and not constrained(variable)
        return (mode == "exact" or lazy) and len(variable.shape) > 0

    def _momentum(self) -> float | None:
        return self.ema_momentum if self.use_ema else None

    def _average_of(self, variable: Any) -> Any:
        return self._model_variables_moving_average[self._get_variable_index(variable)]

    def _kind(self, i: int) -> tuple[bool, str, bool]:
        """What tables share that have one history: what a step adds to it.

        That is whether weights decay, the dtype of the state, and whether a kernel may
        take the table, since it knows the betas in that dtype only.
        """
        tables = self._tables(i)  # whose dtype is that in any scope of autocast
        dtype = state_dtype(tables[0].dtype)
        same = all(x.dtype == dtype for x in tables)
        return self._untracked.decays[i], dtype, same

    def _largest_beta_1(self) -> float:
        """Of a schedule: over steps that lie ever further apart."""
        if not callable(self.beta_1):
            return self.beta_1
        steps = {0, *(round(1.25**k) for k in range(63))}
        for k in getattr(self.beta_1, "boundaries", ()):  # PiecewiseConstantDecay's
            steps |= {int(k), int(k) + 1}
        return max(map(self._beta_1_at, steps))

    def _beta_1_at(self, step: int) -> float:
        assert callable(self.beta_1)
        try:
            with tf.init_scope():
                value = float(self.beta_1(tf.constant(step)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                "`beta_1`, if callable, must take the step, counted from 0, and return "
                f"a number in [0, 1). Received: beta_1={self.beta_1!r}, which for "
                f"step {step} raised: {error}"
            ) from error
        check_range(f"beta_1({step})", value)
        return value

    def _reckoned_with(self) -> dict[str, Any]:
        """Those that rows' debts are reckoned with."""
        names = ["use_ema", "ema_momentum"]
        if self.sparse_updates == "exact":
            names += ["beta_1", "beta_2", "epsilon", "epsilon_hat", "bias_correction"]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def _check_unchanged(self) -> None:
        before = self._untracked.arguments
        if all(last is None for last in self._last):
            return
        for name, now in self._reckoned_with().items():
            if now != before[name]:
                raise ValueError(
                    f"`{name}` cannot be changed after the optimizer was built, for "
                    f"rows owe by what it was, {before[name]!r}. Received: {name}="
                    f"{now!r}. Make a new optimizer with it (`from_config`), build it "
                    'and load the state, or use `sparse_updates="dense"`.'
                )

    def _checked_beta_1(self, beta_1: tf.Tensor, largest: float) -> tf.Tensor:
        """A schedule's beta_1, if it is no more than it was said to be."""
        return _checked(
            beta_1,
            beta_1 <= largest * (1 + 1e-6),
            "`beta_1`'s schedule has exceeded the largest value that was found "
            "when the optimizer was built, over steps ever further apart, and "
            "exact tails hold for no more. Received, and found:",
            *(beta_1, largest),
            '. Use a schedule without such peaks, or sparse_updates="dense".',
        )

    def _decay(self, alpha: tf.Tensor) -> tf.Tensor:
        """The share of the weights that a step takes off."""
        # Not a cast, which would round a number to float32 first.
        return alpha * tf.convert_to_tensor(self.weight_decay, alpha.dtype)

    def _checked_decay(self, decay: tf.Tensor) -> tf.Tensor:
        """`_decay`, if it leaves some of the weights."""
        return _checked(
            decay,
            decay < 1,
            "`learning_rate` * `weight_decay` must stay below 1 in "
            'sparse_updates="exact": a step would take off all of each weight, or '
            "more, and what rows owe has no logarithm. Received, of the two:",
            decay,
            '. Use less of one, or sparse_updates="dense".',
        )

    def _note_by_rows(self, i: int) -> None:
        """From now on the i-th variable is updated row by row."""
        variable = self._trainable_variables[i]
        if owners.owner(variable) is not self:
            raise ValueError(
                f"{path(variable)} is trained by two optimizers with "
                '`sparse_updates="exact"`, or "lazy" and `use_ema`, of which only '
                "the one built last knows what its rows owe. Use "
                '`sparse_updates="dense"`, or "lazy" without `use_ema`, in one of '
                "them; or, to train on with this one alone, a new optimizer."
            )
        if i in self._untracked.by_rows:
            return
        if i in self._untracked.not_by_rows:
            raise ValueError(
                f"{path(variable)} has a sparse gradient in this step, and had a "
                "dense one or none in a step that was compiled before, which may "
                "run again and does not know what its rows owe. Received: "
                f"sparse_updates={self.sparse_updates!r}, use_ema={self.use_ema}. Use "
                "keras_adam.Embedding, or call the compiled step with the sparse "
                'gradient first, or use sparse_updates="dense", or "lazy" without '
                "use_ema."
            )
        self._untracked.by_rows.add(i)
        owners.settle_when_read(variable)
        with tf.init_scope():
            for last in rows.components(tf_variable(self._last[i])):
                t = tf.cast(self.iterations, last.dtype)
                if tf.reduce_max(last) < t:
                    # Not one row was updated at the last step: it was a dense one.
                    last.assign(tf.fill(last.shape, t))

    def _tables(self, i: int) -> list[tf.Variable]:
        return [native(x) for x in (self._trainable_variables[i], *self._state(i))]

    def _written(self, i: int) -> list[tf.Variable]:
        """All that a step writes rows of, but the steps themselves."""
        averages = self._model_variables_moving_average if self.use_ema else []
        return [*self._tables(i), *(native(x) for x in averages[i : i + 1])]

    def _debts(
        self, i: int, as_kernel: bool | None = None, ahead: int = 0
    ) -> ledger.Debts:
        """What the i-th variable's rows owe, by the betas of the kernel or the rule.

        At the end of a step, before it is counted, that is what they owe 1 ahead.
        """
        last, t = native(self._last[i]), tf.cast(self.iterations + ahead, tf.int32)
        momentum = self._momentum()
        if self.sparse_updates == "lazy":
            return ledger.Debts(None, None, self.tail, last, t, momentum)
        _, dtype, same = kind = self._kind(i)
        if as_kernel is None:
            as_kernel = self._has_kernel() and same and not rows.in_xla()
            self._untracked.rounded[i] = as_kernel
        plan = _rounded_plan(self._plan, dtype) if as_kernel else self._plan
        history = self._untracked.histories[kind]
        return ledger.Debts(history, plan, self.tail, last, t, momentum)

    def _once(self, x: tf.Tensor) -> tf.Tensor:
        return rows.once(x, tf.cast(self.iterations, tf.int32))

    def _reading_of(self, i: int, g: tf.IndexedSlices) -> ledger.Reading | None:
        """The forward pass's reading of the rows g is the gradient of, in its order."""
        reading, writers = self._untracked.readings.get(i, (None, None))
        # Eager tensors have neither. And what another graph does with a gradient it may
        # do several times, as loops do, of which the first writes what was read.
        graph = getattr(g.values, "graph", None)
        op = getattr(g.indices, "op", None)
        if reading is None or op is None or graph is not reading.ids.graph:
            return None
        if graph is not tf.compat.v1.get_default_graph():
            return None
        same = op.type == "Reshape" and op.inputs[0] is reading.lengthened
        return reading if same and self._writers(i) == writers else None

    def _writers(self, i: int) -> set[str]:
        """Operations of the graph being traced that may write to the i-th variable."""
        handle = native(self._trainable_variables[i]).handle
        graph = tf.compat.v1.get_default_graph()
        if hasattr(graph, "capture"):
            handle = graph.capture(handle)
        reads = "ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape"
        return {op.name for op in handle.consumers() if op.type not in reads}

    def _settled_rows(self, i: int, g: Any) -> dict[str, Any]:
        """`values` and `average` for `update`, of the rows a gradient is for."""
        reading, _ = self._untracked.readings.pop(i, (None, None))
        if i not in self._untracked.by_rows:
            return {}
        if not isinstance(g, Rows):
            self._settle(i)
            return {}
        debts = self._debts(i)
        if reading is not None and g.ids is reading.ids:
            now, stored, last = reading.values, reading.stored, reading.last
        else:
            *stored, last = rows.gather([*self._tables(i), debts.last], g)
            stored = [*map(self._once, stored)]  # read for what is owed, too
            now = debts.settled(stored, last)
        if not self.use_ema:
            return {"values": now}
        table = self._trainable_variables[i]
        average = native(self._average_of(table))

        def average_rows(theta: tf.Tensor) -> None:
            theta = tf.cast(theta, native(table).dtype)  # as it is written
            old = tf.gather(average, g.lengthened)
            rows.scatter(average, g.ids, debts.average(old, stored, last, theta))

        return {"values": now, "average": average_rows}

    def _end_step(self, grads: dict[int, Any], learning_rate: Any) -> None:
        """Notes which rows the step updated, and what it adds to others' debts."""
        by_rows = self._untracked.by_rows
        self._untracked.readings.clear()
        if not tf.executing_eagerly():
            exact = {i for i, last in enumerate(self._last) if last is not None}
            self._untracked.not_by_rows |= exact - by_rows
        t = self.iterations + 1
        for i in by_rows:
            g = grads.get(i)
            if g is None and self.sparse_updates == "lazy":
                continue
            if g is None:  # no gradient is no step, not a gradient of 0
                self._settle(i)
            ids = g.ids if isinstance(g, Rows) else None
            ledger.mark(self._debts(i), ids, t, self._written(i))
        if self.sparse_updates == "lazy":
            return
        one_of = {self._kind(i): i for i in by_rows}
        tables = [x for i in by_rows for x in self._written(i)]
        t = tf.cast(rows.after(tf.cast(t, tf.uint32), *tables), tf.int32)
        for i in one_of.values():
            history, plan, *_ = self._debts(i)
            assert history is not None and plan is not None
            dtype = history.ring.dtype.name
            step = self._step(learning_rate, dtype, self._untracked.rounded[i])
            beta_1 = None
            if callable(self.beta_1):
                beta_1 = self._checked_beta_1(step.beta_1, plan.beta_1)
            history.advance(
                plan,
                t,
                self._lead(self._scalars(step)),
                beta_1,
                self._checked_decay(self._decay(step.alpha))
                if history.decays
                else None,
            )

    def _settle(self, i: int, ahead: int = 0) -> None:
        settlers = self._untracked.settlers
        as_kernel = self._untracked.rounded.get(i, False)
        # Compiling takes longer than a pass over a small table does.
        large = self._trainable_variables[i].shape.num_elements() > 1e6

        def settle(f: Callable[..., None]) -> None:
            debts = self._debts(i, as_kernel, ahead)
            f(self._tables(i), debts._replace(keys=self._rounding_keys(i, 1)))

        def settler(f: Callable[..., None]) -> Any:
            # Not a function of its own: TensorFlow would take those of all tables for
            # one, and warn that it is traced again and again.
            g = functools.partial(settle, f)
            return tf.function(g, jit_compile=True) if large else g

        key = native(self._trainable_variables[i])._unique_id, as_kernel, ahead
        if key not in settlers:
            steps: list[Callable[..., None]] = []
            if self.use_ema:
                average = native(self._model_variables_moving_average[i])
                steps += [functools.partial(ledger.settle_average, average)]
            if self.sparse_updates == "exact":
                steps += [ledger.settle_theta, ledger.settle_state]
            settlers[key] = [settler(f) for f in steps]
        for call in settlers[key]:
            call()

    def settle(self) -> None:
        """Brings all rows of all tables to date, in two passes over what is behind.

        With `sparse_updates="exact"` a row that no batch has touched for a while
        stands as it was, and what dense Adam would have done to it since is owed. With
        `use_ema` its average owes likewise, in lazy mode too. This pays both. It is
        called at the end of `fit` for the model's optimizer; by `numpy()`,
        `get_weights`, saving and assignment of a table that is a `keras.Variable`; by
        who takes an average; and when `iterations` is set. Call it before other code
        reads or changes a table outside a step, such as `tf.train.Checkpoint`,
        `model.export`, TensorBoard's histograms or `tf.norm(layer.embeddings)` in a
        callback, and before you take values of this optimizer's own `variables`.
        (Where Keras has put a `LossScaleOptimizer` around it, as under
        `mixed_float16`, it is that one's `inner_optimizer`.)
        """
        if self.built:
            self._on_each_replica(self._settle_all)

    def _settle_all(self) -> None:
        for i, last in enumerate(self._last):
            if last is None:
                continue
            last = native(last)
            t = tf.cast(self.iterations, last.dtype)
            by_rows = i in self._untracked.by_rows or tf.reduce_max(last) == t
            if by_rows and tf.reduce_min(last) < t:
                self._settle(i)
        for history in getattr(self, "_histories", []):
            history.log_decay.assign(tf.zeros_like(history.log_decay))

    def set_count(self, assign: Callable[[], Any]) -> Any:
        """Sets the count of steps: no row owes the steps that are left out, or again.

        Args:
            assign: What sets it.
        """
        if not tf.executing_eagerly():
            if self._untracked.by_rows:
                raise ValueError(
                    "`iterations` is set in a function, where rows cannot be "
                    "brought to date before. Received: an assignment to it, in one "
                    f"with sparse_updates={self.sparse_updates!r}, "
                    f"use_ema={self.use_ema}. Set it outside of functions."
                )
            return assign()
        self.settle()
        result = assign()
        self._mark(range(len(self._last)))
        return result

    def _mark(self, indices: Iterable[int]) -> None:
        """Of these variables all rows are up to date."""
        for last in (self._last[i] for i in indices):
            if last is not None:
                last.assign(tf.fill(last.shape, tf.cast(self.iterations, last.dtype)))

    def forget_readings(self) -> None:
        """What a forward pass has read may not be what an update finds."""
        self._untracked.readings.clear()

    def __del__(self) -> None:
        # The tables live on: pay, before what is owed is forgotten.
        if hasattr(self, "_histories") and not sys.is_finalizing():
            with tf.init_scope():
                self.settle()

    def read(self, variable: Any, ids: tf.Tensor) -> tf.Tensor:
        """Rows of a table as dense Adam would have them now; writes nothing.

        Args:
            variable: A variable this optimizer owns: `owners.owner(variable)`.
            ids: Rows' numbers, int32 or int64, of any shape.
        """
        i = self._get_variable_index(variable)
        self._note_by_rows(i)
        owners.settle_when_read(variable)  # where it was built with its `tf.Variable`
        if self.sparse_updates == "lazy":
            return ledger.gather(native(variable), ids)
        places, debts = self._untracked.workspaces[i].places, self._debts(i)
        owners.keep(self.variables, places, debts)
        out, reading = ledger.read(self._tables(i), ids, places, debts)
        # Several replicas have read other rows each.
        if reading and not self._replicas and not tf.executing_eagerly():
            self._untracked.readings[i] = reading, self._writers(i)
        return out
