"""LoRA: what adapters compute, which parameters change, what is kept, what PEFT reads."""

import dataclasses
import functools
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_helpers as small
import train_helpers
from checkpoint_helpers import stored_params
from flax import nnx
from safetensors.numpy import load_file, save_file

from srpo_jax import train_grpo, train_sft
from srpo_jax.learn import optim, state, steps
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model import peft, sharding
from srpo_jax.model.config import Lora, load_config
from srpo_jax.model.hf_table import HFError
from srpo_jax.model.layers import Linear
from srpo_jax.model.lora import is_adapter, merge
from srpo_jax.model.qwen2_5_vl import abstract_params, bind, init_adapters
from srpo_jax.run import rollout
from srpo_jax.run.parts import load_weights, start
from srpo_jax.run.settings import sft_settings
from srpo_jax.structs import RunError
from tools import convert_hf

LORA = Lora(3, 6.0, ("*",))  # every layer that can have one
BASE = dataclasses.replace(small.CFG, remat="none")
CFG = dataclasses.replace(BASE, lora=LORA)
DECODER = dataclasses.replace(CFG, lora=Lora(3, 6.0, ("text/layers/*",)))
FREEZE = ()


@functools.cache
def adapters(cfg=CFG):
    """Of a trained model: B is no longer zero."""
    rng = np.random.default_rng(5)
    return {
        path: x if path.endswith("lora_a") else jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)
        for path, x in init_adapters(cfg, jax.random.key(0)).items()
    }


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def hidden(cfg, params):
    """Images and text -> hidden states [B, T, D], 0 in padding."""
    batch, model = small.prompts(), bind(cfg, params)
    features = model.encode_images(batch.vision)
    args = (batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, features)
    return model.hidden(*args) * (batch.segment_ids > 0)[..., None]


# --- what is computed ----------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    fresh = init_adapters(CFG, jax.random.key(0))
    h_BTD = hidden(CFG, small.params() | fresh)
    np.testing.assert_array_equal(h_BTD, hidden(BASE, small.params()))
    for path, x in fresh.items():
        assert x.dtype == jnp.float32
        if path.endswith("lora_b"):
            assert not x.any()
        else:
            fan_in = math.prod(x.shape[path.startswith(("text/layers", "vision/blocks")) : -1])
            assert 0.9 / math.sqrt(fan_in) < np.abs(x).max() <= 1 / math.sqrt(fan_in)
    assert not np.array_equal(
        fresh["text/layers/mlp/up/lora_a"], fresh["text/layers/mlp/gate/lora_a"]
    )


def test_merged_weights_compute_what_weights_and_adapters_compute():
    params = small.params() | adapters()
    merged = merge(params, LORA, "float32")
    assert merged.keys() == small.params().keys()
    apart, together = hidden(CFG, params), hidden(BASE, merged)
    np.testing.assert_allclose(together, apart, atol=1e-5, rtol=1e-5)
    assert np.abs(together - hidden(BASE, small.params())).max() > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_an_adapter_follow_from_that_of_its_weight(bias):
    """With W' = W + s A B: dB = s A^T dW', dA = s dW' B^T."""
    rng, lora = np.random.default_rng(0), Lora(2, 3.0, ())
    layer = Linear((3, 5), (2, 4), BASE, bias=bias, rngs=nnx.Rngs(0))
    layer.adapt(lora, stacked=False)
    graphdef, params = nnx.split(layer)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    x, weight = rng.normal(size=(7, 3, 5)), rng.normal(size=(7, 2, 4))
    loss = lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)) * weight)  # noqa: E731
    a, b = (params[name][...] for name in ("lora_a", "lora_b"))
    merged = jax.tree.map(jnp.copy, params)
    merged["kernel"][...] += lora.scale * jnp.tensordot(a, b, axes=1)
    merged["lora_b"][...] = jnp.zeros_like(b)
    (value, got), (wanted_value, full) = (jax.value_and_grad(loss)(p) for p in (params, merged))
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    dw = full["kernel"][...]
    da = lora.scale * jnp.einsum("deho,rho->der", dw, b)
    db = lora.scale * jnp.einsum("der,deho->rho", a, dw)
    np.testing.assert_allclose(got["lora_a"][...], da, atol=1e-4)
    np.testing.assert_allclose(got["lora_b"][...], db, atol=1e-4)


def test_the_sampler_gets_merged_weights_of_each_layer():
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    params = small.params() | adapters()
    params = {path: x for path, x in params.items() if re.match("text/(norm|layers/attn/q)/", path)}
    merged = merge(params, LORA, "float32")
    params = jax.device_put(params, sharding.param_specs(params, mesh))
    out = state.relayout(params, mesh, dtype="float32", lora=LORA)
    layers = {f"text/layers/{i}/attn/q/{name}" for i in range(2) for name in ("kernel", "bias")}
    assert out.keys() == layers | {"text/norm/scale"}
    for i in range(2):
        kernel = out[f"text/layers/{i}/attn/q/kernel"]
        np.testing.assert_allclose(kernel, merged["text/layers/attn/q/kernel"][i], atol=1e-6)
        assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "tensor", None)


def test_targets_choose_layers_and_a_pattern_without_one_is_refused_with_what_there_is():
    some = dataclasses.replace(CFG, lora=Lora(2, 4.0, ("text/layers/attn/[qv]", "*/fc1")))
    layers = {path.rpartition("/")[0] for path in abstract_params(some) if is_adapter(path)}
    assert layers == {"text/layers/attn/q", "text/layers/attn/v", "vision/merger/fc1"}
    for pattern in ("text/layers/attn/z", "text/lm_head", "*embed*"):
        with pytest.raises(ValueError, match=f"^lora.targets: {re.escape(repr(pattern))} matches"):
            abstract_params(dataclasses.replace(CFG, lora=Lora(2, 4.0, ("*", pattern))))


def test_each_adapter_lies_by_exactly_one_row_and_each_row_is_used():
    shapes = {path: leaf for path, leaf in abstract_params(CFG).items() if is_adapter(path)}
    used = set()
    for path, leaf in shapes.items():
        (row,) = (row for row in sharding.ADAPTERS if re.fullmatch(row[0], path))
        assert len(row[1]) == len(leaf.shape), path
        used.add(row)
    assert used == set(sharding.ADAPTERS)
    specs = sharding.param_specs(shapes, sharding.make_mesh(1, 2, 4))
    assert specs["text/layers/mlp/down/lora_a"].spec[1] == "tensor"
    assert specs["text/layers/mlp/down/lora_b"].spec[2] == "fsdp"


# --- what is trained -----------------------------------------------------------------------------


def test_only_adapters_are_trained_and_freezing_one_is_refused():
    trained, frozen = optim.split_frozen(abstract_params(CFG), ())
    assert trained.keys() == adapters().keys() and frozen.keys() == small.params().keys()
    assert not optim.trains_vision(abstract_params(DECODER), ("vision/",))
    assert optim.trains_vision(abstract_params(CFG), ())
    with pytest.raises(ValueError, match="^freeze=.* holds the adapter vision/.*lora.targets"):
        optim.split_frozen(abstract_params(CFG), ("vision/",))


def two_updates(mesh=None):
    """Two SFT updates of every adapter under recomputation, on one device or a mesh."""
    cfg = dataclasses.replace(CFG, remat="block")
    params = jax.tree.map(jnp.copy, small.params() | adapters())
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), small.conversations())
    rows = 2 * small.M
    if mesh is not None:
        params = jax.device_put(params, sharding.param_specs(params, mesh))
        batch, rows = sharding.to_global(batch, mesh), rows // sharding.num_data_shards(mesh)
    step = steps.make_sft_step(
        cfg, SftConfig(micro_batches=rows), small.ADAM, freeze=FREEZE, mesh=mesh
    )
    now = state.init_state(cfg, small.ADAM, params=params, freeze=FREEZE, mesh=mesh)
    told = []
    for _ in range(2):
        now, metrics = step(now, batch, None)
        told.append(float(metrics["loss"]))
    return now, told


@pytest.mark.slow
def test_two_updates_on_eight_devices_equal_those_on_one_and_change_adapters_alone():
    one, losses = two_updates()
    many, losses_8 = two_updates(sharding.make_mesh(2, 2, 2))
    np.testing.assert_allclose(losses_8, losses, rtol=1e-5)
    assert losses[1] < losses[0]
    for path, x in one.params.items():
        np.testing.assert_allclose(many.params[path], x, atol=1e-5, err_msg=path)
        assert np.abs(x - adapters()[path]).max() > 1e-4, path
    for path, x in one.frozen.items():
        np.testing.assert_array_equal(x, small.params()[path], err_msg=path)
    held = jax.tree.leaves(one.opt_state)
    assert sum(x.size for x in held) <= 2 * sum(x.size for x in one.params.values()) + 4


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    before = jax.config.jax_compilation_cache_dir
    yield train_helpers.world(folder) | {"cache": str(folder / "cache")}
    jax.config.update("jax_compilation_cache_dir", before)


def configured(paths, make=train_helpers.sft_config, steps=4, **changes):
    config = make(paths, steps, data=2, fsdp=2, tensor=2)
    config.lora.rank, config.lora.alpha, config.optim.lr = 4, 8.0, 1e-2
    config.compilation_cache_dir = paths["cache"]
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def trained(paths, tmp_path_factory):
    """The folder of an SFT run of two steps on eight devices."""
    folder = tmp_path_factory.mktemp("run")
    config = configured(paths, steps=2, export_hf_dir=str(folder / "merged"))
    train_sft.train(config, str(folder / "sft"))
    return folder


def test_a_checkpoint_holds_the_adapter_and_its_export_the_merged_weights(paths, trained):
    held = stored_params(trained / "sft")
    assert held and all(map(is_adapter, held))
    assert all(np.abs(x).max() > 0 for x in held.values())
    start, end = (
        load_file(f"{d}/model.safetensors") for d in (paths["hf_dir"], trained / "merged")
    )
    changed = {name for name in start if not np.array_equal(start[name], end[name])}
    assert len(changed) == 2 * 7 and all(re.search("proj.weight$", name) for name in changed)
    a, b = (held[f"text/layers/mlp/up/lora_{x}"][1] for x in "ab")
    up = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(end[up], start[up] + 2.0 * (a @ b).T, atol=1e-6)  # alpha / rank


def test_a_checkpoint_is_exported_merged_or_as_an_adapter_of_peft(paths, trained, tmp_path):
    run, hf_dir = trained / "sft", paths["hf_dir"]
    convert_hf.export_hf(run, tmp_path / "merged", hf_dir)
    ours, theirs = (load_file(f / "merged/model.safetensors") for f in (tmp_path, trained))
    assert all(np.array_equal(ours[name], x) for name, x in theirs.items())
    convert_hf.export_adapter(run, tmp_path / "adapter", hf_dir)
    cfg = load_config(hf_dir)
    lora = peft.describe(tmp_path / "adapter", cfg)
    assert (lora.rank, lora.alpha, len(lora.targets)) == (4, 8.0, 7)
    read, held = peft.read_adapter(tmp_path / "adapter", cfg), stored_params(run)
    assert read.keys() == held.keys()
    assert all(np.array_equal(read[path], x) for path, x in held.items())
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == hf_dir
    assert re.fullmatch(told["target_modules"], "model.language_model.layers.1.mlp.up_proj")
    assert not re.fullmatch(told["target_modules"], "model.visual.blocks.1.mlp.up_proj")
    with pytest.raises(HFError, match="not an empty directory"):
        convert_hf.export_adapter(run, tmp_path / "adapter", hf_dir)


def weights_of(config, folder, kind=sft_settings):
    """All parameters that a run of ``config`` starts from, and whence."""
    settings = kind(config, folder)
    with start(settings) as parts:
        params, origin = load_weights(settings, parts, "float32")
    return {path: np.asarray(x) for path, x in params.items()}, origin


@pytest.mark.parametrize("form", ["run", "peft"])
def test_a_run_starts_from_an_adapter_or_merges_it(paths, trained, tmp_path, form):
    run, source = trained / "sft", str(trained / "sft")
    if form == "peft":
        source = str(tmp_path / "adapter")
        convert_hf.export_adapter(run, source, paths["hf_dir"])
    found, origin = weights_of(configured(paths, init_from=source), tmp_path)
    assert origin == (source if form == "peft" else f"{source}/checkpoints/2")
    for path, x in stored_params(run).items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    whole = configured(paths, init_from=source, **{"lora.rank": 0})
    merged, _ = weights_of(whole, tmp_path)
    base = {path: x for path, x in found.items() if not is_adapter(path)}
    wanted = merge(found, Lora(4, 8.0, ()), "float32")
    assert merged.keys() == base.keys()
    for path, x in wanted.items():
        np.testing.assert_allclose(merged[path], x, atol=1e-6, err_msg=path)
    for changes in ({"lora.rank": 8}, {"lora.alpha": 4.0}, {"lora.targets": ("*/attn/*",)}):
        changes = {"freeze": (), "init_from": source, **changes}
        with pytest.raises(RunError, match="another adapter .*: set --config.lora.rank=4 "):
            weights_of(configured(paths, **changes), tmp_path)


def test_a_run_does_not_go_on_over_other_weights_than_its_adapter_was_trained_on(
    paths, trained, tmp_path
):
    shutil.copytree(trained / "sft", tmp_path / "sft")
    other = train_helpers.make_hf_dir(tmp_path, seed=1)
    changes = {"hf_dir": str(other), "checkpoint.allow_changes": "hf_dir"}
    with pytest.raises(RunError, match="not those that the adapter of this run was trained on"):
        train_sft.train(configured(paths, steps=3, **changes), str(tmp_path / "sft"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_for_bit(paths, tmp_path):
    schedule = {"optim.schedule": "constant", "optim.warmup_ratio": 0.0}
    for end in (2, 4):
        train_sft.train(configured(paths, steps=end, **schedule), str(tmp_path / "stopped"))
    train_sft.train(configured(paths, steps=4, **schedule), str(tmp_path / "whole"))
    one, other = (stored_params(tmp_path / name) for name in ("stopped", "whole"))
    assert all(one[path].tobytes() == x.tobytes() for path, x in other.items())


@pytest.mark.slow
def test_rl_trains_the_adapter_of_a_run_against_its_start(paths, trained, tmp_path, monkeypatch):
    """From the adapter of stage 1, with KL to it, also after a restart."""
    monkeypatch.setattr(rollout, "grade", train_helpers.fake_grade)

    def config(steps):
        changes = {"init_from": str(trained / "sft"), "grpo.kl_coef": 0.1, "filter.low": 0.0}
        changes |= {"filter.high": 1.0, "optim.schedule": "constant", "optim.warmup_ratio": 0.0}
        return configured(paths, train_helpers.grpo_config, steps, **changes)

    assert train_grpo.train(config(1), str(tmp_path / "broken"))["kl"] == pytest.approx(0, abs=1e-6)
    shutil.move(trained / "sft", tmp_path / "gone")  # what matters of it was kept
    row = train_grpo.train(config(2), str(tmp_path / "broken"))
    shutil.move(tmp_path / "gone", trained / "sft")
    whole = train_grpo.train(config(2), str(tmp_path / "whole"))
    assert row["kl"] == whole["kl"] > 0
    one, other = (stored_params(tmp_path / name) for name in ("broken", "whole"))
    before = stored_params(trained / "sft")
    assert one.keys() == before.keys()
    for path, x in other.items():
        assert one[path].tobytes() == x.tobytes() and not np.array_equal(x, before[path]), path


# --- PEFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rename", "message"),
    [
        ({"use_dora": True}, {}, "use_dora=True is not supported; merge the adapter"),
        ({"peft_type": "IA3"}, {}, "peft_type='IA3' is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save=.* is not supported"),
        ({"r": 0}, {}, "r=0 and lora_alpha=8.0 must be above 0"),
        ({"r": 8}, {}, r"lora_A.weight: shape \[4, 16\], wanted \[8, 16\]"),
        ({}, {"up_proj": "sideways"}, "up_proj.lora_A.weight: missing"),
        ({}, {"layers.1.": "layers.7."}, "layers.7.*: no adapter can be there"),
        ({}, {"self_attn.q_proj": "lm_head"}, "lm_head.*: no adapter can be there"),
    ],
)
def test_what_is_no_adapter_of_this_model_is_one_line(
    paths, trained, tmp_path, config, rename, message
):
    convert_hf.export_adapter(trained / "sft", tmp_path / "a", paths["hf_dir"])
    file, weights = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / peft.WEIGHTS
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    arrays = load_file(weights)
    for old, new in rename.items():
        arrays = {name.replace(old, new): x for name, x in arrays.items()}
    if "sideways" in rename.values():
        arrays = {name: x for name, x in arrays.items() if "1.mlp.sideways" not in name}
        arrays = {name.replace("sideways", "up_proj"): x for name, x in arrays.items()}
    save_file(arrays, weights)
    with pytest.raises(HFError, match=message) as caught:
        peft.describe(tmp_path / "a", load_config(paths["hf_dir"]))
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)


def test_peft_computes_with_our_adapter_what_our_merged_weights_compute(paths, trained, tmp_path):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    convert_hf.export_adapter(trained / "sft", tmp_path / "a", paths["hf_dir"])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = Model.from_pretrained(paths["hf_dir"])(input_ids=ids).logits
        merged = Model.from_pretrained(trained / "merged")(input_ids=ids).logits
        adapted = theirs.PeftModel.from_pretrained(
            Model.from_pretrained(paths["hf_dir"]), tmp_path / "a"
        )
        got = adapted.eval()(input_ids=ids).logits
        assert (merged - before).abs().max() > 0.1
        assert (got - merged).abs().max() < 1e-5
        # And back: what PEFT writes is what we read.
        adapted.save_pretrained(tmp_path / "again")
    cfg, held = load_config(paths["hf_dir"]), stored_params(trained / "sft")
    again = peft.read_adapter(tmp_path / "again", cfg)
    assert all(np.array_equal(again[path], x) for path, x in held.items())
