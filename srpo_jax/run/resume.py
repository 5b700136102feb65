"""Is a resumed run the same run? Configurations as plain values, compared key by key."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from srpo_jax import RunError

# Keys that a resumed run may change: they do not enter the numbers, or only in the order of sums.
FREE = (
    "checkpoint",
    "compilation_cache_dir",
    "compile_guard",
    "compiler_defaults",
    "data.max_bad_share",
    "data.prompts_per_row",
    "data.timeout",
    "data.workers",
    "distributed",
    "eval",
    "export_hf_dir",
    "grading.workers",
    "grpo.logit_chunk",
    "log",
    "logit_chunk",
    "lora.export",
    "mesh",
    "model.remat",
    "optim.max_skipped",
    "preflight",
    "reward.judge.concurrency",
    "reward.judge.key_env",
    "reward.judge.max_calls",
    "reward.judge.url",
    "reward.timeout",
    "reward.workers",
    "rollouts.every",
    "sampling.concurrent_rows",
    "sampling.engine.concurrency",
    "sampling.engine.folder",
    "sampling.engine.key_env",
    "sampling.engine.timeout",
    "sampling.engine.url",
)
_MAY_GROW = ("steps", "epochs")
_PER_PROCESS = ("distributed", "compilation_cache_dir")  # may differ between processes


def config_hash(plain: dict[str, Any]) -> str:
    """What all processes must hold in common, in 16 hexadecimal digits."""
    shared = {k: v for k, v in flat_config(plain).items() if not below(k, _PER_PROCESS)}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def check_config(saved: dict[str, Any], current: dict[str, Any], allowed: str = "") -> None:
    """Raise RunError naming each key that would make the resumed run another run.

    Args:
        saved: the config of the checkpoint.
        current: of this run. It may have more steps or epochs.
        allowed: keys or sections that may differ, between commas; "True" stands for all.
    """
    old, new = flat_config(saved), flat_config(current)
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    for name in names:
        if name != "True" and not any(below(key, [name]) for key in new):
            raise RunError(f"checkpoint.allow_changes={allowed}: there is no key {name}")
    lone = old.keys() ^ new.keys()
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        # What one of two versions does not have, and is off in the other, is off in both.
        and not (key in lone and not (old.get(key) or new.get(key)))
        and not below(key, (*FREE, *names))
        and not (key in _MAY_GROW and 0 < (old.get(key) or 0) < (new.get(key) or 0))
    ]
    if changed and "True" not in names:
        shown = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        if "data.global_batch_size" in changed:
            shown += " (devices, processes and data.prompts_per_row may change, the batch may not)"
        raise RunError(
            f"the checkpoint to resume was written under another config: {shown}. Set these back, "
            f"use a new --workdir, or pass --config.checkpoint.allow_changes={','.join(changed)}"
        )


def moved_from(meta: dict[str, Any], mesh: dict[str, Any]) -> str:
    """What to say where a checkpoint is of other processes, devices or another mesh; "" else."""
    import jax  # noqa: PLC0415  (what reads configurations alone need not wait for it)

    now = {"processes": jax.process_count(), "devices": jax.device_count(), "mesh": mesh}
    was = now | {n: value for n, value in (meta["config"] | meta).items() if n in now}
    changed = [
        f"{name} were {was[name]}, are {now[name]}" for name in now if was[name] != now[name]
    ]
    if not changed:
        return ""
    return (
        f"going on elsewhere ({'; '.join(changed)}): the same batches, and the same losses but for "
        "the order of sums"
    )


def allows(allowed: str, key: str) -> bool:
    """Whether ``checkpoint.allow_changes`` covers a config key."""
    names = [name.strip() for name in allowed.split(",")]
    return "True" in names or below(key, names)


def below(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted config key is one of ``names`` or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted keys; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flat_config(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
