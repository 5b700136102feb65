"""Settings of a recipe that fit a topology, by estimated step time; and what would make one fit.

Memory is counted (tools/lib/counted.py) and time estimated, so that hundreds of settings take
seconds; `tools.plan` compiles the best few.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from srpo_jax.model import sharding
from srpo_jax.run.resume import flat_config
from srpo_jax.structs import RunError
from tools.lib.assumed import Lengths
from tools.lib.counted import Held, count
from tools.lib.planned import Recipe, read_recipe
from tools.lib.roofline import Rates
from tools.lib.step_time import Estimate, cost, estimate
from tools.lib.topologies import Topology

Changes = Mapping[str, Any]  # keys of the configuration -> values

MOST_TENSOR = 8  # devices of a node, which share fast links
ROWS = (4, 2, 1)  # prompts or conversations per row; more of them are fewer, larger programs
REMAT = ("dots", "block", "offload")  # the less is computed twice, the faster
CONCURRENT = (0, 32, 16, 8, 4, 2)  # rows that are decoded at a time; 0: all
LORA = {"lora.rank": 16, "model.param_dtype": "bfloat16"}
# What may make a plan fit, in the order of docs/memory.md: first what costs nothing.
REMEDIES: tuple[Changes, ...] = (
    *({"sampling.concurrent_rows": rows} for rows in CONCURRENT[1:]),
    {"data.prompts_per_row": 1},
    *({"mesh.fsdp": -1, "mesh.tensor": parts} for parts in (2, 4, 8)),
    {"model.remat": "offload"},
    {"optim.offload": True},
    {"model.param_dtype": "bfloat16"},
    {"optim.moment_dtype": "bfloat16"},
    {"optim.moment_dtype": "int8"},
    LORA,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to run the recipe: what it changes, what it holds and how long a step takes."""

    changes: Changes
    recipe: Recipe
    held: Held
    found: Estimate

    def seconds(self, rates: Rates) -> float:
        """Of a step."""
        return sum(phase.seconds(rates)[0] for phase in self.found.phases)


def changed(config: Any, changes: Changes) -> Any:
    """A copy of the configuration. Patch budgets follow ``data.prompts_per_row``."""
    out = copy.deepcopy(config)
    rows, before = changes.get("data.prompts_per_row"), config.data.prompts_per_row
    if rows and rows != before:
        budgets = tuple(-(-n * rows // before) for n in config.data.patch_budgets)
        changes = {**changes, "data.patch_budgets": budgets}
    out.update_from_flattened_dict(dict(changes))
    return out


def overrides(config: Any, changes: Changes) -> str:
    """The changes as words of a command line; of values that the configuration has, none."""
    before, after = (flat_config(c.to_dict()) for c in (config, changed(config, changes)))
    new = {key: value for key, value in after.items() if before[key] != value}
    texts = {k: f'"{tuple(v)}"' if isinstance(v, list) else f"{v}" for k, v in new.items()}
    return " ".join(f"--config.{key}={text}" for key, text in texts.items())


def ranking(
    config: Any, found: Sequence[Setting], rates: Rates, price: float | None
) -> Iterator[str]:
    """Lines: each setting with its memory, time, cost and what it changes."""
    costs = f" {'1,000 steps':>12}" if price else ""
    yield f"{'':3} {'data,fsdp,tensor':>16} {'GiB':>6} {'seconds':>8}{costs}  changes"
    for number, setting in enumerate(found, 1):
        mesh, seconds = setting.recipe.mesh, setting.seconds(rates)
        shape = ",".join(map(str, mesh.shape.values()))
        told = f" {cost(seconds, mesh.size, price):12,.0f}" if price else ""
        own = {key: n for key, n in setting.changes.items() if not key.startswith("mesh.")}
        words = overrides(config, own).replace("--config.", "") or "none but the mesh"
        yield f"{number:3} {shape:>16} {setting.held.most:6.1f} {seconds:8.1f}{told}  {words}"


def recipe_of(config: Any, topology: Topology, changes: Changes) -> Recipe:
    """The recipe with ``changes`` on the topology; ValueError or RunError where it cannot run."""
    new = changed(config, changes)
    sizes = (new.mesh.data, new.mesh.fsdp, new.mesh.tensor)
    return read_recipe(new, sharding.make_mesh(*sizes, devices=topology.devices))


def settings(
    config: Any, topology: Topology, usable: float, lengths: tuple[Lengths | None, Lengths | None]
) -> Iterator[Setting]:
    """Those that fit into ``usable`` GiB by count.

    Of each mesh, number of prompts per row and choice of LoRA there is one: with the least that is
    computed twice, and the most rows in the sampler, that fit.
    """
    adapters: tuple[Changes, ...] = ({},) if config.lora.rank else ({}, LORA)
    rows = sorted({*ROWS, config.data.prompts_per_row}, reverse=True)
    for mesh, adapter, per_row in itertools.product(meshes(topology), adapters, rows):
        base = {**mesh, **adapter, "data.prompts_per_row": per_row}
        found = _fitting(config, topology, usable, base)
        # Where there are fewer prompts than a row would take, fewer are the same setting.
        if found and found[1].shapes.sequences // found[1].shapes.rows == per_row:
            yield Setting(*found, estimate(found[1], *lengths))


def meshes(topology: Topology) -> Iterator[Changes]:
    """Data, fsdp and tensor in powers of two; fsdp stays within a slice."""
    devices, slices = len(topology.devices), topology.slices
    tensor = 1
    while tensor <= min(MOST_TENSOR, devices // slices):
        data = slices
        while data * tensor <= devices:
            if devices % (data * tensor) == 0:
                fsdp = devices // (data * tensor)
                yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
            data *= 2
        tensor *= 2


def _fitting(
    config: Any, topology: Topology, usable: float, base: Changes
) -> tuple[Changes, Recipe, Held] | None:
    on_cpu = topology.devices[0].platform == "cpu"
    concurrent = CONCURRENT if "grpo" in config else (0,)
    for remat in REMAT[:2] if on_cpu else REMAT:
        for rows in concurrent:
            changes = {**base, "model.remat": remat}
            changes |= {"sampling.concurrent_rows": rows} if rows else {}
            try:
                recipe = recipe_of(config, topology, changes)
            except (ValueError, RunError):  # heads or prompts that this mesh cannot divide
                return None
            held = count(recipe)
            if held.most <= usable:
                return changes, recipe, held
            if held.updating > usable:
                break
    return None


def remedies(config: Any, topology: Topology, usable: float, beyond: float) -> list[str]:
    """Changes after which the plan should fit, as overrides; two together where none is enough.

    ``beyond``: GiB that compiled programs were found to need more than the count.
    """
    known = flat_config(config.to_dict())

    def fits(changes: Changes) -> bool:
        if not known.keys() >= changes.keys() or not overrides(config, changes):
            return False
        try:
            return count(recipe_of(config, topology, changes)).most + beyond <= usable
        except (ValueError, RunError):
            return False

    for number in (1, 2):
        found: dict[tuple[str, ...], str] = {}  # of the same keys the mildest change
        for together in itertools.combinations(REMEDIES, number):
            changes = {key: value for one in together for key, value in one.items()}
            if (keys := tuple(sorted(changes))) not in found and fits(changes):
                found[keys] = overrides(config, changes)
        if found:
            return [*found.values()]
    return []
