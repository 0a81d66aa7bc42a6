"""Compiles a `tf.function`, or a function of JAX, for a TPU or GPU that is not there.

Their compilers (the wheels `libtpu` and `jax-cuda12-pjrt`) run on any machine. Nothing
is executed: what comes out shows that a step compiles, which memory it reuses, and what
it copies; it says nothing of numbers or of time. TensorFlow gives the step as HLO,
jaxlib turns that into StableHLO, and the client of a topology compiles it.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",  # or it asks Google's cloud what machine this is
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # or a second process dies on a lock file
    TPU_LOG_DIR="disabled",
    # Where no kernel can be run, none can be chosen by its time. (TensorFlow's XLA, in
    # the same process, reads them, too.)
    XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
    + os.environ.get("XLA_FLAGS", ""),
)

import jax
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax.experimental import topologies
from jaxlib import _jax
from jaxlib.mlir import ir

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
# As NVIDIA's data sheets have it; with CUDA and cuDNN of about that compiler's age.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 7 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 85899345920
  memory_bandwidth: 3350000000000
}
"""
CHIPS = (*TPUS, "h100")


class Compiled(NamedTuple):
    """What the compiler made of a step.

    Attributes:
        seconds: It took.
        alias_bytes: Of arguments that become results where they are.
        new_results: Shapes of the results that do not.
        temporary_bytes: Beside arguments and results.
        text: The program, optimized, in HLO.
    """

    seconds: float
    alias_bytes: int
    new_results: list[str]
    temporary_bytes: int
    text: str

    def copies(self, *shape: int) -> int:
        """How often a tensor of this shape is brought into another layout."""
        return len(re.findall(rf"\[{','.join(map(str, shape))}\]\S* copy\(", self.text))

    def fusions(self, *shape: int) -> int:
        """How many fusions give tensors of this shape."""
        one = rf"\w+\[{','.join(map(str, shape))}\]"
        _, entry = self.text.split("\nENTRY ")
        results = re.findall(r"= (.*?) fusion\(", entry)
        return sum(re.search(one, result) is not None for result in results)


@functools.cache
def device(chip: str) -> jax.Device:
    if chip in TPUS:
        topology = topologies.get_topology_desc(TPUS[chip], platform="tpu")
    else:
        topology = topologies.get_topology_desc(
            chip, platform="cuda", target_config=H100, topology="1x1x1"
        )
    return topology.devices[0]


def compile_for(chip: str, f: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles a `tf.function(jit_compile=True)` for one of them.

    Args:
        chip: One of `CHIPS`.
        f: What to compile.
        *args: Tensors that it could be called with.
    """
    get_ir = f.experimental_get_compiler_ir(*args)
    # TensorFlow refuses others where there are none; at this stage it is the same.
    hlo = get_ir(stage="hlo_serialized", platform_name="CPU")
    to = device(chip)
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
        _drop_copies(module)
        options = compiler.get_compile_options(
            num_replicas=1,
            num_partitions=1,
            device_assignment=np.array([[to.id]]),
            backend=to.client,
        )
        start = time.perf_counter()
        program = compiler.backend_compile_and_load(
            to.client, module, xla_client.DeviceList((to,)), options, []
        )
        seconds = time.perf_counter() - start
    return _read(program, seconds)


def compile_on_jax_for(chip: str, f: Callable[..., Any], state: Any, data: Any):
    """Compiles `f(state, data)`, whose state is donated, for one of them.

    Args:
        chip: One of `CHIPS`.
        f: What to compile, a function of JAX.
        state, data: Lists and tuples of arrays that it could be called with.
    """
    placed = jax.sharding.SingleDeviceSharding(device(chip))

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    jitted = jax.jit(f, donate_argnums=0)
    lowered = jitted.trace(*jax.tree.map(shape, (state, data))).lower(
        lowering_platforms=("tpu" if chip in TPUS else "cuda",)
    )
    start = time.perf_counter()
    program = lowered.compile().runtime_executable()
    return _read(program, time.perf_counter() - start)


def _read(program: Any, seconds: float) -> Compiled:
    text = program.hlo_modules()[0].to_string()
    memory = program.get_compiled_memory_stats()
    head = text.split("\n", 1)[0]
    aliased = {int(i) for i in re.findall(r"\{(\d+)\}: \(\d+", head)}
    results = re.findall(r"\w+\[[\d,]*\]", head.split(")->")[1])
    return Compiled(
        seconds,
        memory.alias_size_in_bytes,
        [x for i, x in enumerate(results) if i not in aliased],
        memory.temp_size_in_bytes,
        text,
    )


def _drop_copies(module: ir.Module) -> None:
    """Takes out `mhlo.copy`, which the way back to HLO does not know."""
    found = []

    def visit(op):
        if op.name == "mhlo.copy":
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        op.results[0].replace_all_uses_with(op.operands[0])
        op.operation.erase()
