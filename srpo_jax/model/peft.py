"""Adapters as PEFT stores them, and weights with their adapters merged in, block by block."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from srpo_jax.data.buckets import AnyPath, located
from srpo_jax.data.hf_folder import ADAPTER, read_json
from srpo_jax.model.config import Lora, ModelConfig
from srpo_jax.model.hf import new_directory
from srpo_jax.model.hf_files import Stored, listed, released_name, tensors
from srpo_jax.model.hf_table import HFError, Index, hf_tensors
from srpo_jax.model.hf_write import host_reader
from srpo_jax.model.lora import (
    LORA_A,
    LORA_B,
    adapters_of,
    in_8_bits,
    is_adapter,
    is_scale,
    over_outputs,
    scale_of,
)
from srpo_jax.model.qwen2_5_vl import ADAPTABLE, abstract_params

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys of adapter_config.json that change what an adapter computes, and what they must be.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": ([], None),
}


def abstract_adapters(cfg: ModelConfig, lora: Lora | None) -> dict[str, Any]:
    """Path -> shape and dtype of the adapters of ``lora`` beside a model's weights."""
    shapes = abstract_params(dataclasses.replace(cfg, lora=lora))
    return {path: leaf for path, leaf in shapes.items() if is_adapter(path)}


# --- merged weights ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """A weight with its adapter merged in (in float32); indexing it reads that slice."""

    kernel: Any
    a: Any
    b: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.kernel.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the weight."""
        return np.dtype(self.kernel.dtype)

    def __getitem__(self, index: Index) -> np.ndarray:
        stacked = len(self.a.shape) + len(self.b.shape) - 2 - len(index)
        split, rank = len(self.a.shape) - 1, slice(0, self.a.shape[-1])
        lead, inputs, outputs = index[:stacked], index[stacked:split], index[split:]
        kernel, a, b = (
            np.asarray(host_reader(leaf)(at), np.float32)
            for leaf, at in (
                (self.kernel, index),
                (self.a, (*lead, *inputs, rank)),
                (self.b, (*lead, rank, *outputs)),
            )
        )
        layers = kernel.shape[:stacked]
        a, b = a.reshape(*layers, -1, a.shape[-1]), b.reshape(*layers, a.shape[-1], -1)
        return (kernel + self.scale * (a @ b).reshape(kernel.shape)).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class LongLeaf:
    """A weight in 8 bits as the float32 numbers that it stands for; indexing it reads that slice.

    ``scale`` None: ``kernel`` is not in 8 bits yet, and becomes what it would be of them.
    """

    path: str
    kernel: Any
    scale: Any
    scale_ndim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.kernel.shape)

    @property
    def dtype(self) -> np.dtype:
        """What it is to be written as: float32, or as it was before it came into 8 bits."""
        return np.dtype(np.float32 if self.scale is not None else self.kernel.dtype)

    def __getitem__(self, index: Index) -> np.ndarray:
        ndim, read = len(self.shape), host_reader(self.kernel)
        behind = 1 + ndim - self.scale_ndim  # the axis of layers and those of inputs
        layers, inputs, outputs = index[:1], index[1:behind], index[behind:]
        if self.scale is not None:
            scale = host_reader(self.scale)((*layers, *outputs))
            return read(index) * over_outputs(self.path, scale, ndim)
        # The scale is that of all inputs.
        whole = (slice(0, size) for size in self.shape[1:behind])
        block = read((*layers, *whole, *outputs))
        codes, scale = map(np.asarray, in_8_bits(self.path, block, self.scale_ndim))
        return (codes * over_outputs(self.path, scale, ndim))[(slice(None), *inputs)]


def merged_leaves(params: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Parameters of the model without its adapters, as `hf.save_hf` takes them: each weight with
    its own merged, and as it was when the adapter was trained (``Lora.base_dtype``)."""
    leaves, lora = {}, cfg.lora
    shapes = abstract_params(cfg) if lora else {}
    for path, leaf in params.items():
        if is_adapter(path) or is_scale(path):
            continue
        for beside, scale in scale_of(path, shapes).items():
            leaf = LongLeaf(path, leaf, params.get(beside), len(scale.shape))
        both = adapters_of(path, params).values()
        leaves[path] = MergedLeaf(leaf, *both, scale=lora.scale) if lora and both else leaf
    return leaves


# --- PEFT directories --------------------------------------------------------------------------


def save_adapter(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    out_dir: AnyPath,
    base: str,
    *,
    agree: Callable[[int], int] | None = None,
) -> None:
    """Write the adapters among ``params`` (anything that `hf.save_hf` takes) as PEFT stores them.

    ``base`` stands in adapter_config.json as the model's place. Collective, as `hf.save_hf`.
    """
    assert cfg.lora, "adapters come with a model that has them"
    arrays, modules = {}, set()
    for tensor in hf_tensors(cfg.base):
        both = adapters_of(tensor.row.path, params)
        if not both:
            continue
        modules.add(_module(tensor.row.name))
        for name, leaf, split in zip("AB", both.values(), (-1, 1), strict=True):
            lead = (tensor.layer,) if tensor.row.stacked else ()
            index = [slice(i, i + 1) for i in lead] + [slice(0, n) for n in leaf.shape[len(lead) :]]
            x = np.asarray(host_reader(leaf)(tuple(index)), np.float32)
            x = x[0] if lead else x
            x = x.reshape(math.prod(x.shape[:split]), -1).T
            key = f"{PREFIX}{_module(tensor.name)}.lora_{name}.weight"
            arrays[key] = np.ascontiguousarray(x)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": "|".join(re.escape(m).replace(r"\{\}", r"\d+") for m in sorted(modules)),
        "inference_mode": True,
    }
    with new_directory(out_dir, agree) as folder:
        if folder:
            save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / ADAPTER).write_text(json.dumps(config, indent=2) + "\n")


def _module(name: str) -> str:
    """A tensor of the released layout -> its module in transformers since 4.52."""
    name = re.sub(r"^model\.", "language_model.", name.removesuffix(".weight"))
    return f"model.{name}"


def describe(folder: AnyPath, base: ModelConfig) -> Lora:
    """What a PEFT adapter is: rank, alpha and the layers that have one; HFError as `read_adapter`.

    Raises HFError, too, for an adapter that computes something else than this model's do.
    """
    file = located(folder) / ADAPTER
    config = read_json(file)
    for key, plain in PLAIN.items():
        if config.get(key) not in plain:
            raise HFError(f"{file}: {key}={config.get(key)!r} is not supported; merge the adapter")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise HFError(f"{file}: r={rank!r} and lora_alpha={alpha!r} must be above 0")
    parts = _open(folder, base, rank)
    return Lora(rank, float(alpha), tuple(sorted(path.removesuffix("/kernel") for path in parts)))


def read_adapter(folder: AnyPath, base: ModelConfig) -> dict[str, np.ndarray]:
    """Our adapter parameters, float32, from a PEFT directory.

    Raises HFError with every tensor that is unknown, missing or of another shape: another base
    model's, for instance.
    """
    lora = describe(folder, base)
    shapes, read = abstract_adapters(base, lora), {}
    for path, layers in _open(folder, base, lora.rank).items():
        for name, pairs in zip((LORA_A, LORA_B), zip(*layers, strict=True), strict=True):
            target = path.removesuffix("kernel") + name
            stacked = [stored.read(()).astype(np.float32).T for stored in pairs]
            read[target] = np.stack(stacked).reshape(shapes[target].shape)
    return read


def _open(folder: AnyPath, base: ModelConfig, rank: int) -> dict[str, list[tuple[Stored, Stored]]]:
    """Path of each weight with an adapter -> A and B of its layers."""
    file = located(folder) / WEIGHTS
    stored = {released_name(one.key.removeprefix(PREFIX)): one for one in tensors(file)}
    known, found, wrong = set(), {}, []
    touched = {name.partition(".lora_")[0] for name in stored}
    rows = {t.row.path for t in hf_tensors(base) if t.name.removesuffix(".weight") in touched}
    for tensor in hf_tensors(base):
        if tensor.row.path in rows and ADAPTABLE.match(tensor.row.path):
            names = [f"{tensor.name.removesuffix('weight')}lora_{x}.weight" for x in "AB"]
            shapes = ((rank, tensor.shape[1]), (tensor.shape[0], rank))
            known.update(names)
            faults = (_fault(stored, *one) for one in zip(names, shapes, strict=True))
            wrong += filter(None, faults)
            if not wrong:
                pair = (stored[names[0]], stored[names[1]])
                found.setdefault(tensor.row.path, []).append(pair)
    wrong = [f"{name}: no adapter can be there" for name in sorted(stored.keys() - known)] + wrong
    if wrong or not found:
        wrong = wrong or ["no adapter in it"]
        raise HFError(listed(f"{file} holds no adapter of this model", wrong))
    return found


def _fault(stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> str | None:
    have = stored[name].shape if name in stored else None
    if have == shape:
        return None
    told = "missing" if have is None else f"shape {list(have)}"
    return f"{name}: {told}, wanted {list(shape)}"
