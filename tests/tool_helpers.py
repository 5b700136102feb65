"""A small random Hugging Face directory, as the command-line tools meet it."""

import json
from pathlib import Path

from srpo_jax.model.sizes import Shape
from tests.data_helpers import make_hf_dir
from tools.make_hf import make_config, write_random_hf

SIZES = {
    "odd heads": dict(
        hidden=84, layers=3, heads=7, kv_heads=7, mlp=100, vision_hidden=60, vision_depth=5,
        vision_heads=5, vision_mlp=52, full_blocks=(0, 3), tied=False,
    ),
    "one kv head, tied": dict(
        hidden=60, layers=2, heads=5, kv_heads=1, mlp=72, vision_hidden=36, vision_depth=3,
        vision_heads=3, vision_mlp=40, full_blocks=(2,), tied=True,
    ),
}  # fmt: skip


def write_hf(folder: Path, size: str = "one kv head, tied", **spread: float) -> Path:
    """A random HF directory with a small real tokenizer; loud weights, so that errors show."""
    tokenizer_dir = make_hf_dir(folder / "tokenizer")
    added = {
        token["content"]: token["id"]
        for token in json.loads((tokenizer_dir / "tokenizer.json").read_text())["added_tokens"]
    }
    ids = {
        "image_token_id": added["<|image_pad|>"],
        "video_token_id": added["<|video_pad|>"],
        "vision_start_token_id": added["<|vision_start|>"],
        "vision_end_token_id": added["<|vision_end|>"],
        "vision_token_id": added["<|vision_pad|>"],
        "eos_token_id": added["<|im_end|>"],
        "bos_token_id": added["<|endoftext|>"],
    }
    config = make_config(Shape(**SIZES[size], vocab_size=max(added.values()) + 9), ids)
    spread = dict(std=0.1, norm_std=0.3, bias_std=0.3) | spread
    write_random_hf(folder / "hf", config, tokenizer_dir, dtype="float32", **spread)
    return folder / "hf"


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
