"""Hugging Face in and out: identity, sharded reading, both layouts, one error for all faults."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from srpo_jax.model import hf, hf_files, hf_table, hf_write, sharding
from srpo_jax.model.config import ModelConfig, load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import Shape, size_config
from tools import make_hf

IM_END, END = 130, 131
TOKENS = {
    "image_token_id": 132,
    "video_token_id": 133,
    "vision_start_token_id": 134,
    "vision_end_token_id": 135,
    "vision_token_id": 136,
    "eos_token_id": IM_END,
    "bos_token_id": END,
}


def tiny_config(token_ids=TOKENS, **changes):
    """Odd sizes, all different, so that a swapped axis cannot fit by chance."""
    sizes = dict(
        hidden=48, layers=2, heads=6, kv_heads=2, mlp=40, vocab_size=144, vision_hidden=24,
        vision_depth=3, vision_heads=2, vision_mlp=20, full_blocks=(1,), tied=False,
    )  # fmt: skip
    return make_hf.make_config(Shape(**(sizes | changes)), token_ids)


def write_tiny(path, dtype="float32", tied=False, **kwargs):
    """A tiny HF directory whose every tensor is random, norms and biases too."""
    spread = dict(std=0.3, norm_std=0.3, bias_std=0.3)
    return make_hf.write_random_hf(path, tiny_config(tied=tied), dtype=dtype, **spread, **kwargs)


def read_all(hf_dir):
    """Every tensor of a directory, whatever files it lies in."""
    tensors = {}
    for file in sorted(hf_dir.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rewrite(hf_dir, change):
    """Replace model.safetensors by ``change(tensors)``."""
    tensors = read_all(hf_dir)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, hf_dir / "model.safetensors")


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_hf_to_ours_to_hf_is_the_identity(tmp_path, dtype, tied):
    cfg = write_tiny(tmp_path / "in", dtype, tied)
    params = hf.load_params(tmp_path / "in", cfg)
    assert ("text/lm_head/kernel" in params) == (not tied)
    assert {str(p.dtype) for p in params.values()} == {dtype}
    hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in")
    before, after = read_all(tmp_path / "in"), read_all(tmp_path / "out")
    assert_same_tensors(before, after)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "in" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_values_stand_where_the_axes_say(tmp_path):
    cfg = write_tiny(tmp_path / "in")
    stored, params = read_all(tmp_path / "in"), hf.load_params(tmp_path / "in", cfg)
    get = lambda path: np.asarray(params[path])  # noqa: E731
    # torch's Linear holds [out, in]; head h, channel e of a projection is row h * E + e.
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    assert q.shape == (6 * 8, 48)
    assert get("text/layers/attn/q/kernel")[1, 5, 4, 3] == q[4 * 8 + 3, 5]
    assert (
        get("text/layers/attn/q/bias")[0, 4, 3]
        == (stored["model.layers.0.self_attn.q_proj.bias"][4 * 8 + 3])
    )
    v = stored["model.layers.0.self_attn.v_proj.weight"]
    assert get("text/layers/attn/v/kernel")[0, 5, 1, 3] == v[1 * 8 + 3, 5]
    o = stored["model.layers.1.self_attn.o_proj.weight"]
    assert get("text/layers/attn/o/kernel")[1, 4, 3, 7] == o[7, 4 * 8 + 3]
    up = stored["model.layers.0.mlp.up_proj.weight"]
    assert get("text/layers/mlp/up/kernel")[0, 9, 30] == up[30, 9]
    qkv = stored["visual.blocks.2.attn.qkv.weight"]
    assert get("vision/blocks/attn/qkv/kernel")[2, 7, 1, 0, 5] == qkv[1 * 24 + 0 * 12 + 5, 7]
    patch = stored["visual.patch_embed.proj.weight"]
    assert patch.shape == (24, 3, 2, 14, 14)
    # A pixel row runs over channel, frame, row, column.
    flat = 2 * (2 * 14 * 14) + 1 * (14 * 14) + 3 * 14 + 5
    assert get("vision/patch_embed/kernel")[flat, 7] == patch[7, 2, 1, 3, 5]
    assert get("text/lm_head/kernel")[3, 100] == stored["lm_head.weight"][100, 3]
    assert get("text/embed/embedding")[100, 3] == stored["model.embed_tokens.weight"][100, 3]
    fc2 = stored["visual.merger.mlp.2.weight"]
    assert get("vision/merger/fc2/kernel")[90, 40] == fc2[40, 90]


def test_shards_and_index_hold_the_same_model(tmp_path):
    cfg = write_tiny(tmp_path / "one", "bfloat16")
    write_tiny(tmp_path / "many", "bfloat16", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "many" / hf_write.INDEX_FILE).read_text())
    stored = read_all(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert set(index["weight_map"]) == set(stored)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 4 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(index["weight_map"][key] == file.name for key in opened.keys())
    assert_same_tensors(read_all(tmp_path / "one"), stored)
    one, many = (hf.load_params(tmp_path / d, cfg) for d in ("one", "many"))
    assert all(np.array_equal(one[k], many[k]) for k in one)


def test_the_nested_layout_reads_the_same(tmp_path):
    cfg = write_tiny(tmp_path / "hf")
    flat = hf.load_params(tmp_path / "hf", cfg)

    def nest(name):
        if name.startswith("model."):
            return "model.language_model." + name.removeprefix("model.")
        return "model." + name if name.startswith("visual.") else name

    rewrite(tmp_path / "hf", lambda tensors: {nest(k): v for k, v in tensors.items()})
    assert "model.visual.blocks.0.norm1.weight" in read_all(tmp_path / "hf")
    nested = hf.load_params(tmp_path / "hf", cfg)
    assert all(np.array_equal(flat[k], nested[k]) for k in flat)


@pytest.mark.parametrize("layout", ["train", "sample"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_sharded_reading_equals_whole_reading(tmp_path, layout, dtype):
    cfg = write_tiny(tmp_path / "hf")
    mesh = sharding.make_mesh(2, 2, 2)
    specs = sharding.param_specs(abstract_params(cfg), mesh, layout)
    whole = hf.load_params(tmp_path / "hf", cfg, dtype=dtype)
    parts = hf.load_params(tmp_path / "hf", cfg, shardings=specs, dtype=dtype)
    divided = 0
    for path in whole:
        assert parts[path].sharding == specs[path]
        assert parts[path].dtype == whole[path].dtype
        assert np.array_equal(np.asarray(parts[path]), np.asarray(whole[path])), path
        divided += not specs[path].is_fully_replicated
    assert divided > 10


def test_only_the_slices_of_a_shard_are_read(tmp_path, monkeypatch):
    cfg = write_tiny(tmp_path / "hf")
    read = []
    original = hf.Stored.read
    monkeypatch.setattr(hf.Stored, "read", lambda self, i: read.append(x := original(self, i)) or x)
    leaves = hf.open_hf(tmp_path / "hf", cfg)
    whole = hf.load_params(tmp_path / "hf", cfg)
    for path, index in {
        "text/layers/attn/q/kernel": np.s_[1:2, 12:24, 2:4, 0:8],
        "text/layers/attn/o/kernel": np.s_[0:1, 3:6, 0:8, 24:48],
        "vision/blocks/attn/qkv/kernel": np.s_[0:2, 0:12, 0:3, 1:2, 0:12],
        "vision/blocks/attn/qkv/bias": np.s_[0:3, 0:3, 0:1, 2:5],
        "vision/patch_embed/kernel": np.s_[0:1176, 6:12],
        "text/embed/embedding": np.s_[36:72, 0:24],
        "text/lm_head/kernel": np.s_[0:24, 36:72],
    }.items():
        read.clear()
        part = leaves[path][index]
        assert np.array_equal(part, np.asarray(whole[path])[index]), path
        assert sum(r.size for r in read) == part.size, path


@pytest.mark.parametrize("sharded", [False, True])
def test_loading_tells_what_is_read_of_what_this_process_reads(tmp_path, sharded):
    cfg = write_tiny(tmp_path / "hf")
    shapes = abstract_params(cfg)
    specs = sharding.param_specs(shapes, sharding.make_mesh(1, 4, 2)) if sharded else None
    told = []
    add = lambda *one: told.append(one)  # noqa: E731
    hf.load_params(tmp_path / "hf", cfg, shardings=specs, progress=add)
    size = 4 * sum(math.prod(leaf.shape) for leaf in shapes.values())
    done = [one[1] for one in told]
    assert {one[2] for one in told} == {size} and done == sorted(done) and done[-1] == size
    layers = [name for name, *_ in told if name.startswith("text/layers/mlp/up/")]
    assert len(layers) == cfg.text.num_hidden_layers


def test_each_slice_is_read_once_for_all_devices_that_hold_it(tmp_path, monkeypatch):
    cfg = write_tiny(tmp_path / "hf")
    specs = sharding.param_specs(abstract_params(cfg), sharding.make_mesh(2, 2, 2))
    read = []
    original = hf.HFLeaf.__getitem__
    monkeypatch.setattr(
        hf.HFLeaf, "__getitem__", lambda self, i: read.append(x := original(self, i)) or x
    )
    params = hf.load_params(tmp_path / "hf", cfg, shardings=specs)
    assert sum(r.nbytes for r in read) == sum(p.nbytes for p in params.values())


def test_loaded_parameters_can_be_donated(tmp_path):
    cfg = write_tiny(tmp_path / "hf")
    specs = sharding.param_specs(abstract_params(cfg), sharding.make_mesh(1, 4, 2))
    # Not read back from the arrays: a view on the host would hold on to their buffers.
    leaves = hf.open_hf(tmp_path / "hf", cfg)
    kept = {k: leaf[(slice(None),) * len(leaf.shape)] for k, leaf in leaves.items()}
    for shardings in (None, specs):
        params = hf.load_params(tmp_path / "hf", cfg, shardings=shardings)
        add = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
        out = add(params)
        assert all(leaf.is_deleted() for leaf in params.values())
        assert all(np.array_equal(np.asarray(out[k]), kept[k] + 1) for k in kept)


def test_a_cast_rounds_to_nearest(tmp_path):
    cfg = write_tiny(tmp_path / "hf")
    stored = read_all(tmp_path / "hf")["model.layers.1.mlp.gate_proj.weight"]
    params = hf.load_params(tmp_path / "hf", cfg, dtype=jnp.bfloat16)
    expected = stored.astype(ml_dtypes.bfloat16).T
    assert np.array_equal(np.asarray(params["text/layers/mlp/gate/kernel"])[1], expected)


def test_one_error_lists_every_fault(tmp_path):
    cfg = write_tiny(tmp_path / "hf")

    def spoil(t):
        del t["model.layers.1.mlp.up_proj.weight"]
        t["model.layers.7.mlp.up_proj.weight"] = np.zeros((40, 48), np.float32)
        t["visual.merger.mlp.0.weight"] = np.zeros((96, 95), np.float32)
        t["model.norm.weight"] = np.zeros(48, np.int8)
        t["model.layers.1.input_layernorm.weight"] = np.zeros(48, ml_dtypes.bfloat16)
        t["lora.weight"] = np.zeros(3, np.float32)

    rewrite(tmp_path / "hf", spoil)
    with pytest.raises(ValueError) as error:
        hf.load_params(tmp_path / "hf", cfg)
    head, _, faults = str(error.value).partition(" (6 faults): ")
    assert head == f"{tmp_path}/hf does not hold this model"
    assert sorted(faults.split("; ")) == [
        "lora.weight: superfluous, shape [3]",
        "model.layers.1.input_layernorm.weight: dtype BF16, layer 0 has F32",
        "model.layers.1.mlp.up_proj.weight: missing, wanted [40, 48]",
        "model.layers.7.mlp.up_proj.weight: superfluous, shape [40, 48]",
        "model.norm.weight: dtype I8, wanted one of F32, BF16, F16",
        "visual.merger.mlp.0.weight: shape [96, 95], wanted [96, 96]",
    ]


def test_mixed_dtypes_are_fine_where_a_dtype_is_asked_for(tmp_path):
    cfg = write_tiny(tmp_path / "hf")
    name = "model.layers.1.input_layernorm.weight"
    rewrite(tmp_path / "hf", lambda t: t.update({name: t[name].astype(ml_dtypes.bfloat16)}))
    params = hf.load_params(tmp_path / "hf", cfg, dtype="float32")
    assert {str(p.dtype) for p in params.values()} == {"float32"}


def test_a_missing_or_torn_shard_is_named(tmp_path):
    cfg = write_tiny(tmp_path / "hf", max_shard_bytes=60_000)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises(ValueError) as error:
        hf.load_params(tmp_path / "hf", cfg)
    assert f"{shards[0]}: is missing; download it again" in str(error.value)
    assert f"{shards[1]}: is not readable as safetensors" in str(error.value)
    assert "(2 faults)" in str(error.value)  # and not each tensor in them
    shards[1].write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer.*git lfs pull"):
        hf.load_params(tmp_path / "hf", cfg)


def test_of_many_faults_the_first_are_told_and_the_rest_counted(tmp_path):
    write_tiny(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"\((\d+) faults\): .*; and \d+ more$") as error:
        hf.load_params(tmp_path / "hf", ModelConfig.from_hf(tiny_config(layers=9)))
    assert str(error.value).count(";") == hf_files.SHOWN and "\n" not in str(error.value)


def test_directories_without_weights_are_explained(tmp_path):
    cfg = ModelConfig.from_hf(tiny_config())
    with pytest.raises(ValueError, match="no such directory"):
        hf.load_params(tmp_path / "nowhere", cfg)
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        hf.load_params(tmp_path, cfg)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin"):
        hf.load_params(tmp_path, cfg)


def test_a_tensor_in_both_layouts_at_once_is_a_fault(tmp_path):
    cfg = write_tiny(tmp_path / "hf")
    twice = "model.language_model.norm.weight"
    rewrite(tmp_path / "hf", lambda t: t.update({twice: t["model.norm.weight"]}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: twice"):
        hf.load_params(tmp_path / "hf", cfg)


def test_a_tied_model_may_carry_its_head(tmp_path):
    """As transformers: an equal head is dropped, a lone head serves as embedding."""
    cfg = write_tiny(tmp_path / "hf", tied=True)
    plain = hf.load_params(tmp_path / "hf", cfg)
    embed = "model.embed_tokens.weight"
    rewrite(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t[embed].copy()}))
    both = hf.load_params(tmp_path / "hf", cfg)
    assert both.keys() == plain.keys()
    rewrite(tmp_path / "hf", lambda t: {k: v for k, v in t.items() if k != embed})
    lone = hf.load_params(tmp_path / "hf", cfg)
    assert np.array_equal(lone["text/embed/embedding"], plain["text/embed/embedding"])


def test_a_tied_model_with_another_head_is_a_fault(tmp_path):
    cfg = write_tiny(tmp_path / "hf", tied=True)
    name = "model.embed_tokens.weight"
    rewrite(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t[name] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs .* tie_word_embeddings"):
        hf.load_params(tmp_path / "hf", cfg)


def test_old_rotary_buffers_are_ignored(tmp_path):
    cfg = write_tiny(tmp_path / "hf")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "hf", lambda t: t.update({name: np.zeros(4, np.float32)}))
    assert hf.load_params(tmp_path / "hf", cfg).keys() == abstract_params(cfg).keys()


# --- export ----------------------------------------------------------------------------------


def test_export_from_shards_equals_export_from_one_device(tmp_path):
    cfg = write_tiny(tmp_path / "in", "bfloat16")
    specs = sharding.param_specs(abstract_params(cfg), sharding.make_mesh(2, 2, 2))
    params = hf.load_params(tmp_path / "in", cfg, shardings=specs)
    hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in")
    assert_same_tensors(read_all(tmp_path / "in"), read_all(tmp_path / "out"))


def test_blocks_of_any_size_give_the_same_file(tmp_path, monkeypatch):
    cfg = write_tiny(tmp_path / "in")
    params = hf.load_params(tmp_path / "in", cfg)
    monkeypatch.setattr(hf_write, "BLOCK_BYTES", 1000)
    hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in")
    assert_same_tensors(read_all(tmp_path / "in"), read_all(tmp_path / "out"))


def test_export_sets_the_dtype_it_writes(tmp_path):
    cfg = write_tiny(tmp_path / "in")
    params = hf.load_params(tmp_path / "in", cfg)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    nested = {**config, "text_config": {"dtype": "float32", "hidden_size": 48}}
    before = (tmp_path / "in" / "config.json").read_text()
    hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in", dtype="bfloat16")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == json.loads(before) | {"torch_dtype": "bfloat16"}
    assert {str(t.dtype) for t in read_all(tmp_path / "out").values()} == {"bfloat16"}
    written = hf_write._with_dtype(nested, "bfloat16")
    assert written["text_config"]["dtype"] == written["torch_dtype"] == "bfloat16"
    assert hf_write._with_dtype(written, "bfloat16") == written


def test_export_copies_the_processor_and_completes_the_eos_ids(tmp_path, shared_data):
    tokenizer = shared_data / "tokenizer_qwen2_5_vl"
    config = json.loads((tokenizer / "7B" / "config.json").read_text())
    config |= tiny_config(token_ids={}, vocab_size=151_666) | {"eos_token_id": 151_645}
    cfg = make_hf.write_random_hf(tmp_path / "in", config, tokenizer, dtype="bfloat16")
    params = hf.load_params(tmp_path / "in", cfg)
    shutil.copy(tokenizer / "7B" / "generation_config.json", tmp_path / "in")
    hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
                 "preprocessor_config.json", "chat_template.json", "config.json",
                 "generation_config.json"):  # fmt: skip
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": 151645, "top_k": 1}')
    hf.save_hf(params, cfg, tmp_path / "one", tmp_path / "in")
    made = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert made == {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "top_k": 1}
    (tmp_path / "in" / "generation_config.json").unlink()
    hf.save_hf(params, cfg, tmp_path / "none", tmp_path / "in")
    made = json.loads((tmp_path / "none" / "generation_config.json").read_text())
    assert made["eos_token_id"] == [151645, 151643]


def test_export_refuses_what_is_not_one_model(tmp_path):
    cfg = write_tiny(tmp_path / "in")
    params = hf.load_params(tmp_path / "in", cfg)
    params["text/norm/scale"] = params["text/norm/scale"][:-1]
    params["extra"] = params.pop("text/layers/attn/q/bias")
    with pytest.raises(ValueError) as error:
        hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in")
    text = str(error.value)
    for part in ("text/norm/scale", "extra", "text/layers/attn/q/bias", "(3 faults)"):
        assert part in text
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    write_tiny(tmp_path / "tied", tied=True)
    params = hf.load_params(tmp_path / "in", cfg)
    with pytest.raises(ValueError, match=r"text/lm_head/kernel: .*tied has no such parameter"):
        hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "tied")
    with pytest.raises(ValueError, match="cannot write dtype int8"):
        hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in", dtype="int8")


def test_export_is_all_or_nothing(tmp_path, monkeypatch):
    cfg = write_tiny(tmp_path / "in")
    params = hf.load_params(tmp_path / "in", cfg)
    with pytest.raises(ValueError, match="not an empty directory"):
        hf.save_hf(params, cfg, tmp_path / "in", tmp_path / "in")

    def stop(name, done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in", progress=stop)
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    (tmp_path / "out").mkdir()
    hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- the released sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_names_and_shapes_of_the_released_models(size, shared_data):
    file = (
        shared_data / "tokenizer_qwen2_5_vl" / "derived" / f"{size.upper()}_parameter_shapes.json"
    )
    wanted = {name: tuple(shape) for name, shape in json.loads(file.read_text()).items()}
    tensors = hf_table.hf_tensors(size_config(size))
    assert {t.name: t.shape for t in tensors} == wanted
    assert len(tensors) == len(wanted)


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_each_parameter_has_exactly_one_row(size):
    paths = [row.path for row in hf_table.TABLE]
    names = [row.name for row in hf_table.TABLE]
    assert len(set(paths)) == len(paths) and len(set(names)) == len(names)
    params = abstract_params(size_config(size))
    assert set(params) == set(paths) - ({"text/lm_head/kernel"} if size == "3b" else set())


def test_7b_has_as_many_parameters_as_published():
    counts = {k: math.prod(p.shape) for k, p in abstract_params(size_config("7b")).items()}
    assert sum(counts.values()) == 8_292_166_656
    assert sum(n for k, n in counts.items() if k.startswith("vision/")) == 676_550_144


def test_published_index_names_are_those_of_the_table(shared_data):
    folder = shared_data / "tokenizer_qwen2_5_vl" / "7B"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = hf_table.hf_tensors(load_config(folder))
    assert {t.name for t in tensors} == set(index["weight_map"])
    assert 2 * sum(math.prod(t.shape) for t in tensors) == index["metadata"]["total_size"]
