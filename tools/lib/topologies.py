"""Hardware that is not there: device topologies to compile for, on any CPU machine.

`tpu:v5p:2x2x2`, `tpu:v5p:2x2x2:4` (four slices of it) and `cuda:h100:1x8` (hosts x GPUs) name them.
TPU needs `jax[tpu]`, CUDA needs `jax-cuda13-plugin`, `jax-cuda13-pjrt` and cuDNN; both come with
requirements-aot.txt.
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

GIB = 1 << 30


@dataclass(frozen=True)
class Topology:
    """Devices that can be compiled for, and what each holds."""

    name: str
    devices: tuple[Any, ...]  # jax device descriptions, host after host
    memory_gib: float  # of one device
    bandwidth: float  # bytes/s of one device's memory
    links: float  # bytes/s that one device sends to others
    network: float = math.inf  # bytes/s of one device to other slices; all fast: inf
    slices: int = 1


@dataclass(frozen=True)
class _Chip:
    """A TPU chip by its data sheet (docs.cloud.google.com/tpu/docs)."""

    memory_gib: int
    bandwidth: float  # bytes a second
    links: float  # bytes a second, all links, one direction
    network: float | None = None  # bytes a second to other slices, where it is published
    devices: int = 1
    options: tuple[tuple[str, str], ...] = ()


_CHIPS = {
    "v4": _Chip(32, 1228e9, 300e9, None, 1, (("chip_config_name", "megacore"),)),
    "v5e": _Chip(16, 819e9, 200e9, 3.125e9),
    "v5p": _Chip(95, 2765e9, 600e9, 6.25e9),
    "v6e": _Chip(32, 1640e9, 400e9, 12.5e9),
    "tpu7x": _Chip(192, 7380e9, 600e9, None, 2),
}


@dataclass(frozen=True)
class _Gpu:
    """What XLA's GPU compiler asks about a device (GpuTargetConfigProto), and its links."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes a second
    cores: int
    shared_per_core: int
    capability: tuple[int, int]
    accelerated: bool
    clock_ghz: float
    l2_bytes: int
    nvlink: float  # bytes a second, one direction (NVIDIA's data sheet gives both)
    network: float  # bytes a second of the network card beside each GPU of a DGX


_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", 85_094_825_984, 2.0e12, 108, 167_936, (8, 0), False, 1.41,
                 41_943_040, 300e9, 25e9),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 84_930_068_480, 3.35e12, 132, 233_472, (9, 0), True, 1.98,
                 52_428_800, 450e9, 50e9),
    "h200": _Gpu("NVIDIA H200", 151_397_597_184, 4.8e12, 132, 233_472, (9, 0), True, 1.98,
                 52_428_800, 450e9, 50e9),
}  # fmt: skip


def _target_config(gpu: _Gpu) -> str:
    """GpuTargetConfigProto in text form: XLA's own view of the device, without the device."""
    feature = "feature_extension: ACCELERATED_FEATURES" if gpu.accelerated else ""
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared_per_core}
      threads_per_core_limit: 2048
      core_count: {gpu.cores}
      fpus_per_core: {128 if gpu.capability[0] >= 9 else 64}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      thread_dim_limit_x: 1024
      thread_dim_limit_y: 1024
      thread_dim_limit_z: 64
      memory_bandwidth: {int(gpu.bandwidth)}
      l2_cache_size: {gpu.l2_bytes}
      clock_rate_ghz: {gpu.clock_ghz}
      device_memory_size: {gpu.memory_bytes}
      shared_memory_per_block_optin: {gpu.shared_per_core - 1024}
      cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} {feature} }}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    runtime_version {{ major: 13 minor: 0 patch: 0 }}
    device_description_str: "{gpu.name}"
    """


def describe(name: str) -> Topology:
    """Topology for `tpu:KIND:AxBxC[:SLICES]` or `cuda:KIND:HOSTSxGPUS`.

    Raises:
        ValueError: an unknown name, with the known kinds.
        RuntimeError: the compiler for that platform is not installed, with the remedy.
    """
    from jax.experimental import topologies

    platform, _, rest = name.partition(":")
    kind, _, shape = rest.partition(":")
    shape, _, count = shape.partition(":")
    slices = int(count) if count.isdecimal() else 0 if count else 1
    if platform == "tpu" and kind in _CHIPS and shape and slices:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        chip = _CHIPS[kind]
        if slices > 1 and not chip.network:
            raise ValueError(f"{name}: the network between slices of {kind} is not known; plan one")
        options: dict[str, Any] = {"topology_name": f"{kind}:{shape}", **dict(chip.options)}
        options |= {"num_slices": slices} if slices > 1 else {}
        parts = (chip.memory_gib, chip.bandwidth, chip.links, chip.network)
        device = [part / chip.devices for part in parts if part]
    elif platform == "cuda" and kind in _GPUS and not count and re.fullmatch(r"\d+x\d+", shape):
        gpu, (hosts, gpus) = _GPUS[kind], (int(n) for n in shape.split("x"))
        options = {"target_config": _target_config(gpu), "topology": f"1x{hosts}x{gpus}"}
        # What passes between hosts takes all their cards and is spread inside by NVLink.
        links = gpu.nvlink if hosts == 1 else min(gpu.nvlink, gpus * gpu.network)
        device = [gpu.memory_bytes / GIB, gpu.bandwidth, links, links]
    else:
        known = [f"tpu:{k}:AxB[:SLICES]" for k in _CHIPS] + [f"cuda:{k}:HOSTSxGPUS" for k in _GPUS]
        raise ValueError(f"unknown topology {name!r}; known: {', '.join(known)}")
    try:
        found = topologies.get_topology_desc(platform=platform, **options)
    except Exception as error:
        raise RuntimeError(
            f"cannot describe {name}: {error}. Install the compilers: "
            "pip install -r requirements-aot.txt; "
            "pip install --no-deps -r requirements-aot-nodeps.txt"
        ) from error
    return Topology(name, tuple(found.devices), *device, slices=slices)


def memory_gib(compiled: jax.stages.Compiled) -> dict[str, float]:
    """GiB per device of a compiled program: arguments, outputs not aliased to them, temporaries."""
    stats: Any = compiled.memory_analysis()  # typed as optional; no compiler here leaves it out
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = {"arguments": arguments, "outputs": max(outputs, 0), "temporaries": temporaries}
    parts["total"] = sum(parts.values())
    return {key: float(np.round(value / GIB, 3)) for key, value in parts.items()}
