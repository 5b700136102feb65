"""What the compilers are told at the start; docs/compiler_flags.md gives the reasons.

Nothing that the environment says already is changed.
"""

import os

import jax

# Collectives run beside matrix products: of weights inside a slice, of gradients between slices.
TPU_FLAGS = {
    "--xla_enable_async_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion": "true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "--xla_tpu_overlap_compute_collective_tc": "true",
    "--xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "--xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
MEMORY_SHARE = 0.92  # of a GPU's memory that is ours; jax takes 0.75 by itself
GPU_LEVEL = "O1"  # of optimisation
_PART_OF_LEVEL = ("latency_hiding_scheduler", "enable_pipelined", "while_loop_double_buffering")


def prepare() -> None:
    """Sets the environment of what reads it once: call it before anything touches a device."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    names = {word.partition("=")[0] for word in given.split()}
    new = [f"{name}={value}" for name, value in TPU_FLAGS.items() if name not in names]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*given.split(), *new])
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))


def tune(platform: str, devices: int) -> str:
    """Sets what may be set later, for that many devices of a platform -> what holds, in words.

    Empty where nothing of this module has an effect.
    """
    if platform == "tpu":
        return "LIBTPU_INIT_ARGS=" + os.environ["LIBTPU_INIT_ARGS"]
    if platform not in ("gpu", "cuda"):
        return ""
    flags = os.environ.get("XLA_FLAGS", "")
    own = "JAX_OPTIMIZATION_LEVEL" in os.environ or any(part in flags for part in _PART_OF_LEVEL)
    told = []
    if devices > 1 and not own:  # it hides collectives
        jax.config.update("jax_optimization_level", GPU_LEVEL)
        told.append(f"jax_optimization_level={GPU_LEVEL}")
    if share := os.environ.get("XLA_CLIENT_MEM_FRACTION"):
        told.append(f"XLA_CLIENT_MEM_FRACTION={share}")
    return ", ".join(told)
