"""Sample completions of given prompts from a Hugging Face directory.

Input, JSON Lines: conversations {"id", "messages": [...]} as in tools.logprobs, or records {"id",
"problem" or "question", "images", "choices"}, which are put into the SRPO prompt (or, with --plain,
into the one-round prompt). Image paths are relative to the file (or to --data_root).
Output: one line per sample, {"id", "sample", "completion", "token_ids", "logprobs", "finished"}:
token_ids end with the end token where there is one; logprobs are those of the whole distribution at
the temperature (without top-k, top-p, min-p; at temperature 0: of temperature 1); finished is false
where --max_new_tokens cut the sample off. A sample depends on seed, id and sample number only.
"""

import argparse
import functools
import itertools
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from srpo_jax.data.batching import Encoded
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.fields import Columns, to_record
from srpo_jax.data.files import JsonlLog
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.qwen2_5_vl import bind
from srpo_jax.model.sharding import to_global
from srpo_jax.run import console
from srpo_jax.sampling.sampler import Sampler, SamplingConfig, vision_token_ids
from srpo_jax.structs import Params, Rollout, VisionInputs
from tools.lib import cli, loading


def encode(model: loading.Model, row: loading.Row, args: argparse.Namespace) -> Encoded:
    """One input line, a conversation or a record, as a prompt."""
    fields, origin = row.fields, row.origin
    if "messages" in fields:
        messages, images = loading.load_conversation(row, args)
        return model.processor.encode_prompt(messages, images, origin=origin)
    root = loading.data_root(args)
    columns = Columns.parse(args.columns)
    record = to_record(fields, origin=origin, root=root, require_answer=False, columns=columns)
    return PromptEncoder(model.processor, args.prompt)(record)


def make_sampler(model: loading.Model, args: argparse.Namespace) -> Sampler:
    """The sampler of the arguments; ids that no token of the tokenizer has are forbidden too."""
    processor, size = model.processor, model.cfg.text.vocab_size
    forbidden = {*vision_token_ids(model.cfg), *processor.forbidden_ids}
    forbidden |= set(range(processor.vocab_size, size))
    sampling = SamplingConfig(
        max_new_tokens=args.max_new_tokens,
        group_size=args.n,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        eos_ids=processor.eos_ids,
        pad_id=processor.pad_id,
        forbidden_ids=tuple(i for i in forbidden if i < size),
    )
    return Sampler(model.cfg, sampling, model.mesh)


@functools.partial(jax.jit, static_argnums=0)
def encode_images(cfg: ModelConfig, params: Params, vision: VisionInputs[jax.Array]) -> jax.Array:
    """Features [M, N/4, D] of the images of each row, from the tower's parameters."""
    return bind(cfg, params, "tower").encode_images(vision)


def sample(
    model: loading.Model, sampler: Sampler, samples: list[Encoded], ids: list[str], args: Any
) -> Rollout[np.ndarray]:
    """The samples of at most ``args.batch_size`` encoded prompts, on the host."""
    batch, features = loading.make_batch(model, samples, args.batch_size), None
    if batch.vision is not None:
        with jax.set_mesh(model.mesh):
            features = encode_images(model.cfg, model.params, batch.vision)
    keys = np.zeros(batch.tokens.shape[0], np.uint32)
    keys[: len(ids)] = [zlib.crc32(name.encode()) for name in ids]
    rollout = sampler.generate(
        model.decoder, batch, features, to_global(keys, model.mesh), seed=args.seed, step=0
    )
    return jax.tree.map(np.asarray, rollout)


def output_rows(
    row: loading.Row,
    rollout: Rollout[np.ndarray],
    prompt: int,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
) -> list[dict[str, Any]]:
    """The output lines of one prompt's samples."""
    rows = []
    for sample, mask in enumerate(rollout.completion_mask[prompt]):
        length = int(mask.sum())
        token_ids = rollout.completions[prompt, sample, :length].tolist()
        text_ids = token_ids[:-1] if token_ids and token_ids[-1] in eos_ids else token_ids
        rows.append(
            {
                "id": row.output_id,
                "sample": sample,
                "completion": tokenizer.decode(text_ids, skip_special_tokens=False),
                "token_ids": token_ids,
                "logprobs": rollout.policy_logp[prompt, sample, :length].astype(float).tolist(),
                "finished": bool(rollout.finished[prompt, sample]),
            }
        )
    return rows


def main(args: argparse.Namespace) -> None:
    """Sample the prompts of --input batch by batch; the next batch is read while one is sampled."""
    rows = loading.read_rows(args.input)
    output = JsonlLog(args.output, loading.settings(args))
    left = [row for row in rows if row.id not in output.done]
    if left:
        model = loading.load_model(args, for_sampling=True)
        sampler, processor = make_sampler(model, args), model.processor
        parts = [left[i : i + args.batch_size] for i in range(0, len(left), args.batch_size)]
        progress = console.progress("prompts", len(left))
        with ThreadPoolExecutor(1) as reader, progress as advance:

            def read(part: list[loading.Row]) -> Future[list[Encoded]]:
                return reader.submit(lambda: [encode(model, row, args) for row in part])

            # One batch ahead: more would hold the pixels of the whole file.
            upcoming = read(parts[0])
            for part, following in itertools.zip_longest(parts, parts[1:], fillvalue=[]):
                samples, upcoming = upcoming.result(), read(following)
                rollout = sample(model, sampler, samples, [row.id for row in part], args)
                for p, row in enumerate(part):
                    lines = output_rows(row, rollout, p, processor.tokenizer, processor.eos_ids)
                    output.append(row.id, lines)
                advance(len(part))
    output.finish(row.id for row in rows)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.generate --hf_dir Qwen2.5-VL-3B-Instruct --input prompts.jsonl "
        "--output out.jsonl --n 8 --temperature 1.0",
    )
    add = parser.add_argument
    loading.add_arguments(parser)
    cli.add_columns(parser)
    add("--n", type=cli.positive, default=1, help="samples per prompt (%(default)s)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    add("--top_k", type=int, default=0, help="0 is off (%(default)s)")
    add("--top_p", type=float, default=1.0, help="1 is off (%(default)s)")
    add("--min_p", type=float, default=0.0, help="0 is off (%(default)s)")
    add("--max_new_tokens", type=cli.positive, default=1024, help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    prompt = parser.add_mutually_exclusive_group()
    told = {"--srpo": "records get the SRPO prompt (default)", "--plain": "one round"}
    for flag, text in told.items():
        name = flag.removeprefix("--")
        prompt.add_argument(
            flag, dest="prompt", action="store_const", const=name, default="srpo", help=text
        )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
