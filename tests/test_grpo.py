"""The GRPO update on plain arrays: preparation, loss of a micro-batch, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.learn import grpo
from srpo_jax.learn.grpo import GrpoConfig, Tokens
from srpo_jax.learn.objectives import Samples
from srpo_jax.structs import Batch, Experience, Rollout, Verdict

P, G, R = 2, 2, 4


def _rollout(lengths=((4, 2), (1, 3)), finished=((True, True), (True, False))):
    mask = jnp.arange(R)[None, None] < jnp.array(lengths)[:, :, None]
    return Rollout(
        completions=jnp.ones((P, G, R), jnp.int32),
        completion_mask=mask,
        finished=jnp.array(finished),
        sample_logp=jnp.where(mask, -1.0, 0.0),
        policy_logp=jnp.where(mask, -1.0, 0.0),
    )


def _verdict(first, final):
    """First and final answers right or wrong; everything else in order."""
    first, final = jnp.array(first, bool), jnp.array(final, bool)
    yes = jnp.ones((P, G), bool)
    return Verdict(
        first_correct=first,
        final_correct=final,
        has_first=yes,
        has_second=yes,
        format_ok=jnp.array([[True, False], [True, True]]),
        reflection_ok=yes,
        reflection_new=yes,
        stated=jnp.zeros((P, G), jnp.int32),
        first_tokens=jnp.full((P, G), 10, jnp.int32),
        first_end=jnp.full((P, G), 2, jnp.int32),
        total_tokens=jnp.full((P, G), 20, jnp.int32),
        block_tokens=jnp.arange(P * G * 5, dtype=jnp.int32).reshape(P, G, 5),
    )


VERDICT = _verdict([[1, 0], [0, 0]], [[1, 1], [0, 1]])


def _experience(rollout=None, verdict=VERDICT, valid=(True, True), **fields):
    """What an update is prepared from; of the prompts it reads which are fillers."""
    batch = Batch(**dict.fromkeys(BATCH)).replace(valid=jnp.array(valid))
    return Experience(batch, _rollout() if rollout is None else rollout, verdict, **fields)


BATCH = [field.name for field in dataclasses.fields(Batch) if field.name != "vision"]


def _weights(ready, rollout=None):
    """[P, G]: weight of each sample's tokens together."""
    rollout = _rollout() if rollout is None else rollout
    return ready.weight_PG * rollout.completion_mask.sum(-1)


def _tokens(ready, rollout, old=None, ref=None):
    """What the loss reads, unpacked: [P, G, R]."""
    spread = lambda x: jnp.where(rollout.completion_mask, x[..., None], 0.0)  # noqa: E731
    logps = (rollout.sample_logp, rollout.policy_logp, old, ref)
    number = jnp.arange(ready.adv_PG.size).reshape(ready.adv_PG.shape)
    of_token = jnp.broadcast_to(number[..., None], rollout.completion_mask.shape)
    samples = Samples(of_token, rollout.completion_mask, number.size)
    return Tokens(spread(ready.adv_PG), spread(ready.weight_PG), *logps, samples)


BOTH = jnp.ones(P, bool)


def test_prepare_weights_are_those_of_the_whole_update():
    ready = grpo.prepare(GrpoConfig(aggregation="token"), _experience())
    np.testing.assert_allclose(_weights(ready) * 10, [[4, 2], [1, 3]], rtol=1e-6)
    assert ready.tokens == 10
    ready = grpo.prepare(GrpoConfig(), _experience())
    np.testing.assert_allclose(_weights(ready), [[0.25, 0.25], [0.25, 0.25]], rtol=1e-6)


def test_prepare_leaves_out_fillers_and_groups_of_weight_zero():
    cfg = GrpoConfig(aggregation="token")
    filler = grpo.prepare(cfg, _experience(valid=[False, True]))
    dropped = grpo.prepare(cfg, _experience(weight=jnp.array([0.0, 1.0])))
    for ready in (filler, dropped):
        np.testing.assert_allclose(_weights(ready) * 4, [[0, 0], [1, 3]], rtol=1e-6)
        assert ready.tokens == 4


def test_prepare_masks_truncated_samples_but_keeps_them_in_the_baseline():
    plain = grpo.prepare(GrpoConfig(), _experience())
    masked = grpo.prepare(GrpoConfig(mask_truncated=True), _experience())
    assert masked.weight_PG[1, 1] == 0 and plain.weight_PG[1, 1] != 0
    np.testing.assert_allclose(_weights(masked), [[1 / 3, 1 / 3], [1 / 3, 0]], rtol=1e-6)
    np.testing.assert_array_equal(plain.adv_PG, masked.adv_PG)


def test_the_kl_in_the_reward_is_taken_off_with_the_present_coefficient():
    mask = _rollout().completion_mask
    ref = jnp.where(mask, -1.0 - 0.1 * jnp.arange(P * G).reshape(P, G, 1), 7.0)
    cfg = GrpoConfig(kl_coef=0.5, kl_in_reward=True, advantage="centred")
    plain = grpo.prepare(dataclasses.replace(cfg, kl_coef=0.0), _experience(ref_logp=ref))
    kl = np.array([[0.0, 0.1], [0.2, 0.3]]) * mask.sum(-1)  # k1 of each sample
    for coef, given in ((0.5, None), (np.array([[0.25], [2.0]]), jnp.array([0.25, 2.0]))):
        got = grpo.prepare(cfg, _experience(ref_logp=ref, kl_coef=given)).adv_PG
        penalty = -coef * (kl - kl.mean(1, keepdims=True))
        np.testing.assert_allclose(got, plain.adv_PG + penalty, atol=1e-6)


def test_the_policy_itself_is_the_old_one_in_the_first_update_but_for_carried_groups():
    carried = jnp.array([False, True])
    first = grpo.prepare(GrpoConfig(), _experience(carried=carried))
    assert first.on_policy_P.tolist() == [True, False]
    assert grpo.prepare(GrpoConfig(), _experience()).on_policy_P.all()
    assert not grpo.prepare(GrpoConfig(), _experience(), 1).on_policy_P.any()


def test_an_update_weighs_its_own_prompts_only():
    experience = _experience(update=jnp.array([1, 0]))
    for update, own in ((0, [[0, 0], [1, 3]]), (1, [[4, 2], [0, 0]])):
        cfg = GrpoConfig(aggregation="token", updates_per_rollout=2, epochs=2)
        ready = grpo.prepare(cfg, experience, update)
        again = grpo.prepare(cfg, experience, update + 2)
        np.testing.assert_array_equal(ready.weight_PG, again.weight_PG)
        assert not again.on_policy_P.any()
        np.testing.assert_allclose(_weights(ready) * np.sum(own), own, rtol=1e-6)
        assert ready.metrics["samples"] == G


def test_nothing_to_learn_from_is_zero_and_not_nan():
    cfg = GrpoConfig(mask_truncated=True, kl_coef=0.1)
    rollout = _rollout(finished=((False, False), (False, False)))
    ready = grpo.prepare(cfg, _experience(rollout))
    logp = jnp.full((P, G, R), -2.0)

    def loss(logp):
        return grpo.policy_loss(cfg, logp, logp, _tokens(ready, rollout, ref=logp - 1.0))

    (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(logp)
    assert value == 0 and (grad == 0).all()
    assert jax.tree.structure(aux) == jax.tree.structure(grpo.no_aux(cfg))
    for nothing in (aux, grpo.no_aux(cfg)):
        metrics = grpo.update_metrics(nothing, ready.tokens)
        assert all(v == 0 for v in metrics.values()), metrics


def test_policy_loss_by_hand():
    """One group of two samples, rewards r and r - 0.5 apart: advantages +-1/sqrt(2)."""
    cfg = GrpoConfig(clip_low=0.2, clip_high=0.2, kl_coef=0.5, tis_cap=1.5, entropy_coef=0.01)
    rollout = jax.tree.map(lambda x: x[:1], _rollout())
    verdict = jax.tree.map(lambda x: x[:1], _verdict([[1, 0], [0, 0]], [[1, 0], [0, 0]]))
    verdict = verdict.replace(format_ok=jnp.ones((1, G), bool))
    ready = grpo.prepare(cfg, _experience(rollout, verdict, valid=[True]))
    a = 1 / np.sqrt(2)
    np.testing.assert_allclose(ready.adv_PG, [[a, -a]], rtol=1e-4)

    logp = jnp.full((1, G, R), -1.0)
    ratio = 1.5  # of the second token of sample 0; all others 1
    old = logp.at[0, 0, 1].add(-np.log(ratio))
    rollout = rollout.replace(sample_logp=old - jnp.log(2.0), policy_logp=old - 0.25)
    ref = logp - np.log(2.0)  # k3 = exp(-ln 2) - 1 + ln 2
    entropy = jnp.full((1, G, R), 3.0)

    loss, aux = grpo.policy_loss(cfg, logp, entropy, _tokens(ready, rollout, old, ref))
    # Sample 0: 4 tokens, one clipped at 1.2. Sample 1: 2 tokens. TIS 2 is capped at 1.5.
    policy = -1.5 * 0.5 * (a * (3 + 1.2) / 4 - a * 2 / 2)
    kl = 0.5 - 1 + np.log(2.0)
    np.testing.assert_allclose(loss, policy + 0.5 * kl - 0.01 * 3.0, rtol=1e-4)
    metrics = grpo.update_metrics(aux, ready.tokens)
    want = {
        "loss/policy": policy,
        "loss/kl": kl,
        "kl": kl,
        "entropy": 3.0,
        "ratio/mean": (5 + 1.5) / 6,
        "ratio/max": 1.5,
        "ratio/min": 1.0,
        "clip/high": 1 / 6,
        "clip/low": 0.0,
        "sampler/logp_diff_mean": 0.25,
        "sampler/logp_diff_max": 0.25,
        "sampler/tis_weight": 1.5,
    }
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


def test_micro_batches_add_up_to_the_metrics_of_the_whole():
    cfg = GrpoConfig(aggregation="token", kl_coef=0.1)
    rollout = _rollout()
    ready = grpo.prepare(cfg, _experience(rollout))
    logp = -jax.random.uniform(jax.random.key(0), (P, G, R))
    old, ref = logp - 0.3 * jnp.sin(9 * logp), logp + 0.1
    args = (logp, -logp, _tokens(ready, rollout, old, ref))

    _, whole = grpo.policy_loss(cfg, *args)
    parts = [
        grpo.policy_loss(cfg, *jax.tree.map(lambda x, i=i: x[i : i + 1], args))[1] for i in (0, 1)
    ]
    want = grpo.update_metrics(whole, ready.tokens)
    got = grpo.update_metrics(
        grpo.combine_aux(jax.tree.map(lambda *x: jnp.stack(x), *parts, grpo.no_aux(cfg))),
        ready.tokens,
    )
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_rollout_metrics_count_first_and_final_answers():
    cfg = GrpoConfig()
    rollout = _rollout()
    verdict = VERDICT.replace(stated=jnp.array([[-1, -1], [-1, 0]], jnp.int32))
    terms = grpo.reward_terms(cfg, verdict)
    got = grpo.rollout_metrics(terms, verdict, rollout, BOTH)
    # first 1 0 0 0, final 1 1 0 1: two of three wrong first answers are mended, none harmed.
    want = {
        "accuracy/first": 1 / 4,
        "accuracy/final": 3 / 4,
        "fix/count": 2,
        "fix/of": 3,
        "harm/count": 0,
        "harm/of": 1,
        # Reflections of all say "wrong" but of the last: of a right one, two wrong ones, nothing.
        "reflected/count": 4,
        "right_reflected/count": 3,
        "right_one_round/of": 0,
        "stated/count": 3,
        "stated/of": 4,
        "detection/count": 2,
        "detection/of": 3,
        "false_alarm/count": 1,
        "false_alarm/of": 1,
        "tokens_right/count": 4 + 2 + 3,
        "tokens_right/of": 3,
        "tokens_wrong/count": 1,
        "tokens_wrong/of": 1,
        "format_rate": 3 / 4,
        "truncated_share": 1 / 4,
        "completion_length/mean": 10 / 4,
        "completion_length/max": 4,
        "samples": 4,
        "tokens": 10,
        "block_tokens/first_think": (0 + 5 + 10 + 15) / 4,
        "block_tokens/second_answer": (4 + 9 + 14 + 19) / 4,
        "reward/r_acc": 0.5 / 4,
        "reward/r_format": 1.5 / 4,
        "reward/i_eff": (0.25 + 0.5 + 0.0 + 0.5) / 4,
        "reward/i_ref": 0.25,
        "reward/f_len": 1.0,
        # 0.35 (i_ref and f_len) plus 1.25, 0.5, 0.5 and 1.0
        "reward/mean": 0.35 + 3.25 / 4,
        "reward/group_std": (0.75 + 0.5) / np.sqrt(2) / 2,
        "reward/std": np.std([1.25, 0.5, 0.5, 1.0]),
        "groups_without_signal": 0.0,
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_samples_of_one_round_are_counted_apart():
    second = jnp.array([[True, False], [False, False]])
    answered = jnp.array([[True, True], [True, False]])
    blocks = VERDICT.block_tokens * second[..., None]
    verdict = VERDICT.replace(has_second=second, has_first=answered, block_tokens=blocks + 1)
    verdict = verdict.replace(block_tokens=verdict.block_tokens.at[..., 2].set(2 * second))
    got = grpo.rollout_metrics(grpo.reward_terms(GrpoConfig(), verdict), verdict, _rollout(), BOTH)
    assert (got["reflected/count"], got["reflected/of"]) == (1, 4)
    assert (got["right_reflected/count"], got["right_reflected/of"]) == (1, 1)
    # Two end after the first answer, one of them right; one has no answer at all.
    assert (got["right_one_round/count"], got["right_one_round/of"]) == (1, 2)


def test_rollout_metrics_ignore_fillers():
    rollout = _rollout()
    verdict = _verdict([[0, 0], [1, 0]], [[0, 0], [0, 0]])
    verdict = verdict.replace(format_ok=jnp.ones((P, G), bool))
    terms = grpo.reward_terms(GrpoConfig(), verdict)
    got = grpo.rollout_metrics(terms, verdict, rollout, jnp.array([False, True]))
    assert got["samples"] == 2 and got["accuracy/first"] == 0.5 and got["tokens"] == 4
    assert got["harm/count"] == 1 and got["harm/of"] == 1 and got["fix/of"] == 1
    assert got["groups_without_signal"] == 0
    assert got["completion_length/max"] == 3
    got = grpo.rollout_metrics(terms, verdict, rollout, BOTH)
    assert got["groups_without_signal"] == 0.5
    got = grpo.rollout_metrics(terms, verdict, rollout, jnp.zeros(P, bool))
    assert got["reward/mean"] == 0 and not any(np.isnan(v) for v in got.values())


def test_contradictory_configurations_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        GrpoConfig(temperature=0.0)
    with pytest.raises(ValueError, match="length_cap"):
        GrpoConfig(aggregation="constant")
    assert not GrpoConfig().needs_reference and GrpoConfig(kl_coef=0.01).needs_reference
