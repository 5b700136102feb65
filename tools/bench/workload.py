"""The work that is measured: a model with random or given weights, prompts with an image, lengths.

Completions get the lengths that ``--lengths`` asks for by construction: the sampler is told a limit
for each sample, and the update is given completions of just those lengths.
"""

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from srpo_jax.data.batching import Encoded, Media, collate, encode_arrays
from srpo_jax.data.processing import Processor
from srpo_jax.data.prompts import Message
from srpo_jax.data.vision_arrays import VisionGeometry, VisionIds
from srpo_jax.model import hf, sharding
from srpo_jax.model.config import ModelConfig, load_config
from srpo_jax.model.qwen2_5_vl import abstract_params, init_params
from srpo_jax.model.sizes import SIZES, Shape, size_config
from srpo_jax.run.metrics import ModelFlops
from srpo_jax.structs import Batch, Params

# Small models with the real vocabulary, for machines without an accelerator.
SMALL = {
    "43m": Shape(151_936, 256, 688, 4, 4, 2, 512, True, 256, 4, 4, (1, 3)),
    "smoke": Shape(151_936, 32, 48, 2, 2, 1, 48, True, 32, 2, 2, (1,)),
    "256m": Shape(151_936, 1024, 2816, 8, 8, 2, 512, True, 256, 4, 4, (1, 3)),
}
SIZE_NAMES = (*SMALL, *(name for name, size in SIZES.items() if size.shape))
_WORDS = ("red", "green", "blue", "one", "two", "three", "left", "right", "big", "small")
_WRAPPING = 32  # tokens that a chat template puts around a prompt, at most
_PLAIN_IDS = 100_000  # token ids below are words, and none of a model's special tokens


@dataclasses.dataclass(frozen=True)
class Workload:
    """One batch of prompts and the lengths of their completions, on a mesh."""

    model: ModelConfig
    mesh: Mesh
    hf_dir: str  # weights are read from it; "": random ones
    prompts: int  # P
    group_size: int  # G
    prompt_tokens: int  # S: budget of a prompt, which about fills it
    max_new_tokens: int  # R
    image: tuple[int, int]  # patches, rows and columns; (0, 0): no image
    lengths_PG: np.ndarray
    prompts_per_row: int

    @property
    def rows(self) -> int:
        """M: micro-batches times data shards."""
        return self.prompts // self.prompts_per_row

    @property
    def tokens(self) -> int:
        """Completion tokens of all samples."""
        return int(self.lengths_PG.sum())

    @functools.cached_property
    def flops(self) -> ModelFlops:
        """FLOP counts of the model."""
        return ModelFlops.of(
            abstract_params(self.model), len(self.model.vision.fullatt_block_indexes)
        )

    def text_flops(self, prompt_lengths_P: np.ndarray) -> float:
        """Forward FLOPs over every prompt once and its completions after it."""
        return self.flops.text(prompt_lengths_P) + self.flops.text(
            self.lengths_PG, prefix=prompt_lengths_P[:, None], head_tokens=self.tokens
        )

    def describe(self) -> str:
        """Shapes in words."""
        lengths = self.lengths_PG
        image = f", image {self.image[0]}x{self.image[1]} patches" if self.image[0] else ""
        return (
            f"{self.prompts} prompts of {self.prompt_tokens} tokens{image} x {self.group_size} "
            f"samples of at most {self.max_new_tokens} (mean {lengths.mean():.0f}, longest "
            f"{lengths.max()}), {self.prompts_per_row} prompts a row, {self.model.dtype}"
        )

    def messages(self) -> tuple[list[list[Message]], list[list[Image.Image]]]:
        """The prompts as conversations with their images, for a model that has a tokenizer."""
        rng, (height, width) = np.random.default_rng(0), self.image
        side = self.model.vision.patch_size
        conversations, images = [], []
        for _ in range(self.prompts):
            content: list[dict[str, str]] = []
            own = []
            if height:
                pixels = rng.integers(0, 256, (height * side, width * side, 3), np.uint8)
                own, content = [Image.fromarray(pixels)], [{"type": "image"}]
            words = " ".join(rng.choice(_WORDS, self._words).tolist())
            content.append({"type": "text", "text": words})
            conversations.append([{"role": "user", "content": content}])
            images.append(own)
        return conversations, images

    @property
    def _words(self) -> int:
        merged = self.image[0] * self.image[1] // self.model.vision.merge_unit
        return max(self.prompt_tokens - merged - _WRAPPING, 1)

    def encoded(self) -> list[Encoded]:
        """The prompts: random text around one image of noise.

        Through the processor of ``hf_dir`` where there is one: a peer can be given the same.
        """
        if self.hf_dir:
            processor = self.processor
            return [
                processor.encode_prompt(messages, images)
                for messages, images in zip(*self.messages(), strict=True)
            ]
        rng, vocabulary = np.random.default_rng(0), self.model.text.vocab_size
        geometry, (height, width) = _geometry(self.model), self.image
        ids = VisionIds(self.model.image_token_id, self.model.video_token_id, geometry=geometry)
        merged, media = height * width // geometry.merge_unit, None
        if merged:
            pixels = rng.standard_normal((height * width, geometry.patch_dim), np.float32)
            media = Media(pixels, [[1, height, width]])
        found = []
        for _ in range(self.prompts):
            words = rng.integers(0, min(vocabulary, _PLAIN_IDS), self.prompt_tokens - merged)
            tokens = [*words[:1], *[ids.image_token_id] * merged, *words[1:]]
            found.append(encode_arrays(tokens, ids, media))
        return found

    @functools.cached_property
    def processor(self) -> Processor:
        """Of ``hf_dir``; it takes the images as they are."""
        pixels = max(self.image[0] * self.image[1], 4) * self.model.vision.patch_size**2
        return Processor(self.hf_dir, min_pixels=min(pixels, 3136), max_pixels=pixels)

    def batch(self) -> Batch[np.ndarray]:
        """The prompts as the loader hands them over."""
        samples = self.encoded()
        slots = samples[0].num_slots * self.prompts_per_row
        return collate(
            samples,
            rows=self.rows,
            tokens=self.prompt_tokens,
            patches=slots,
            per_row=self.prompts_per_row,
            pad_id=0,
            geometry=_geometry(self.model),
        )

    def params(self, dtype: str, layout: str = "train") -> Params:
        """All parameters: those of ``hf_dir``, or random ones made in their shards."""
        cfg = dataclasses.replace(self.model, param_dtype=dtype)
        shardings = sharding.param_specs(abstract_params(cfg), self.mesh, layout)
        if self.hf_dir:
            return hf.load_params(self.hf_dir, cfg, shardings=shardings, dtype=dtype)
        make = functools.partial(init_params, cfg)
        return jax.jit(make, out_shardings=shardings)(jax.random.key(0))

    def completions(self) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens [P, G, R] and their mask, of the wanted lengths."""
        shape = (self.prompts, self.group_size, self.max_new_tokens)
        tokens = np.random.default_rng(1).integers(
            0, min(self.model.text.vocab_size, _PLAIN_IDS), shape
        )
        mask = np.arange(self.max_new_tokens) < self.lengths_PG[..., None]
        return np.where(mask, tokens, 0).astype(np.int32), mask


def _geometry(model: ModelConfig) -> VisionGeometry:
    vision = model.vision
    return VisionGeometry(
        vision.patch_size,
        vision.spatial_merge_size,
        vision.temporal_patch_size,
        vision.window_size,
    )


def draw_lengths(text: str, prompts: int, group_size: int, limit: int) -> np.ndarray:
    """[P, G] lengths from ``full``, ``lognormal:MEAN,SIGMA`` or a JSON file of numbers.

    Log-normal ones have that mean before they are cut off at ``limit``; a file's numbers are taken
    in turn. Raises ValueError for anything else.
    """
    count = prompts * group_size
    if text == "full":
        lengths = np.full(count, limit)
    elif text.startswith("lognormal:"):
        try:
            mean, sigma = map(float, text.removeprefix("lognormal:").split(","))
        except ValueError:
            raise ValueError(f"--lengths {text}: write lognormal:MEAN,SIGMA") from None
        rng = np.random.default_rng(2)
        lengths = np.rint(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count))
    elif Path(text).is_file():
        lengths = np.resize(np.asarray(json.loads(Path(text).read_text()), np.int64), count)
    else:
        raise ValueError(f"--lengths {text}: full, lognormal:MEAN,SIGMA, or a JSON file of numbers")
    return np.clip(lengths, 1, limit).astype(np.int32).reshape(prompts, group_size)


def workload(args: argparse.Namespace) -> Workload:
    """The work that the command line asks for; ValueError where sizes do not go together."""
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    options = {"dtype": dtype, "param_dtype": args.param_dtype or dtype}
    if args.hf_dir:
        model = load_config(args.hf_dir, **options)
    elif args.size in SMALL:
        model = SMALL[args.size].config(**options)
    else:
        model = size_config(args.size, **options)
    mesh = sharding.make_mesh(tensor=args.tensor)
    shards = sharding.num_data_shards(mesh)
    per_row = args.prompts_per_row or max(1, min(2, args.prompts // shards))
    if args.prompts % (per_row * shards):
        raise ValueError(
            f"--prompts {args.prompts} is no multiple of data shards x --prompts_per_row = "
            f"{shards} x {per_row}"
        )
    height, width = (int(n) for n in args.image.split("x"))
    merged = height * width // model.vision.merge_unit
    if merged >= args.prompt_tokens:
        raise ValueError(
            f"--image {args.image} takes {merged} of --prompt_tokens {args.prompt_tokens}"
        )
    lengths = draw_lengths(args.lengths, args.prompts, args.group_size, args.max_new_tokens)
    return Workload(
        model=model,
        mesh=mesh,
        hf_dir=args.hf_dir or "",
        prompts=args.prompts,
        group_size=args.group_size,
        prompt_tokens=args.prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        image=(height, width),
        lengths_PG=lengths,
        prompts_per_row=per_row,
    )


def param_bytes(params: Params, *, text_only: bool = True) -> int:
    """Bytes of the parameters on one device."""
    sizes = 0
    for path, x in params.items():
        if text_only and path.startswith("vision/"):
            continue
        sizes += math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    return sizes
