"""The work that is measured: a model with random or given weights, prompts with an image, lengths.

Completions get the lengths that ``--lengths`` asks for by construction: the sampler is told a limit
for each sample and has no end token, the update is given completions of just those lengths.
"""

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from srpo_jax.data.batching import Encoded, Layout, collate
from srpo_jax.data.files import write_json
from srpo_jax.data.processing import Processor
from srpo_jax.data.prompts import Message
from srpo_jax.model import hf, sharding
from srpo_jax.model.config import ModelConfig, load_config
from srpo_jax.model.qwen2_5_vl import abstract_params, init_params
from srpo_jax.model.sizes import SIZES, Shape
from srpo_jax.run.metrics import ModelFlops
from srpo_jax.structs import Batch, Params
from tools.demo.tokenizer import train_tokenizer, write_tokenizer
from tools.make_hf import TOKEN_KEYS, make_config

# Small models for machines without an accelerator, two of them with the real vocabulary.
SHAPES = {
    "smoke": Shape(1024, 32, 48, 2, 2, 1, 48, True, 32, 2, 2, (1,)),
    "43m": Shape(151_936, 256, 688, 4, 4, 2, 512, True, 256, 4, 4, (1, 3)),
    "256m": Shape(151_936, 1024, 2816, 8, 8, 2, 512, True, 256, 4, 4, (1, 3)),
} | {name: size.shape for name, size in SIZES.items() if size.shape}
WORDS = ("red", "green", "blue", "one", "two", "three", "left", "right", "big", "small")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One batch of prompts and the lengths of their completions, on a mesh."""

    model: ModelConfig
    mesh: Mesh
    folder: Path  # Hugging Face files: all of them, or all but the weights
    has_weights: bool  # in ``folder``; else they are random
    prompt_tokens: int  # S: budget of a prompt, which about fills it
    max_new_tokens: int  # R
    image: tuple[int, int]  # patches, rows and columns; (0, 0): no image
    lengths_PG: np.ndarray
    prompts_per_row: int

    def with_weights(self, folder: Path) -> "Workload":
        """The same with the weights of a directory."""
        return dataclasses.replace(self, folder=folder, has_weights=True)

    @property
    def layout(self) -> Layout:
        """Of the prompts."""
        shards, prompts = sharding.num_data_shards(self.mesh), len(self.lengths_PG)
        return Layout(prompts, shards, prompts // (shards * self.prompts_per_row))

    @functools.cached_property
    def flops(self) -> ModelFlops:
        """FLOP counts of the model."""
        full_blocks = len(self.model.vision.fullatt_block_indexes)
        return ModelFlops.of(abstract_params(self.model), full_blocks)

    def describe(self) -> str:
        """Shapes in words."""
        lengths, (height, width) = self.lengths_PG, self.image
        image = f", image {height}x{width} patches," if height else ""
        count = sum(math.prod(x.shape) for x in abstract_params(self.model).values())
        return (
            f"{count / 1e6:,.1f} M parameters, {self.model.dtype}; {len(lengths)} prompts of at "
            f"most {self.prompt_tokens} tokens{image} x {lengths.shape[1]} samples of at most "
            f"{self.max_new_tokens} (mean {lengths.mean():.0f}, longest {lengths.max()}); "
            f"{self.prompts_per_row} prompts a row"
        )

    @functools.cached_property
    def processor(self) -> Processor:
        """Of ``folder``; it takes the images as they are."""
        pixels = max(math.prod(self.image), 4) * self.model.vision.patch_size**2
        return Processor(self.folder, min_pixels=min(pixels, 3136), max_pixels=pixels)

    @functools.cached_property
    def conversations(self) -> list[tuple[list[Message], list[Image.Image]]]:
        """The prompts, each with its images: words that about fill it, around noise."""
        images = noise(len(self.lengths_PG), self.image, self.model.vision.patch_size)
        rng = np.random.default_rng(0)

        def prompt(words: int, own: list[Image.Image]) -> tuple[list[Message], list[Image.Image]]:
            text = {"type": "text", "text": " ".join(rng.choice(WORDS, words).tolist())}
            content = [*({"type": "image"} for _ in own), text]
            return [{"role": "user", "content": content}], own

        frame = self.processor.encode_prompt(*prompt(1, images[0])).num_tokens
        if frame >= self.prompt_tokens:
            raise ValueError(
                f"--prompt_tokens {self.prompt_tokens}: the image and the template take {frame}"
            )
        return [prompt(self.prompt_tokens - frame, own) for own in images]

    def encoded(self) -> list[Encoded]:
        """The prompts as the model takes them."""
        return [self.processor.encode_prompt(*both) for both in self.conversations]

    def batch(self) -> Batch[np.ndarray]:
        """The prompts as the loader hands them over."""
        samples = self.encoded()
        return collate(
            samples,
            rows=len(samples) // self.prompts_per_row,
            tokens=self.prompt_tokens,
            patches=samples[0].num_slots * self.prompts_per_row,
            per_row=self.prompts_per_row,
            pad_id=self.processor.pad_id,
            geometry=self.processor.geometry,
        )

    def params(self, layout: str = "train") -> Params:
        """All parameters: those of ``folder``, or random ones made in their shards."""
        shardings = sharding.param_specs(abstract_params(self.model), self.mesh, layout)
        if self.has_weights:
            dtype = self.model.param_dtype
            return hf.load_params(self.folder, self.model, shardings=shardings, dtype=dtype)
        make = functools.partial(init_params, self.model)
        return jax.jit(make, out_shardings=shardings)(jax.random.key(0))

    def completions(self) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens [P, G, R] and their mask, of the wanted lengths."""
        mask = np.arange(self.max_new_tokens) < self.lengths_PG[..., None]
        words = min(self.processor.forbidden_ids)  # control tokens come after all words
        tokens = np.random.default_rng(1).integers(0, words, mask.shape)
        return np.where(mask, tokens, self.processor.pad_id).astype(np.int32), mask


def noise(count: int, patches: tuple[int, int], side: int) -> list[list[Image.Image]]:
    """One image of so many patches for each prompt; none for 0 patches."""
    rng, (height, width) = np.random.default_rng(0), patches
    if not height * width:
        return [[] for _ in range(count)]
    pixels = rng.integers(0, 256, (count, height * side, width * side, 3), np.uint8)
    return [[Image.fromarray(one)] for one in pixels]


def draw_lengths(text: str, shape: tuple[int, int], limit: int) -> np.ndarray:
    """[P, G] lengths from ``full``, ``lognormal:MEAN,SIGMA`` or a file.

    Log-normal ones have that mean before they are cut off at ``limit``. A file holds numbers, one a
    line or as a JSON list, or is one of training's rollouts/; they are taken in turn. Raises
    ValueError for anything else.
    """
    count = math.prod(shape)
    kind, _, numbers = text.partition(":")
    if text == "full":
        lengths = np.full(count, limit)
    elif kind == "lognormal":
        try:
            mean, sigma = map(float, numbers.split(","))
            center = math.log(mean) - sigma**2 / 2
        except ValueError:
            raise ValueError(f"--lengths {text}: write lognormal:MEAN,SIGMA") from None
        lengths = np.rint(np.random.default_rng(2).lognormal(center, abs(sigma), count))
    elif Path(text).is_file():
        lengths = np.resize(read_lengths(Path(text)), count)
    else:
        raise ValueError(f"--lengths {text}: full, lognormal:MEAN,SIGMA, or a file of numbers")
    return np.clip(lengths, 1, limit).astype(np.int32).reshape(shape)


def read_lengths(file: Path) -> list[int]:
    """The numbers of a file for ``draw_lengths``; ValueError where it has none."""
    text = file.read_text("utf-8")
    try:
        one = text.lstrip().startswith("[")
        rows = json.loads(text) if one else map(json.loads, text.strip().split("\n"))
        lengths = [int(row["tokens"] if isinstance(row, dict) else row) for row in rows]
    except (ValueError, TypeError, KeyError):
        lengths = []
    if not lengths:
        raise ValueError(
            f"{file}: for --lengths it must hold numbers, one a line or as a JSON list, or rows "
            "with tokens"
        )
    return lengths


def parse_image(text: str) -> tuple[int, int]:
    """Patches of an image from "36x36"; ValueError unless both are even (0x0: no image)."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()) or int(height) % 2 or int(width) % 2:
        raise ValueError(f"--image {text}: ROWSxCOLUMNS of patches, both even; 0x0 for none")
    return int(height), int(width)


def make_folder(size: str, folder: Path) -> Path:
    """A Hugging Face directory without weights: a config of this size, a small tokenizer."""
    texts = [" ".join(WORDS), " " + " ".join(WORDS), "user\n", "assistant\n"] * 2
    ids = write_tokenizer(train_tokenizer(texts), folder)
    token_ids = {key: ids[token] for key, token in TOKEN_KEYS.items()}
    write_json(folder / "config.json", make_config(SHAPES[size], token_ids))
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    write_json(folder / "generation_config.json", ends)
    return folder


def workload(args: argparse.Namespace, folder: Path, prompts: int) -> Workload:
    """``prompts`` prompts of what the command line asks for; ValueError where sizes do not go
    together."""
    cpu = jax.default_backend() == "cpu"
    dtype = args.dtype or ("float32" if cpu else "bfloat16")
    remat = args.remat or ("none" if cpu else "block")  # as the peers: they recompute on a GPU only
    mesh = sharding.make_mesh(tensor=args.tensor)
    shards = sharding.num_data_shards(mesh)
    per_row = args.prompts_per_row or max(1, min(2, prompts // shards))
    if prompts % (per_row * shards):
        raise ValueError(
            f"{prompts} prompts are no multiple of data shards x --prompts_per_row = "
            f"{shards} x {per_row}"
        )
    param_dtype = args.param_dtype or dtype
    return Workload(
        model=load_config(folder, dtype=dtype, param_dtype=param_dtype, remat=remat),
        mesh=mesh,
        folder=folder,
        has_weights=bool(args.hf_dir),
        prompt_tokens=args.prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        image=parse_image(args.image),
        lengths_PG=draw_lengths(args.lengths, (prompts, args.group_size), args.max_new_tokens),
        prompts_per_row=per_row,
    )
