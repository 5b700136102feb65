"""Log-probability of every token of given conversations, from a Hugging Face directory.

Input, JSON Lines: {"id", "messages": [{"role", "content": str | [{"type": "text", "text"} |
{"type": "image", "image": path}]}]}; paths are relative to the file (or to --data_root).
Output: {"id", "token_ids", "logprobs"}, where logprobs[i] belongs to token_ids[i] given those
before it, and logprobs[0] is null. The conversation is rendered by the chat template without a
generation prompt; every image stands as its image tokens. In float32 the numbers agree with
transformers to 1e-4.
"""

import argparse
import functools

import jax
import numpy as np

from srpo_jax.data.batching import Encoded
from srpo_jax.data.files import JsonlLog
from srpo_jax.learn.head import HeadConfig, token_logps
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.qwen2_5_vl import bind
from srpo_jax.run import console
from srpo_jax.structs import Batch, Params
from tools.lib import cli, loading


@functools.partial(jax.jit, static_argnums=0)
def conversation_logps(cfg: ModelConfig, params: Params, batch: Batch[jax.Array]) -> jax.Array:
    """[B, T - 1] float32: log-probability of tokens[:, 1:], over the whole vocabulary."""
    model = bind(cfg, params)
    features = None if batch.vision is None else model.encode_images(batch.vision)
    h_BTD = model.hidden(
        batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, features, single=True
    )
    logp_BT, _ = token_logps(h_BTD[:, :-1], batch.tokens[:, 1:], model.head_kernel(), HeadConfig())
    return logp_BT


def score(
    model: loading.Model, samples: list[Encoded], batch_size: int
) -> list[list[float | None]]:
    """The ``logprobs`` of each encoded conversation, at most ``batch_size`` of them."""
    batch = loading.make_batch(model, samples, batch_size)
    with jax.set_mesh(model.mesh):
        logps = conversation_logps(model.cfg, model.params, batch)
    return [
        [None, *np.asarray(row, np.float64)[: sample.num_tokens - 1].tolist()]
        for sample, row in zip(samples, np.asarray(logps), strict=False)
    ]


def main(args: argparse.Namespace) -> None:
    """Score the conversations of --input batch by batch."""
    rows = loading.read_rows(args.input)
    output = JsonlLog(args.output, loading.settings(args))
    left = [row for row in rows if row.id not in output.done]
    if left:
        model = loading.load_model(args)

        def encode(row: loading.Row) -> Encoded:
            messages, images = loading.load_conversation(row, args)
            return model.processor.encode_prompt(
                messages, images, generation_prompt=False, origin=row.origin
            )

        with console.progress("conversations", len(left)) as advance:
            for start in range(0, len(left), args.batch_size):
                part = left[start : start + args.batch_size]
                samples = [encode(row) for row in part]
                found = score(model, samples, args.batch_size)
                for row, sample, logprobs in zip(part, samples, found, strict=True):
                    token_ids = sample.token_ids.tolist()
                    fields = {"id": row.output_id, "token_ids": token_ids, "logprobs": logprobs}
                    output.append(row.id, [fields])
                advance(len(part))
    output.finish(row.id for row in rows)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.logprobs --hf_dir Qwen2.5-VL-3B-Instruct --input conversations.jsonl "
        "--output out.jsonl",
    )
    loading.add_arguments(parser)
    parser.set_defaults(dtype="float32")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
