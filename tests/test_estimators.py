"""Each credit as an estimator: on a policy whose groups are enumerated, its expected gradient is
that of the expected reward, up to factors that stand here; and what it varies by."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest

from srpo_jax.learn.grpo import GrpoConfig, credited
from srpo_jax.rewards.terms import add_up
from srpo_jax.structs import Verdict

# A first round is one of three. The first is right; behind the last there is no second round.
FIRST = np.exp([0.3, -0.2, 0.1]) / np.exp([0.3, -0.2, 0.1]).sum()
SECOND = np.array([[0.7, 0.3], [0.4, 0.6], [1.0, 0.0]])
R_ACC = np.array([1.0, 0.0, 0.25])
REST = np.array([[0.5, -0.5], [0.125, 1.0], [0.0, 0.0]])
RIGHT = np.array([True, False, False])
FAMILIES = {
    forks: [
        (a, bs)
        for a in range(3)
        for bs in itertools.product(range(2 if SECOND[a, 1] else 1), repeat=forks)
    ]
    for forks in (1, 2)
}


class Groups(NamedTuple):
    """All N groups of G samples that there are, and how probable each is."""

    first_NG: np.ndarray
    second_NG: np.ndarray
    probability_N: np.ndarray


def groups(number: int, forks: int) -> Groups:
    """Of so many families."""
    drawn = list(itertools.product(FAMILIES[forks], repeat=number))
    chance = [math.prod(FIRST[a] * math.prod(SECOND[a, [*bs]]) for a, bs in one) for one in drawn]
    first = [[a for a, bs in one for _ in bs] for one in drawn]
    second = [[b for _, bs in one for b in bs] for one in drawn]
    return Groups(np.array(first), np.array(second), np.array(chance))


def gradients(found: Groups, scale: float = 1.0, **config) -> np.ndarray:
    """[N, 3 + 6] of the logits of first and second rounds, float64, as each group estimates it;
    first answers pay ``scale`` times as much."""
    first, second, _ = found
    right = RIGHT[first]
    held = dict(first_correct=right, final_correct=right, has_first=right | True)
    verdict = Verdict(**dict.fromkeys(Verdict.__dataclass_fields__) | held)
    terms = add_up({"r_acc": scale * R_ACC[first], "i_ref": REST[first, second]}, {})
    cfg = GrpoConfig(**config)
    adv, rest = credited(cfg, terms, verdict, counted_PG=np.ones_like(right))
    score = np.eye(3)[first] - FIRST
    later = np.eye(3)[first][..., None] * (np.eye(2)[second] - SECOND[first])[:, :, None]
    later = later.reshape(*first.shape, 6)
    weighed = [np.asarray(a, np.float64)[..., None] * s for a, s in ((adv, score), (rest, later))]
    return np.concatenate(weighed, -1).mean(1)


def true_gradient(first_reward: np.ndarray, rest_reward: np.ndarray) -> tuple:
    """Of the expectations of two rewards [3, 2]: in first rounds' logits, in second rounds'."""
    of_first = (SECOND * first_reward).sum(1)
    own = FIRST * (of_first - FIRST @ of_first)
    value = (SECOND * rest_reward).sum(1, keepdims=True)
    return own, FIRST[:, None] * SECOND * (rest_reward - value)


def kept(advantage: str, alike: int) -> float:
    """Factor of a baseline over ``alike`` samples, the sample itself among them."""
    return 1.0 * (alike > 1) if advantage == "rloo" else (alike - 1) / alike


@pytest.mark.parametrize("advantage", ["centred", "rloo"])
@pytest.mark.parametrize(("number", "forks"), [(4, 1), (3, 1), (2, 2), (3, 2)])
def test_expected_gradients_are_those_of_the_expected_reward(advantage, number, forks):
    found = groups(number, forks)
    np.testing.assert_allclose(found.probability_N.sum(), 1.0)
    total, samples = R_ACC[:, None] + REST, number * forks
    for credit in ("whole", "segments"):
        paid = (total, total) if credit == "whole" else (R_ACC[:, None] + 0 * REST, REST)
        first, rest = true_gradient(*paid)
        if forks > 1:  # a continuation is compared with its siblings
            rest = rest * kept(advantage, forks)
        elif credit == "whole":
            rest = rest * kept(advantage, samples)
        else:  # with those of the group whose first answer was as right, however many these are
            share = np.where(RIGHT, FIRST[RIGHT].sum(), FIRST[~RIGHT].sum())
            others = samples - 1
            chances = [
                math.comb(others, k) * share**k * (1 - share) ** (others - k)
                for k in range(samples)
            ]
            factor = sum(c * kept(advantage, k + 1) for k, c in enumerate(chances))
            rest = rest * factor[:, None]
        want = np.concatenate([first * kept(advantage, number), rest.reshape(-1)])
        each = gradients(found, advantage=advantage, credit=credit, forks=forks)
        np.testing.assert_allclose(found.probability_N @ each, want, atol=1e-6, err_msg=credit)


# Total variance of a group's estimate, `rloo`, 4 samples or 2 x 2: (first rounds', second rounds').
VARIANCES = {
    1.0: {
        ("whole", 1): [0.052, 0.021],
        ("whole", 2): [0.149, 0.056],
        ("segments", 1): [0.029, 0.036],
        ("segments", 2): [0.121, 0.056],
    },
    4.0: {
        ("whole", 1): [0.439, 0.28],
        ("whole", 2): [1.79, 0.056],
        ("segments", 1): [0.47, 0.036],
        ("segments", 2): [1.94, 0.056],
    },
}


@pytest.mark.parametrize("scale", VARIANCES)
def test_forks_vary_less_in_the_second_round_where_first_rounds_differ_more_than_it_does(scale):
    """The numbers of docs/objectives.md."""
    table = {}
    for credit, forks in itertools.product(("whole", "segments"), (1, 2)):
        found = groups(4 // forks, forks)
        each = gradients(found, scale, advantage="rloo", credit=credit, forks=forks)
        spread = found.probability_N @ np.square(each - found.probability_N @ each)
        table[credit, forks] = [round(float(part.sum()), 3) for part in np.split(spread, [3])]
    assert table == {key: pytest.approx(value, abs=1e-3) for key, value in VARIANCES[scale].items()}
