"""What is looked at before a run, and at its first update."""

import dataclasses

import numpy as np
import pytest

from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.rewards.profiles import GRPO, PAPER, PROFILES
from srpo_jax.run import preflight
from srpo_jax.structs import RunError


class Source(list):
    """Records of these answers; None: one that cannot be read."""

    def __getitem__(self, index):
        if super().__getitem__(index) is None:
            raise RecordError(f"f:{index}", "broken")
        return Record(str(index), "q", super().__getitem__(index), origin=f"f:{index}")


def test_gold_answers_that_do_not_fit_are_told_and_most_of_them_stop_the_run():
    look = lambda answers, cap: preflight.check_answers(Source(answers), len, cap, 2)  # noqa: E731
    fits = "gold answers take up to 6 of sampling.max_new_tokens=6 (2 records)"
    assert look(["1", None, "123"], 6) == fits
    assert look(["1", "2", "123", "1234"], 5).startswith("2 of 4 gold answers take up to 8 of ")
    assert look(["1", "2", "123", "1234"], 5).endswith("can only be wrong; first f:2")
    with pytest.raises(RunError, match="^2 of 3 .* raise --config.sampling.max_new_tokens"):
        look(["1", "123", "1234"], 5)
    assert look([None], 5).endswith("(0 records)")


def test_every_profile_pays_right_answers_and_teaches_nothing_where_all_are_alike():
    for profile in PROFILES:
        for kind in ("group", "rloo", "batch_std"):
            for credit in ("whole", "segments"):
                cfg = GrpoConfig(profile=profile, advantage=kind, credit=credit)
                assert "groups of equals teach nothing" in preflight.check_reward(cfg)
    assert preflight.check_reward(GrpoConfig(profile=GRPO)).startswith("right answers earn 1.5, ")
    # A price by the token is reckoned with lengths that the budget allows: 36 tokens cost 0.9.
    priced = GrpoConfig(profile=GRPO, weights=(("price", 0.025),), length_cap=36)
    assert preflight.check_reward(priced).startswith("right answers earn 0.6, wrong ones 0.5")


@pytest.mark.parametrize(
    ("terms", "fields", "message"),
    [
        (lambda v: {"r_acc": -1.0 * v.final_correct}, {}, "earn -1, wrong ones 0; mend the terms"),
        (lambda v: {"r_acc": 0 * v.stated}, {}, "right answers earn 0, wrong ones 0"),
        (lambda v: {"r_acc": v.stated * np.inf}, {}, "term r_acc is inf for a plain"),
        (
            lambda v: {"r_acc": v.final_correct + np.arange(4.0)},
            {},
            "equal samples has an advantage other than 0: .*preflight=False",
        ),
        (PAPER.terms, {"adv_eps": 0.0}, "is grpo.adv_eps=0.0 above 0"),
    ],
)
def test_a_reward_that_cannot_be_meant_stops_the_run(terms, fields, message):
    profile = dataclasses.replace(PAPER, name="own", terms=terms)
    with pytest.raises(RunError, match=f"^reward.profile=own: .*{message}"):
        preflight.check_reward(GrpoConfig(profile=profile, **fields))


def test_an_update_that_reckons_with_another_distribution_than_the_sampled_one_stops_the_run():
    differ = lambda mean: {"sampler/logp_diff_mean": mean, "sampler/logp_diff_max": 3.0}  # noqa: E731
    told = preflight.check_sampler(differ(0.02), "bfloat16")
    assert told == "sampler and update differ by 0.02 nats a token, at most 3"
    for mean, dtype in ((0.02, "float32"), (0.2, "bfloat16"), (float("nan"), "bfloat16")):
        with pytest.raises(RunError, match=f"is no rounding of {dtype}: compare"):
            preflight.check_sampler(differ(mean), dtype)
