"""One batch of prompts to graded completions: encode images, sample, grade.

Used by the RL loop and by every evaluation. Images are encoded once for a prompt, and their
features serve the sampler and, where the tower is frozen, every later pass of the step.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from srpo_jax.data.fields import Record
from srpo_jax.data.files import write_jsonl
from srpo_jax.data.loader import LoadedBatch
from srpo_jax.learn import grpo
from srpo_jax.learn.state import relayout
from srpo_jax.model import sharding
from srpo_jax.rewards.answers import Question, tolerance_of
from srpo_jax.rewards.grade import grade
from srpo_jax.rewards.profiles import Profile
from srpo_jax.run import processes
from srpo_jax.run.feed import prompt_keys
from srpo_jax.run.own import OwnTerms
from srpo_jax.run.parts import Parts
from srpo_jax.run.trackers import EXAMPLES, Example
from srpo_jax.sampling.sampler import Sampler, SamplingConfig
from srpo_jax.structs import BLOCKS, Batch, Experience, Params, Rollout, Verdict


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A batch of prompts with its completions: this process's part, and global arrays."""

    records: Sequence[Record]
    slots: np.ndarray  # [len(records)] which of this process's prompts record i is
    local: Batch  # host arrays
    batch: Batch  # without pixels, unless the tower that reads them is trained
    features: jax.Array | None
    rollout: Rollout
    idle_share: float = 0.0  # of the sampler's slots and steps
    forks: int = 1  # samples of a family, one after the other
    age: int = 0  # steps since the policy was that of the weights that drew


@dataclasses.dataclass(frozen=True)
class Graded:
    """What grading found for this process's P prompts, as numpy arrays."""

    verdict: Verdict  # [P, G]
    details: list[dict[str, Any]]  # of each sample, prompt after prompt
    rollout: Rollout  # [P, G, R], this process's part
    failures: dict[int, str] = dataclasses.field(default_factory=dict)  # prompts without a reward

    @property
    def rewarded(self) -> np.ndarray:
        """[P] bool: which prompts' samples have a reward."""
        return ~np.isin(np.arange(len(self.rollout.finished)), [*self.failures])


class Drawer(Protocol):
    """Draws samples in the sampler's place."""

    def __call__(self, params: Params, loaded: LoadedBatch, step: int) -> tuple[Rollout, int]:
        """This process's part of the rollout, and how many steps old its weights are."""
        ...


def with_ids(sampling: SamplingConfig, parts: Parts) -> SamplingConfig:
    """``sampling`` with the model's token ids."""
    return dataclasses.replace(
        sampling,
        eos_ids=parts.processor.eos_ids,
        pad_id=parts.processor.pad_id,
        forbidden_ids=parts.forbidden_ids,
    )


class Generator:
    """Samples and grades batches of one shape with one set of sampling parameters."""

    def __init__(
        self,
        parts: Parts,
        sampling: SamplingConfig,
        profile: Profile,
        *,
        keep_pixels: bool = False,
        own: OwnTerms | None = None,
        engine: Drawer | None = None,
    ):
        """Token ids of ``sampling`` are set to the model's.

        ``keep_pixels`` leaves ``Sampled.batch.vision`` for an update that trains the tower; ``own``
        are terms for ``Verdict.own``; ``engine`` draws in the sampler's place.
        """
        self.parts, self._profile, self._keep_pixels = parts, profile, keep_pixels
        self._own, self._engine = own if own and own.names else None, engine
        text = parts.token_text.token_bytes
        self._sampler = Sampler(parts.model, with_ids(sampling, parts), parts.mesh, text)
        self._sampler.between_segments = parts.stop.between_phases

    def sample(self, params: Params, loaded: LoadedBatch, *, seed: int, step: int) -> Sampled:
        """Encode the images of a batch and sample its group of completions."""
        local, parts = loaded.arrays, self.parts
        batch, features = self.encode(params, local)
        place = (loaded.records, loaded.slots, local, batch, features)
        if self._engine:
            drawn, age = self._engine(params, loaded, step)
            return Sampled(*place, sharding.to_global(drawn, parts.mesh), age=age)
        keys = prompt_keys(loaded)
        # Alive until the next update donates ``params``.
        fit = relayout(params, parts.mesh, dtype=parts.model.dtype, lora=parts.model.lora)
        rollout = self._sampler.generate(fit, batch, features, keys, seed=seed, step=step)
        return Sampled(*place, rollout, self._sampler.idle_share, self._sampler.sampling.forks)

    def encode(self, params: Params, local: Batch) -> tuple[Batch, jax.Array | None]:
        """This process's host arrays -> the global batch and the features of its images."""
        batch = sharding.to_global(local, self.parts.mesh)
        if batch.vision is None:
            return batch, None
        features = self.parts.encode_step(params, batch.vision)
        return (batch if self._keep_pixels else batch.replace(vision=None)), features

    def grade(self, sampled: Sampled) -> Graded:
        """Grade this process's completions on the host; fillers get a verdict of all wrong."""
        rollout = processes.to_local(sampled.rollout)
        prompts = rollout.completions.shape[0]
        questions = [Question("0")] * prompts
        for record, slot in zip(sampled.records, sampled.slots, strict=True):
            tolerance = tolerance_of(record, self.parts.grading.tolerance)
            questions[slot] = Question(record.answer, record.choices, tolerance)
        verdict, details = grade(
            rollout.completions,
            rollout.completion_mask,
            questions,
            token_text=self.parts.token_text,
            verifier=self.parts.verifier,
            profile=self._profile,
        )
        group = rollout.completions.shape[1]
        if self._sampler.sampling.forks > 1:
            cut_PG = self._sampler.automaton.cuts(rollout.completions, rollout.completion_mask)
            verdict = dataclasses.replace(verdict, first_end=cut_PG)
        late = "answers were not compared before grading.step_timeout was over"
        ungraded = {at // group for at, one in enumerate(details) if not one["graded"]}
        failures = {int(p): late for p in sampled.slots if p in ungraded}
        if self._own:
            own_PGN, failed = self._own.of_round(sampled.records, sampled.slots, verdict, details)
            verdict, failures = dataclasses.replace(verdict, own=own_PGN), failures | failed
        return Graded(verdict, details, rollout, failures)

    def blocks(self, token_ids: np.ndarray, spans: dict[str, Any]) -> dict[str, str | None]:
        """The text of each block from its token span; None where it is missing."""
        return {
            name: None
            if spans[name] is None
            else self.parts.token_text.completion(token_ids[slice(*spans[name])]).decode()
            for name in BLOCKS
        }


@dataclasses.dataclass(frozen=True)
class Round:
    """One batch of prompts, sampled and graded."""

    sampled: Sampled
    graded: Graded
    weight: np.ndarray  # [P] of this process: 0 for groups that the filter leaves out
    scores: tuple[Any, ...]  # of score_step, on device

    @property
    def local(self) -> Experience:
        """This process's part, on the host."""
        return Experience(
            batch=self.sampled.local,
            rollout=self.graded.rollout,
            verdict=self.graded.verdict,
            weight=self.weight,
        )


def make_score_step(cfg: grpo.GrpoConfig, mesh: Mesh) -> Callable[..., Any]:
    """-> ``score_step(verdict, rollout, rewarded) -> (terms, advantages, metrics)`` of all samples.

    The same functions as in the update's ``prepare``, for the rollout files and for metrics that do
    not depend on which groups the update takes.
    """

    def score_step(verdict: Verdict, rollout: Rollout, rewarded_P: jax.Array):
        terms = grpo.reward_terms(cfg, verdict)
        counted_PG = jnp.broadcast_to(rewarded_P[:, None], terms.total.shape)
        advantages = grpo.credited(cfg, terms, verdict, counted_PG=counted_PG)
        return terms, advantages, grpo.rollout_metrics(terms, verdict, rollout, rewarded_P)

    rows, one = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.jit(score_step, out_shardings=(rows, rows, one))


def graded_samples(
    sampled: Sampled, graded: Graded
) -> Iterator[tuple[Record, tuple[int, int], dict[str, Any], dict[str, Any]]]:
    """Each completion: its record, its place [p, g], its grading's details, and the row of values
    that rollouts/ and samples.jsonl share."""
    verdict, group = graded.verdict, graded.rollout.finished.shape[1]
    for record, p in zip(sampled.records, sampled.slots.tolist(), strict=True):
        for at in ((p, g) for g in range(group)):
            detail = graded.details[p * group + at[1]]
            row = {
                "id": record.id,
                "sample": at[1],
                "gold": record.answer,
                "tokens": int(graded.rollout.completion_mask[at].sum()),
                **{name: detail[name] for name in ("first_answer", "final_answer")},
                **{
                    name: bool(getattr(verdict, name)[at])
                    for name in ("first_correct", "final_correct", "format_ok")
                },
            }
            yield record, at, detail, row


def rollout_rows(one: Round, step: int, number: int) -> list[dict[str, Any]]:
    """The rows of rollouts/ of one round; a group without a reward says why (``no_reward``), and
    with forks samples of equal ``family`` have one first round.

    ``images`` are paths as the record gives them, or its ``origin`` where it holds their bytes.
    """
    terms, (adv_PG, rest_adv_PG) = processes.to_local(one.scores[:2])
    verdict, rollout, failures = one.graded.verdict, one.graded.rollout, one.graded.failures
    return [
        {"step": step, "round": number}
        | row
        | {
            "completion": detail["text"],
            "finished": bool(rollout.finished[at]),
            "block_tokens": dict(zip(BLOCKS, verdict.block_tokens[at].tolist(), strict=True)),
            "reflection_ok": bool(verdict.reflection_ok[at]),
            **{name: float(values[at]) for name, values in terms.parts.items()},
            "total": float(terms.total[at]),
            "advantage": float(adv_PG[at]),
            "rest_advantage": float(rest_adv_PG[at]),
            "weight": float(one.weight[at[0]]),
            **({"family": at[1] // one.sampled.forks} if one.sampled.forks > 1 else {}),
            **({"no_reward": failures[at[0]]} if at[0] in failures else {}),
            "question": record.question,
            "choices": list(record.choices),
            "images": [image.path or image.origin for image in record.images],
            "source": record.source,
            "origin": record.origin,
        }
        for record, at, detail, row in graded_samples(one.sampled, one.graded)
    ]


def write_rollouts(folder: epath.Path, rounds: Sequence[Round], step: int, mesh: Mesh) -> None:
    """The rows of a step as <step>.jsonl, one file of each process; of `processes.speakers`."""
    several = jax.process_count() > 1
    names = {i: f"{step:06d}{f'.{i}' * several}.jsonl" for i in processes.speakers(mesh)}
    rows = [row for i, one in enumerate(rounds) for row in rollout_rows(one, step, i)]
    write_jsonl(folder / names[jax.process_index()], rows)
    if jax.process_index() == 0 and folder.is_dir():
        for path in folder.glob(f"{step:06d}*.jsonl"):
            if path.name not in names.values():  # of this step done before, by other processes
                path.unlink()


def examples_of(one: Round) -> list[Example]:
    """The first sample of a few prompts, with the prompt's first image."""
    samples = graded_samples(one.sampled, one.graded)
    first = ((record, detail["text"]) for record, at, detail, _ in samples if at[1] == 0)
    return [
        Example(record.question, record.answer, text, next(iter(record.images), None))
        for record, text in itertools.islice(first, EXAMPLES)
    ]


def vision_work(batch: Batch) -> tuple[float, float, float]:
    """(patches, pairs in windows, pairs in frames) of a batch's real patches, for `ModelFlops`.

    Host arrays only: this process's part.
    """
    if batch.vision is None:
        return 0.0, 0.0, 0.0
    in_window = np.asarray(batch.vision.window_valid).sum(-1).astype(np.float64)
    frames = np.asarray(batch.vision.frame_id)
    per_frame = [np.bincount(row[row >= 0]).astype(np.float64) for row in frames]
    return (
        float(in_window.sum()),
        float((in_window**2).sum()),
        float(sum((count**2).sum() for count in per_frame)),
    )
