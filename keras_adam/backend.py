"""What depends on Keras's backend, chosen in one place.

On JAX nothing here imports TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from keras_adam import ledger, owners, tails
    from keras_adam.optimizer import RowOptimizer as Optimizer

    bitcast: Any = tf.bitcast
elif keras.backend.backend() == "jax":
    from jax.lax import bitcast_convert_type as bitcast

    from keras_adam.dense import DenseOptimizer as Optimizer

    tf = ledger = owners = tails = None
else:
    raise ImportError(
        "keras_adam works with Keras on TensorFlow, and with dense gradients on JAX. "
        f"Received: the backend {keras.backend.backend()!r}. Set the environment "
        'variable KERAS_BACKEND to "tensorflow" or "jax" before Keras is imported.'
    )

__all__ = ["Optimizer", "bitcast", "ledger", "owners", "tails", "tf"]
