"""Tiny torch Qwen2.5-VL models of Hugging Face, and the same inputs in their form and in ours."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from srpo_jax.data.vision_arrays import (
    VisionGeometry,
    VisionIds,
    mrope_positions,
    stack_rows,
    vision_arrays,
)
from srpo_jax.model.sizes import Shape
from srpo_jax.structs import VisionInputs
from tools.make_hf import make_config

IMAGE, VIDEO, START, END = 132, 133, 134, 135
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "vision_token_id": 136,
    "eos_token_id": 130,
    "bos_token_id": 131,
}
TEXT_IDS = 130  # ids below are words

# Odd head counts, groups of more than one query head, an irregular and a regular block pattern.
CONFIGS = {
    "untied": dict(
        hidden=96, layers=3, heads=6, kv_heads=3, mlp=80, vocab_size=144, vision_hidden=48,
        vision_depth=5, vision_heads=3, vision_mlp=56, full_blocks=(1, 4), tied=False,
    ),
    "tied": dict(
        hidden=60, layers=2, heads=5, kv_heads=1, mlp=72, vocab_size=137, vision_hidden=40,
        vision_depth=4, vision_heads=5, vision_mlp=36, full_blocks=(1, 3), tied=True,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Video:
    """A video as the model sees it: frames, rows and columns of patches, seconds per frame."""

    grid: tuple[int, int, int]
    seconds: float = 1.0


Piece = int | Image.Image | Video  # that many words, or an image, or a video
Sequence_ = Sequence[Piece]


def make_model(name: str, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A float32 model whose every parameter is random and large enough that a wrong axis shows."""
    config = Qwen2_5_VLConfig(**make_config(Shape(**CONFIGS[name]), TOKENS))
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in key or "ln_q" in key:
                value.copy_(1 + 0.3 * noise)
            else:
                value.copy_((0.3 if key.endswith("bias") else 0.1) * noise)
    return model.float().eval()


def save_model(model: Qwen2_5_VLForConditionalGeneration, path: Path) -> Path:
    """Write it as transformers does."""
    model.save_pretrained(path)
    return path


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels: no two patches alike."""
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@dataclasses.dataclass
class Inputs:
    """One batch in both forms."""

    torch: dict[str, Any]  # keyword arguments of HF's forward
    tokens: np.ndarray  # [B, T]
    mrope: np.ndarray  # [B, 3, T]
    segments: np.ndarray  # [B, T]
    vision_src: np.ndarray  # [B, T]
    vision: VisionInputs
    grids: list[tuple[int, int, int]]  # of all images, then of all videos
    image_slots: list[np.ndarray]  # [N] bool of each row: slots of images; the rest videos


def make_inputs(
    sequences: Sequence[Sequence_], *, tokens: int, patches: int, rows: int = 0, seed: int = 1
) -> Inputs:
    """Word ids are random; images go through HF's PIL image processor.

    Args:
        sequences: the pieces of each sequence.
        tokens: T, both for HF and for us; right-padded.
        patches: N, slots of a row.
        rows: M; 0 means one for each sequence.
    """
    rng = np.random.default_rng(seed)
    rows = rows or len(sequences)
    built = [_build(pieces, rng) for pieces in sequences]
    B = len(built)
    ids = np.zeros((B, tokens), np.int64)
    mask, mrope = np.zeros((B, tokens), np.int64), np.zeros((B, 3, tokens), np.int32)
    source = np.full((B, tokens), -1, np.int32)
    offset, per_row = np.zeros(rows, np.int64), B // rows
    arrays: list[list] = [[] for _ in range(rows)]
    for b, one in enumerate(built):
        length = len(one["ids"])
        ids[b, :length], mask[b, :length] = one["ids"], 1
        mrope[b, :, :length] = one["mrope"]
        places = np.flatnonzero(np.isin(one["ids"], (IMAGE, VIDEO)))
        source[b, places] = offset[b // per_row] + np.arange(len(places))
        offset[b // per_row] += len(places)
        arrays[b // per_row].append(vision_arrays(one["pixels"], one["grids"]))
    kinds = torch.tensor((ids == IMAGE) * 1 + (ids == VIDEO) * 2, dtype=torch.int32)
    arguments = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": kinds,
        "use_cache": False,
    }
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        found = [piece for one in built for piece in one[kind]]
        if found:
            arguments[pixels] = torch.tensor(np.concatenate([p for p, _, _ in found]))
            arguments[grid] = torch.tensor([g for _, g, _ in found])
        if found and kind == "video":
            arguments["second_per_grid_ts"] = torch.tensor([s for _, _, s in found])
    return Inputs(
        arguments,
        ids.astype(np.int32),
        mrope,
        mask.astype(np.int32),
        source,
        stack_rows(arrays, patches, VisionGeometry()),
        [g for kind in ("image", "video") for one in built for _, g, _ in one[kind]],
        [np.concatenate([o["slots"] for o in built[r * per_row :][:per_row]]) for r in range(rows)],
    )


def _build(pieces: Sequence_, rng: np.random.Generator) -> dict[str, Any]:
    """One sequence: ids, pixels and grids in the order of the text, positions."""
    out: dict[str, Any] = {"image": [], "video": []}
    ids, pixels, grids, slots = [], [np.zeros((0, 1176), np.float32)], [], [np.zeros(0, bool)]
    for piece in pieces:
        if isinstance(piece, int):
            ids += rng.integers(0, TEXT_IDS, piece).tolist()
            continue
        kind = "video" if isinstance(piece, Video) else "image"
        if isinstance(piece, Video):
            rows = rng.standard_normal((int(np.prod(piece.grid)), 1176)).astype(np.float32)
            grid, seconds = piece.grid, piece.seconds
        else:
            found = image_processor()(images=[piece], return_tensors="np")
            rows, grid = found["pixel_values"], tuple(found["image_grid_thw"][0].tolist())
            seconds = 1.0
        count = int(np.prod(grid)) // 4
        ids += [START, *([VIDEO if kind == "video" else IMAGE] * count), END]
        out[kind].append((rows, grid, seconds))
        pixels.append(rows)
        grids.append(grid)
        slots.append(np.full(vision_arrays(rows, [grid]).num_slots, kind == "image"))
    mrope, _ = mrope_positions(
        ids,
        VisionIds(IMAGE, VIDEO),
        [g for _, g, _ in out["image"]],
        [g for _, g, _ in out["video"]],
        [s for _, _, s in out["video"]],
    )
    return out | {
        "ids": ids,
        "mrope": mrope,
        "pixels": np.concatenate(pixels),
        "grids": grids,
        "slots": np.concatenate(slots),
    }


def image_processor() -> Qwen2VLImageProcessorPil:
    """HF's PIL processor with the recipe's pixel limits."""
    return Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=501_760)


@dataclasses.dataclass
class Reference:
    """What HF computes, as float32: logits and the residual stream after every block and layer."""

    logits: np.ndarray  # [B, T, V]
    layers: list[np.ndarray]  # of [B, T, D]
    blocks: dict[str, list[np.ndarray]]  # "image", "video" -> after each block [patches, width]


def run_reference(model: Qwen2_5_VLForConditionalGeneration, inputs: Inputs) -> Reference:
    """HF's forward, with hooks on every layer."""
    layers: list[np.ndarray] = []
    blocks: list[np.ndarray] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, to=to: to.append(_first(out)))
        for modules, to in (
            (model.model.language_model.layers, layers),
            (model.model.visual.blocks, blocks),
        )
        for module in modules
    ]
    try:
        with torch.no_grad():
            logits = model(**inputs.torch).logits
    finally:
        for hook in hooks:
            hook.remove()
    kinds = [k for k, v in (("image", "pixel_values"), ("video", "pixel_values_videos"))
             if v in inputs.torch]  # fmt: skip
    depth = len(model.model.visual.blocks)
    by_kind = {kind: blocks[i * depth : (i + 1) * depth] for i, kind in enumerate(kinds)}
    return Reference(logits.float().numpy(), layers, by_kind)


def _first(out: Any) -> np.ndarray:
    return (out[0] if isinstance(out, tuple) else out).float().numpy(force=True)
