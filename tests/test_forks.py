"""Families of samples that share their first round: where they part, what that is worth, and that
an update which computes the first round once is the same update."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
import step_helpers as helpers
from step_helpers import G, P, R

from configs import grpo as grpo_recipe
from srpo_jax.data.batching import Layout
from srpo_jax.learn import lanes
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.steps import grpo_update
from srpo_jax.run.preflight import check_reward
from srpo_jax.run.settings import grpo_settings
from srpo_jax.sampling.forks import CUT, Automaton
from srpo_jax.structs import Experience, RunError

FIRST_ANSWER = re.compile(rb"<answer>.*?</answer>", re.DOTALL)
# Tags whole, in pieces, and merged with what stands beside them; an id without bytes.
PIECES = [b"<answer>", b"</answer>", b"<ans", b"wer>", b"</", b"<", b"/", b"answer", b">", b"a<a"]
PIECES += [
    b"7</answer>\n<",
    b"</think><answer>7",
    b"nswer></answer>",
    b"\xc3",
    b"er>x",
    b"<answ",
    b"",
]


def test_the_cut_is_behind_the_token_that_completes_the_first_answer():
    rng = np.random.default_rng(0)
    automaton = Automaton.of_tokens(PIECES, len(PIECES) + 2)
    ids = rng.integers(0, len(PIECES) + 2, (200, 3, 40))
    mask = np.arange(40) < rng.integers(0, 41, (200, 3, 1))
    found, number = automaton.cuts(ids, mask), 0
    for at in np.ndindex(found.shape):
        tokens = [(PIECES + [b"", b""])[i] for i in ids[at][mask[at]]]
        answer = FIRST_ANSWER.search(b"".join(tokens))
        want = len(tokens)
        if answer:
            ends = np.cumsum([len(token) for token in tokens])
            want, number = int(np.searchsorted(ends, answer.end())) + 1, number + 1
        assert found[at] == want
    assert 100 < number < 500
    state = jnp.zeros(found.shape, jnp.int32)  # the same, token by token, as the sampler reads
    for t in range(8):
        state = automaton.after(state, jnp.asarray(ids[..., t]))
        np.testing.assert_array_equal(state == CUT, automaton.cuts(ids, mask | True) <= t + 1)


# --- the update ------------------------------------------------------------------------------


def forked() -> Experience:
    """Pairs of samples that share two tokens, or all they have; old, reference and sampler differ;
    truncated samples get no gradient, a prompt has no weight, some have an older policy."""
    samples, verdict = helpers.rollout()
    noise = np.random.default_rng(8).normal(size=(3, P, G, R)).astype(np.float32) * 0.2
    policy, old, ref = noise - 3.0
    cut = np.full((P, G), 2, np.int32)
    length = np.maximum(np.asarray(samples.completion_mask).sum(-1), 2)
    leader = np.arange(G) // 2 * 2
    whole = np.zeros((P, G), bool)  # pairs without an answer: the same to the end
    whole[::2, 2:] = True
    length = np.where(whole, length[:, leader], length)
    cut = np.where(whole, length, cut)
    shared = np.arange(R) < cut[..., None]
    mask = np.arange(R) < length[..., None]
    same = lambda x: np.where(mask, np.where(shared, np.asarray(x)[:, leader], x), 0)  # noqa: E731
    finished = np.where(whole, samples.finished[:, leader], samples.finished)
    rollout = samples.replace(
        completions=same(samples.completions),
        completion_mask=mask,
        finished=finished,
        sample_logp=same(policy - 0.1),
        policy_logp=same(policy),
    )
    return Experience(
        helpers.prompts(),
        rollout,
        dataclasses.replace(verdict, first_end=cut),
        helpers.features(),
        same(old),
        same(ref),
        carried=np.arange(P) % 3 == 1,
        weight=np.array([1, 0.5, 0, 1, 1, 1, 1, 2], np.float32),
    )


@pytest.mark.slow
def test_computing_a_first_round_once_changes_neither_loss_nor_gradient():
    cfg = helpers.with_(helpers.GRPO, kl_coef=0.3, entropy_coef=0.05, clip_low=0.05, clip_high=0.1)
    cfg = helpers.with_(cfg, forks=2, mask_truncated=True, tis_cap=1.5, aggregation="token")
    every, parts = forked(), helpers.grpo_steps(cfg)
    weight = (np.asarray(every.weight) * every.batch.valid)[:, None] * every.rollout.finished
    lengths = every.rollout.completion_mask.sum(-1) * (weight != 0)
    budgets = lanes.LaneBudgets(Layout(P // helpers.M * helpers.M, rows=helpers.M), G, helpers.S, R)
    runs = lanes.family_runs(lengths, every.verdict.first_end, 2)
    found = []
    for held in ((lengths, budgets), (runs, budgets.of_families(2))):
        (packed,) = lanes.pack(every.batch.lengths, *held)
        found.append((packed, *grpo_update(parts, helpers.new_state(), every, packed)))
    (whole, want, plain), (once, got, metrics) = found
    helpers.assert_close(got.opt_state, want.opt_state, 1e-6)
    for name in ("loss", "loss/policy", "loss/kl", "ratio/max", "ratio/min"):
        np.testing.assert_allclose(metrics[name], plain[name], atol=1e-6, err_msg=name)
    # A sum over all parameters, whose order is the compiler's.
    np.testing.assert_array_max_ulp(metrics["grad_norm"], plain["grad_norm"], maxulp=3)
    assert (
        metrics["ratio/max"] > 1.01 and np.abs(want.opt_state["text/lm_head/kernel"]).max() > 1e-3
    )
    tokens = [sum(int((part.sample >= 0).sum()) for part in held if part) for held in (whole, once)]
    assert tokens == [lengths.sum(), runs.sum()] and metrics["trained_tokens"] == runs.sum()
    assert tokens[1] < 0.8 * tokens[0]


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "forks", "words"),
    [
        (8, 3, "sampling.forks: must divide group_size=8, is 3"),
        (8, 0, "sampling.forks: must be at least 1"),
        (2, 2, "set --config.sampling.group_size=4"),
    ],
)
def test_families_that_cannot_be_compared_are_named(group, forks, words):
    config = grpo_recipe.get_config("size=tiny")
    config.sampling.group_size, config.sampling.forks = group, forks
    with pytest.raises(RunError, match=re.escape(words)):
        grpo_settings(config)


def test_a_reward_is_looked_at_before_training_for_any_number_of_forks():
    for forks in (2, 3):
        assert "teach nothing" in check_reward(GrpoConfig(forks=forks))
