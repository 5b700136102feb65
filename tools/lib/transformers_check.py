"""Does transformers load this Hugging Face directory, and does it say what our sampler says?

Samples greedily from --hf_dir with both, in float32 on the CPU, and compares the token ids. Needs
torch, which the package itself does not.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.fields import to_record
from srpo_jax.data.files import read_jsonl, write_jsonl
from srpo_jax.data.images import load_image
from srpo_jax.data.processing import Processor
from tools.lib import cli, loading

ROOT = Path(__file__).resolve().parents[2]


def torch_is_there() -> bool:
    """Whether torch can be imported; without it there is nothing to compare with."""
    return importlib.util.find_spec("torch") is not None


def ours(
    hf_dir: Path, records: list[dict[str, Any]], root: Path, max_new_tokens: int
) -> list[list[int]]:
    """Greedy completions of tools.generate, run as the command that it is."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "prompts.jsonl", Path(folder) / "out.jsonl"
        write_jsonl(given, records)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tools.generate", f"--hf_dir={hf_dir}"),
                *(f"--input={given}", f"--output={out}", f"--data_root={root}"),
                *("--temperature=0", "--dtype=float32", f"--max_new_tokens={max_new_tokens}"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"tools.generate failed: {done.stderr.strip()[-500:]}")
        return [row["token_ids"] for row in read_jsonl(out)]


def transformers_completions(
    hf_dir: Path, records: list[dict[str, Any]], root: Path, max_new_tokens: int
) -> list[list[int]]:
    """Greedy completions of transformers' own model, tokenizer and image processor."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    found: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        hf_dir, dtype=torch.float32, output_loading_info=True
    )
    model, loaded = found  # a pair, as it was asked for
    strange = {key: sorted(loaded[key]) for key in ("missing_keys", "unexpected_keys")}
    if any(strange.values()):
        raise ValueError(f"{hf_dir}: transformers finds other tensors than it needs: {strange}")
    low, high = loading.pixel_limits(hf_dir)
    processor = Processor(hf_dir, min_pixels=low, max_pixels=high)
    out = []
    for number, row in enumerate(records, 1):
        record = to_record(row, origin=f"record {number}", root=str(root), require_answer=False)
        images = [load_image(ref) for ref in record.images]
        pixels = processor.image_processor(images, return_tensors="np")
        ids = PromptEncoder(processor)(record).token_ids
        input_ids = torch.tensor(ids[None], dtype=torch.long)
        with torch.no_grad():
            sequence = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                pixel_values=torch.tensor(pixels["pixel_values"]),
                image_grid_thw=torch.tensor(pixels["image_grid_thw"]),
                mm_token_type_ids=(input_ids == processor.image_token_id).long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                suppress_tokens=list(processor.forbidden_ids),
            )
        out.append(sequence[0, len(ids) :].tolist())
    return out


def compare(hf_dir: Path, records: list[dict[str, Any]], root: Path, max_new_tokens: int) -> int:
    """Number of tokens compared. ValueError naming the first record and token that differ."""
    mine = ours(hf_dir, records, root, max_new_tokens)
    theirs = transformers_completions(hf_dir, records, root, max_new_tokens)
    for record, a, b in zip(records, mine, theirs, strict=True):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
            raise ValueError(f"record {record.get('id')}: token {at} differs: {a} and {b}")
    return sum(map(len, mine))


def main(args: argparse.Namespace) -> None:
    """Compare the first --limit records of --input."""
    if not torch_is_there():
        raise RuntimeError("this check needs torch: pip install -r requirements-test.txt")
    path = Path(args.input)
    records = read_jsonl(path)[: args.limit]
    root = Path(args.data_root) if args.data_root else path.resolve().parent
    tokens = compare(Path(args.hf_dir), records, root, args.max_new_tokens)
    print(json.dumps({"records": len(records), "equal_tokens": tokens}))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__, "python -m tools.lib.transformers_check --hf_dir runs/hf --input test.jsonl"
    )
    add = parser.add_argument
    add("--hf_dir", required=True, help="Hugging Face Qwen2.5-VL directory")
    add("--input", required=True, help="JSON Lines of records")
    add("--data_root", help="folder of the images (default: that of --input)")
    add("--limit", type=int, default=4, help="first so many records (%(default)s)")
    add("--max_new_tokens", type=int, default=64, help="(%(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
