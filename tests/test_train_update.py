"""What the update of stage 2 really gets, against values worked out beside the loop."""

import jax
import numpy as np
import pytest
import train_helpers as helpers

from srpo_jax import train_grpo
from srpo_jax.data.batching import Layout
from srpo_jax.learn import lanes
from srpo_jax.learn.steps import make_logp_step
from srpo_jax.model import hf, sharding
from srpo_jax.model.config import load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.run import rollout
from srpo_jax.run.pool import Pool
from srpo_jax.sampling.sampler import Sampler, vision_token_ids

STEPS, UPDATES = 3, 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """One run with two updates a rollout, carried groups, a reference, a temperature; all calls."""
    folder = tmp_path_factory.mktemp("world")
    paths = helpers.world(folder)
    config = helpers.grpo_config(paths, steps=STEPS, data=2, fsdp=2, tensor=2)
    config.optim.lr, config.optim.warmup_ratio, config.optim.final_fraction = 1e-2, 0.0, 0.1
    config.grpo.kl_coef, config.grpo.entropy_coef = 0.1, 0.01
    config.grpo.updates_per_rollout = UPDATES
    config.sampling.group_size, config.sampling.temperature = 3, 0.7
    config.filter.resample, config.filter.low, config.filter.high = True, 0.2, 0.8
    found = {"updates": [], "drawn": [], "sampled_in": {}, "paths": paths, "config": config}

    make, update = train_grpo.make_grpo_steps, train_grpo.grpo_update
    generate, add = Sampler.generate, Pool.add

    def recording_make(model, cfg, optimizer, **kwargs):
        found.update(model=model, cfg=cfg, optimizer=optimizer, mesh=kwargs["mesh"])
        return make(model, cfg, optimizer, **kwargs)

    def recording_update(parts, state, experience, packed, number, **kwargs):
        now = {path: np.asarray(x) for path, x in (state.params | state.frozen).items()}
        packed = list(packed)
        found["updates"].append((experience, (number, packed), now))
        return update(parts, state, experience, packed, number, **kwargs)

    def recording_generate(self, *args, **kwargs):
        found["drawn"].append((kwargs["seed"], kwargs["step"]))
        return generate(self, *args, **kwargs)

    def recording_add(self, one, step):
        for group in np.asarray(one.graded.rollout.completions):
            found["sampled_in"][group.tobytes()] = step
        add(self, one, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "grade", helpers.fake_grade)
        patch.setattr(train_grpo, "make_grpo_steps", recording_make)
        patch.setattr(train_grpo, "grpo_update", recording_update)
        patch.setattr(Sampler, "generate", recording_generate)
        patch.setattr(Pool, "add", recording_add)
        found["row"] = train_grpo.train(config, str(folder / "run"))
    return found


def logps(seen, params, experience):
    """[P, G, R] log-probs of an experience under parameters given as host arrays."""
    cfg, mesh = seen["cfg"], seen["mesh"]
    specs = sharding.param_specs(abstract_params(seen["model"]), mesh)
    placed = {path: jax.device_put(params[path], specs[path]) for path in specs}
    step = seen.setdefault("logp", make_logp_step(seen["model"], cfg, mesh=mesh))
    mask = np.asarray(experience.rollout.completion_mask)
    rows = sharding.num_data_shards(mesh) * cfg.micro_batches
    (P, S), (_, G, R) = experience.batch.tokens.shape, mask.shape
    layout = Layout(P // rows * cfg.micro_batches, rows=cfg.micro_batches)
    budgets = lanes.LaneBudgets(layout, G, S, R)
    found = sharding.to_global(np.zeros(mask.shape, np.float32), mesh)
    (packed,) = lanes.pack(np.asarray(experience.batch.lengths), mask.sum(-1), budgets)
    for part in packed:
        inputs = (experience.batch, experience.rollout, experience.features)
        found = step(found, placed, *inputs, sharding.to_global(part, mesh))
    return np.asarray(found)


def test_objective_schedule_and_sampler_follow_the_config(seen):
    cfg, config = seen["cfg"], seen["config"]
    assert (cfg.temperature, cfg.entropy_coef, cfg.kl_coef) == (0.7, 0.01, 0.1)
    assert cfg.length_cap == config.sampling.max_new_tokens
    model = load_config(seen["paths"]["hf_dir"])
    markers = {i for i in vision_token_ids(model) if i < model.text.vocab_size}
    assert markers and markers <= set(cfg.forbidden_ids)
    # The cosine ends with the last of all updates, not with the last step.
    schedule = seen["optimizer"].schedule
    np.testing.assert_allclose(schedule(STEPS * UPDATES), 1e-3, rtol=1e-5)
    assert schedule(STEPS) > 2e-3
    assert {step for _, step in seen["drawn"]} == set(range(STEPS))
    assert {seed for seed, _ in seen["drawn"]} == {config.seed}


def test_updates_take_turns_with_the_micro_batches(seen):
    size = seen["cfg"].micro_batches // UPDATES
    taken = {0: set(), 1: set()}
    for experience, (number, packed), _ in seen["updates"]:
        taken[number] |= {row for part in packed for row in np.asarray(part.row).tolist()}
        # Nothing of the filter's and no filler is computed; all else is, on any shard.
        weight = np.asarray(experience.weight) * np.asarray(experience.batch.valid)
        by_row = weight.reshape(-1, seen["cfg"].micro_batches, len(weight) // (4 * UPDATES * size))
        for part in packed:
            row, pick = np.asarray(part.row), np.asarray(part.pick)
            held = zip(pick, np.asarray(part.prompt).reshape(len(pick), -1), strict=True)
            prompts = {int(own[p]) for own, block in held for p in block if p >= 0}
            weights = by_row[np.arange(len(row)), row].reshape(-1)
            assert prompts == set(np.flatnonzero(weights).tolist())
    assert len(seen["updates"]) > STEPS
    assert taken == {0: set(range(size)), 1: set(range(size, 2 * size))}


def test_old_log_probs_are_those_of_the_policy_that_sampled(seen):
    carried_groups, done = 0, None
    for experience, _, params in seen["updates"]:
        if experience is done:  # the second update of the same rollout
            continue
        done = experience
        now = logps(seen, params, experience)
        mask = np.asarray(experience.rollout.completion_mask)
        old, sampled = np.asarray(experience.old_logp), np.asarray(experience.rollout.policy_logp)
        carried, shards = np.asarray(experience.carried), sharding.num_data_shards(seen["mesh"])
        valid = np.flatnonzero(np.asarray(experience.batch.valid))
        born = {
            p: seen["sampled_in"][np.asarray(experience.rollout.completions)[p].tobytes()]
            for p in valid
        }
        newest = max(born.values())
        for p, step in born.items():
            assert carried[p] == (step < newest)
            if carried[p]:  # an older policy's: as it was then, and no longer the present one's
                carried_groups += 1
                assert np.abs(sampled[p] - now[p])[mask[p]].max() > 1e-3
            elif p % (len(mask) // shards) >= len(mask) // shards // UPDATES:
                np.testing.assert_allclose(old[p][mask[p]], now[p][mask[p]], atol=1e-5)
            else:  # the first update's: there the policy itself is the old one
                np.testing.assert_allclose(sampled[p][mask[p]], now[p][mask[p]], atol=1e-4)
    assert carried_groups


def test_the_reference_is_the_policy_of_the_start(seen):
    hf_dir = seen["paths"]["hf_dir"]
    start = {path: np.asarray(x) for path, x in hf.load_params(hf_dir, load_config(hf_dir)).items()}
    experience, _, params = seen["updates"][-1]
    valid = np.asarray(experience.batch.valid)[:, None, None]
    mask = np.asarray(experience.rollout.completion_mask) & valid
    reference = np.asarray(experience.ref_logp)
    np.testing.assert_allclose(reference[mask], logps(seen, start, experience)[mask], atol=1e-5)
    assert np.abs(reference - logps(seen, params, experience))[mask].max() > 1e-2
    assert seen["row"]["kl"] > 0
