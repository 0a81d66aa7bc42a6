"""The Embedding layer that reads rows as they are now."""

from __future__ import annotations

from typing import Any

import keras

from keras_adam.backend import Optimizer, ledger, owners, tf
from keras_adam.base import uncast


def _stateless_scope() -> Any:
    """Keras's scope of a stateless call, or of a look at shapes, if one is open."""
    with keras.StatelessScope(initialize_variables=False) as scope:
        return scope.original_scope


@keras.saving.register_keras_serializable(package="keras_adam")
class Embedding(keras.layers.Embedding):
    """`keras.layers.Embedding` that sees each row as dense Adam would have it now.

    While an optimizer with `sparse_updates="exact"` trains its table, a row that no
    batch has touched for a while owes the steps that skipped it. This layer reads
    rows with what they owe, in training, `evaluate` and `predict`, and writes
    nothing. (`keras.layers.Embedding` reads what stands in the table.) With any
    other optimizer, and without one, it is `keras.layers.Embedding`; it gathers
    rows from the variable itself, never from a copy of it.

    TensorFlow code that reads `layer.embeddings` itself reads what stands in the table,
    unless the table's gradient is dense, as with tied weights: then no row owes.
    Outside a step, call `optimizer.settle()` before, also before
    `keras.Variable(table)`, `other.assign(table)` and `copy.deepcopy(table)`.
    (`numpy()`, `print`, `get_weights` and saving do.) A function that assigns to the
    table, as `keras.layers.SpectralNormalization` does, is not served: what rows owe
    comes on top, and with weight decay is a share of what was assigned. Of
    `tf.autodiff.ForwardAccumulator` a `tf.function` is not served. An exact optimizer
    adds row 0 and one row in 65,535 to each batch, with a gradient of 0; a lazy
    optimizer that trains the same table updates these too.

    The optimizer must be built before a function that reads rows is traced, or that
    goes on reading what stands in the table, and a warning says so. `fit`, `evaluate`
    and `predict` see to it where the optimizer is the model's own; with several, and in
    loops written by hand, call `optimizer.build(model.trainable_variables)` first.

    Args:
        *args, **kwargs: Those of `keras.layers.Embedding`. So are the shapes: ids
            of any shape, int32, int64 or float, to `(*ids.shape, output_dim)`.

    Raises:
        ValueError: The table is trained by two exact optimizers, of which only the one
            built last knows what rows owe (do not call steps that were compiled for
            another any more), or in some steps by a dense gradient that was compiled
            first.

    Source: `keras_adam.tails` has the rule of what is owed.
    """

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)
        if isinstance(getattr(self, "_embeddings", None), keras.Variable):
            self._embeddings._keras_adam_by_rows = True

    def call(self, inputs: Any) -> Any:
        table = getattr(self, "_embeddings", None)
        # Not its `value`, which under autocast is a copy.
        native = owners.tf_variable(table) if tf is not None else None
        special = self.lora_enabled or self.quantization_mode is not None
        if special or native is None or not isinstance(native, tf.Variable):
            return super().call(inputs)
        scope = _stateless_scope()
        if scope is not None and scope.get_current_value(table) is not None:
            return super().call(inputs)
        if isinstance(inputs, tf.RaggedTensor):
            return tf.ragged.map_flat_values(self.call, inputs)
        if isinstance(inputs, tf.SparseTensor):
            inputs = tf.sparse.to_dense(inputs)
        ids = inputs if inputs.dtype in ("int32", "int64") else tf.cast(inputs, "int32")
        ids = tf.where(ids < 0, ids + tf.cast(self.input_dim, ids.dtype), ids)
        owner = self._owner(table)
        rows = owner.read(table, ids) if owner else ledger.gather(native, ids)
        return tf.cast(rows, self.compute_dtype)

    @staticmethod
    def _build_outside(optimizer: Any, variables: Any) -> None:
        """Of the function that is traced, of the layer's scopes of names and of
        autocast, and of replicas, which all get here."""

        def build(_: Any = None) -> None:
            names = keras.name_scope(
                optimizer.name, caller=optimizer, override_parent=""
            )
            with tf.init_scope(), names, uncast(variables):
                optimizer.build(variables)

        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            build()
        else:
            replica.merge_call(build)

    def _owner(self, table: Any) -> Any:
        """The table's; at `evaluate` or `predict` before `fit` the model's optimizer,
        built early, since Keras keeps the compiled function for after, when rows owe.

        After `compile` that is another than the owner, which may still live.
        """
        model = self._get_call_context().entry_layer
        self._maybe_reset_call_context()
        optimizer = owners.optimizer_of(model)
        unbuilt = isinstance(optimizer, Optimizer) and not optimizer.built
        if unbuilt and owners.is_for(owners.owner(table), model):
            # Where Keras only looks for shapes, new variables would have no value.
            for_shapes = _stateless_scope() is not None
            if not for_shapes and all(layer.built for layer in model._flatten_layers()):
                self._build_outside(optimizer, model.trainable_variables)
        owner = owners.owner(table)
        if owner is not None and owner is optimizer:
            owners.set_model(owner, model)
        if not tf.executing_eagerly():
            owners.note_reader(table, model, owner)
        return owner

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """As Keras's: the table is kept as it is now, and read as it stands."""
        self._settle()
        super().enable_lora(*args, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """As Keras's, which refuses subclasses."""
        self._settle()
        super().quantize(*args, **{**kwargs, "type_check": False})

    def _settle(self) -> None:
        table = getattr(self, "_embeddings", None)
        if tf is not None and table is not None:
            owners.settle(table)
