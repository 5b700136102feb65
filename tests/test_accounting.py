"""Several samples, early stops and paired differences, against numbers worked by hand."""

import pytest

from srpo_jax.report.accounting import (
    CONFIDENT,
    accounts,
    accuracy_at,
    majority_at_k,
    paired,
    pass_at_k,
    stop_curve,
)


def samples(origin, answers, right=()):
    """Rows of one problem; an answer in ``right`` is right."""
    return [
        {"origin": origin, "sample": i, "final_answer": a, "final_correct": a in right}
        for i, a in enumerate(answers)
    ]


# ------------------------------------------------------------------------------ several samples


def test_pass_at_k_is_the_unbiased_estimate():
    # One of four right: k = 2 misses it in C(3, 2) of C(4, 2) pairs, 3 of 6. Three of four right:
    # no pair misses them.
    rows = samples("a", ["1", "2", "2", "2"], {"1"}) + samples("b", ["5", "5", "5", "6"], {"5"})
    found = pass_at_k(rows, (1, 2, 3, 4))
    assert found[1] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert found[2] == pytest.approx((3 / 6 + 1) / 2)
    assert found[3] == pytest.approx((3 / 4 + 1) / 2)
    assert found[4] == 1.0


def test_pass_at_k_needs_k_samples_of_every_problem():
    rows = samples("a", ["1", "1"]) + samples("data:7", ["1"])
    with pytest.raises(ValueError, match="data:7: 1 samples are too few for k = 2"):
        pass_at_k(rows, (1, 2))
    with pytest.raises(ValueError, match="at least 1, found 0"):
        pass_at_k(rows, (0,))
    with pytest.raises(ValueError, match="no rows"):
        pass_at_k([], (1,))


def test_rows_are_accounted_for_as_far_as_they_tell():
    rows = samples("a", ["1", "1", "2"], {"1"}) + samples("b", ["2", "2", "2"])
    found = accounts(rows)
    assert list(found) == ["pass@k", "maj@k"]
    assert found["maj@k"] == {"1": 0.5, "2": 0.5, "3": 0.5}
    assert found["pass@k"] == {str(k): v for k, v in pass_at_k(rows, (1, 2, 3)).items()}
    told = {"tokens_to_first": None, "first_confidence": None, "first_correct": True, "tokens": 9}
    assert list(accounts([row | told for row in samples("a", ["1"])])) == ["stop"]


def test_a_sample_that_is_there_twice_is_an_error():
    with pytest.raises(ValueError, match="a: sample 0 is there twice"):
        pass_at_k(samples("a", ["1"]) * 2, (1,))


def test_the_majority_counts_the_first_k_samples_in_their_order():
    rows = samples("a", ["3", "4", "4", "3", "3"], {"4"})
    found = majority_at_k(rows[::-1], (1, 3, 5))
    assert found == {1: 0.0, 3: 1.0, 5: 0.0}


def test_of_equally_frequent_answers_the_earliest_wins():
    assert majority_at_k(samples("a", ["7", "8", "8", "7"], {"7"}), (4,)) == {4: 1.0}
    assert majority_at_k(samples("a", ["8", "7", "7", "8"], {"7"}), (4,)) == {4: 0.0}


def test_samples_without_an_answer_do_not_vote():
    rows = samples("a", [None, " ", None, "5"], {"5"})
    assert majority_at_k(rows, (3, 4)) == {3: 0.0, 4: 1.0}


def test_accuracy_of_the_majority_is_the_mean_over_problems():
    rows = samples("a", ["1"], {"1"}) + samples("b", ["2"]) + samples("c", ["3"]) * 1
    assert majority_at_k(rows, (1,))[1] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("a", "b"),
    [("0.5", r"\frac{1}{2}"), ("$5$", "5 cm"), ("B", "(B)"), ("B. 57", "B"), ("Paris", "paris."),
     ("1,000", "1000"), (r"$x + 1$", "x+1")],
)  # fmt: skip
def test_answers_that_say_the_same_vote_together(a, b):
    assert majority_at_k(samples("a", ["99", a, b], {a, b}), (3,)) == {3: 1.0}


@pytest.mark.parametrize(
    ("a", "b"), [("x", "X"), ("5 cm", "5 m"), ("B", "D"), ("2", "-2"), ("a", "A"), ("a", "b")]
)
def test_answers_that_say_something_else_do_not(a, b):
    assert majority_at_k(samples("a", ["99", a, b], {a, b}), (3,)) == {3: 0.0}


def test_an_option_by_its_text_votes_for_its_letter():
    rows = samples("a", ["cat", "dog", "B"], {"dog", "B"})
    assert majority_at_k(rows, (3,)) == {3: 0.0}
    with_choices = [row | {"choices": ["cat", "dog"]} for row in rows]
    assert majority_at_k(with_choices, (3,)) == {3: 1.0}


# ---------------------------------------------------------------------------------- early stops


def ending(first, final, confidence, so_far, tokens):
    return {
        "first_correct": first, "final_correct": final, "first_confidence": confidence,
        "tokens_to_first": so_far, "tokens": tokens,
    }  # fmt: skip


ENDINGS = [
    ending(True, True, 0.99, 10, 40),
    ending(True, False, 0.90, 20, 60),
    ending(False, True, 0.50, 30, 70),
    ending(False, False, None, None, 100),  # no first answer
]


def test_stopping_always_never_or_when_confident():
    found = stop_curve(ENDINGS)["points"]
    assert found["first"] == {"accuracy": 0.5, "tokens": (10 + 20 + 30 + 100) / 4, "stopped": 0.75}
    assert found["final"] == {"accuracy": 0.5, "tokens": (40 + 60 + 70 + 100) / 4, "stopped": 0.0}
    # 0.99 and, on the threshold itself, 0.90 stop.
    assert found["confident"] == {
        "threshold": 0.9, "accuracy": 0.75, "tokens": (10 + 20 + 70 + 100) / 4, "stopped": 0.5
    }  # fmt: skip


def test_the_threshold_is_not_chosen_on_the_rows():
    sure_and_wrong = [ending(False, True, 0.95, 1, 9)]
    assert CONFIDENT == 0.9
    assert stop_curve(sure_and_wrong)["points"]["confident"]["accuracy"] == 0.0


def test_the_curve_runs_over_quantiles_of_the_confidence():
    curve = stop_curve(ENDINGS)["curve"]
    assert [point["quantile"] for point in curve][::5] == [0.0, 0.5, 1.0]
    low, middle, high = curve[::5]
    assert (low["threshold"], low["stopped"], low["tokens"]) == (0.5, 0.75, 40.0)
    assert (middle["threshold"], middle["stopped"], middle["accuracy"]) == (0.9, 0.5, 0.75)
    assert (high["threshold"], high["stopped"], high["accuracy"]) == (0.99, 0.25, 0.5)
    assert high["tokens"] == (10 + 60 + 70 + 100) / 4


def test_accuracy_at_a_number_of_tokens_lies_between_the_points():
    points = [[30.0, 0.9], [10.0, 0.5], [20.0, 0.8]]
    assert accuracy_at(points, 15.0) == pytest.approx(0.65)
    assert accuracy_at(points, 40.0) == 0.9 and accuracy_at(points, 9.0) is None


def test_without_any_confidence_there_is_no_curve():
    found = stop_curve([ending(True, False, None, 5, 9)])
    assert found["curve"] == []
    assert found["without_confidence"] == 1
    assert found["points"]["first"]["tokens"] == 5.0
    assert found["points"]["confident"] == {
        "threshold": 0.9, "accuracy": 0.0, "tokens": 9.0, "stopped": 0.0
    }  # fmt: skip
    with pytest.raises(ValueError, match="no rows"):
        stop_curve([])


# ----------------------------------------------------------------------------------- two models


def verdicts(values, **same):
    return [
        {"id": f"p{i}", "origin": f"f:{i}", "final_correct": v, "first_correct": not v} | same
        for i, v in enumerate(values)
    ]


def test_the_difference_and_its_exact_p():
    base, new = [0] * 5 + [1] + [1] * 4, [1] * 5 + [0] + [1] * 4
    found = paired(verdicts(base), verdicts(new))
    assert (found["problems"], found["better"], found["worse"]) == (10, 5, 1)
    assert (found["base"], found["new"]) == (0.5, 0.9)
    assert found["difference"] == pytest.approx(0.4)
    assert found["p"] == 2 * (1 + 6) / 2**6
    assert found["test"] == "McNemar, exact"
    assert paired(verdicts(base), verdicts(new), "first_correct")["difference"] == -0.4


def test_p_is_one_where_nothing_changed_or_as_much_either_way():
    assert paired(verdicts([0, 1]), verdicts([0, 1]))["p"] == 1.0
    assert paired(verdicts([0, 1]), verdicts([1, 0]))["p"] == 1.0


def test_the_interval_is_that_of_the_mean_difference():
    # 300 of 1000 better and 100 worse: mean 0.2, variance 0.36, standard error 0.6 / sqrt(1000).
    base, new = [0] * 300 + [1] * 700, [1] * 300 + [0] * 100 + [1] * 600
    found = paired(verdicts(base), verdicts(new))
    assert found["low"] == pytest.approx(0.2 - 1.96 * 0.018974, abs=0.002)
    assert found["high"] == pytest.approx(0.2 + 1.96 * 0.018974, abs=0.002)
    assert found["p"] < 1e-20
    assert paired(verdicts(base), verdicts(new), seed=0) == found


def test_several_samples_of_a_problem_are_one_problem():
    base = verdicts([0, 0]) + verdicts([1, 1]) + verdicts([0, 0])
    new = verdicts([1, 0]) + verdicts([1, 1]) + verdicts([1, 0])
    found = paired(base, new)
    assert found["problems"] == 2
    assert found["difference"] == pytest.approx((2 / 3 + 0) / 2)
    assert (found["better"], found["worse"], found["p"]) == (1, 0, 1.0)
    assert found["test"] == "sign test, exact"


def test_problems_are_matched_by_id_wherever_the_data_lie():
    moved = [row | {"origin": f"elsewhere:{row['id']}"} for row in verdicts([1, 0])][::-1]
    assert paired(verdicts([1, 0]), moved)["difference"] == 0.0


def test_ids_that_several_problems_share_are_not_used():
    base = [row | {"id": "same"} for row in verdicts([1, 0])]
    assert paired(base, [row | {"id": "same"} for row in verdicts([0, 0])])["worse"] == 1
    with pytest.raises(ValueError, match="ids do not tell problems apart"):
        paired(base, [{"id": "p0", "final_correct": True}])


def test_different_problems_are_named():
    with pytest.raises(ValueError, match=r"by id: 1 only in the base rows \(p2\)"):
        paired(verdicts([0, 1, 1]), verdicts([0, 1]))
    with pytest.raises(ValueError, match=r"4 only in the new rows \(p1, p2, p3, \.\.\.\)"):
        paired(verdicts([0]), verdicts([0] * 5))
    with pytest.raises(ValueError, match="different golds of p0: '5' and '6'"):
        paired(verdicts([0], gold="5"), verdicts([0], gold="6"))


def test_a_missing_verdict_is_named():
    with pytest.raises(ValueError, match="p0 has no 'official'"):
        paired(verdicts([1]), verdicts([1]), "official")
    with pytest.raises(ValueError, match="no rows"):
        paired(verdicts([1]), [])
    with pytest.raises(ValueError, match="neither 'id' nor 'origin'"):
        paired(verdicts([1]), [{"final_correct": True}])
