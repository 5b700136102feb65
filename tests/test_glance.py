"""The top of a run's page: do its reflections help, what it does, how far it is."""

import importlib

import pytest
from test_run_page import metric_rows, run_of

from srpo_jax.report import glance, run_page, verdict


@pytest.mark.parametrize(
    ("fixed", "harmed", "word"),
    [(40, 5, "Yes"), (5, 40, "No, they harm"), (6, 5, "Not clear"), (0, 0, "No, they change")],
)
def test_an_evaluation_says_whether_reflections_help(fixed, harmed, word):
    rates = {"acc@1": 0.5, "fix": fixed / 100, "harm": harmed / 100, "records": 200}
    found = verdict.of_rates(rates, "held out")
    assert found.word.startswith(word) and "On 200 problems (held out)" in found.text
    assert f"{fixed / 1:.1f} % of wrong first answers were made right" in found.text


def test_a_second_answer_is_no_reflection_where_verdicts_are_worth_nothing():
    rates = {"acc@1": 0.5, "fix": 0.4, "harm": 0.0, "records": 200}
    found = verdict.of_rates(rates, "x")
    blind = [{"split": "train", "stated_share": 0.9, "detection_margin": 0.04}] * 3
    told = verdict.qualified(found, blind)
    assert (told.word, told.kind) == ("Yes, as a second try", "mixed")
    assert told.text.startswith(found.text) and told.text.endswith("is the second try")
    for other in ({"detection_margin": 0.06}, {"stated_share": 0.1}, {"detection_margin": None}):
        assert verdict.qualified(found, [row | other for row in blind]) == found
    assert glance.helped(blind, {"test": rates}).word == "Yes, as a second try"
    worse = verdict.of_rates(rates | {"fix": 0.0, "harm": 0.4}, "x")
    assert verdict.qualified(worse, blind) == worse


def test_an_evaluation_says_what_comes_after_the_first_answer_costs():
    points = {"first": {"tokens": 9.3}, "final": {"tokens": 29.8}}
    rates = {"acc@1": 0.5, "fix": 0.4, "harm": 0.1, "records": 200, "stop": {"points": points}}
    assert verdict.of_rates(rates, "x").text.endswith("takes 20.5 of 29.8 tokens")


def test_the_interval_is_the_bootstrapped_one_or_that_of_paired_shares():
    rates = {"acc@1": 0.5, "fix": 0.4, "harm": 0.1, "records": 200}
    assert "(95 % interval 8.2 to 21.5)" in verdict.of_rates(rates, "x").text  # by hand
    rates |= {"benchmark": {"interval": {"net_gain": [-0.01, 0.31]}}}
    found = verdict.of_rates(rates, "x")
    assert "(95 % interval -1.0 to 31.0)" in found.text and found.word == "Not clear"


def test_training_says_whether_reflections_help_once_there_are_some_steps():
    rows = [
        {"step": n, "accuracy/net": 0.1 + 0.02 * (n % 2), "fix/count": 3, "fix/of": 10}
        for n in range(40)
    ]
    assert verdict.of_steps(rows[: verdict.FEWEST - 1]) is None
    found = verdict.of_steps(rows)
    assert (
        found.word == "Yes" and "steps 15 to 39" in found.text and "30.0 % of wrong" in found.text
    )
    assert "right 11.0 points more often" in found.text


def test_an_evaluation_is_asked_before_training_and_the_runs_own_before_none():
    trained = [row | {"accuracy/net": 0.1} for row in metric_rows(20)]
    rates = {"acc@1": 0.5, "fix": 0.1, "harm": 0.1, "records": 50, "split": "eval", "step": 9}
    assert "training problems" in glance.helped(trained, {}).text
    assert "held out, at step 9" in glance.helped([*trained, rates], {}).text
    assert "(test)" in glance.helped([*trained, rates], {"test": rates}).text
    assert glance.helped([], {}) == verdict.UNKNOWN


def test_an_evaluation_is_of_the_run_in_whose_folder_its_weights_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [run_of(tmp_path / name, metric_rows(1)) for name in ("a", "ab")]
    rates = {"acc@1": 0.5, "fix": 0.1, "harm": 0.1, "net_gain": 0.0, "records": 50}
    rates |= {"acc@2": 0.5, "tokens": 9.0, "samples": 50, "weights": "ab/hf"}
    html = run_page.page(runs, evaluations={"test": rates})
    first, second = html.split("Do its reflections help?")[1:]
    assert "(test)" not in first and "On 50 problems (test)" in second


def test_a_run_says_what_it_does_how_far_it_is_and_how_its_numbers_moved(tmp_path):
    config = importlib.import_module("configs.grpo").get_config("size=3b").to_dict()
    config["data"]["train"] = "rl.jsonl"
    assert glance.doing(config, "runs/sft") == (
        "Stage 2, reinforcement learning (reward.profile=paper): 128 prompts x 8 samples a step of "
        "rl.jsonl, from runs/sft"
    )
    rows = metric_rows(40, **{"time/step": 90.0, "accuracy/final": 0.5, "loss": 3.0})
    for row in rows[20:]:
        row["accuracy/final"] = 0.75
    assert glance.progress(rows, 79) == ("step 39 of 79, 90 s a step, 1:00:00 to go")
    found = {what: (now, before) for what, now, before, _ in glance.numbers(rows)}
    assert found["final answer right"] == ("75.0%", "50.0%") and "loss" not in found
    html = run_page.page([run_of(tmp_path, rows)])
    assert "Do its reflections help?" in html and 'href="#warnings-part">1 warning' not in html
    rows = [row | {"truncated_share": 0.5} for row in rows]
    html = run_page.page([run_of(tmp_path, rows)])
    assert 'href="#warnings-part">1 warning</a>' in html
