r"""SRPO stage 1: supervised fine-tuning on conversations that reflect.

    python -m srpo_jax.train_sft --config=configs/sft.py:size=7b --workdir=runs/sft \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.data.train=reflections.jsonl

Reading guide: `train` reads top to bottom, in the order in which things happen: mesh, processor and
model config; data; state, fresh or restored; the jitted step and the evaluation; the loop. The
arithmetic of a step is in steps.py and losses.py, what a batch is in data/loader.py; session.py
restores, logs, evaluates, saves and exports. A run that is stopped (SIGTERM, Ctrl-C) finishes its
step, saves and leaves with exit code 0; the same command goes on from there, bit for bit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from srpo_jax.data.encoders import SftEncoder
from srpo_jax.data.loader import LoadedBatch
from srpo_jax.evaluate import make_evaluator
from srpo_jax.learn import optim
from srpo_jax.learn.steps import SftConfig, make_encode_step, make_sft_step
from srpo_jax.model import sharding
from srpo_jax.run import setup
from srpo_jax.run.rollout import make_flops, make_token_text, vision_work
from srpo_jax.run.runtime import RunError
from srpo_jax.run.session import Session

SHOWN = ("loss", "grad_norm", "lr", "tokens_per_second", "time/step")


def train(
    config: Any,
    workdir: str,
    *,
    encode: Callable[..., Any] | None = None,
    encode_prompt: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Run stage 1, or go on with it where it was stopped.

    Args:
        config: of configs/sft.py.
        workdir: folder for checkpoints/, metrics.jsonl and quarantine.jsonl.
        encode: record -> Encoded with a loss mask, instead of the configured target.
        encode_prompt: record -> Encoded for the evaluation, instead of the configured prompt.

    Returns:
        the last row of metrics, with ``step``, ``finished`` (False where a signal stopped the run)
        and the last evaluation under "eval".
    """
    parts = setup.start(config)
    rows = setup.rows_per_shard(
        "data.global_batch_size",
        config.data.global_batch_size,
        config.data.prompts_per_row,
        parts.shards,
    )
    encode = encode or SftEncoder(
        parts.processor, config.data.target, masks_wrong_first(config.data)
    )
    loader, records = open_data(config, workdir, parts, rows, encode)
    if config.data.pack and not config.steps:
        raise RunError("data.pack: a packed batch holds as many records as fit; set config.steps")
    total = config.steps or max(1, int(records * config.epochs) // config.data.global_batch_size)

    optimizer = optim.make_optimizer(setup.optim_config(config.optim), total)
    run = Session(config, workdir, parts, optimizer, total, SHOWN)
    if run.host:
        loader.set_state(run.host["data"])

    step_config = SftConfig(micro_batches=rows, logit_chunk=config.logit_chunk)
    sft_step = run.guard.watch(
        make_sft_step(
            parts.model, step_config, optimizer, freeze=tuple(config.freeze), mesh=parts.mesh
        )
    )
    evaluator = None
    if config.eval.file:
        prompt = "plain" if config.data.target == "plain" else "srpo"
        encode_step = make_encode_step(parts.model, mesh=parts.mesh)
        evaluator = make_evaluator(
            config, parts, encode_step, make_token_text(parts), run.verifier, run.guard,
            prompt=prompt, encode=encode_prompt,
        )  # fmt: skip

    state = run.state
    del run.state  # the step donates it
    work = Work(parts, trains_vision=any(path.startswith("vision/") for path in state.params))
    with run:
        if evaluator is not None and config.eval.at_start and run.step == 0:
            run.evaluate(state, evaluator)
        while run.step < total:
            with run.timers("data"):
                loaded = next(loader)
            bucket = setup.bucket_of(loaded.arrays)
            run.agree(bucket)
            with run.timers("update"), run.guard.step(bucket):
                batch = sharding.to_global(loaded.arrays, parts.mesh)
                state, metrics = sft_step(state, batch, None)
            run.step += 1
            run.log(metrics, **work(loaded))
            if run.end_step(state, evaluator, lambda: ({"data": loader.get_state()}, {})):
                break
        return run.finish(state)


def masks_wrong_first(data: Any) -> bool:
    """``data.mask_wrong_first`` as yes or no; "auto" depends on the target. RunError otherwise."""
    answers = {"auto": data.target == "rl_aligned", "true": True, "false": False}
    text = str(data.mask_wrong_first).lower()
    if text not in answers:
        raise RunError(f"data.mask_wrong_first={text}: choose {', '.join(answers)}")
    return answers[text]


def open_data(
    config: Any, workdir: str, parts: setup.Parts, rows: int, encode: Callable[..., Any]
) -> tuple[Any, int]:
    """The endless loader of conversations, and the number of records."""
    data = config.data
    source = setup.open_source("data.train", data.train, data.root)
    budgets = tuple(data.patch_budgets)
    setup.check_first_records(
        "data.train", source, encode, parts, tokens=data.tokens, patches=max(budgets, default=0)
    )
    loader = setup.open_loader(
        parts,
        source,
        encode,
        quarantine_path=f"{workdir}/quarantine.jsonl",
        global_batch_size=data.global_batch_size,
        rows_per_shard=rows,
        token_budget=data.tokens,
        patch_budgets=budgets,
        pack=data.pack,
        shuffle=data.shuffle,
        seed=config.seed,
        workers=data.workers,
        max_bad_share=data.max_bad_share,
    )
    return loader, len(source)


class Work:
    """Tokens and model FLOPs of a batch, this process's part."""

    def __init__(self, parts: setup.Parts, trains_vision: bool):
        self._flops, self._vision_passes = make_flops(parts), 3 if trains_vision else 1

    def __call__(self, loaded: LoadedBatch) -> dict[str, float]:
        batch = loaded.arrays
        samples = [np.bincount(row)[1:] for row in batch.segment_ids[batch.valid]]
        lengths = np.concatenate([[0], *samples])
        targets = float(batch.loss_mask.sum())
        text = 3 * self._flops.text(lengths, head_tokens=targets)  # forward and backward
        vision = self._vision_passes * self._flops.vision(*vision_work(batch))
        return {"tokens": float(lengths.sum()), "flops": text + vision}


if __name__ == "__main__":
    setup.main(train)
