"""A checkpoint of parameters alone, written at once; tools.convert_hf writes its like in pieces."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from srpo_jax.run.checkpoint import FORMAT
from srpo_jax.structs import Params


def save_params(path: Path, params: Params, config_dict: dict[str, Any]) -> None:
    """Write parameters (sharded or not), with JSON values beside them, to a new directory."""
    record = {"format": FORMAT, "config": config_dict, "processes": 1}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        saved = ocp.args.StandardSave(dict(params))
        meta = ocp.args.JsonSave(record)
        writer.save(path.resolve(), args=ocp.args.Composite(params=saved, meta=meta))
