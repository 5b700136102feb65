"""Runs that train adapters: where base and adapter are, whether they belong together."""

import dataclasses
import functools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srpo_jax.data.files import absolute
from srpo_jax.data.hf_folder import ADAPTER, how_to_get, model_folder
from srpo_jax.model import peft, sharding
from srpo_jax.model.config import Lora, ModelConfig
from srpo_jax.model.peft import abstract_adapters
from srpo_jax.model.qwen2_5_vl import init_adapters
from srpo_jax.run import checkpoint, checksums, processes
from srpo_jax.run.sections import RunSettings
from srpo_jax.structs import Params, RunError


@dataclasses.dataclass(frozen=True)
class Weights:
    """Where the weights of a run come from: checkpoints or Hugging Face directories."""

    base: str  # "": hf_dir
    adapter: str = ""  # of a run that trained one, or of PEFT; "": none
    lora: Lora | None = None  # what that adapter is


def find_weights(settings: RunSettings, model: ModelConfig, source: str = "") -> Weights:
    """The weights that ``source``, init_from or hf_dir names; of a run its newest step.

    RunError where there are none, or an adapter that is not like the one that this run trains.
    """
    key, source = "" if source else "init_from=", source or settings.init_from
    if not source:
        return Weights("")
    if not absolute(source).exists():
        wanted = "a checkpoint, the --workdir of a run, or a Hugging Face model directory"
        raise RunError(f"{key}{source}: no such directory{how_to_get(source, wanted)}")
    if (absolute(source) / "config.json").is_file():
        folder = str(model_folder(source))
        same = settings.hf_dir and folder == str(model_folder(settings.hf_dir))
        return Weights("" if same else folder)
    if (absolute(source) / ADAPTER).is_file():
        found = Weights("", source, peft.describe(source, model.base))
    else:
        folder = checkpoint.find_params(source)
        meta = checkpoint.read_meta(folder)
        if key and folder != absolute(source):
            _tell_if_unfinished(f"{key}{source}", meta)
        if (lora := lora_of(meta)) is None:
            return Weights(str(folder))
        found = Weights(meta["base"]["path"], str(folder), lora)
    _check_like(found, model, key)
    return found


def _check_like(found: Weights, model: ModelConfig, key: str) -> None:
    """RunError unless ``model`` has no adapters, or such as were found."""
    held, lora = found.lora, model.lora
    if held is None or lora is None:
        return
    shapes = (abstract_adapters(model, one) for one in (held, lora))
    if next(shapes) != next(shapes) or held.scale != lora.scale:
        raise RunError(
            f"{key}{found.adapter}: has another adapter than this run trains: set "
            f"--config.lora.rank={held.rank} --config.lora.alpha={held.alpha} "
            f'--config.lora.targets="{held.targets}", or rank=0, which trains all weights'
        )


def origin_of(found: Weights, settings: RunSettings) -> str:
    """What a restart names to find the same weights, and a person reads."""
    return found.adapter or found.base or str(model_folder(settings.hf_dir))


def lora_of(meta: dict[str, Any]) -> Lora | None:
    """The adapter that a checkpoint holds, from the JSON beside it; None: it holds all weights."""
    if "base" not in meta:
        return None
    own = meta["config"]["lora"]
    return Lora(own["rank"], own["alpha"], tuple(own["targets"]), own.get("base_dtype", ""))


def load_adapter(found: Weights, model: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """The adapter that was found, else a fresh one of ``model``; float32, laid out to train."""
    shapes = abstract_adapters(model, found.lora or model.lora)
    layout = sharding.param_specs(shapes, mesh, "train")
    if not found.adapter:
        fresh = functools.partial(init_adapters, model)
        return jax.jit(fresh, out_shardings=layout)(jax.random.key(seed))
    if not (absolute(found.adapter) / ADAPTER).is_file():
        return checkpoint.load_params(found.adapter, layout, shapes, jnp.float32)
    read = peft.read_adapter(found.adapter, model.base)
    placed = {
        path: jax.make_array_from_callback(x.shape, layout[path], x.__getitem__)
        for path, x in read.items()
    }
    return checkpoint.own_buffers(placed)


def base_record(path: str, weights: Params) -> dict[str, Any]:
    """What a checkpoint says of the frozen weights that it does not hold."""
    sums = json.dumps(checksums.checksums(weights), sort_keys=True)
    dtypes = sorted({str(x.dtype) for x in weights.values()})
    return {"path": path, "dtype": ",".join(dtypes), "sum": zlib.crc32(sums.encode())}


def check_base(record: dict[str, Any], weights: Params, hf_dir: str) -> None:
    """RunError unless these are the weights that the adapter was trained on."""
    if base_record(record["path"], weights) != record:
        raise RunError(
            f"{record['path'] or hf_dir}: its weights are not those that the adapter of this run "
            "was trained on (checksum); put those back"
        )


def _tell_if_unfinished(named: str, meta: dict[str, Any]) -> None:
    """A word where the newest step of the run that was named is not its last one."""
    step, total = meta.get("step"), meta.get("total_steps")
    if step and total and step < total:
        processes.say(
            f"{named}: that run is not finished; these are the weights after step {step} of {total}"
        )
