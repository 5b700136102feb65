"""Model configuration, read from a Hugging Face ``config.json`` in its flat or nested form."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from srpo_jax.data.buckets import AnyPath
from srpo_jax.data.hf_folder import model_folder, read_json

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "block", "dots", "offload")
BASE_DTYPES = ("", "int8")  # of weights beside adapters; "": param_dtype
ATTENTION = ("auto", "xla", "cudnn", "splash")


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
        _check_positive("vision_config", self)
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
        _check_positive("text_config", self)
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
class Lora:
    """Low-rank adapters (arXiv 2106.09685): ``x @ W + alpha / rank * (x @ A) @ B``.

    ``targets`` are patterns of the linear layers' names, in which * stands for anything.
    ``base_dtype``: "int8" holds the weights of the decoder's layers in 8 bits, with a scale for
    each output; "" all of them as they come.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base_dtype: str = ""

    def __post_init__(self) -> None:
        _check_choice("lora.base_dtype", self.base_dtype, BASE_DTYPES)

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied with."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Qwen2.5-VL: its two halves, its special tokens, and how to compute it. Hashable.

    ``dtype`` is what matrix products compute in, ``param_dtype`` what parameters are held in.
    ``remat``: "none" keeps all activations, "block" recomputes each decoder layer and each group of
    vision blocks, "dots" keeps matrix products and recomputes the rest, "offload" is "block" with
    what it keeps in host memory. ``attention`` names the implementation; "auto" is the best of the
    platform that the mesh's devices belong to. ``lora``: the adapters beside its weights.
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
    lora: Lora | None = None

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("param_dtype", self.param_dtype, DTYPES)
        _check_choice("remat", self.remat, REMAT)
        _check_choice("attention", self.attention, ATTENTION)
        _require(
            self.vision.out_hidden_size == self.text.hidden_size,
            f"vision_config.out_hidden_size: {self.vision.out_hidden_size} must equal the decoder's"
            f" hidden_size, {self.text.hidden_size}",
        )

    @property
    def base(self) -> "ModelConfig":
        """The model without adapters and 8 bits: what a Hugging Face directory holds."""
        return dataclasses.replace(self, lora=None)

    @property
    def train_passes(self) -> int:
        """Forward passes that a forward and a backward pass cost together: beside adapters weights
        need no gradient of their own."""
        return 2 if self.lora else 3

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **overrides: Any) -> "ModelConfig":
        """Reads the contents of a ``config.json``; ``overrides`` are fields of this class.

        Both forms are read: flat (the released checkpoints: the decoder's keys at the top) and
        nested (transformers 5: ``text_config``). A missing key means transformers' default, as the
        released 32B and 72B files leave some out. Raises ValueError naming the offending key.
        """
        if "qwen2_5_vl" not in str(hf.get("model_type", "")):
            raise ValueError(
                f"model_type: {hf.get('model_type')!r} is not qwen2_5_vl; give a Qwen2.5-VL model"
            )
        _require(
            not hf.get("quantization_config"),
            "quantization_config: quantised weights are not read; give the model they were made of",
        )
        vision = hf.get("vision_config")
        if not isinstance(vision, dict):
            raise ValueError("vision_config: missing or not a table")
        nested = hf.get("text_config")
        text = nested if isinstance(nested, dict) else hf
        fields = _read(cls, {key: hf[key] for key in TOKEN_IDS if key in hf})
        fields |= {"vision": _vision_from_hf(vision), "text": _text_from_hf(text)}
        # As in transformers, either place ties: files before version 5 have it in the inner one.
        fields["tie_word_embeddings"] = _tied(hf) or _tied(text)
        unknown = sorted(set(overrides) - {f.name for f in dataclasses.fields(cls)})
        _require(not unknown, f"unknown model configuration keys: {', '.join(unknown)}")
        return cls(**(fields | overrides))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model in the released, flat form."""
        vision = dataclasses.asdict(self.vision)
        for key in _NOT_IN_HF_VISION:
            del vision[key]
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
            **{key: getattr(self, key) for key in TOKEN_IDS},
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


def load_config(hf_dir: AnyPath, **overrides: Any) -> ModelConfig:
    """Reads ``config.json`` of a Hugging Face directory; see ``ModelConfig.from_hf``.

    Raises what `model_folder` does, and ValueError naming the offending key.
    """
    path = model_folder(hf_dir) / "config.json"
    found = read_json(path)
    try:
        return ModelConfig.from_hf(found, **overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# What must never stand in a text: images, videos and their markers.
TOKEN_IDS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name.endswith("_token_id"))
_NOT_IN_HF_VISION = ("rope_theta", "rms_norm_eps")


def _tied(table: dict[str, Any]) -> bool:
    tied = table.get("tie_word_embeddings")
    words = f"tie_word_embeddings: expected true or false, found {tied!r}"
    _require(tied is None or isinstance(tied, bool), words)
    return bool(tied)


def _vision_from_hf(hf: dict[str, Any]) -> VisionConfig:
    """``vision_config``; the released files call the channels ``in_chans``."""
    _check_choice("vision_config.hidden_act", hf.get("hidden_act", "silu"), ("silu",))
    table = {k: v for k, v in hf.items() if k not in _NOT_IN_HF_VISION}
    if "in_chans" in hf:
        table.setdefault("in_channels", hf["in_chans"])
    fields = _read(VisionConfig, table, "vision_config.")
    rope = hf.get("rope_parameters") or {}
    return VisionConfig(**fields | _read(VisionConfig, rope, "vision_config.rope_parameters."))


def _text_from_hf(hf: dict[str, Any]) -> TextConfig:
    """The decoder's keys: the top of a flat file, or ``text_config``."""
    _check_choice("hidden_act", hf.get("hidden_act", "silu"), ("silu",))
    _require(
        not hf.get("use_sliding_window"),
        "use_sliding_window: true is not supported; released models have false",
    )
    fields = _read(TextConfig, {k: v for k, v in hf.items() if v is not None})
    if hf.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 64)
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check_choice(f"{name}.type", kind, ("default", "mrope"))
    return TextConfig(**fields | _read(TextConfig, rope, f"{name}."))


# Type of a field -> what config.json must hold for it, in words and as a test, and its maker.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    int: ("an integer", lambda v: type(v) is int, int),
    float: ("a number", lambda v: type(v) in (int, float), float),
    tuple[int, ...]: (
        "integers",
        lambda v: isinstance(v, list) and all(type(i) is int for i in v),
        tuple,
    ),
}


def _read(kind: type, table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of ``kind`` that ``table`` holds; ValueError for one of another type."""
    fields = {}
    for key, hint in typing.get_type_hints(kind).items():
        if key in table:
            (words, fits, make), value = _KINDS[hint], table[key]
            if hint is int and isinstance(value, list) and len(set(value)) == 1:
                value = value[0]  # transformers allows patch sizes as pairs
            _require(fits(value), f"{prefix}{key}: expected {words}, found {value!r}")
            fields[key] = make(value)
    return fields


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{key}: {value!r} is not one of {', '.join(choices)}")


def _check_positive(where: str, config: Any) -> None:
    """ValueError for a size, that is an integer, that is not positive."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fits = field.type is not int or value > 0
        _require(fits, f"{where}.{field.name}: must be positive, found {value}")


def _check_divides(small_key: str, small: int, large_key: str, large: int) -> None:
    _require(large % small == 0, f"{small_key}: {small} does not divide {large_key}, {large}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
