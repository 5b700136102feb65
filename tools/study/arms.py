"""What is compared: arms, how much of everything, and the commands of one arm."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from configs import grpo
from srpo_jax.run.resume import flat_config
from tools.demo import __main__ as demo
from tools.demo.stages import Stage
from tools.demo.tasks import Task


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method: where it starts, and what its RL sets. Without overrides there is no RL."""

    name: str
    what: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = "five"  # of STARTS
    prompt: str = "srpo"

    @property
    def missing_keys(self) -> list[str]:
        """Keys that it sets and this version does not have."""
        known = _known_keys()
        return [key for key in self.overrides if key not in known]


@functools.cache
def _known_keys() -> frozenset[str]:
    return frozenset(flat_config(grpo.get_config("size=tiny").to_dict()))


# SFT: what it learns from, and how. "mix" has one round where that is right; "masked" ones see
# wrong first answers and do not imitate them, as configs/sft.py's default is.
FIVE = {"data.train": "five.parquet"}
MIX = {"data.train": "mix.parquet", "data.target": "adaptive"}
MASKED = {"data.mask_wrong_first": "true"}
STARTS = {"five": FIVE, "mix": MIX, "masked": FIVE | MASKED, "masked_mix": MIX | MASKED}
SRPO, GRPO, SEGMENTS = (demo.ARMS[name] for name in ("SRPO", "GRPO", "segments"))
FORKS = GRPO | {"sampling.forks": 2}
VERDICT = {"reward.verdict": 0.25}
# The price is a trade: of a right answer 10 tokens leave 0.85 and 30 leave 0.55, so that to reflect
# is worth it where the first answer is right in fewer than about six of ten (it mends 85 %).
# "centred" keeps that trade; the end token is judged among samples of the same first verdict.
ON_DEMAND = GRPO | {
    "data.prompt": "adaptive",
    "reward.token_price": 0.015,
    "grpo.advantage": "centred",
    "grpo.credit": "segments",
}
# First answers are paid themselves, so that they get better while most responses still reflect.
BOTH_PAID = ON_DEMAND | {"reward.first": 1.0}
ARMS = {
    arm.name: arm
    for arm in (
        Arm("sft", "no RL"),
        Arm("grpo", "final answer and format", GRPO),
        Arm("srpo", "the paper's reward", SRPO),
        Arm("openrlhf", "the authors' OpenRLHF reward", {"reward.profile": "openrlhf"}),
        Arm("balanced", "profile `balanced`", {"reward.profile": "balanced"}),
        Arm(
            "normalised",
            "the paper's, `grpo.normalise_terms`",
            SRPO | {"grpo.normalise_terms": True},
        ),
        Arm("segments", "`balanced`, `grpo.credit=segments`", SEGMENTS),
        Arm("forks", "GRPO's, `sampling.forks=2`", FORKS),
        Arm("forks_verdict", "forks, `reward.verdict=0.25`", FORKS | VERDICT),
        Arm("verdict", "GRPO's, `reward.verdict=0.25`", GRPO | VERDICT),
        Arm("segments_verdict", "`segments`, `reward.verdict=0.25`", SEGMENTS | VERDICT),
        Arm("sft_mix", "no RL, SFT with one-round records", start="mix", prompt="adaptive"),
        Arm(
            "adaptive",
            "on demand, SFT with one-round records",
            ON_DEMAND,
            start="mix",
            prompt="adaptive",
        ),
        Arm(
            "adaptive_first",
            "on demand, `reward.first=1`, SFT with one-round records",
            BOTH_PAID,
            start="mix",
            prompt="adaptive",
        ),
        Arm("adaptive_five", "on demand, SFT on five blocks", ON_DEMAND, prompt="adaptive"),
        Arm("sft_masked", "no RL, wrong first answers not imitated", start="masked"),
        Arm("grpo_masked", "GRPO's, wrong first answers not imitated in SFT", GRPO, start="masked"),
        Arm(
            "segments_masked",
            "`segments`, wrong first answers not imitated in SFT",
            SEGMENTS,
            start="masked",
        ),
        Arm(
            "adaptive_masked",
            "`adaptive`, wrong first answers not imitated in SFT",
            ON_DEMAND,
            start="masked_mix",
            prompt="adaptive",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything; ``plan`` is the demo's, of which the study takes less."""

    plan: demo.Plan
    samples: int = 4  # of a test problem at temperature 1


# RL data for arms whose steps cost less than GRPO's: twice the problems of ``rl_steps``.
FULL = Budget(demo.Plan(rl_steps=50, test=512, validation=512))
QUICK = Budget(
    demo.Plan(
        sft_steps=6, sft_batch=8, rl_steps=2, rl_prompts=4, group_size=4, test=16, validation=16
    ),
    samples=2,
)
ONE_ROUND_SHARE = 0.5  # of the right first answers in the "mix": a response ends there


def sizes(plan: demo.Plan) -> dict[str, int]:
    """Problems of each split."""
    return plan.sizes | {"rl": 2 * plan.rl_steps * plan.rl_prompts}


def _compiled(folder: Path) -> dict[str, Any]:
    """The programs of all tasks and seeds in one place: most differ in numbers only."""
    return {"compilation_cache_dir": folder.parents[1] / "compiled"}


def start_stage(folder: Path, seed: int, plan: demo.Plan, task: Task, start: str) -> Stage:
    """SFT of one of `STARTS`; arms share it."""
    stage, out = demo.sft_stage(folder, seed, plan, task), folder / start
    chosen = STARTS[start]
    own: dict[str, Any] = chosen | {
        "data.train": folder / "data" / chosen["data.train"],
        "export_hf_dir": out / "hf",
    }
    overrides = stage.overrides | own | {"checkpoint.every": 100} | _compiled(folder)
    return dataclasses.replace(stage, workdir=out, done=out / "hf", overrides=overrides)


def rl_stage(folder: Path, seed: int, plan: demo.Plan, task: Task, arm: Arm, steps: int) -> Stage:
    """RL of an arm to ``steps``; it goes on from what its folder holds."""
    stage, out = demo.rl_stage(folder, seed, plan, "GRPO", task), folder / arm.name
    overrides = stage.overrides | {
        "hf_dir": folder / arm.start / "hf",
        "steps": steps,
        # As many steps as GRPO's compute allows are not known before: no schedule by their number.
        "optim.schedule": "constant",
        "checkpoint.every": 10,
        "rollouts.every": 0,
        "export_hf_dir": "",
    }
    overrides |= arm.overrides | _compiled(folder)
    return dataclasses.replace(stage, workdir=out, steps=steps, overrides=overrides)


def eval_stage(
    folder: Path, seed: int, budget: Budget, task: Task, arm: Arm, mode: str, split: str
) -> Stage:
    """An arm's held-out problems: several samples of each at temperature 1, or greedy."""
    plan = budget.plan
    stage = demo.eval_stage(folder, seed, plan, arm.name, mode, split, task)
    own: dict[str, Any] = {"hf_dir": folder / arm.start / "hf", "data.prompt": arm.prompt}
    if arm.overrides:
        own["init_from"] = folder / arm.name
    if mode == "sampled":
        own["eval.samples"] = budget.samples
    return dataclasses.replace(stage, overrides=stage.overrides | own | _compiled(folder))
