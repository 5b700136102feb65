"""The reference of the KL: what a run keeps of it for itself, and its coefficient."""

import types

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.run import checkpoint, reference
from srpo_jax.run.metrics import Timers
from srpo_jax.run.reference import Reference, adapted_kl_coef


def test_the_reference_outlives_the_step_that_it_was_read_from(tmp_path, monkeypatch):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {name: jnp.full(3, n, jnp.float32) for n, name in enumerate(("a", "frozen"), 1)}
    state = types.SimpleNamespace(params={"a": params["a"]}, frozen={"frozen": params["frozen"]})
    model = types.SimpleNamespace(dtype="bfloat16")
    parts = types.SimpleNamespace(model=types.SimpleNamespace(lora=None), timers=Timers())
    cfg = GrpoConfig(kl_coef=0.1, ref_every=4)
    settings = types.SimpleNamespace(model=model, workdir=epath.Path(tmp_path / "rl"), plain={})
    settings.grpo, settings.optim = cfg, types.SimpleNamespace(offload=False)

    def load(settings, parts, dtype, source):
        shardings = dict.fromkeys(params, place)
        return checkpoint.load_params(source, shardings, params, dtype), source

    monkeypatch.setattr(reference, "load_weights", load)
    origin = tmp_path / "sft" / "checkpoints" / "7"  # retention has deleted it
    run = types.SimpleNamespace(step=0, origin=str(origin), state=state, base={}, hosts=[])
    load_now = lambda: Reference(settings, parts, cfg, run).params  # noqa: E731
    first = load_now()
    run.step = 3
    again = load_now()
    assert first.keys() == again.keys() == {"a"}
    assert again["a"].dtype == "bfloat16" and jnp.array_equal(first["a"], again["a"])
    assert checkpoint.read_meta(tmp_path / "rl" / "reference")["origin"] == str(origin)
    run.step, run.origin = 0, str(tmp_path / "hf")  # what is no run's stays where it is
    settings.workdir = epath.Path(tmp_path / "other")
    load_now()
    assert not (tmp_path / "other").exists()

    # Renewed after steps 4, 8 and 12: a checkpoint is resumed with the one that it had.
    settings.workdir = epath.Path(tmp_path / "rl")
    for step in (4, 8, 12):
        state.params["a"] = jnp.full(3, step, jnp.float32)
        kept = Reference(settings, parts, cfg, run)
        kept.follow(state, step, {})
        assert jnp.array_equal(kept.params["a"], state.params["a"])
        (settings.workdir / "checkpoints" / f"{step + 2}").mkdir(parents=True)
        if step == 8:  # retention
            (settings.workdir / "checkpoints" / "6").rmdir()
    kept = {path.name for path in (tmp_path / "rl").glob("reference*")}
    assert kept == {"reference", "reference_8", "reference_12"}
    for run.step, since in ((10, 8), (11, 8), (12, 12), (14, 12)):
        assert (load_now()["a"] == since).all()
    run.step = 7
    with pytest.raises(checkpoint.CheckpointError, match="reference_4: no checkpoint here"):
        load_now()


def test_the_coefficient_of_the_kl_follows_its_target():
    assert adapted_kl_coef(0.1, 0.05, 0.05) == 0.1
    assert adapted_kl_coef(0.1, 0.055, 0.05) == pytest.approx(0.1 * 1.01)
    assert adapted_kl_coef(0.1, 9.0, 0.05) == pytest.approx(0.1 * 1.02)  # at most so much a step
    assert adapted_kl_coef(0.1, -1.0, 0.05) == pytest.approx(0.1 * 0.98)
    assert adapted_kl_coef(0.1, float("nan"), 0.05) == 0.1
