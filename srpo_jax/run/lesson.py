"""What the updates of a step learn from, and what is told about it."""

import dataclasses
import itertools

import jax
import numpy as np

from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.lanes import family_runs, slots_and_tokens
from srpo_jax.run import processes
from srpo_jax.run.diagnostics import Counts, added_up, rates_of
from srpo_jax.run.metrics import ModelFlops, merge_metrics
from srpo_jax.run.parts import Parts
from srpo_jax.run.rollout import Round, vision_work
from srpo_jax.structs import Batch, Experience, Lanes

Packed = list[list[Lanes | None]]  # of each update, of each of its micro-batches


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


# --- what is told ----------------------------------------------------------------------------


def row_of(
    lesson: Lesson,
    updates: list[dict[str, np.ndarray]],
    packed: Packed,
    counts: Counts,
    parts: Parts,
    pending: int,
) -> tuple[dict[str, float], str]:
    """One row: what the samples were like (before the filter), and what the updates did; and why a
    group had no reward, or "" (collective). ``pending`` groups wait in this process.
    """
    rounds = lesson.rounds
    samples = merge_metrics([dict(jax.device_get(r.scores[2])) for r in rounds], "samples")
    samples |= rates_of(samples)
    samples["detection_margin"] = samples["detection_rate"] - samples["false_alarm_rate"]
    samples["accuracy/net"] = samples["accuracy/final"] - samples["accuracy/first"]
    sampled_names = set(samples)
    learned = merge_metrics(updates, "trained_tokens") if updates else {}
    slots, tokens = slots_and_tokens(itertools.chain(*packed))
    own = {
        "slots": slots,
        "tokens": tokens,
        "kept": sum(float(r.weight[r.sampled.slots].sum()) for r in rounds),
        "valid": sum(len(r.sampled.slots) for r in rounds),
        "used": int(np.asarray(lesson.local.weight).sum()),
        "age": int(lesson.age.sum()),
        "oldest": int(lesson.age.max()),
        "filter/pending_groups": pending,
        "filter/dropped_groups": lesson.dropped,
        "reward/failed": sum(len(r.graded.failures) for r in rounds),
        **parts.verifier.counts(),
    }
    why = [reason for r in rounds for reason in r.graded.failures.values()]
    everyone = processes.once(processes.gather((own, counts, why[:1])), parts.mesh)
    held, counted, said = zip(*everyone, strict=True)
    total = {name: sum(one[name] for one in held) for name in own}
    row = {
        **samples,
        **{k: v for k, v in learned.items() if k not in sampled_names},
        "updates": len(updates),
        **{name: value for name, value in total.items() if "/" in name},
        **rates_of(added_up(counted)),
        "filter/kept_share": total["kept"] / max(total["valid"], 1),
        "update/padding_share": 1 - total["tokens"] / max(total["slots"], 1),
        "filter/rounds": len(rounds),
        "filter/age_mean": total["age"] / max(total["used"], 1),
        "filter/age_max": max(one["oldest"] for one in held),
        "sampling/idle_share": sum(r.sampled.idle_share for r in rounds) / len(rounds),
    }
    return row, next(itertools.chain(*said), "")


def work_of(
    lesson: Lesson,
    learned_PG: np.ndarray,
    cfg: GrpoConfig,
    parts: Parts,
    *,
    refers: bool,
    trains_vision: bool,
) -> tuple[float, float]:
    """Tokens sampled and model FLOPs of a step, this process's part; ``refers``: to a reference."""
    # The update is a forward and a backward pass, log-probs are forward passes.
    both, views = parts.model.train_passes, 1 + bool(cfg.perception_coef)
    updates = both * cfg.epochs * views
    flops = updates * forward_work(parts.flops, lesson.local.batch, learned_PG)[1]
    own = 0 if cfg.epochs > 1 else 1 / cfg.updates_per_rollout
    passes = 1 - own if cfg.updates > 1 else 0
    passes += refers
    flops += passes * forward_work(parts.flops, lesson.local.batch, lengths_of(lesson.local))[1]
    tokens = 0.0
    for one in lesson.rounds:
        count, sampling = forward_work(parts.flops, one.local.batch, lengths_of(one.local))
        vision = parts.flops.vision(*vision_work(one.sampled.local))
        tokens += count
        flops += sampling + vision * views * (both if trains_vision else 1)
    return tokens, flops


def forward_work(flops: ModelFlops, batch: Batch, lengths_PG: np.ndarray) -> tuple[float, float]:
    """Tokens, and FLOPs of the decoder, for one pass over completions and their prompts."""
    some = lengths_PG.reshape(len(lengths_PG), -1).any(1)
    prompts = np.asarray(batch.lengths, np.float64)[some]
    lengths = lengths_PG[some].astype(np.float64)
    prefix = prompts.reshape(-1, *[1] * (lengths.ndim - 1))
    if lengths.ndim == 3:  # what each sample adds comes behind the first round of its family
        prefix = prefix + lengths[..., :1] * (np.arange(lengths.shape[2]) > 0)
    total = flops.text(prompts) + flops.text(lengths, prefix, head_tokens=lengths.sum())
    return float(prompts.sum() + lengths.sum()), total
