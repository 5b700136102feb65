"""Reward terms of one's own: what a function gets and may return, weights, failures, training."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import train_helpers as helpers

from srpo_jax import train_grpo
from srpo_jax.data.fields import Record
from srpo_jax.learn import grpo
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.model import sharding
from srpo_jax.remote.reward import open_judge
from srpo_jax.rewards.function import scores
from srpo_jax.rewards.profiles import PAPER
from srpo_jax.rewards.template import TokenText
from srpo_jax.run import rollout
from srpo_jax.run.own import OwnTerms, made_up
from srpo_jax.run.sections import JudgeSettings, RewardSettings
from srpo_jax.structs import Rollout, RunError
from tests.openai_server import Server
from tests.test_grpo import VERDICT

RECORD = Record("a", "How many?", "1", source="dots", extra={"level": 3})
FILE = """
import time
from beside import BONUS

def score(completions):
    return [float(len(text)) for text in completions]

def two(completions, verdicts, **rest):
    assert sorted(rest) == ["answers", "blocks", "prompts", "records"]
    return {"bonus": [BONUS] * len(completions), "right": [v["final_correct"] for v in verdicts]}

def seen(prompts, completions, blocks, answers, verdicts, records):
    assert prompts == ["How many?"] * 4 and records[0]["level"] == 3 and records[0]["answer"] == "1"
    assert blocks[0]["second_answer"] == r"\\boxed{1}" and blocks[3]["reflection"] is None
    assert answers[1] == {"first": "2", "final": "2"} and completions[3] == ""
    return [float(v["format_ok"]) for v in verdicts]

def not_a_number(completions):
    return [0.0, float("nan"), 0.0, 0.0]

def too_few(completions):
    return [1.0]

def one_for_all(completions):
    return 1.0

def raises(records):
    return [record["nope"] for record in records]

def foreign(images):
    return []

def r_acc(completions):
    return [0.0] * len(completions)

def picky(completions):
    if "break" in completions:
        raise ValueError("no break")
    return [len(text) for text in completions]

def sleeps(completions):
    time.sleep(60)

def leaves(completions):
    import os
    os._exit(3)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "my_reward.py"
    path.write_text(FILE)
    path.with_name("beside.py").write_text("BONUS = 0.5\n")
    return path


def settings(**fields) -> RewardSettings:
    return RewardSettings(PAPER, ("yes",), ("no",), workers=1, **fields)


def tried(**fields) -> OwnTerms:
    with OwnTerms(settings(**fields), sharding.make_mesh()) as own:
        own.try_on([RECORD])
    return own


def test_a_function_gets_what_it_names_and_gives_one_or_several_terms(file):
    assert tried(function=f"{file}:seen").weights == (("seen", 1.0),)
    assert tried(function=f"{file}:score", weight="0.25").weights == (("score", 0.25),)
    own = tried(function=f"{file}:two", weight="right=2, bonus=-1")
    assert own.weights == (("bonus", -1.0), ("right", 2.0))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("not_a_number", "not_a_number: term not_a_number of sample 2 of 4 is nan"),
        ("too_few", "too_few: term too_few has 1 numbers for 4 samples"),
        ("one_for_all", "term one_for_all is 1.0, not a number for each sample"),
        ("raises", r"KeyError: 'nope' \(my_reward.py:28\)"),
        ("foreign", "foreign asks for images: there are prompts, completions"),
        ("missing", "my_reward.py has no function missing"),
        ("r_acc", "a reward term is called r_acc, a name in use"),
        ("sleeps", "sleeps: no answer after 0.3 s, twice"),
        ("leaves", "leaves: its process ended, twice"),
    ],
)
def test_what_is_wrong_with_a_function_is_one_line_before_the_first_step(file, name, told):
    with pytest.raises(RunError, match=told) as caught:
        tried(function=f"{file}:{name}", timeout=0.3 if name == "sleeps" else 20.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["nowhere.py:score", "my_reward:score", "my_reward.py"])
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(RunError, match=r"reward.function=.*(there is no file|write FILE.py:FUNC)"):
        OwnTerms(settings(function=place), sharding.make_mesh())


def test_a_weight_that_cannot_be_meant_is_refused(file):
    for weight in ("much", "a=b", "nan", "1,2"):
        with pytest.raises(ValueError, match="write a number, or NAME=0.5,OTHER=1"):
            settings(function="x.py:y", weight=weight)
    with pytest.raises(RunError, match="must name each term of the function: bonus, right"):
        tried(function=f"{file}:two", weight="right=2")
    with pytest.raises(ValueError, match="replace=True: set function"):
        settings(replace=True)


def test_a_file_that_cannot_be_imported_says_where(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import json\n\nimport no_such_module\n")
    with pytest.raises(RunError, match=r"No module named 'no_such_module' \(broken.py:3\)"):
        tried(function=f"{path}:score")


def test_a_group_that_gets_no_terms_has_a_reason_and_zeros_that_count_nowhere(file):
    rows = dict.fromkeys(("first_answer", "final_answer"), "1") | {"blocks": {}}
    details = [rows | {"text": text} for text in ("ab", "abc", "break", "abcd")]
    verdict = VERDICT.replace(**{k: np.asarray(x) for k, x in vars(VERDICT).items() if k != "own"})
    with OwnTerms(settings(function=f"{file}:picky"), sharding.make_mesh()) as own:
        own.try_on([RECORD])
        records = [RECORD, dataclasses.replace(RECORD, id="b")]
        found_PGN, failures = own.of_round(records, np.array([1, 0]), verdict, details)
    np.testing.assert_array_equal(found_PGN[..., 0], [[2, 3], [0, 0]])
    assert list(failures) == [1] and "ValueError: no break" in failures[1]


def test_a_group_with_an_answer_that_had_no_turn_has_no_reward():
    text = "<think>a</think><answer>1</answer>"
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    tokens = np.broadcast_to(ids, (3, 2, len(ids)))
    # Two prompts of two samples with two answers each, and a filler.
    found = [True, True, False, None, True, False, True, True, None, None, None, None]
    parts = SimpleNamespace(
        token_text=TokenText([bytes([i]) for i in range(256)]),
        verifier=SimpleNamespace(check=lambda items: found),
        grading=SimpleNamespace(tolerance=0.0),
    )
    sampled = SimpleNamespace(
        records=[RECORD, RECORD],
        slots=np.array([1, 0]),
        rollout=Rollout(tokens, tokens > 0, np.ones((3, 2), bool), None, None),
    )
    sampler = SimpleNamespace(sampling=SimpleNamespace(forks=1))
    generator = SimpleNamespace(parts=parts, _profile=PAPER, _own=None, _sampler=sampler)
    graded = rollout.Generator.grade(generator, sampled)
    assert graded.verdict.final_correct.tolist() == [[True, False], [False, True], [False, False]]
    assert list(graded.failures) == [0] and "grading.step_timeout" in graded.failures[0]
    assert graded.rewarded.tolist() == [False, True, True]


# --- in the update -------------------------------------------------------------------------------


def own_verdict():
    own = np.array([[[1, 0], [3, 0]], [[0, 2], [0, 0]]], np.float32)
    return VERDICT.replace(own=own)


OWN = {"own": ("a", "b"), "weights": (("f_len", 0.1), ("a", 0.5), ("b", 1.0))}


def test_own_terms_enter_the_sum_with_their_weights():
    plain = grpo.reward_terms(GrpoConfig(), VERDICT)
    both = grpo.reward_terms(GrpoConfig(**OWN), own_verdict())
    np.testing.assert_allclose(both.total - plain.total, [[0.5, 1.5], [2, 0]], atol=1e-6)
    np.testing.assert_array_equal(both.parts["b"], [[0, 0], [2, 0]])
    alone = settings(function="x.py:y", replace=True).design
    replaced = grpo.reward_terms(GrpoConfig(profile=alone, **OWN), own_verdict())
    np.testing.assert_allclose(replaced.total, [[0.5, 1.5], [2, 0]])
    with pytest.raises(ValueError, match="two reward terms are called i_ref"):
        grpo.reward_terms(GrpoConfig(own=("a", "i_ref")), own_verdict())


def test_own_terms_pay_what_comes_after_the_first_answer_and_all_where_they_replace():
    counted = np.ones((2, 2), bool)
    pay = {"credit": "segments", "advantage": "centred"}

    def credited(verdict, **fields):
        cfg = GrpoConfig(**pay, **fields)
        terms = grpo.reward_terms(cfg, verdict)
        return grpo.credited(cfg, terms, verdict, counted_PG=counted)

    (first, rest), (own_first, own_rest) = credited(VERDICT), credited(own_verdict(), **OWN)
    np.testing.assert_allclose(own_first, first)
    # Of the first prompt one first answer is right and one wrong: neither has another to equal.
    np.testing.assert_allclose(own_rest - rest, [[0, 0], [1, -1]], atol=1e-6)
    alone = settings(function="x.py:y", replace=True).design
    first, _ = credited(own_verdict(), profile=alone, **OWN)
    np.testing.assert_allclose(first, [[-0.5, 0.5], [1, -1]])


def test_made_up_samples_have_what_real_ones_have():
    verdict = made_up(RECORD)["verdicts"]
    fields = set(vars(VERDICT)) - {"own"}
    assert all(set(one) == fields for one in verdict)


# --- the page ---------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs/rewards.md").read_text("utf-8")


def shown(start: str) -> str:
    """The page's block of code that begins, or has an option that begins, with ``start``."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if start in block)
    return found


def options(command: str) -> dict[str, str]:
    """Values of a shown command's options of the section reward."""
    words = shlex.split(command.replace("\\\n", " "))
    pairs = (word.removeprefix("--config.reward.").partition("=") for word in words)
    return {name: value for name, sign, value in pairs if sign}


def test_the_pages_function_scores_made_up_samples_and_others(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(shown("# my_reward.py"))
    given = options(shown("--config.reward.function="))
    assert given["function"] == "my_reward.py:score"
    assert tried(function=f"{path}:score", weight=given["weight"]).weights == (
        ("short", 0.2),
        ("grounded", 0.1),
    )
    samples = made_up(dataclasses.replace(RECORD, extra={"budget": 5}))
    samples["blocks"][0]["reflection"] = "The Figure shows 1."
    assert scores(f"{path}:score", samples) == {"short": [0, 0, 0, 1], "grounded": [1, 0, 0, 0]}


def test_the_pages_judge_is_asked_as_shown(tmp_path):
    command = options(shown("--config.reward.judge.model="))
    given = {name.removeprefix("judge."): value for name, value in command.items()}
    fields = {"model", "url", "rubric", "weight", "max_calls"}
    assert fields <= given.keys()
    with Server(lambda body: json.dumps({"score": 0.5})) as server:
        server.keep = True
        one = JudgeSettings(
            url=server.base_url,
            model=given["model"],
            rubric=given["rubric"],
            max_calls=int(given["max_calls"]),
            key_env="",
        )
        assert open_judge(one, tmp_path, 0, 1)([group("x")]) == [{"judge": [0.5]}]
        assert server.bodies[0]["model"] == "qwen-72b"
        assert given["rubric"] in server.bodies[0]["messages"][-1]["content"]


# --- in training ---------------------------------------------------------------------------------

HALF = """
def half(completions, records):
    if int(records[0]["id"].rpartition("-")[2]) % 2:
        raise ValueError("odd ones not")
    return {"brief": [1.0 / (1 + len(text)) for text in completions]}
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return helpers.world(tmp_path_factory.mktemp("own_world"))


@pytest.mark.slow
def test_a_group_whose_call_fails_gets_weight_0_and_is_counted(
    paths, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rollout, "grade", helpers.fake_grade)
    (tmp_path / "mine.py").write_text(HALF)
    config = helpers.grpo_config(paths, steps=1)
    config.reward.function = f"{tmp_path}/mine.py:half"
    config.reward.weight = "brief=3"
    config.reward.workers = 1
    row = train_grpo.train(config, tmp_path / "run")
    lines = (tmp_path / "run/rollouts/000001.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    failed = {s["id"] for s in samples if int(s["id"].rpartition("-")[2]) % 2}
    assert row["reward/failed"] == len(failed) > 0
    for s in samples:
        assert (s["weight"] == 0.0) == (s["id"] in failed) == ("no_reward" in s)
    good = [s for s in samples if "no_reward" not in s]
    assert all(s["brief"] == pytest.approx(1 / (1 + len(s["completion"]))) for s in good)
    assert row["reward/brief"] == pytest.approx(np.mean([s["brief"] for s in good]), rel=1e-4)
    assert row["reward/mean"] == pytest.approx(np.mean([s["total"] for s in good]), rel=1e-4)
    assert capsys.readouterr().out.count("ValueError: odd ones not (mine.py:4)") == 1


# --- a judge -------------------------------------------------------------------------------------


def judge_settings(server, **fields) -> JudgeSettings:
    given = {"model": "judge-1", "url": server.base_url, "rubric": "Is it brief?", "key_env": ""}
    return JudgeSettings(**{**given, "max_calls": 100, **fields})


def brevity(body: dict) -> str:
    """1 for a response without a reflection; FAIL in it brings nonsense."""
    text = body["messages"][-1]["content"]
    assert text.startswith("Is it brief?") and "Reference answer: 1" in text
    response = text.partition("Response:\n")[2]
    return "good" if "FAIL" in response else json.dumps({"score": float(len(response) < 300)})


def group(*texts: str) -> dict:
    samples = made_up(RECORD)
    return {key: [values[0]] * len(texts) for key, values in samples.items()} | {
        "completions": list(texts)
    }


@pytest.fixture
def quick_backoff(monkeypatch):
    monkeypatch.setattr("srpo_jax.remote.client.backoff", lambda *_: 0.001)


def test_a_judge_scores_each_response_once_and_a_failed_call_gives_the_group_a_reason(tmp_path):
    with Server(brevity) as server:
        judge = open_judge(judge_settings(server), tmp_path, 0, 1)
        groups = [group("short", "x" * 900), group("short", "FAIL"), group("other", "other")]
        first, second, third = judge(groups)
        assert first == {"judge": [1.0, 0.0]} and third == {"judge": [1.0, 1.0]}
        assert second == "4 replies of no use, the last: not JSON"
        asked = server.requests
        assert asked == 3 + 4  # equal requests are one, nonsense is asked for four times
        again = open_judge(judge_settings(server), tmp_path, 0, 1)
        assert again(groups) == [first, second, third] and server.requests == asked


def test_beyond_its_calls_a_judge_says_nothing_also_in_a_resumed_run(tmp_path):
    with Server(brevity) as server:
        limited = judge_settings(server, max_calls=3)
        two = [group("a", "b"), group("c", "d")]
        first, second = open_judge(limited, tmp_path, 0, 1)(two)
        assert {type(first), type(second)} <= {dict, str} and server.requests == 3
        assert "all of 3 calls are used up" in (first, second)
        more = open_judge(limited, tmp_path, 0, 1)([group("e", "e")])
        assert more == ["all of 3 calls are used up"] and server.requests == 3


def test_a_judges_term_has_its_weight_and_a_server_that_is_not_there_stops_the_start(
    tmp_path, quick_backoff
):
    with Server(brevity) as server:
        one = judge_settings(server, weight=0.5)
        judge = open_judge(one, tmp_path, 0, 1)
        with OwnTerms(settings(judge=one), sharding.make_mesh(), judge) as own:
            own.try_on([RECORD])
            assert own.weights == (("judge", 0.5),)
        nowhere = dataclasses.replace(one, url="http://127.0.0.1:9/v1")
    with OwnTerms(
        settings(judge=nowhere), sharding.make_mesh(), open_judge(nowhere, tmp_path / "other", 0, 1)
    ) as own:
        with pytest.raises(
            RunError, match="reward.judge: tried .*: judge-1: no server at http://127"
        ):
            own.try_on([RECORD])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rubric": ""}, "reward.judge.rubric=: give a text"),
        ({"rubric": "none.md"}, "reward.judge.rubric=none.md: give a text, or a file"),
        ({"max_calls": 0}, "reward.judge.max_calls=0: say how many calls"),
        ({"key_env": "sk-123"}, "reward.judge: key_env is the NAME"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_by_key(tmp_path, fields, told):
    with pytest.raises(RunError, match=told):
        one = JudgeSettings(model="judge-1", rubric="Is it brief?", max_calls=1)
        open_judge(dataclasses.replace(one, **fields), tmp_path, 0, 1)
