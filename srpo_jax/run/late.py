"""A rollout that is one step late: sampled before the update of the step before its own.

So it is graded while the device is busy with that update. It lies in the checkpoint meanwhile, with
the place in the data from which its prompts are drawn again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from srpo_jax.data.loader import LoadedBatch
from srpo_jax.model import sharding
from srpo_jax.run import processes
from srpo_jax.run.host_state import Host
from srpo_jax.run.rollout import Generator, Graded, Round, Sampled
from srpo_jax.structs import Batch, Params, Rollout, Verdict

SHOWN = ("text", "first_answer", "final_answer")  # of a sample's details, in rollouts/


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A graded round for the next step."""

    one: Round
    step: int  # whose updates take it
    data: dict[str, Any]  # place in the data before its prompts

    def state(self) -> Host:
        """JSON values and arrays from which `Stored` makes the same round."""
        sampled, graded = self.one.sampled, self.one.graded
        values = {
            "step": self.step,
            "prompts": _prompts(sampled, sampled.local),
            "details": [{name: one[name] for name in SHOWN} for one in graded.details],
            "failures": [*graded.failures.items()],
            "idle_share": sampled.idle_share,
            "forks": sampled.forks,
        }
        parts = {"rollout": vars(graded.rollout), "verdict": vars(graded.verdict)}
        arrays = {
            f"late/{part}/{name}": np.asarray(x)
            for part, held in parts.items()
            for name, x in held.items()
            if x is not None
        }
        return {"late": values}, arrays


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a checkpoint holds of a `Waiting` round."""

    values: dict[str, Any]
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, host: Host) -> "Stored | None":
        """Of what a process kept; None where nothing waited."""
        return cls(host[0]["late"], host[1]) if "late" in host[0] else None

    def fits(self, loaded: LoadedBatch, step: int) -> bool:
        """Whether it is of this step, and of the very prompts that were drawn (collective)."""
        same = self.values["prompts"] == _prompts(loaded, loaded.arrays)
        return not processes.any_true([not same or self.values["step"] != step])[0]

    def round(
        self, loaded: LoadedBatch, params: Params, generator: Generator
    ) -> tuple[Sampled, Graded]:
        """The round again, with its prompts' images encoded anew."""
        rollout = Rollout(**self._part("rollout"))
        graded = Graded(
            verdict=Verdict(**self._part("verdict")),
            details=self.values["details"],
            rollout=rollout,
            failures={int(p): reason for p, reason in self.values["failures"]},
        )
        batch, features = generator.encode(params, loaded.arrays)
        on_mesh = sharding.to_global(rollout, generator.parts.mesh)
        held = (loaded.records, loaded.slots, loaded.arrays, batch, features, on_mesh)
        return Sampled(*held, self.values["idle_share"], self.values["forks"]), graded

    def _part(self, part: str) -> dict[str, np.ndarray]:
        prefix = f"late/{part}/"
        return {n.removeprefix(prefix): x for n, x in self.arrays.items() if n.startswith(prefix)}


def _prompts(held: LoadedBatch | Sampled, local: Batch) -> list[Any]:
    """Who is asked at which of how many places, as JSON values."""
    return [[record.id for record in held.records], held.slots.tolist(), len(local.valid)]
