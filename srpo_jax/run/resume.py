"""Is a resumed run the same run? Configurations as plain values, compared key by key."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from srpo_jax.structs import RunError

# Keys that a resumed run may change: they do not enter the numbers.
FREE = (
    "checkpoint",
    "compilation_cache_dir",
    "compile_guard",
    "data.max_bad_share",
    "data.workers",
    "distributed",
    "eval",
    "export_hf_dir",
    "grading.workers",
    "log",
    "rollouts",
)
_PER_PROCESS = ("distributed", "compilation_cache_dir")  # may differ between processes


def config_hash(plain: dict[str, Any]) -> str:
    """What all processes must hold in common, in 16 hexadecimal digits."""
    shared = {k: v for k, v in flat_config(plain).items() if not below(k, _PER_PROCESS)}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def check_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise RunError naming each key that would make the resumed run another run."""
    old, new = flat_config(saved), flat_config(current)
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not below(key, FREE)
    ]
    if changed:
        raise RunError(
            f"the checkpoint to resume was written under another config: {'; '.join(changed)}. Set "
            "these back, use a new --workdir, or pass --config.checkpoint.allow_changes=True"
        )


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
