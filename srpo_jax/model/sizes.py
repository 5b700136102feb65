"""The sizes of Qwen2.5-VL: what each is made of and how it is spread. A new size is one entry."""

import dataclasses
from typing import Any

from srpo_jax.model.config import ModelConfig, TextConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """What tells one Qwen2.5-VL from another; the vision tower's defaults are the released ones."""

    vocab_size: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vision_mlp: int
    tied: bool = False  # the embedding is the output head
    vision_hidden: int = 1280
    vision_depth: int = 32
    vision_heads: int = 16
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)

    def config(self, **overrides: Any) -> ModelConfig:
        """The model of this shape; rotary sections keep 16 : 24 : 24.

        ``overrides`` are fields of ModelConfig. Raises ValueError, naming the key, for numbers that
        do not go together.
        """
        half = self.hidden // self.heads // 2
        temporal = max(1, half // 4)
        rest = half - temporal
        fields: dict[str, Any] = {"tie_word_embeddings": self.tied} | overrides
        return ModelConfig(
            vision=VisionConfig(
                depth=self.vision_depth,
                hidden_size=self.vision_hidden,
                intermediate_size=self.vision_mlp,
                num_heads=self.vision_heads,
                out_hidden_size=self.hidden,
                fullatt_block_indexes=self.full_blocks,
                tokens_per_second=2,
            ),
            text=TextConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden,
                intermediate_size=self.mlp,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                max_position_embeddings=128_000,
                rms_norm_eps=1e-6,
                mrope_section=(temporal, rest // 2, rest - rest // 2),
            ),
            **fields,
        )


@dataclasses.dataclass(frozen=True)
class Size:
    """A size that recipes are written for."""

    shape: Shape | None  # None: any model
    tensor_parallel: int  # devices that share one copy of a matrix product's weights
    prompts_per_row: int  # GRPO prompts that one data shard holds at a time
    sequences_per_row: int  # SFT conversations, likewise


SIZES = {
    "3b": Size(Shape(151_936, 2048, 11_008, 36, 16, 2, 3420, tied=True), 1, 2, 2),
    "7b": Size(Shape(152_064, 3584, 18_944, 28, 28, 4, 3420), 1, 2, 1),
    "32b": Size(Shape(152_064, 5120, 27_648, 64, 40, 8, 3456), 4, 1, 1),
    "72b": Size(Shape(152_064, 8192, 29_568, 80, 64, 8, 3456), 8, 1, 1),
    "tiny": Size(None, 1, 4, 4),
}


def size_config(size: str, **overrides: Any) -> ModelConfig:
    """The released Qwen2.5-VL of ``size``; ValueError for one that has no shape of its own."""
    shapes = {name: entry.shape for name, entry in SIZES.items() if entry.shape}
    if size not in shapes:
        raise ValueError(f"size: {size!r} is not one of {', '.join(shapes)}")
    return shapes[size].config(**overrides)
