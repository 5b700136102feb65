"""The phases that run on the host: reading weights, making batches, grading answers."""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import jax

from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.loader import Loader
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import open_records
from srpo_jax.data.stream import LoaderConfig
from srpo_jax.model import hf, sharding
from srpo_jax.model.config import load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.rewards.verifier import Verifier
from tools.bench.measure import Phase
from tools.lib import loading

# Gold, right answer and wrong answer for a number n, of the kinds that grading meets: most are
# settled at once, the last three go to a worker.
ANSWERS: tuple[Callable[[int], tuple[str, str, str]], ...] = (
    lambda n: ("B", f"(B) {n}", f"(C) {n}"),
    lambda n: (f"{n}", f"{n}.0", f"{n + 1}"),
    lambda n: (rf"\frac{{{n}}}{{4}}", f"{n / 4}", f"{n / 4 + 1}"),
    lambda n: (f"{n} cm", f"{n} centimetres", f"{n} m"),
    lambda n: (rf"{n}\sqrt{{2}}", rf"\sqrt{{{2 * n * n}}}", rf"\sqrt{{{2 * n * n + 1}}}"),
    lambda n: (f"x^2-{n * n}", f"(x-{n})(x+{n})", f"x^2+{n}"),
    lambda n: (rf"(-\infty, {n})", f"x<{n}", f"x>{n}"),
)
_CHECKS = 700


def phase(name: str, args: argparse.Namespace) -> Phase:
    """The phase of that name; ValueError where an option that it needs is missing."""
    return {"load": load, "data": data, "grade": grade}[name](args)


def load(args: argparse.Namespace) -> Phase:
    """Safetensors to arrays in their shards."""
    _require(args, "load", "hf_dir")
    cfg = load_config(args.hf_dir)
    files = sum(file.stat().st_size for file in Path(args.hf_dir).glob("*.safetensors"))
    shardings = sharding.param_specs(
        abstract_params(cfg), sharding.make_mesh(tensor=args.tensor), "train"
    )

    def run() -> dict[str, jax.Array]:
        return hf.load_params(args.hf_dir, cfg, shardings=shardings)

    return Phase("load", run, unit="bytes", needed=files, bytes=files)


def data(args: argparse.Namespace) -> Phase:
    """Records to batches: reading, decoding, tokenizing, padding, in this process's threads."""
    _require(args, "data", "hf_dir", "records")
    low, high = loading.pixel_limits(args.hf_dir)
    processor = Processor(args.hf_dir, min_pixels=low, max_pixels=high)
    source, encode = open_records(args.records), PromptEncoder(processor, "srpo")
    config = LoaderConfig(
        global_batch_size=args.prompts,
        rows_per_shard=1,
        token_budget=args.prompt_tokens,
        patch_budgets=(args.prompts * high // processor.geometry.patch_size**2 // 64 * 64 + 1024,),
        pad_id=processor.pad_id,
        geometry=processor.geometry,
        shuffle=False,
        epochs=1,
        drop_remainder=False,
        max_bad_share=1.0,
    )

    def run() -> int:
        loader = Loader(source, encode, config)
        return sum(len(batch.records) for batch in loader)

    return Phase("data", run, unit="records", needed=len(source))


def grade(args: argparse.Namespace) -> Phase:
    """Answers checked by the pool, every one of them new."""
    del args
    fresh = itertools.count(2)  # no verdict is remembered from before

    def run() -> int:
        kinds = [ANSWERS[i % len(ANSWERS)](next(fresh)) for i in range(_CHECKS)]
        return sum(
            verifier.check([(gold, both[i % 2], ()) for i, (gold, *both) in enumerate(kinds)])
        )

    verifier = Verifier(2)
    return Phase("grade", run, unit="answers", needed=_CHECKS)


def _require(args: argparse.Namespace, name: str, *options: str) -> None:
    missing = [f"--{option}" for option in options if not getattr(args, option)]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(missing)}")
