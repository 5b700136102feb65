"""Runs that cannot work end with a clear message, before the first step where that can be."""

from pathlib import Path

import jax
import numpy as np
import pytest
import train_helpers as helpers

from srpo_jax import train_grpo, train_sft
from srpo_jax.structs import RunError

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return helpers.world(tmp_path_factory.mktemp("world"))


def test_recompilation_after_warm_up_stops_the_run_and_names_the_step(paths, tmp_path, monkeypatch):
    to_global, calls = train_sft.sharding.to_global, []

    def wider_in_step_3(batch, mesh):
        calls.append(1)
        if len(calls) == 3:
            batch = batch.replace(tokens=np.pad(batch.tokens, ((0, 0), (0, 8))))
        return to_global(batch, mesh)

    def make_fake_step(*_, **__):
        def sft_step(state, batch, features):
            return state, {"loss": batch.tokens.sum()}

        return jax.jit(sft_step)

    monkeypatch.setattr(train_sft.sharding, "to_global", wider_in_step_3)
    monkeypatch.setattr(train_sft, "make_sft_step", make_fake_step)
    with pytest.raises(RunError) as error:
        train_sft.train(helpers.sft_config(paths, steps=5, **MESH), tmp_path / "guarded")
    message = str(error.value)
    assert "recompiled after warm-up" in message and "sft_step" in message
    assert "tokens int32[8, 296]" in message and "tokens [8, 288]" in message
    calls.clear()
    unguarded = helpers.sft_config(paths, steps=5, **MESH)
    unguarded.compile_guard = False
    assert train_sft.train(unguarded, tmp_path / "unguarded")["finished"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hf_dir": ""}, "hf_dir is empty: pass --config.hf_dir"),
        ({"size": "7b"}, "hidden_size is 16, that of size=7b is 3584"),
        ({"data.train": ""}, "data.train is empty: pass --config.data.train"),
        (
            {"data.prompt_tokens": 5},
            "data.prompt_tokens=5 does not hold one image of max_pix",
        ),
        (
            {"data.prompt_tokens": 20},
            "none of the first .* exceed data.prompt_tokens=20; r",
        ),
        ({"data.patch_budgets": ()}, "64 image patches exceed data.patch_budgets=0; raise it"),
        (
            {"max_pixels": 10**6},
            "data.patch_budgets: 64 do not hold one image of max_pixels=1000",
        ),
        ({"grpo.updates_per_rollout": 3}, "=3 must divide data.global_batch_size=8: .*rollout=2$"),
        ({"sampling.group_size": 1}, "at least 2 samples"),
        (
            {"data.global_batch_size": 48},
            r"has 40 records, fewer than a batch of data.global_batch_size=48: lower that",
        ),
        ({"sampling.temperature": 0.0}, "temperature 0"),
        ({"mesh.tensor": 3}, "does not fit 8 devices"),
        ({"init_from": "nowhere"}, "init_from=nowhere: no such directory; give a checkpoint"),
        ({"init_from": "Qwen/Qwen2.5-VL-7B-Instruct"}, "hf download Qwen/Qwen2.5-VL-7B-Instruct"),
        (
            {"export_hf_dir": f"{__file__}/hf"},
            "export_hf_dir=.*_stops.py is a file; choose",
        ),
        ({"compilation_cache_dir": __file__}, "compilation_cache_dir=.*: is a file; give a folder"),
        ({"export_hf_dir": str(ROOT)}, "exists and is not an empty directory"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_first_step(
    paths, tmp_path, change, message
):
    config = helpers.grpo_config(paths, **MESH)
    config.update_from_flattened_dict(change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        train_grpo.train(config, tmp_path)
    assert not any(tmp_path.iterdir())  # the right command may start here
