"""Weights of 8 bits beside adapters: what is computed, trained, sampled and exported."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_helpers as small
import train_helpers
from safetensors.numpy import load_file
from test_lora import adapters, configured, hidden, paths, weights_of  # noqa: F401  (a fixture)

from srpo_jax import train_grpo, train_sft
from srpo_jax.learn import optim, state
from srpo_jax.model import peft, sharding
from srpo_jax.model.config import Lora
from srpo_jax.model.lora import in_8_bits, is_adapter, is_scale, merge, over_outputs
from srpo_jax.model.qwen2_5_vl import abstract_params, shortened
from srpo_jax.run import rollout
from srpo_jax.structs import RunError
from tools import convert_hf

CFG = dataclasses.replace(small.CFG, remat="none", lora=Lora(3, 6.0, ("*",), "int8"))
CHANGES = {"lora.base_dtype": "int8"}


@functools.cache
def held():
    """All parameters of a trained model, decoder layers in 8 bits."""
    return shortened(small.params(), CFG) | adapters()


def test_codes_and_scales_are_those_worked_out_by_hand():
    kernel = np.array([[1.0, -2.0, 0.0], [0.25, 0.5, 0.0]], np.float32)  # [inputs, outputs]
    codes, scale = in_8_bits("text/layers/0/mlp/up/kernel", kernel, scale_ndim=1)
    np.testing.assert_array_equal(scale, np.float32([1 / 127, 2 / 127, 0]))
    np.testing.assert_array_equal(codes, [[127, -127, 0], [32, 32, 0]])  # 31.75 both
    assert codes.dtype == np.int8 and scale.dtype == np.float32


@pytest.mark.parametrize("name, outputs", [("attn/q", 2), ("attn/o", 1), ("mlp/down", 1)])
def test_no_number_moves_by_more_than_half_a_step_of_its_output(name, outputs):
    path, kernel = f"text/layers/{name}/kernel", small.params()[f"text/layers/{name}/kernel"]
    scale = held()[f"text/layers/{name}/kernel_scale"]
    assert scale.shape == (kernel.shape[0], *kernel.shape[-outputs:])
    whole = merge({p: x for p, x in held().items() if not is_adapter(p)}, None, "float32")[path]
    inputs = tuple(range(1, kernel.ndim - outputs))
    off = np.abs(whole - kernel).max(axis=inputs)
    assert (off <= 0.5001 * scale).all() and off.max() > 0.3 * scale.max()


def test_only_kernels_of_the_decoders_layers_are_shortened():
    short = {path for path, x in held().items() if x.dtype == jnp.int8}
    layers = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    assert short == {f"text/layers/{name}/kernel" for name in layers}
    assert {p for p in held() if is_scale(p)} == {f"{path}_scale" for path in short}
    assert held().keys() == abstract_params(CFG).keys()
    for path, leaf in abstract_params(CFG).items():
        assert (held()[path].shape, held()[path].dtype) == (leaf.shape, leaf.dtype), path


def test_a_model_computes_with_codes_what_it_computes_with_the_numbers_they_stand_for():
    apart = hidden(CFG, held())
    together = hidden(CFG.base, merge(held(), CFG.lora, "float32"))
    np.testing.assert_allclose(together, apart, atol=2e-5, rtol=1e-5)
    longer = hidden(CFG.base, merge(small.params() | adapters(), CFG.lora, "float32"))
    off = np.abs(apart - longer).max() / np.abs(longer).max()
    assert 1e-4 < off < 0.05


def test_a_weight_that_is_rounded_on_the_way_is_written_in_its_own_dtype_whatever_slice_is_read():
    path = "text/layers/attn/o/kernel"
    kernel = np.asarray(small.params()[path].astype(jnp.bfloat16))  # [L, H, E, D]
    leaf = peft.merged_leaves({path: kernel}, CFG)[path]
    assert leaf.dtype == jnp.bfloat16
    cut = (slice(1, 2), slice(0, 1), slice(2, 5), slice(3, 9))
    whole = leaf[tuple(slice(0, size) for size in kernel.shape)]
    np.testing.assert_array_equal(leaf[cut], whole[cut])
    codes, scale = in_8_bits(path, kernel, 2)
    np.testing.assert_array_equal(whole, codes * over_outputs(path, scale, 4))


def test_codes_and_scales_are_frozen_and_lie_by_one_row_each():
    trained, frozen = optim.split_frozen(held(), ())
    assert trained.keys() == adapters().keys()
    assert {p for p in frozen if is_scale(p)} == {p for p in held() if is_scale(p)}
    specs = sharding.param_specs(abstract_params(CFG), sharding.make_mesh(1, 2, 4))
    assert specs["text/layers/mlp/up/kernel_scale"].spec[1] == "tensor"
    assert specs["text/layers/mlp/down/kernel_scale"].spec == jax.sharding.PartitionSpec(None, None)


def test_the_sampler_gets_whole_numbers():
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    params = jax.device_put(held(), sharding.param_specs(held(), mesh))
    out = state.relayout(params, mesh, dtype="float32", lora=CFG.lora)
    assert not any(is_scale(p) or is_adapter(p) for p in out)
    wanted = merge(held(), CFG.lora, "float32")
    for i in range(2):
        for name in ("attn/o", "mlp/gate"):
            got = out[f"text/layers/{i}/{name}/kernel"]
            np.testing.assert_allclose(got, wanted[f"text/layers/{name}/kernel"][i], atol=1e-6)


def test_a_run_trains_over_8_bits_and_its_exports_and_successors_know(paths, tmp_path):  # noqa: F811
    run, changes = tmp_path / "sft", CHANGES | {"export_hf_dir": str(tmp_path / "merged")}
    train_sft.train(configured(paths, steps=2, **changes), str(run))
    meta = json.loads(next((run / "checkpoints/2").rglob("metadata")).read_text())
    assert meta["base"]["dtype"] == "float32,int8"
    convert_hf.export_hf(run, tmp_path / "again", paths["hf_dir"])
    first, second, start = (
        load_file(f"{d}/model.safetensors")
        for d in (tmp_path / "merged", tmp_path / "again", paths["hf_dir"])
    )
    for name, x in first.items():
        np.testing.assert_allclose(second[name], x, atol=1e-7, err_msg=name)
    changed = {name for name in start if not np.array_equal(start[name], first[name])}
    assert len(changed) == 2 * 7 and all(name.endswith("proj.weight") for name in changed)
    # An evaluation merges the adapter into what it was trained on, not into the longer weights.
    whole, _ = weights_of(configured(paths, init_from=str(run), **{"lora.rank": 0}), tmp_path)
    up = first["model.layers.1.mlp.up_proj.weight"].T
    np.testing.assert_allclose(whole["text/layers/mlp/up/kernel"][1], up, atol=1e-6)
    with pytest.raises(RunError, match="lora.base_dtype"):
        train_sft.train(configured(paths, steps=3), str(run))


@pytest.mark.slow
def test_rl_over_8_bits_begins_at_its_reference_and_goes_on_bit_for_bit(
    paths,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(rollout, "grade", train_helpers.fake_grade)

    def config(steps):
        changes = {"grpo.kl_coef": 0.1, "filter.low": 0.0, "filter.high": 1.0} | CHANGES
        changes |= {"optim.schedule": "constant", "optim.warmup_ratio": 0.0}
        return configured(paths, train_helpers.grpo_config, steps, **changes)

    row = train_grpo.train(config(1), str(tmp_path / "broken"))
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    row = train_grpo.train(config(2), str(tmp_path / "broken"))
    whole = train_grpo.train(config(2), str(tmp_path / "whole"))
    assert row["kl"] == whole["kl"] > 0
