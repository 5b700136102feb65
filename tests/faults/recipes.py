"""The runs that faults are caused in: --config=tests/faults/recipes.py:KIND, world in FAULTS_WORLD.

Tiny, and with everything in them that a run leaves behind: checkpoints, rows, rollouts, an
evaluation, an export. No two of them are alike in what a checkpoint holds.
"""

import json
import os
from pathlib import Path

import train_helpers as helpers
from ml_collections import ConfigDict


def get_config(kind: str) -> ConfigDict:
    """The configuration of "sft", "srpo", "resample", "lora" or "evaluation"."""
    paths = json.loads(Path(os.environ["FAULTS_WORLD"]).read_text())
    if kind == "evaluation":
        config = helpers.evaluation_config(paths)
        config.eval.samples, config.eval.temperature, config.eval.batch_size = 2, 1.0, 1
        config.data.prompts_per_row = 1
    elif kind == "sft":
        config = helpers.sft_config(paths, steps=6)
        config.eval.file, config.eval.every = paths["held_out"], 3
    else:
        config = helpers.grpo_config(paths, steps=6)
        config.sampling.group_size, config.data.global_batch_size = 3, 4
        config.filter.low, config.filter.high = 0.2, 0.8
    if kind == "resample":
        config.filter.resample, config.grpo.updates_per_rollout = True, 2
        config.grpo.kl_coef, config.grpo.kl_in_reward, config.grpo.kl_target = 0.1, True, 0.02
    if kind == "lora":
        config.lora.rank = 2
    if kind != "evaluation":
        config.optim.lr, config.checkpoint.every, config.checkpoint.keep = 1e-2, 2, 2
        config.checkpoint.grace_seconds = 60.0
        config.log.every = 1
    config.sampling.max_new_tokens, config.sampling.segment = 8, 4
    config.compilation_cache_dir = paths["cache"]
    return config
