"""config.json in its two forms -> ModelConfig, and the sizes of the released models."""

import json
import math

import pytest

from srpo_jax.model.config import ModelConfig, TextConfig, VisionConfig, load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import size_config

# Keys as the released 3B file has them.
FLAT = {
    "model_type": "qwen2_5_vl",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


def nested(flat):
    """The same model as transformers 5 writes it."""
    top = ("model_type", "tie_word_embeddings", "vision_config")
    text = {k: v for k, v in flat.items() if k not in top and not k.endswith("token_id")}
    scaling = text.pop("rope_scaling")
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": scaling["mrope_section"],
    }
    vision = {k: v for k, v in flat["vision_config"].items() if k != "in_chans"}
    vision |= {"in_channels": 3, "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0}}
    kept = {k: v for k, v in flat.items() if k.endswith("token_id")}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text | {"model_type": "qwen2_5_vl_text", "tie_word_embeddings": True},
        "vision_config": vision,
        **kept,
    }


def test_flat_and_nested_files_give_the_released_model():
    assert ModelConfig.from_hf(FLAT) == size_config("3b")
    assert ModelConfig.from_hf(nested(FLAT)) == size_config("3b")
    assert hash(size_config("3b")) == hash(ModelConfig.from_hf(FLAT))


def test_written_file_reads_back_equal():
    cfg = ModelConfig(
        VisionConfig(
            depth=3,
            hidden_size=36,
            intermediate_size=20,
            num_heads=3,
            out_hidden_size=40,
            patch_size=2,
            window_size=8,
            fullatt_block_indexes=(0, 2),
        ),
        TextConfig(
            vocab_size=77,
            hidden_size=40,
            intermediate_size=36,
            num_hidden_layers=3,
            num_attention_heads=5,
            num_key_value_heads=1,
            mrope_section=(1, 1, 2),
            rope_theta=5e5,
        ),
        image_token_id=9,
        param_dtype="bfloat16",
    )
    written = json.loads(json.dumps(cfg.to_hf()))
    assert ModelConfig.from_hf(written, param_dtype="bfloat16") == cfg


def test_missing_keys_are_transformers_defaults():
    """The released 32B and 72B files leave out what equals the default."""
    vision = {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 5120}
    text = {"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648}
    text |= {"num_hidden_layers": 64, "num_attention_heads": 40, "rms_norm_eps": 1e-6}
    flat = {"model_type": "qwen2_5_vl", "vision_config": vision | {"tokens_per_second": 2}, **text}
    flat["max_position_embeddings"] = 128_000
    assert ModelConfig.from_hf(flat) == size_config("32b")


def change(**changes):
    """FLAT with changed keys; ``vision_...`` keys go into vision_config."""
    vision = {k[7:]: v for k, v in changes.items() if k.startswith("vision_")}
    top = {k: v for k, v in changes.items() if not k.startswith("vision_")}
    return FLAT | top | {"vision_config": FLAT["vision_config"] | vision}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change(model_type="qwen2_vl"), "model_type: 'qwen2_vl'"),
        (FLAT | {"vision_config": None}, "vision_config: missing"),
        (change(model_type="qwen2"), "'qwen2' is not qwen2_5_vl; give a Qwen2.5-VL model"),
        (change(quantization_config={"quant_method": "awq"}), "quantised weights are not read"),
        (change(tie_word_embeddings="false"), "tie_word_embeddings: expected true or false"),
        (change(hidden_size="2048"), "hidden_size: expected an integer, found '2048'"),
        (change(num_key_value_heads=3), "num_key_value_heads: 3 does not divide"),
        (change(hidden_act="gelu"), "hidden_act: 'gelu'"),
        (change(use_sliding_window=True), "use_sliding_window"),
        (change(rope_scaling={"type": "yarn"}), "rope_scaling.type: 'yarn'"),
        (
            change(rope_scaling={"type": "mrope", "mrope_section": [16, 24]}),
            r"mrope_section: \[16, 24\] must sum",
        ),
        (change(vision_window_size=100), "28 does not divide window_size, 100"),
        (change(vision_num_heads=128), "head width 10"),
        (change(vision_depth=8), r"fullatt_block_indexes: \[15, 23, 31\]"),
        (change(vision_out_hidden_size=1024), "out_hidden_size: 1024 must equal"),
        (change(vision_depth=0), "depth: must be positive"),
    ],
)
def test_errors_name_the_key(config, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config)


def test_overrides_are_checked(tmp_path):
    with pytest.raises(ValueError, match="unknown model configuration keys: atention"):
        ModelConfig.from_hf(FLAT, atention="xla")
    with pytest.raises(ValueError, match="remat: 'all' is not one of none, block, dots"):
        size_config("7b", remat="all")
    with pytest.raises(ValueError, match="'8b' is not one of 3b, 7b, 32b, 72b"):
        size_config("8b")
    with pytest.raises(FileNotFoundError, match="hf_dir must be a Hugging Face model directory"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(change(hidden_act="gelu")))
    with pytest.raises(ValueError, match=r"config\.json: hidden_act"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    assert load_config(tmp_path, dtype="bfloat16").dtype == "bfloat16"


def test_7b_has_its_published_number_of_parameters():
    sizes = {k: math.prod(v.shape) for k, v in abstract_params(size_config("7b")).items()}
    assert sum(sizes.values()) == 8_292_166_656
    assert sum(n for k, n in sizes.items() if k.startswith("vision/")) == 676_550_144


def test_derived_sizes_of_the_released_tower():
    vision = size_config("7b").vision
    assert (vision.window_slots, vision.merge_unit, vision.patch_dim) == (64, 4, 1176)
    assert (vision.head_dim, size_config("7b").text.head_dim) == (80, 128)
