"""A ConfigDict as frozen dataclasses, checked once, and what steps and sampler get from it.

``sft_settings``, ``grpo_settings`` and ``evaluate_settings`` are the border: no ConfigDict goes
beyond them. The dataclasses of `sections` mirror ``configs/`` key by key, so a key that nothing
could read is an error. Training, evaluation and `tools.plan` build the configurations of update and
sampler from them with the same functions: what is planned is what runs.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from etils import epath

from srpo_jax.data.batching import Layout, choose_layout
from srpo_jax.data.encoders import TARGETS
from srpo_jax.data.files import AnyPath, on_bucket
from srpo_jax.data.prompts import MESSAGES
from srpo_jax.learn.grpo import GrpoConfig, Objective
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model.config import ATTENTION, BASE_DTYPES, DTYPES, REMAT
from srpo_jax.rewards.profiles import Profile
from srpo_jax.run.sections import (
    EngineKind,
    EvaluateSettings,
    FilterOn,
    GrpoSettings,
    RunSettings,
    SftSettings,
    TrainSettings,
)
from srpo_jax.run.typed import build
from srpo_jax.sampling.sampler import SamplingConfig
from srpo_jax.structs import RunError

R = TypeVar("R", bound=RunSettings)
S = TypeVar("S", bound=TrainSettings)


def sft_settings(config: Any, workdir: AnyPath = "") -> SftSettings:
    """The settings of stage 1; RunError naming the key that is wrong."""
    settings = _read(SftSettings, config, workdir)
    if not settings.steps and not settings.epochs:
        raise RunError("steps=0 and epochs=0: set one of them")
    return settings


def grpo_settings(
    config: Any, workdir: AnyPath = "", profile: Profile | None = None
) -> GrpoSettings:
    """The settings of stage 2; RunError naming the key that is wrong.

    ``profile`` takes the place of the configured one, and its name stands in checkpoints.
    """
    settings = _read(GrpoSettings, config, workdir)
    if profile is not None:
        reward = dataclasses.replace(settings.reward, profile=profile)
        plain = settings.plain | {"reward": settings.plain["reward"] | {"profile": profile.name}}
        settings = dataclasses.replace(settings, reward=reward, plain=plain)
    if settings.steps < 1:
        raise RunError(f"steps={settings.steps}: must be at least 1")
    price, budget = settings.reward.token_price, settings.sampling.max_new_tokens
    if price * budget >= 1:
        raise RunError(
            f"reward.token_price={price} takes {price * budget:g} off a right answer of "
            f"sampling.max_new_tokens={budget} tokens, as much as it is worth: set it below "
            f"{1 / budget:.2g}"
        )
    if settings.rollouts.late and settings.filter.resample:
        raise RunError(
            "rollouts.late=True and filter.resample=True: what is sampled until a batch is full is "
            "graded at once, so nothing is left to be late; set one of them"
        )
    _check_engine(settings)
    group, low, high = settings.sampling.group_size, settings.filter.low, settings.filter.high
    if group < 2:
        raise RunError(
            f"sampling.group_size={group}: an advantage compares at least 2 samples of a prompt"
        )
    if group < 2 * settings.sampling.forks:
        raise RunError(
            f"sampling.forks={settings.sampling.forks}: one first round of "
            f"sampling.group_size={group} has nothing to be compared with; set "
            f"--config.sampling.group_size={2 * settings.sampling.forks} or more"
        )
    # A composite counts quarters of samples.
    parts = group * (4 if settings.filter.on == "composite" else 1)
    if not any(low <= right / parts <= high for right in range(parts + 1)):
        raise RunError(
            f"filter.low={low} and filter.high={high}: no group could be kept, for no number of "
            f"right samples of sampling.group_size={group} has a share between them"
        )
    return settings


def _check_engine(settings: GrpoSettings) -> None:
    """RunError where an engine could not do what the sampler does."""
    sampling, engine = settings.sampling, settings.sampling.engine
    if not engine.url:
        return
    plain = SamplingConfig(max_new_tokens=1)
    for name in ("forks", "top_k", "top_p", "min_p"):
        if getattr(sampling, name) != getattr(plain, name):
            raise RunError(
                f"sampling.{name}={getattr(sampling, name)}: not with sampling.engine.url: there "
                f"each sample is drawn for itself, from all tokens; set {getattr(plain, name)}"
            )
    if not settings.grpo.tis_cap:
        raise RunError(
            "sampling.engine.url: an engine's log-probs are not the update's, and grpo.tis_cap=0 "
            "leaves that uncorrected; set --config.grpo.tis_cap=2.0"
        )
    if engine.sync_every > 1 and (settings.rollouts.late or settings.filter.resample):
        raise RunError(
            f"sampling.engine.sync_every={engine.sync_every}: not with rollouts.late or "
            "filter.resample, whose groups have an age of their own; set it to 1"
        )
    if on_bucket(engine.folder or settings.workdir):
        raise RunError(
            f"sampling.engine.folder={engine.folder or settings.workdir}: give a folder on a disk "
            "that the engine sees under the same path"
        )


def evaluate_settings(config: Any, workdir: AnyPath = "") -> EvaluateSettings:
    """The settings of an evaluation; RunError naming the key that is wrong."""
    return _read(EvaluateSettings, config, workdir)


def _read(kind: type[R], config: Any, workdir: AnyPath) -> R:
    settings = _checked(build(kind, config))
    plain = json.loads(json.dumps(config.to_dict()))
    return dataclasses.replace(settings, workdir=_folder(workdir), plain=plain)


def _folder(workdir: AnyPath) -> epath.Path:
    scheme = os.fspath(workdir).partition("://")[0]
    if on_bucket(workdir) and scheme != "gs":  # what Orbax writes to
        raise RunError(f"--workdir={workdir}: of buckets only gs:// is supported; mount the others")
    return epath.Path(workdir)


# --- checks ----------------------------------------------------------------------------------

# (keys, what holds, in words). Keys that a program does not have are passed over.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "steps epochs data.workers eval.limit eval.every checkpoint.every checkpoint.keep_every "
        "rollouts.every log.keep bootstrap optim.lr optim.weight_decay reward.alpha grpo.dual_clip "
        "reward.first reward.verdict reward.overlong reward.overlong_buffer reward.token_price "
        "reward.judge.max_calls lora.rank grpo.tis_floor grpo.tis_cap grpo.kl_coef grpo.kl_target "
        "grpo.ref_every "
        "grpo.adv_eps grpo.perception_coef filter.max_age eval.temperature "
        "checkpoint.grace_seconds checkpoint.verify_replicas_every distributed.timeout "
        "data.timeout",
        lambda value: value is None or 0 <= value < math.inf,
        "must not be negative or infinite",
    ),
    (
        "data.global_batch_size data.prompts_per_row data.prompt_tokens data.tokens min_pixels "
        "eval.batch_size eval.samples checkpoint.keep log.every filter.max_rounds logit_chunk "
        "grpo.logit_chunk grpo.updates_per_rollout grpo.epochs grading.workers optim.max_skipped "
        "reward.workers reward.judge.concurrency sampling.engine.concurrency "
        "sampling.engine.sync_every",
        lambda value: value >= 1,
        "must be at least 1",
    ),
    ("data.mix", lambda value: all(weight > 0 for weight in value), "weights must be above 0"),
    (
        "grading.timeout grading.step_timeout reward.timeout lora.alpha optim.eps optim.grad_clip "
        "sampling.engine.timeout "
        "grpo.clip_low grpo.clip_high grpo.sapo_positive grpo.sapo_negative",
        lambda value: value is None or value > 0,
        "must be above 0",
    ),
    (
        "grading.tolerance filter.low filter.high data.max_bad_share optim.warmup_ratio "
        "optim.final_fraction grpo.perception_mask",
        lambda value: 0 <= value <= 1,
        "must lie between 0 and 1",
    ),
    (
        "hf_dir init_from export_hf_dir data.train data.root eval.file",
        lambda value: set(re.findall(r"(\w+)://", value)) <= {"gs"},
        "of buckets only gs:// is supported; mount the others",
    ),
    ("seed", lambda value: 0 <= value < 2**32, "must be at least 0 and below 2**32"),
    (
        "grpo.entropy_coef grpo.masked_entropy_coef reward.judge.weight reward.judge.temperature",
        math.isfinite,
        "must be a number",
    ),
    ("optim.b1 optim.b2", lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ("grpo.dual_clip", lambda value: not value or value > 1, "must be above 1, or 0 (off)"),
)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dtype": DTYPES,
    "model.remat": REMAT,
    "model.attention": ATTENTION,
    "data.prompt": tuple(MESSAGES),
    "data.target": TARGETS,
    "data.mask_wrong_first": ("auto", "true", "false", True, False),
    "log.console": ("auto", "plain", "json"),
    "lora.base_dtype": BASE_DTYPES,
    "lora.export": ("merged", "adapter"),
    "eval.stop_after": ("first", "confident", "final"),
    "filter.on": get_args(FilterOn),
    "sampling.engine.kind": get_args(EngineKind),
    "optim.kind": ("adamw", "adafactor", "muon"),
    "optim.schedule": ("cosine", "constant"),
    "optim.moment_dtype": ("float32", "bfloat16", "int8"),
    "model.param_dtype": ("float32", "bfloat16"),
    **{
        f"grpo.{name}": get_args(hint)
        for name, hint in get_type_hints(Objective).items()
        if get_origin(hint) is Literal
    },
}


def _checked(settings: R) -> R:
    """``settings``, where every value can be meant; RunError naming the first key that cannot."""
    for keys, holds, words in _RULES:
        for key in keys.split():
            value = _value(settings, key)
            if value is not _ABSENT and not holds(value):
                raise RunError(f"{key}={value}: {words}")
    for key, allowed in _CHOICES.items():
        value = _value(settings, key)
        if value is not _ABSENT and value not in allowed:
            raise RunError(f"{key}={value}: choose one of {', '.join(map(str, allowed))}")
    optim = getattr(settings, "optim", None)
    if optim and optim.kind == "adafactor" and optim.moment_dtype != "float32":
        raise RunError(
            f"optim.moment_dtype={optim.moment_dtype}: adafactor has no moments of its parameters' "
            "shapes: set --config.optim.moment_dtype=float32"
        )
    lora = getattr(settings, "lora", None)
    if lora and lora.base_dtype and not lora.rank:
        raise RunError(
            f"lora.base_dtype={lora.base_dtype}: weights in 8 bits cannot be trained; set "
            "--config.lora.rank, or leave it out"
        )
    if settings.min_pixels > settings.max_pixels:
        raise RunError(
            f"min_pixels={settings.min_pixels} lies above max_pixels={settings.max_pixels}"
        )
    if settings.eval.samples > 1 and settings.eval.temperature == 0:
        raise RunError(
            f"eval.samples={settings.eval.samples} greedy samples are all the same: set "
            "--config.eval.temperature, or eval.samples=1"
        )
    return settings


_ABSENT = object()


def _value(settings: Any, key: str) -> Any:
    return functools.reduce(lambda at, name: getattr(at, name, _ABSENT), key.split("."), settings)


# --- what follows from the settings and the machine ------------------------------------------


def batch_layout(settings: TrainSettings, shards: int) -> Layout:
    """Where the sequences of a training batch stand on ``shards`` data shards.

    RunError where the updates of a rollout cannot be equal.
    """
    sequences = settings.data.global_batch_size
    grpo = isinstance(settings, GrpoSettings)
    updates = settings.grpo.updates_per_rollout if grpo else 1
    if sequences % updates:
        nearest = max(n for n in range(1, updates) if sequences % n == 0)
        raise RunError(
            f"grpo.updates_per_rollout={updates} must divide data.global_batch_size={sequences}: "
            f"set --config.grpo.updates_per_rollout={nearest}"
        )
    return choose_layout(sequences, shards, settings.data.prompts_per_row, updates)


def fit_rows(settings: S, shards: int, window: int) -> S:
    """``settings`` with as many prompts per row as ``shards`` data shards need, at most as before.

    Patch budgets, multiples of ``window`` slots, shrink with them; the largest stays, so that the
    mesh does not decide what fits.
    """
    data, per_row = settings.data, batch_layout(settings, shards).per_row
    if per_row == data.prompts_per_row or not data.patch_budgets:
        budgets = data.patch_budgets
    else:
        step = window * data.prompts_per_row
        smaller = {-(-n * per_row // step) * window for n in data.patch_budgets}
        budgets = tuple(sorted({*smaller, max(data.patch_budgets)}))
    data = dataclasses.replace(data, prompts_per_row=per_row, patch_budgets=budgets)
    return dataclasses.replace(settings, data=data)


def sft_config(settings: SftSettings, shards: int) -> SftConfig:
    """What an SFT update does; one micro-batch is one row of every data shard."""
    return SftConfig(
        micro_batches=batch_layout(settings, shards).rows,
        logit_chunk=settings.logit_chunk,
        packed=settings.data.pack,
    )


def grpo_config(
    settings: GrpoSettings,
    shards: int,
    forbidden_ids: tuple[int, ...],
    own: tuple[tuple[str, float], ...] = (),
) -> GrpoConfig:
    """What a GRPO update does; one micro-batch is one row of every data shard.

    ``own`` are the names and weights of reward terms that the verdicts bring.
    """
    layout = batch_layout(settings, shards)
    return GrpoConfig(
        **vars(settings.grpo),
        micro_batches=layout.rows,
        profile=settings.design,
        weights=settings.reward.weights + own,
        own=tuple(name for name, _ in own),
        overlong_buffer=settings.reward.overlong_buffer,
        temperature=settings.sampling.temperature,
        forbidden_ids=forbidden_ids,
        length_cap=settings.sampling.max_new_tokens,
        forks=settings.sampling.forks,
    )


def evaluation_sampling(settings: RunSettings) -> SamplingConfig:
    """How the evaluation samples, without token ids."""
    return dataclasses.replace(
        settings.sampling,
        group_size=settings.eval.samples,
        forks=1,
        temperature=settings.eval.temperature,
    )
