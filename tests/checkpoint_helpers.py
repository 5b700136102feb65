"""The parameters of a checkpoint as they lie there."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from srpo_jax.run import checkpoint


def stored_params(path: Path) -> dict[str, np.ndarray]:
    """The parameters of any checkpoint as they are stored, on the host."""
    folder = checkpoint.find_params(path)
    stored = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / "params")).tree
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = checkpoint.load_params(folder, dict.fromkeys(stored, one), stored)
    return {name: np.asarray(x) for name, x in params.items()}
