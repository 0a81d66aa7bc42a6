"""Where the examples train, and whether XLA compiles their steps."""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf
from absl import flags

FLAGS = flags.FLAGS

JIT = {"auto": "auto", "true": True, "false": False}


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    to = {"flag_values": values}
    flags.DEFINE_enum(
        "jit", "auto", list(JIT), "jit_compile of model.compile. True on a TPU.", **to
    )
    flags.DEFINE_string(
        "tpu",
        None,
        'A TPU to train on: "local", one in this machine, or its name or address. '
        "None: what TensorFlow finds, a GPU or the CPU.",
        **to,
    )


def jit_compile() -> Any:
    """For `model.compile`."""
    return True if FLAGS.tpu else JIT[FLAGS.jit]


def use() -> None:
    """Has all that follows happen on the TPU of --tpu, on one of its cores.

    By OneDeviceStrategy: TPUStrategy is not for keras_adam.
    """
    if not FLAGS.tpu:
        return
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=FLAGS.tpu)
        if FLAGS.tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        core = tf.config.list_logical_devices("TPU")[0].name
    except (tf.errors.OpError, ImportError, IndexError, OSError, ValueError) as e:
        sys.exit(
            f"Cannot use --tpu={FLAGS.tpu}: {str(e).splitlines()[0]}\n\n"
            "TensorFlow finds TPUs on a TPU virtual machine, with the wheel "
            "`tensorflow-tpu` in place of `tensorflow`. Leave --tpu out to train on "
            "this machine's GPU or CPU."
        )
    tf.distribute.experimental_set_strategy(tf.distribute.OneDeviceStrategy(core))
