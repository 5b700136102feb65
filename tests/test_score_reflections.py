"""Reflection quality: measures by rule, the rubric of a judge, intervals, and the command."""

import json
import time

import pytest

from srpo_jax.benchmarks.common import RowError
from srpo_jax.data.prompts import srpo_response
from srpo_jax.report import quality
from tests.benchmark_helpers import write_rows
from tests.judge_world import KEY, answer, prompt
from tests.openai_server import Server
from tests.tool_helpers import read_jsonl
from tools import score_reflections
from tools.lib import cli

FIRST = "There are three rows of four cups so we add three and four and get seven."
REVIEW = "Adding is a mistake: rows of equal length call for a product."
SECOND = "There are three rows of four cups so we multiply and get twelve."
FIELDS = {
    "first_think": FIRST, "first_answer": "7", "reflection": REVIEW, "second_think": SECOND,
    "second_answer": "12",
}  # fmt: skip


def fields(**changed):
    return FIELDS | {"answer": "12"} | changed


def measured(**changed):
    return quality.measure(fields(**changed))


def command(tmp_path, rows, *extra):
    """Exit code, output rows and report of the command."""
    write_rows(tmp_path / "in.jsonl", rows)
    argv = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    argv += ["--report", str(tmp_path / "report"), *extra]
    with pytest.raises(SystemExit) as caught:
        cli.run(score_reflections.main, score_reflections.make_parser(), argv)
    if caught.value.code not in (0, 3):
        return caught.value.code, None, None
    report = json.loads((tmp_path / "report.json").read_text())
    return caught.value.code, read_jsonl(tmp_path / "out.jsonl"), report


def judge_options(server, *extra):
    return ("--judge_model", "judge-1", "--judge_url", server.base_url, *extra)


# ---------------------------------------------------------------------------------------- rules


def test_blocks_come_from_the_response_or_from_fields():
    response = srpo_response(*FIELDS.values())
    from_response = quality.measure({"response": response, "answer": "12"})
    assert quality.blocks({"response": response})["reflection"] == REVIEW
    assert from_response["reflection_words"] == measured()["reflection_words"] == 12
    assert from_response["second_copied"] == measured()["second_copied"]


def test_fields_win_over_a_response_without_our_tags():
    assert quality.blocks(fields(response="plain text"))["reflection"] == REVIEW


def test_lengths_are_in_words():
    assert quality.words("It's 3.5 cm, \\frac{1}{2}") == [
        "it",
        "s",
        "3",
        "5",
        "cm",
        "frac",
        "1",
        "2",
    ]
    assert quality.words("答案是B") == ["答", "案", "是", "b"]
    assert measured()["first_think_words"] == 16


def test_copied_is_the_share_of_runs_of_three_words():
    assert quality.copied("a b c d", "x a b c y") == 0.5
    assert quality.copied("a b c", "A, b; C!") == 1.0
    assert quality.copied("a b c a b c", "a b c") == 0.5
    assert quality.copied("a b", "a b") is None
    # "there are three rows of four cups so we" are seven runs of the eleven
    assert measured()["second_copied"] == pytest.approx(7 / 11)
    assert measured()["reflection_copied"] == 0.0


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (r"So it is \boxed{12}.", ["12"]),
        ("The answer is 12. Check it.", ["12"]),
        ("The answer should be 3.5, not 4", ["3.5"]),
        ("**Answer:** B", ["B"]),
        ("the correct answer is (C), I think", ["(C)"]),
        ("所以答案是12。", ["12"]),
        ("The answer is wrong.", []),
        ("The answer is a guess.", []),
        ("Check the answer again: 12 cups?", []),
        ("Multiply instead.", []),
    ],
)
def test_a_stated_answer_is_found_and_a_remark_is_none(text, stated):
    assert quality.stated_answers(text) == stated
    assert measured(reflection=text)["states_answer"] is bool(stated)


@pytest.mark.parametrize(
    ("changed", "given"),
    [
        ({"reflection": r"It must be \boxed{12}."}, True),
        ({"reflection": "Multiply: 3 times 4 is 12."}, True),
        ({"reflection": "The answer is 24/2."}, True),
        ({"reflection": "The answer is 13."}, False),
        ({"reflection": "Multiply instead."}, False),
        ({"reflection": r"Yes, \boxed{12}.", "first_answer": "12"}, False),  # nothing to give away
        ({"reflection": "Why 12?", "first_think": "12 minus 5 is 7"}, False),
        ({"reflection": "Rather option B.", "answer": "B", "choices": ["7", "12"]}, True),
        ({"reflection": "Or (B)?", "answer": "B", "choices": ["7", "12"]}, True),
        ({"reflection": "A twelve-pack!", "answer": "B", "choices": ["7", "twelve pack"]}, True),
        ({"reflection": "be careful", "answer": "B", "choices": ["7", "12"]}, False),
        ({"reflection": "It is 12.", "answer": None}, True),  # the second answer stands in
        ({"reflection": "It is 12.", "answer": None, "gold": "13"}, False),
        ({"reflection": "It is 12.", "answer": None, "second_answer": ""}, None),
    ],
)
def test_an_answer_is_given_away_where_the_first_attempt_lacks_it(changed, given):
    assert measured(**changed)["gives_away"] is given


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("The reasoning is correct.", "right"),
        ("There are no errors.", "right"),
        ("I do not see any mistake.", "right"),
        ("This isn't right.", "wrong"),
        ("The sum is wrong.", "wrong"),
        ("The setup is valid, but the sum is wrong.", "mixed"),
        ("Find the correct value on the right side of the right triangle.", None),
        ("Look again.", None),
        ("For right triangles there is a rule.", None),
        ("推理是正确的。", "right"),
        ("没有错误。", "right"),
        ("这一步不正确。", "wrong"),
    ],
)
def test_verdicts_are_read_with_their_negations(text, verdict):
    assert quality.verdict(text) == verdict


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({"reflection": "That is wrong."}, True),
        ({"reflection": "That is correct."}, False),
        ({"reflection": "That is correct.", "first_answer": "12"}, True),
        ({"reflection": "That is correct.", "first_correct": True}, True),
        ({"reflection": "Hm."}, None),
        ({"reflection": "That is wrong.", "answer": None}, None),
    ],
)
def test_a_verdict_is_held_against_the_first_answer(changed, fits):
    assert measured(**changed)["verdict_fits"] is fits


def test_a_row_without_a_reflection_has_no_measures_of_one():
    found = quality.measure({"response": "<think>a b c</think><answer>5</answer>", "answer": "5"})
    assert found["has_reflection"] is False
    assert found["first_think_words"] == 3
    assert found["states_answer"] is None
    assert found["verdict_fits"] is None


def test_a_faulty_row_is_named():
    with pytest.raises(RowError, match="no 'response' and no 'reflection'") as caught:
        quality.measured([fields(), {"id": "x"}])
    assert caught.value.index == 1
    with pytest.raises(RowError, match="'first_think' must be text"):
        quality.measure(fields(first_think=5))


def test_pathological_texts_take_little_time():
    start = time.process_time()  # 0.3 s; a rule of quadratic cost takes minutes
    hard = ("answer is " * 10**4, "answer" + " " * 10**5, "not correct " * 10**4, "{" * 10**5)
    for text in hard:
        measured(reflection=text, first_think=text)
    assert time.process_time() - start < 5


# -------------------------------------------------------------------------------------- summary


def test_means_have_intervals_over_problems():
    rows = [fields(id=str(i), reflection="wrong" if i % 4 else "fine") for i in range(40)]
    summary = quality.measure_means(quality.measured(rows))
    wrong = summary["measures"]["verdict_wrong"]
    assert wrong["mean"] == 0.75
    assert 0.55 < wrong["low"] < 0.68  # 0.75 -+ 1.96 sqrt(0.75 * 0.25 / 40) = 0.62, 0.88
    assert 0.82 < wrong["high"] < 0.93
    assert wrong["rows"] == 40
    assert summary == quality.measure_means(quality.measured(rows))


def test_samples_of_one_problem_are_not_independent():
    def width(rows):
        found = quality.measure_means(quality.measured(rows))["measures"]["verdict_wrong"]
        return found["high"] - found["low"]

    texts = ["wrong" if i % 2 else "fine" for i in range(10)]
    alone = [fields(id=f"{i} {k}", reflection=t) for i, t in enumerate(texts) for k in range(16)]
    grouped = [row | {"id": row["id"].split()[0]} for row in alone]
    assert width(grouped) > 2.5 * width(alone)


def test_a_measure_counts_only_where_it_has_a_meaning():
    rows = quality.measured([fields(), {"response": "no tags"}, fields(reflection="a b")])
    summary = quality.measure_means(rows)
    assert summary["rows"] == 3
    assert summary["reflections"] == 2
    assert summary["measures"]["reflection_words"]["mean"] == 7
    assert summary["measures"]["reflection_copied"]["rows"] == 1
    assert summary["measures"]["has_reflection"]["mean"] == pytest.approx(0.6667)


# ---------------------------------------------------------------------------------------- judge


def rows_to_rate():
    return [
        fields(id=str(i), question="How many cups?", reflection=f"Case {i}. USE: {use}")
        for i, use in enumerate((1, 2, 2.5))
    ]


def test_the_rubric_is_rated_and_averaged(tmp_path):
    with Server(answer) as server:
        server.keep = True
        code, out, report = command(tmp_path, rows_to_rate(), *judge_options(server))
    assert code == 0
    assert out[2]["quality"]["rubric"] == {
        "logic": 4, "missing_assumptions": 3, "clarity": 5, "suggestions": 2.5
    }  # fmt: skip
    assert out[2]["quality"]["rubric_mean"] == pytest.approx(14.5 / 4)
    assert report["measures"]["rubric_suggestions"]["mean"] == pytest.approx(5.5 / 3, abs=1e-4)
    assert report["measures"]["rubric_mean"]["rows"] == 3
    text = prompt(server.bodies[0])
    assert all(part in text for part in ("How many cups?", FIRST, "Case"))
    assert SECOND not in text  # the reflection is rated, not what it led to


def test_a_second_run_costs_no_call(tmp_path):
    rows = [*rows_to_rate(), fields(reflection="HOPELESS"), {"response": "no reflection"}]
    with Server(answer) as server:
        _, first, report = command(tmp_path, rows, *judge_options(server))
        asked = server.requests
        assert asked == 3 + 4
        _, second, again = command(tmp_path, rows, *judge_options(server))
        assert server.requests == asked
    assert first == second
    assert report["measures"] == again["measures"]
    assert again["judge"]["calls"] == 0


def test_nonsense_is_in_no_mean_and_reported(tmp_path, capsys):
    rows = [*rows_to_rate(), fields(reflection="HOPELESS"), fields(reflection="USE: 7")]
    with Server(answer) as server:
        _, out, report = command(tmp_path, rows, *judge_options(server))
    assert "rating outside" in out[4]["quality"]["no_judgement"]
    assert "rubric" not in out[3]["quality"]
    assert report["no_judgement_rows"] == 2
    assert report["measures"]["rubric_mean"]["rows"] == 3
    assert "2 reflections without a judgement" in capsys.readouterr().err


def test_faults_change_no_rating_and_the_key_stays_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("srpo_jax.remote.client.backoff", lambda *_: 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = [fields(id=str(i), reflection=f"{i} USE: {i % 5}") for i in range(30)]
    faults = {"429": 0.1, "500": 0.1, "503": 0.1, "cut": 0.1, "not_json": 0.1}
    with Server(answer, faults, seed=3, key=KEY) as server:
        code, out, _ = command(tmp_path, rows, *judge_options(server, "--judge_retries", "40"))
        assert server.requests > 30
    assert code == 0
    assert [r["quality"]["rubric"]["suggestions"] for r in out] == [i % 5 for i in range(30)]
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


# -------------------------------------------------------------------------------------- command


def test_without_a_judge_only_rules_are_used(tmp_path, capsys):
    code, out, report = command(tmp_path, [fields(), {"response": "no tags", "x": 1}])
    assert code == 0
    assert out[0]["quality"]["verdict"] == "wrong"
    assert out[1]["x"] == 1
    assert "judge" not in report
    page = (tmp_path / "report.md").read_text()
    assert "| reflection_words | 12 | 12 to 12 | 1 |" in page
    assert "1 rows without a reflection" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "in.jsonl: no rows"),
        ([fields(), {"id": 1}], "in.jsonl:2: no 'response' and no 'reflection'"),
    ],
)
def test_errors_are_one_line_and_name_the_row(tmp_path, capsys, rows, message):
    assert command(tmp_path, rows)[0] == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
