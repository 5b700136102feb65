"""A run as its compiled programs see it: shapes and settings of a training command."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.lanes import LaneBudgets
from srpo_jax.learn.optim import OptimConfig
from srpo_jax.learn.state import FREEZE_VISION
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model import sharding
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.sizes import size_config
from srpo_jax.run.sections import GrpoSettings
from srpo_jax.run.settings import (
    batch_layout,
    fit_rows,
    grpo_config,
    grpo_settings,
    sft_config,
    sft_settings,
)
from srpo_jax.sampling.sampler import SamplingConfig, vision_token_ids
from srpo_jax.train_grpo import lane_budgets


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Budgets of one update: what the loader would hand to the steps."""

    sequences: int  # P prompts, or SFT conversations, over all devices, fillers included
    tokens: int  # S, or T for SFT
    rows: int  # M
    patches: int  # N of each row


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run as its programs see it. What SFT has not: G and R, which are those of ``sampling``, and
    ``budgets``, what lanes are packed for."""

    model: ModelConfig
    mesh: Mesh
    shapes: Shapes
    optimizer: OptimConfig
    step: SftConfig | GrpoConfig
    sampling: SamplingConfig | None = None
    budgets: LaneBudgets | None = None
    freeze: tuple[str, ...] = FREEZE_VISION


def read_recipe(config: Any, mesh: Mesh) -> Recipe:
    """The run that `train_sft` or `train_grpo` would start with this configuration.

    Shapes are those of the largest patch budget. Raises RunError where the updates of a rollout
    cannot be equal, ValueError for a size that is not a released one.
    """
    reinforce = "grpo" in config
    settings = grpo_settings(config) if reinforce else sft_settings(config)
    how = dataclasses.asdict(settings.model)
    model = size_config(settings.size, **how, lora=settings.adapters)
    shards = sharding.num_data_shards(mesh)
    settings = fit_rows(settings, shards, model.vision.window_slots)
    data, layout = settings.data, batch_layout(settings, shards)
    forbidden, sampling, budgets = vision_token_ids(model), None, None
    if isinstance(settings, GrpoSettings):
        step, tokens = grpo_config(settings, shards, forbidden), data.prompt_tokens
        sampling = dataclasses.replace(settings.sampling, forbidden_ids=forbidden)
        budgets = lane_budgets(settings, layout, model)
    else:
        step, tokens = sft_config(settings, shards), settings.data.tokens
    shapes = Shapes(
        sequences=layout.size,
        tokens=tokens,
        rows=layout.rows * shards,
        patches=max(data.patch_budgets),
    )
    return Recipe(model, mesh, shapes, settings.optim, step, sampling, budgets, settings.freeze)
