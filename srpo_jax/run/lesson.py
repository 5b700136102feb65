"""What the updates of a step learn from, and how long it is."""

import dataclasses

import numpy as np

from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.lanes import family_runs
from srpo_jax.run.rollout import Round
from srpo_jax.structs import Experience


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the updates of a step take: global arrays, and this process's part on the host."""

    experience: Experience
    local: Experience
    rounds: list[Round]  # of sampling that it was made from
    age: np.ndarray  # [P] int32 of this process: how many steps ago each group was sampled
    dropped: int = 0  # groups of this process that had become too old


def lengths_of(local: Experience) -> np.ndarray:
    """[P, G] tokens of the completions, 0 of fillers."""
    lengths_PG = np.asarray(local.rollout.completion_mask).sum(-1)
    return lengths_PG * np.asarray(local.batch.valid)[:, None]


def lengths_to_learn(local: Experience, cfg: GrpoConfig) -> np.ndarray:
    """[P, G] tokens of the completions that have a weight in the update, 0 of all others; or their
    `family_runs`, where a first round is computed once."""
    wanted_PG = np.asarray(local.weight)[:, None] != 0
    if cfg.mask_truncated:
        wanted_PG = wanted_PG & np.asarray(local.rollout.finished)
    lengths_PG = lengths_of(local) * wanted_PG
    return family_runs(lengths_PG, local.verdict.first_end, cfg.forks) if cfg.shares else lengths_PG
