r"""SRPO stage 1: supervised fine-tuning on conversations that reflect.

    python -m srpo_jax.train_sft --config=configs/sft.py:size=7b --workdir=runs/sft \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.data.train=reflections.jsonl

Reading guide: `train` reads top to bottom, in the order in which things happen: mesh, processor and
model config; data; state, fresh or restored; the jitted step and the evaluation; the loop. The
arithmetic of a step is in learn/steps.py and learn/losses.py, what a batch is in data/loader.py;
run/session.py owns the train state, restores, logs, evaluates, saves and exports. A run that is
stopped (SIGTERM, Ctrl-C) finishes its step, saves and leaves with exit code 75; the same command
goes on from there, bit for bit.
"""

from typing import Any

import numpy as np

from srpo_jax.data.encoders import PromptEncoder, SftEncoder, prompt_of
from srpo_jax.data.loader import LoadedBatch
from srpo_jax.evaluate import Evaluator
from srpo_jax.learn.optim import make_optimizer, trains_vision
from srpo_jax.learn.steps import make_sft_step
from srpo_jax.model import sharding
from srpo_jax.rewards.profiles import PAPER, asked_by
from srpo_jax.run import processes
from srpo_jax.run.command import main
from srpo_jax.run.feed import Encode, bucket_of, open_training
from srpo_jax.run.parts import Parts, start
from srpo_jax.run.resume import allows
from srpo_jax.run.rollout import vision_work
from srpo_jax.run.session import Done, Session
from srpo_jax.run.settings import fit_rows, sft_config, sft_settings
from srpo_jax.structs import TrainState

SHOWN = ("loss", "grad_norm", "lr", "tokens_per_second", "time/step")


def train(
    config: Any,
    workdir: str,
    *,
    encode: Encode | None = None,
    encode_prompt: Encode | None = None,
) -> dict[str, Any]:
    """Run stage 1, or go on with it where it was stopped; returns what `Session.run` does.

    Args:
        config: of configs/sft.py.
        workdir: folder for checkpoints/, metrics.jsonl and quarantine.jsonl.
        encode: record -> Encoded with a loss mask, instead of the configured target.
        encode_prompt: record -> Encoded for the evaluation, instead of the configured prompt.
    """
    settings = sft_settings(config, workdir)
    with start(settings) as parts, processes.hold(settings.workdir):
        settings = fit_rows(settings, parts.shards, parts.processor.geometry.window_slots)
        data = settings.data
        encode = encode or SftEncoder(parts.processor, data.target, data.masks_wrong_first)
        loader, records = open_training(settings, parts, encode)
        evaluator = None
        if settings.eval.file:
            prompt = prompt_of(data.target)
            encode_prompt = encode_prompt or PromptEncoder(parts.processor, prompt)
            evaluator = Evaluator(settings, parts, asked_by(prompt, PAPER), encode_prompt)
        batch_size = data.global_batch_size
        total = settings.steps or max(1, int(records * settings.epochs) // batch_size)
        optimizer = make_optimizer(settings.optim, total, settings.seed)
        run = Session(settings, parts, optimizer, total, SHOWN)
        if run.hosts:
            mended = allows(settings.checkpoint.allow_changes, "data.train")
            loader.set_state(*[values["data"] for values, _ in run.hosts], mended=mended)
        cfg, freeze = sft_config(settings, parts.shards), settings.freeze
        sft_step = parts.guard.watch(
            make_sft_step(parts.model, cfg, optimizer, freeze=freeze, mesh=parts.mesh)
        )

        def step(state: TrainState, done: int) -> Done:
            with parts.timers("data"):
                loaded = next(loader)
            bucket = bucket_of(loaded.arrays)
            parts.lockstep(done, bucket)
            with parts.timers("update"), parts.guard.step(bucket):
                batch = sharding.to_global(loaded.arrays, parts.mesh)
                state, metrics = sft_step(state, batch, None)
            metrics = metrics | {"update/padding_share": loaded.padding_share}
            return Done(state, metrics, *work(parts, loaded, trains_vision(parts.shapes, freeze)))

        return run.run(step, lambda: ({"data": loader.get_state()}, {}), evaluator)


def work(parts: Parts, loaded: LoadedBatch, trains_vision: bool) -> tuple[float, float]:
    """Tokens and model FLOPs of a batch, this process's part."""
    batch = loaded.arrays
    valid = np.asarray(batch.valid)
    samples = [np.bincount(row)[1:] for row in np.asarray(batch.segment_ids)[valid]]
    lengths = np.concatenate([[0], *samples])
    targets = float(np.asarray(batch.loss_mask).sum())
    both = parts.model.train_passes  # forward and backward
    text = both * parts.flops.text(lengths, head_tokens=targets)
    vision = parts.flops.vision(*vision_work(batch)) * (both if trains_vision else 1)
    return float(lengths.sum()), text + vision


if __name__ == "__main__":
    main(train)
