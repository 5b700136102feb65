"""Model configuration, read from a Hugging Face ``config.json`` in its flat or nested form."""

import dataclasses
import json
from pathlib import Path
from typing import Any

REMAT_POLICIES = ("none", "block", "dots")
ATTENTION_IMPLS = ("auto", "xla", "cudnn", "splash")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Defaults are those of transformers' ``Qwen2_5_VLVisionConfig``."""

    depth: int = 32
    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: int = 4
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6  # a constant in transformers, not a key of config.json

    def __post_init__(self) -> None:
        _check_positive("vision_config", self, _VISION_SIZES)
        _check_divides("vision_config.num_heads", self.num_heads, "hidden_size", self.hidden_size)
        _require(
            self.head_dim % 4 == 0,
            f"vision_config: head width {self.head_dim} (hidden_size / num_heads) must be divisible"
            " by 4, as rows and columns are rotated in pairs",
        )
        unit = self.patch_size * self.spatial_merge_size
        _check_divides("patch_size * spatial_merge_size", unit, "window_size", self.window_size)
        bad = [i for i in self.fullatt_block_indexes if not 0 <= i < self.depth]
        _require(
            not bad, f"vision_config.fullatt_block_indexes: {bad} outside the {self.depth} blocks"
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Pixels of one flattened patch (1176 in the released models)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that the merger joins into one token of the decoder."""
        return self.spatial_merge_size**2

    @property
    def window_slots(self) -> int:
        """Patch slots of one attention window (64 in the released models)."""
        return (self.window_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. Defaults are those of transformers' ``Qwen2_5_VLTextConfig``."""

    vocab_size: int = 152_064
    hidden_size: int = 8192
    intermediate_size: int = 29_568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    max_position_embeddings: int = 32_768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _check_positive("text_config", self, _TEXT_SIZES)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _check_divides("text_config.num_attention_heads", heads, "hidden_size", self.hidden_size)
        _check_divides("text_config.num_key_value_heads", kv_heads, "num_attention_heads", heads)
        _require(
            self.head_dim % 2 == 0 and sum(self.mrope_section) == self.head_dim // 2,
            f"text_config.rope_scaling.mrope_section: {list(self.mrope_section)} must sum to half"
            f" the head width, {self.head_dim} / 2",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Qwen2.5-VL: its two halves, its special tokens, and how to compute it. Hashable.

    ``dtype`` is what matrix products compute in, ``param_dtype`` what parameters are held in.
    ``remat``: "none" keeps all activations, "block" recomputes each decoder layer and each group of
    vision blocks, "dots" keeps matrix products and recomputes the rest. ``attention`` names the
    implementation; "auto" is the best of the platform that the mesh's devices belong to.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    vision_token_id: int = 151_654
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "block"
    attention: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("param_dtype", self.param_dtype, DTYPES)
        _check_choice("remat", self.remat, REMAT_POLICIES)
        _check_choice("attention", self.attention, ATTENTION_IMPLS)
        _require(
            self.vision.out_hidden_size == self.text.hidden_size,
            f"vision_config.out_hidden_size: {self.vision.out_hidden_size} must equal the decoder's"
            f" hidden_size, {self.text.hidden_size}",
        )

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **overrides: Any) -> "ModelConfig":
        """Reads the contents of a ``config.json``; ``overrides`` are fields of this class.

        Both forms are read: flat (the released checkpoints: the decoder's keys at the top) and
        nested (transformers 5: ``text_config``). A missing key means transformers' default, as the
        released 32B and 72B files leave some out. Raises ValueError naming the offending key.
        """
        if "qwen2_5_vl" not in str(hf.get("model_type", "")):
            raise ValueError(f"config.json: model_type: {hf.get('model_type')!r} is not qwen2_5_vl")
        vision = hf.get("vision_config")
        if not isinstance(vision, dict):
            raise ValueError("config.json: vision_config: missing or not a table")
        nested = hf.get("text_config")
        text = nested if isinstance(nested, dict) else hf
        tied = hf.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
        fields: dict[str, Any] = {k: _integer(hf, k) for k in _TOKEN_IDS if k in hf}
        fields |= {"vision": _vision_from_hf(vision), "text": _text_from_hf(text)}
        fields["tie_word_embeddings"] = bool(tied)
        unknown = sorted(set(overrides) - {f.name for f in dataclasses.fields(cls)})
        _require(not unknown, f"unknown model configuration keys: {', '.join(unknown)}")
        return cls(**(fields | overrides))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model in the released, flat form."""
        vision = {
            k: v for k, v in dataclasses.asdict(self.vision).items() if k not in _NOT_IN_HF_VISION
        }
        vision["fullatt_block_indexes"] = list(self.vision.fullatt_block_indexes)
        text = dataclasses.asdict(self.text)
        section = list(text.pop("mrope_section"))
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            **text,
            "hidden_act": "silu",
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "use_sliding_window": False,
            **{key: getattr(self, key) for key in _TOKEN_IDS},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.param_dtype,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "hidden_act": "silu",
                **vision,
                "in_chans": self.vision.in_channels,
                "spatial_patch_size": self.vision.patch_size,
            },
        }


def load_config(hf_dir: str | Path, **overrides: Any) -> ModelConfig:
    """Reads ``config.json`` of a Hugging Face directory; see ``ModelConfig.from_hf``."""
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; hf_dir must be a Hugging Face model directory")
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")), **overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_TOKEN_IDS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)
_VISION_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "window_size",
)
_TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_NOT_IN_HF_VISION = ("rope_theta", "rms_norm_eps", "fullatt_block_indexes")


def _vision_from_hf(hf: dict[str, Any]) -> VisionConfig:
    """``vision_config``; the released files call the channels ``in_chans``."""
    _check_choice("vision_config.hidden_act", hf.get("hidden_act", "silu"), ("silu",))
    fields: dict[str, Any] = {
        k: _integer(hf, k, "vision_config.")
        for k in (*_VISION_SIZES, "tokens_per_second")
        if k in hf
    }
    if "in_channels" not in hf and "in_chans" in hf:
        fields["in_channels"] = _integer(hf, "in_chans", "vision_config.")
    if "fullatt_block_indexes" in hf:
        fields["fullatt_block_indexes"] = _integers(hf, "fullatt_block_indexes", "vision_config.")
    rope = hf.get("rope_parameters") or {}
    if "rope_theta" in rope:
        fields["rope_theta"] = _number(rope, "rope_theta", "vision_config.rope_parameters.")
    return VisionConfig(**fields)


def _text_from_hf(hf: dict[str, Any]) -> TextConfig:
    """The decoder's keys: the top of a flat file, or ``text_config``."""
    _check_choice("hidden_act", hf.get("hidden_act", "silu"), ("silu",))
    _require(
        not hf.get("use_sliding_window"),
        "config.json: use_sliding_window: true is not supported; released models have false",
    )
    fields: dict[str, Any] = {
        k: _integer(hf, k)
        for k in (*_TEXT_SIZES, "max_position_embeddings")
        if hf.get(k) is not None
    }
    if "num_key_value_heads" in hf and hf["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 64)
    for key in ("rms_norm_eps", "initializer_range", "rope_theta"):
        if hf.get(key) is not None:
            fields[key] = _number(hf, key)
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check_choice("rope_scaling.type", kind, ("default", "mrope"))
    if "rope_theta" in rope:
        fields["rope_theta"] = _number(rope, "rope_theta", "rope_parameters.")
    if "mrope_section" in rope:
        fields["mrope_section"] = _integers(rope, "mrope_section", "rope_scaling.")
    return TextConfig(**fields)


def _integer(table: dict[str, Any], key: str, prefix: str = "") -> int:
    value = table[key]
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]  # transformers allows patch sizes as pairs
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json: {prefix}{key}: expected an integer, found {value!r}")
    return value


def _integers(table: dict[str, Any], key: str, prefix: str = "") -> tuple[int, ...]:
    value = table[key]
    if not isinstance(value, (list, tuple)) or not all(type(i) is int for i in value):
        raise ValueError(f"config.json: {prefix}{key}: expected integers, found {value!r}")
    return tuple(value)


def _number(table: dict[str, Any], key: str, prefix: str = "") -> float:
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.json: {prefix}{key}: expected a number, found {value!r}")
    return float(value)


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{key}: {value!r} is not one of {', '.join(choices)}")


def _check_positive(where: str, config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(value > 0, f"{where}.{key}: must be positive, found {value}")


def _check_divides(small_key: str, small: int, large_key: str, large: int) -> None:
    _require(large % small == 0, f"{small_key}: {small} does not divide {large_key}, {large}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
