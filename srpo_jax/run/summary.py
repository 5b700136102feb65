"""What a training run says at its start and at its end."""

import math
from collections.abc import Iterator
from typing import Any

import jax

from srpo_jax.launch import command
from srpo_jax.model import sharding
from srpo_jax.run.parts import Parts
from srpo_jax.run.recipe import differences
from srpo_jax.run.replicas import held_by_several
from srpo_jax.run.sections import GrpoSettings, SftSettings, TrainSettings
from srpo_jax.structs import TrainState

_GIB = 2**30


Fact = tuple[str, str, dict[str, Any]]  # its kind, a line, and what the line tells as values


def opening(
    settings: TrainSettings, parts: Parts, state: TrainState, total_steps: int
) -> Iterator[Fact]:
    """Model, devices, memory, batch, budgets, differences from the recipe, folder."""
    trained, frozen = _count(state.params), _count(state.frozen)
    dtype = _dtype(state.params)
    text = f"model: {settings.hf_dir}, {_millions(trained)} parameters trained in {dtype}"
    yield "model", text, {"hf_dir": settings.hf_dir, "trained": trained, "dtype": dtype}
    if frozen:
        dtype = _dtype(state.frozen)
        held = {"parameters": frozen, "dtype": dtype}
        yield "frozen", f"  frozen: {_millions(frozen)} in {dtype}", held
    device = jax.local_devices()[0]  # another process's tells nothing of its memory
    axes = ", ".join(f"{name} {size}" for name, size in parts.mesh.shape.items())
    known = {"count": jax.device_count(), "device": device.device_kind}
    text = f"devices: {jax.device_count()} of {device.device_kind}; mesh: {axes}"
    yield "devices", text, known | {"mesh": dict(parts.mesh.shape)}
    held, waiting = (_held(state, offloaded=offloaded) for offloaded in (False, True))
    limit = (device.memory_stats() or {}).get("bytes_limit")
    room = f" of {limit / _GIB:.1f}" if limit else ""
    host = f" and {waiting / _GIB:.2f} of its host" if waiting else ""
    text = f"memory: parameters and optimizer take {held / _GIB:.2f} GiB{room} of a device{host}; "
    text += f"what programs take besides: {command('plan')}"
    yield "memory", text, {"state_bytes": held, "host_bytes": waiting, "device_bytes": limit}
    if every := settings.checkpoint.verify_replicas_every:
        text = f"replicas: {_replicas(state)} held by several devices, compared every {every} steps"
        yield "replicas", text, {"every": every}
    known = {"steps": total_steps, "batch": settings.data.global_batch_size}
    yield "steps", f"steps: {total_steps:,} of {_batch(settings)}", known
    text, known = _budgets(settings)
    yield "budgets", f"budgets: {text}", known
    changed = [*differences(settings.plain)]
    if changed:
        text = f"differs from the recipe of size={settings.size} (config.yaml) in:\n  "
        yield "changed", text + ", ".join(changed), {"keys": changed}
    yield "folder", f"folder: {settings.workdir}", {"workdir": settings.workdir}


def closing(settings: TrainSettings) -> Iterator[Fact]:
    """Where everything lies, and the next command."""
    folder = settings.workdir
    names = ["checkpoints/", "metrics.jsonl", "config.yaml"]
    names += [f"{name}/" for name in ("rollouts", "tensorboard") if (folder / name).exists()]
    yield "files", f"{folder} holds {', '.join(names)}", {"workdir": folder, "names": names}
    page = f"{command('report')} --workdir {folder}"
    yield "report", f"its page: {page}", {"command": page}
    program, recipe, data = "evaluate", "eval", "eval.file"
    if isinstance(settings, SftSettings):
        program, recipe, data = "train_grpo", "grpo", "data.train"
    after = (
        f"{command(program)} --config={recipe}:size={settings.size} --workdir=... "
        f"--config.hf_dir={settings.hf_dir} --config.init_from={folder} --config.{data}=..."
    )
    yield "next", f"next: {after}", {"command": after}


def _batch(settings: TrainSettings) -> str:
    size = settings.data.global_batch_size
    if isinstance(settings, GrpoSettings):
        updates = settings.grpo.updates_per_rollout * settings.grpo.epochs
        return f"{size} prompts x {settings.sampling.group_size} samples, {updates} updates each"
    return f"{size} conversations"


def _budgets(settings: TrainSettings) -> tuple[str, dict[str, int]]:
    """In words, and as values."""
    if isinstance(settings, SftSettings):
        tokens = settings.data.tokens
        text, held = f"conversations of {tokens:,} tokens", {"tokens": tokens}
    else:
        prompt, answer = settings.data.prompt_tokens, settings.sampling.max_new_tokens
        text = f"prompts of {prompt:,} tokens, answers of {answer:,}"
        held = {"prompt_tokens": prompt, "max_new_tokens": answer}
    pixels = settings.max_pixels
    return f"{text}, images of {pixels:,} pixels", held | {"max_pixels": pixels}


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _dtype(tree: Any) -> str:
    return ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)}))


def _replicas(state: TrainState) -> str:
    """What part of the state a comparison of replicas sees."""
    several = sum(x.nbytes for x in held_by_several(state).values())
    share = several / sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return f"{share:.2%} of the state" if several else "nothing (mesh.data=1)"


def _held(state: TrainState, *, offloaded: bool) -> int:
    """Bytes of the state on the first device of this process, or of its part in host memory."""
    first = jax.local_devices()[0]
    shards = (
        shard
        for leaf in jax.tree.leaves(state)
        for shard in getattr(leaf, "addressable_shards", ())
    )
    own = (shard.data for shard in shards if shard.device == first)
    return sum(x.nbytes for x in own if (x.sharding.memory_kind == sharding.HOST) == offloaded)
