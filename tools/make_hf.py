"""Write a Qwen2.5-VL of any size with random weights as a Hugging Face directory; needs no torch.

For trying things out from `--hf_dir` as with released weights: config.json in the released form,
generation_config.json with both end tokens, safetensors, and the tokenizer and processor files.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from srpo_jax.model import hf, hf_write
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import Shape
from srpo_jax.run import console
from tools.lib import cli

# Config key -> the token that has this id in Qwen2.5-VL's tokenizer.
TOKEN_KEYS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "eos_token_id": "<|im_end|>",
    "bos_token_id": "<|endoftext|>",
}
RELEASED_IDS = {
    "<|endoftext|>": 151_643,
    "<|im_end|>": 151_645,
    "<|vision_start|>": 151_652,
    "<|vision_end|>": 151_653,
    "<|vision_pad|>": 151_654,
    "<|image_pad|>": 151_655,
    "<|video_pad|>": 151_656,
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclasses.dataclass(frozen=True)
class RandomLeaf:
    """A parameter that is drawn layer by layer when it is read; never whole in memory."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    seed: int
    std: float
    mean: float

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not self.stacked:
            return _draw(self, 0, self.shape)[index]
        layers = range(*index[0].indices(self.shape[0]))
        return np.stack([_draw(self, i, self.shape[1:])[index[1:]] for i in layers])


@functools.lru_cache(maxsize=1)  # the blocks of one tensor are read one after another
def _draw(leaf: RandomLeaf, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    if not leaf.std:
        return np.full(shape, leaf.mean, leaf.dtype)
    rng = np.random.default_rng([leaf.seed, zlib.crc32(leaf.path.encode()), layer])
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(leaf.std)
    values += np.float32(leaf.mean)
    return values.astype(leaf.dtype)


def random_params(
    cfg: ModelConfig,
    *,
    seed: int,
    dtype: Any,
    std: float = 0.02,
    norm_std: float = 0.0,
    bias_std: float = 0.0,
) -> dict[str, RandomLeaf]:
    """Normal kernels, norm scales around one, biases around zero; the same at every block size."""
    leaves = {}
    for path, leaf in abstract_params(cfg).items():
        kind = path.rsplit("/", 1)[1]
        spread, mean = {"scale": (norm_std, 1.0), "bias": (bias_std, 0.0)}.get(kind, (std, 0.0))
        stacked = "/layers/" in path or "/blocks/" in path
        leaves[path] = RandomLeaf(path, leaf.shape, np.dtype(dtype), stacked, seed, spread, mean)
    return leaves


def write_random_hf(
    out_dir: str | Path,
    config_dict: Mapping[str, Any],
    tokenizer_dir: str | Path | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    progress: hf.Progress | None = None,
    **spread: float,
) -> ModelConfig:
    """Write an HF directory with random weights.

    Args:
        out_dir: directory to make.
        config_dict: contents of config.json, flat or nested.
        tokenizer_dir: where tokenizer and processor files are copied from; None: none.
        seed: of the weights.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_bytes: size at which a new safetensors file is begun.
        progress: called after each tensor.
        **spread: ``std``, ``norm_std``, ``bias_std`` of `random_params`.

    Raises:
        ValueError: the config is not a Qwen2.5-VL, or out_dir is not empty.
    """
    out_dir = Path(out_dir)
    config = {**config_dict, "torch_dtype": dtype}
    cfg = ModelConfig.from_hf(config)
    reference = out_dir.resolve().with_name(f".{out_dir.name}.reference")
    shutil.rmtree(reference, ignore_errors=True)
    reference.mkdir(parents=True)
    try:
        if tokenizer_dir:
            for name in hf_write.COPIED_FILES:
                if (Path(tokenizer_dir) / name).is_file():
                    shutil.copyfile(Path(tokenizer_dir) / name, reference / name)
        (reference / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        eos, bos = config.get("eos_token_id"), config.get("bos_token_id")
        ids = {"bos_token_id": bos, "pad_token_id": bos, "eos_token_id": [eos, bos]}
        if None not in (eos, bos):  # a response ends with either, as in the released models
            (reference / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        params = random_params(cfg, seed=seed, dtype=DTYPES[dtype], **spread)
        hf.save_hf(
            params, cfg, out_dir, reference, max_shard_bytes=max_shard_bytes, progress=progress
        )
    finally:
        shutil.rmtree(reference, ignore_errors=True)
    return cfg


def added_tokens(tokenizer_dir: str | Path) -> dict[str, int]:
    """Special token -> id, from tokenizer.json. Raises ValueError when it cannot be read."""
    file = Path(tokenizer_dir) / "tokenizer.json"
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        return {token["content"]: int(token["id"]) for token in tokens}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a tokenizer.json with added_tokens: {error!r}") from error


def make_config(shape: Shape, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """A config.json of this shape in the released form.

    Raises:
        ValueError: sizes that do not go together, naming the key.
    """
    too_large = {k: v for k, v in token_ids.items() if v >= shape.vocab_size}
    if too_large:
        raise ValueError(f"--vocab_size {shape.vocab_size} is too small for token ids {too_large}")
    return {**shape.config().to_hf(), **token_ids}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    out = cli.base_parser(
        __doc__,
        "python -m tools.make_hf --out tiny --tokenizer QWEN_DIR --hidden 128 --layers 2",
    )
    add = out.add_argument
    add("--out", required=True, help="directory to make")
    add("--tokenizer", help="directory with tokenizer.json and the processor's files to copy")
    add("--hidden", type=int, default=64, help="width of the decoder")
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    add("--kv_heads", type=int, default=2)
    add("--mlp", type=int, help="default 4 x hidden")
    add("--vocab_size", type=int, help="default: the tokenizer's, else the released 152064")
    add("--vision_hidden", type=int, default=64)
    add("--vision_depth", type=int, default=4)
    add("--vision_heads", type=int, default=4)
    add("--vision_mlp", type=int, help="default 4 x vision_hidden")
    add("--full_blocks", type=int, nargs="*", help="default: each fourth vision block")
    add("--tied", action="store_true", help="the embedding is the output head, as in 3B")
    add("--seed", type=int, default=0)
    add("--dtype", choices=list(DTYPES), default="bfloat16")
    add("--std", type=float, default=0.02, help="of kernels and embeddings")
    add("--max_shard_gb", type=cli.above_zero, default=5.0)
    return out


def main(args: argparse.Namespace) -> None:
    """Make the config from the arguments and write the directory."""
    ids = added_tokens(args.tokenizer) if args.tokenizer else RELEASED_IDS
    default = -(-(max(ids.values()) + 1) // 128) * 128 if args.tokenizer else 152_064
    vocab = args.vocab_size or default
    if not args.tokenizer and vocab <= max(ids.values()):  # a toy: the last ids of its vocabulary
        ids = {token: vocab - len(ids) + i for i, token in enumerate(ids)}
    full = args.full_blocks
    shape = Shape(
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.kv_heads,
        mlp=args.mlp or 4 * args.hidden,
        vocab_size=vocab,
        vision_hidden=args.vision_hidden,
        vision_depth=args.vision_depth,
        vision_heads=args.vision_heads,
        vision_mlp=args.vision_mlp or 4 * args.vision_hidden,
        full_blocks=tuple(range(3, args.vision_depth, 4)) if full is None else tuple(full),
        tied=args.tied,
    )
    token_ids = {key: ids[token] for key, token in TOKEN_KEYS.items() if token in ids}
    with console.progress("writing", 100, "%") as advance:
        cfg = write_random_hf(
            args.out,
            make_config(shape, token_ids),
            args.tokenizer,
            seed=args.seed,
            dtype=args.dtype,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            progress=console.percent(advance),
            std=args.std,
        )
    count = sum(int(np.prod(leaf.shape)) for leaf in abstract_params(cfg).values())
    print(f"{args.out}: {count:,} parameters, vocabulary {cfg.text.vocab_size}, {args.dtype}")


if __name__ == "__main__":
    cli.run(main, make_parser())
