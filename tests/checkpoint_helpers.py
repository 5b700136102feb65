"""Checkpoints of parameters alone: written at once (tools.convert_hf does it in pieces), read."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from srpo_jax.run import checkpoint
from srpo_jax.run.checkpoint import FORMAT
from srpo_jax.structs import Params


def save_params(path: Path, params: Params, config_dict: dict[str, Any]) -> None:
    """Write parameters (sharded or not), with JSON values beside them, to a new directory."""
    record = {"format": FORMAT, "config": config_dict, "processes": 1}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        saved = ocp.args.StandardSave(dict(params))
        meta = ocp.args.JsonSave(record)
        writer.save(path.resolve(), args=ocp.args.Composite(params=saved, meta=meta))


def stored_params(path: Path) -> dict[str, np.ndarray]:
    """The parameters of any checkpoint as they are stored, on the host."""
    folder = checkpoint.find_params(path)
    stored = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / "params")).tree
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = checkpoint.load_params(folder, dict.fromkeys(stored, one), stored)
    return {name: np.asarray(x) for name, x in params.items()}
