"""The mode ``judge``: what is asked, what is not, faults, nonsense, and the cache."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.common import RowError
from srpo_jax.benchmarks.judge.client import Judge
from srpo_jax.benchmarks.judge.flows import settled
from srpo_jax.remote import judge as judge_client
from srpo_jax.remote.cache import JudgeCache, request_key
from srpo_jax.remote.judge import NoJudgement
from srpo_jax.remote.protocol import Endpoint, Fatal, Request
from tests import judge_world
from tests.benchmark_helpers import parity_rows, without, write_rows
from tests.judge_world import KEY, answer, kind, prompt
from tests.openai_server import HTTPError, Server
from tests.tool_helpers import read_jsonl
from tools import score_benchmark
from tools.lib import cli

K12 = {"question": "How many cups?", "answer": "two cups", "subject": "math"}
VISTA = {
    "query": "Hint: an integer.\nQuestion: How many cups?", "question_type": "free_form",
    "answer_type": "integer", "choices": None, "precision": None, "answer": "5",
}  # fmt: skip
VERSE = {"question_for_eval": "Find AB.", "answer": "C", "problem_version": "Text Dominant"}
PRO = {
    "id": "test_Music_1", "subject": "Music", "answer": "B",
    "choices": ["apple pie", "banana split", "cherry tart", "date cake"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    """Retries come at once: how they are spaced is tested with the client."""
    monkeypatch.setattr("srpo_jax.remote.client.backoff", lambda *_: 0.001)


def make_judge(server, tmp_path, **options):
    endpoint = Endpoint("judge-1", server.base_url, key_env="", price_in=1.0, price_out=2.0)
    return Judge(endpoint, tmp_path / "cache.sqlite", **options)


def judge_rows(tmp_path, benchmark, rows, answer=answer):
    """(scored rows, kinds of the requests) with a fresh server and cache."""
    with Server(answer) as server:
        server.keep = True
        scored = scoring.score(benchmark, rows, "judge", judge=make_judge(server, tmp_path))
    return scored, [kind(body) for body in server.bodies]


def command(tmp_path, server, rows, *extra, benchmark="mmk12"):
    """Exit code, output rows and report of the command."""
    write_rows(tmp_path / "in.jsonl", rows)
    argv = ["--benchmark", benchmark, "--mode", "judge", "--judge_model", "judge-1"]
    argv += ["--predictions", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    argv += ["--judge_url", server.base_url, "--report", str(tmp_path / "report.json"), *extra]
    with pytest.raises(SystemExit) as caught:
        cli.run(score_benchmark.main, score_benchmark.make_parser(), argv)
    if caught.value.code not in (0, 3):
        return caught.value.code, None, None
    report = json.loads((tmp_path / "report.json").read_text())
    return caught.value.code, read_jsonl(tmp_path / "out.jsonl"), report


# ------------------------------------------------------------------------------------ benchmarks


def test_mathvista_extracts_by_model_and_compares_by_its_own_rule(tmp_path):
    rows = [VISTA | {"response": f"I count. ANS: {text}"} for text in ("5.0", "6", "five")]
    scored, asked = judge_rows(tmp_path, "mathvista", rows)
    assert [row["correct"] for row in scored] == [True, False, False]
    assert [row["extraction"] for row in scored] == ["5.0", "6", "five"]
    assert [row["prediction"] for row in scored] == ["5", "6", None]
    assert asked == ["mathvista_extract"] * 3
    assert {row["mode"] for row in scored} == {"judge"}


def test_mathvista_shows_the_judge_its_query_and_the_response(tmp_path):
    with Server(answer) as server:
        server.keep = True
        judge = make_judge(server, tmp_path)
        scoring.score("mathvista", [VISTA | {"response": "So: ANS: 5"}], "judge", judge=judge)
    text = prompt(server.bodies[0])
    assert VISTA["query"] in text
    assert "So: ANS: 5" in text
    assert server.bodies[0]["temperature"] == 0


SHORT = [  # rows that the official code scores without its model
    (VISTA | {"response": "5"}, True),
    (VISTA | {"response": ""}, False),
    (VISTA | {"response": "long", "extraction": "5"}, True),
    (VISTA | {"question_type": "multi_choice", "answer_type": "text", "choices": ["cat", "dog"],
              "answer": "dog", "response": "dog"}, True),
    (VISTA | {"answer_type": "float", "precision": 1.0, "answer": "0.5", "response": "0.52"}, True),
]  # fmt: skip


def test_mathvista_keeps_the_official_shortcuts(tmp_path):
    scored, asked = judge_rows(tmp_path, "mathvista", [row for row, _ in SHORT])
    assert [row["correct"] for row in scored] == [right for _, right in SHORT]
    assert asked == []


def test_mathvistas_optional_pattern_is_the_models_business(tmp_path):
    row = VISTA | {"response": 'The answer is "6". No: ANS: 5'}
    scored, asked = judge_rows(tmp_path, "mathvista", [row])
    assert scored[0]["correct"]
    assert asked == ["mathvista_extract"]


def test_an_option_is_never_guessed_for_a_response_without_an_answer(tmp_path):
    row = VISTA | {"question_type": "multi_choice", "answer_type": "text", "answer": "a"}
    scored, _ = judge_rows(
        tmp_path, "mathvista", [row | {"choices": ["a", "bcd"], "response": "I cannot tell."}]
    )
    assert scored[0]["prediction"] is None
    assert not scored[0]["correct"]
    assert "finds no answer" in scored[0]["no_answer"]


def test_mathverse_extracts_then_asks_yes_or_no(tmp_path):
    rows = [VERSE | {"response": f"ANS: {text}"} for text in ("c", "D")]
    scored, asked = judge_rows(tmp_path, "mathverse", rows)
    assert [row["correct"] for row in scored] == [True, False]
    assert sorted(asked) == ["mathverse_extract"] * 2 + ["mathverse_judge"] * 2


def test_mathverse_needs_no_second_call_for_the_very_gold(tmp_path):
    scored, asked = judge_rows(tmp_path, "mathverse", [VERSE | {"response": "ANS: C"}])
    assert scored[0]["correct"]
    assert asked == ["mathverse_extract"]


def test_a_given_extraction_is_only_judged(tmp_path):
    row = VERSE | {"response": "ANS: D", "extraction": "c"}
    scored, asked = judge_rows(tmp_path, "mathverse", [row])
    assert scored[0]["correct"]
    assert asked == ["mathverse_judge"]


def test_open_questions_are_extracted_and_matched(tmp_path):
    rows = [K12 | {"response": f"ANS: {text}"} for text in ("two  CUPS", "three", "two cups")]
    scored, asked = judge_rows(tmp_path, "mmk12", rows)
    assert [row["correct"] for row in scored] == [True, False, True]
    assert asked.count("extract") == 3
    assert asked.count("match") == 1  # the same words, and the same by the strict rule, need none


@pytest.mark.parametrize("benchmark", ["mathvision", "olympiadbench", "wemath", "emma", "mmmu"])
def test_the_generic_judge_serves_the_other_benchmarks(tmp_path, benchmark):
    row = K12 | {"final_answer": ["two cups"], "choices": []}
    rows = [row | {"response": "ANS: TwoCups"}, row | {"response": "ANS: 3 pots"}]
    scored, asked = judge_rows(tmp_path, benchmark, rows)
    assert [r["correct"] for r in scored] == [True, False]
    assert sorted(asked) == ["extract"] * 2 + ["match"] * 2


def test_options_are_read_by_the_official_patterns_before_the_judge(tmp_path):
    rows = [
        PRO | {"response": text} for text in ("Answer: B", "Answer: C", "Hm. ANS: banana split")
    ]
    scored, asked = judge_rows(tmp_path, "mmmu_pro", [*rows, PRO | {"response": "ANS: none"}])
    assert [row["correct"] for row in scored] == [True, False, True, False]
    assert asked.count("extract") == 2
    assert not any("drawn" in row for row in scored)


def test_wemaths_options_reach_the_judge(tmp_path):
    row = {"question": "How long?", "option": "A. 3; B. 4", "answer": "B", "response": "ANS: B"}
    with Server(answer) as server:
        server.keep = True
        scored = scoring.score("wemath", [row], "judge", judge=make_judge(server, tmp_path))
    assert scored[0]["correct"]
    assert "A. 3; B. 4" in prompt(server.bodies[0])


def test_long_responses_show_their_end_only(tmp_path):
    rows = [K12 | {"response": "BEGIN" + "x" * 10**6 + " ANS: two cups"}]
    with Server(answer) as server:
        server.keep = True
        scored = scoring.score("mmk12", rows, "judge", judge=make_judge(server, tmp_path))
    assert scored[0]["correct"]
    assert len(prompt(server.bodies[0])) < 30_000
    assert "BEGIN" not in prompt(server.bodies[0])


@pytest.mark.parametrize(
    ("gold", "text", "options", "unit", "verdict"),
    [
        ("B", "B", [], "", True),
        ("B", "(b)", ["x", "y"], "", True),
        ("B", "y", ["x", "y"], "", True),
        ("B", "A", ["x", "y"], "", False),
        ("B", "z", ["x", "y"], "", None),
        ("0.5", "1/2", [], "", True),
        ("0.5", "0.6", [], "", None),
        ("5", "5 km", [], "m", None),
        ("5", "5", [], "m", True),
        ("a", "B", [], "", None),  # a variable, not option A
    ],
)
def test_what_needs_no_judge_is_settled(gold, text, options, unit, verdict):
    assert settled([gold], text, options, unit) is verdict


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("mmk12", {"answer": "5", "response": "x"}, "no 'question'"),
        ("mmk12", {"question": "?", "response": "x"}, "no 'answer'"),
        ("mathvista", {"question": "?", "answer": "5", "response": "x"}, "no 'question_type'"),
        ("mathvista", VISTA | {"answer_type": "float", "response": "x"}, "no 'precision'"),
        ("mmmu_pro", {"answer": "A", "response": "x"}, "no 'choices'"),
    ],
)
def test_a_missing_field_costs_no_call(tmp_path, benchmark, row, message):
    good = VISTA | K12 | PRO | {"response": "ANS: 5"}
    with Server(answer) as server:
        with pytest.raises(RowError, match=message) as caught:
            scoring.score(benchmark, [good, row], "judge", judge=make_judge(server, tmp_path))
    assert caught.value.index == 1
    assert server.requests == 0


# ---------------------------------------------------------------------- faults, nonsense, refusals


def test_nonsense_is_asked_for_again_with_another_seed(tmp_path):
    with Server(answer) as server:
        server.keep = True
        judge = make_judge(server, tmp_path)
        scored = scoring.score(
            "mmk12", [K12 | {"response": "MUMBLE ANS: two cups"}], "judge", judge=judge
        )
    assert scored[0]["correct"]
    assert "no_judgement" not in scored[0]
    assert [body["seed"] for body in server.bodies] == [0, 1]
    assert server.bodies[0]["temperature"] < server.bodies[1]["temperature"]
    assert sum(judge.stats.nonsense.values()) == 1


def test_lasting_nonsense_is_no_judgement_and_counted_apart(tmp_path):
    rows = [K12 | {"response": "ANS: two cups"}, K12 | {"response": "HOPELESS ANS: two cups"}]
    with Server(answer) as server:
        code, out, report = command(tmp_path, server, rows)
        assert server.requests == 1 + judge_client.TRIES
    assert code == 0
    assert out[1]["correct"] is False
    assert out[1]["extraction"] is None
    assert "4 replies of no use" in out[1]["no_judgement"]
    assert "no_answer" not in out[1]
    assert (report["no_judgement_rows"], report["no_answer_rows"]) == (1, 0)
    assert report["accuracy"] == 50.0
    assert sum(report["judge"]["nonsense"].values()) == judge_client.TRIES


@pytest.mark.parametrize("reply", ['{"judgement": 2}', '{"judgement": true}', "yes", '{"j": 1}'])
def test_a_judgement_is_one_or_zero_and_nothing_else(tmp_path, reply):
    def strange(body):
        return reply if kind(body) == "match" else answer(body)

    scored, asked = judge_rows(tmp_path, "mmk12", [K12 | {"response": "ANS: 2 pots"}], strange)
    assert "no_judgement" in scored[0]
    assert asked.count("match") == judge_client.TRIES


def test_a_truncated_reply_is_nonsense(tmp_path):
    def cut(body):
        return {"content": '{"extraction": "two cups"}', "finish_reason": "length"}

    scored, _ = judge_rows(tmp_path, "mmk12", [K12 | {"response": "x"}], cut)
    assert "cut off" in scored[0]["no_judgement"]


def test_faults_of_the_server_change_no_verdict(tmp_path):
    faults = {"429": 0.08, "500": 0.06, "503": 0.06, "timeout": 0.02, "cut": 0.06, "not_json": 0.06}
    rows = [
        K12 | {"response": f"case {i} ANS: {'TWO cups' if i % 3 else 'pots ' + str(i)}"}
        for i in range(60)
    ]
    options = ("--judge_timeout", "0.4", "--judge_retries", "30")
    with Server(answer, faults, seed=5) as server:
        code, out, report = command(tmp_path, server, rows, *options)
        kinds = server.kinds
    assert code == 0
    assert [row["correct"] for row in out] == [bool(i % 3) for i in range(60)]
    assert report["no_judgement_rows"] == 0
    assert report["judge"]["calls"] == 60 + 20  # the strict rule knows that "TWO cups" are "two"
    assert all(kinds[name] for name in faults), kinds


def test_what_stays_unavailable_is_reported_and_asked_for_by_the_next_run(tmp_path, capsys):
    rows = [K12 | {"response": f"{i} ANS: two cups"} for i in range(3)]
    with Server(answer, ["500"] * 6) as server:
        code, out, report = command(tmp_path, server, rows, "--judge_retries", "1")
        assert code == 3
        assert report["judge"]["unavailable"] == 3
        assert all("unavailable" in row["no_judgement"] for row in out)
        assert "run the same command again" in capsys.readouterr().out
        code, out, report = command(tmp_path, server, rows)
    assert code == 0
    assert report["accuracy"] == 100.0


def test_a_filtered_prompt_is_no_judgement_and_asked_once(tmp_path):
    rows = [K12 | {"response": "FILTERED"}]
    with Server(answer) as server:
        for _ in range(2):
            code, out, _ = command(tmp_path, server, rows)
            assert code == 0
            assert "content_filter" in out[0]["no_judgement"]
        assert server.requests == 1


def test_a_server_that_refuses_everything_stops_the_run(tmp_path):
    def refuse(body):
        raise HTTPError(400, "response_format is not supported")

    rows = [K12 | {"response": f"{i} ANS: x"} for i in range(100)]
    with Server(refuse) as server:
        with pytest.raises(Fatal, match="--judge_schema off"):
            scoring.score("mmk12", rows, "judge", judge=make_judge(server, tmp_path))
    assert server.requests < 50
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.sqlite")) as cache:
        assert cache.execute("SELECT COUNT(*) FROM replies").fetchone() == (0,)


# ----------------------------------------------------------------------------------------- cache


def test_a_second_run_costs_no_call_and_gives_the_same(tmp_path, capsys):
    rows = [K12 | {"response": f"{i} ANS: {text}"} for i, text in enumerate(("two CUPS", "pots"))]
    rows.append(K12 | {"response": "HOPELESS"})
    with Server(answer) as server:
        priced = ("--judge_price_in", "1", "--judge_price_out", "2")
        _, first, report = command(tmp_path, server, rows, *priced)
        asked = server.requests
        assert report["judge"]["calls"] == asked
        told = report["judge"]
        tokens = told["prompt_tokens"] + 2 * told["completion_tokens"]
        assert told["cost_usd"] == pytest.approx(tokens / 1e6, abs=1e-6)
        assert told["cost_usd"] > 0
        assert f"{asked} calls, 0 from the cache" in capsys.readouterr().out
        _, second, report = command(tmp_path, server, rows, *priced)
        assert server.requests == asked
    assert first == second
    assert (report["judge"]["calls"], report["judge"]["cached"]) == (0, asked)
    assert report["judge"]["cost_usd"] == 0
    assert (tmp_path / "out.judge.sqlite").is_file()
    assert f"0 calls, {asked} from the cache" in capsys.readouterr().out


def test_the_cache_file_can_be_named_and_shared(tmp_path):
    rows = [K12 | {"response": "ANS: pots"}]
    cache = ("--judge_cache", str(tmp_path / "folder" / "all.sqlite"))
    with Server(answer) as server:
        command(tmp_path, server, rows, *cache)
        command(tmp_path, server, rows, *cache, benchmark="mathvision")
        assert server.requests == 2
    assert (tmp_path / "folder" / "all.sqlite").is_file()


def test_the_key_knows_model_prompt_and_parameters():
    request = Request([{"role": "user", "content": "x"}], 9, 0.0, 1)
    others = [
        Request([{"role": "user", "content": "y"}], 9, 0.0, 1),
        Request([{"role": "user", "content": "x"}], 8, 0.0, 1),
        Request([{"role": "user", "content": "x"}], 9, 0.5, 1),
        Request([{"role": "user", "content": "x"}], 9, 0.0, 2),
        Request([{"role": "user", "content": "x"}], 9, 0.0, 1, {"type": "object"}),
    ]
    keys = {request_key("m", other) for other in others} | {request_key("n", request)}
    assert len(keys) == 6
    assert request_key("m", request) not in keys
    assert request_key("m", Request([{"role": "user", "content": "x"}], 9, 0.0, 1)) == request_key(
        "m", request
    )


def test_equal_questions_at_the_same_time_are_asked_once(tmp_path):
    with Server(answer, delay=0.05) as server:
        rows = [K12 | {"response": "ANS: pots"}] * 20
        scored = scoring.score("mmk12", rows, "judge", judge=make_judge(server, tmp_path))
        assert server.requests == 2
    assert [row["correct"] for row in scored] == [False] * 20


def test_the_limit_of_requests_in_flight_holds(tmp_path):
    rows = [K12 | {"response": f"{i} ANS: pots"} for i in range(12)]
    with Server(answer, delay=0.02) as server:
        command(tmp_path, server, rows, "--concurrency", "3")
        assert server.max_pending == 3


def test_a_foreign_file_is_not_taken_for_a_cache(tmp_path):
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    (tmp_path / "text.sqlite").write_text("not a database at all, but long enough" * 20)
    for name in ("other.sqlite", "text.sqlite"):
        with pytest.raises(ValueError, match=name):
            JudgeCache(tmp_path / name)


def test_a_killed_run_resumes_where_it_stood(tmp_path):
    rows = [K12 | {"response": f"{i} ANS: {'pots' if i % 2 else 'two cups'}"} for i in range(40)]
    write_rows(tmp_path / "in.jsonl", rows)
    with Server(answer, delay=0.1) as server:
        argv = [sys.executable, "-m", "tools.score_benchmark", "--benchmark", "mmk12"]
        argv += ["--mode", "judge", "--judge_model", "judge-1", "--judge_url", server.base_url]
        argv += ["--predictions", str(tmp_path / "in.jsonl"), "--concurrency", "4"]
        argv += ["--output", str(tmp_path / "out.jsonl")]
        process = subprocess.Popen(argv, env=os.environ | {"OPENAI_API_KEY": KEY})
        deadline = time.monotonic() + 60
        while server.requests < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        answered = server.requests
        assert 20 <= answered < 60
        assert not (tmp_path / "out.jsonl").exists()
        server.delay = 0.0
        code, out, report = command(tmp_path, server, rows, "--concurrency", "4")
        assert server.requests <= 60 + 4  # at most what was in flight is asked twice
    assert code == 0
    assert report["judge"]["cached"] >= answered - 4
    assert [row["correct"] for row in out] == [i % 2 == 0 for i in range(40)]
    found = list(tmp_path.rglob("*"))
    assert any(path.suffix == ".sqlite" for path in found)
    assert not any(KEY.encode() in path.read_bytes() for path in found if path.is_file())


# --------------------------------------------------------------------------------------- command


def test_the_key_stands_in_no_file_and_no_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    rows = [K12 | {"response": "ANS: pots"}]
    with Server(answer, key=KEY) as server:
        code, _, report = command(tmp_path, server, rows, "--judge_key_env", "JUDGE_KEY")
        assert code == 0
        assert report["judge"]["calls"] == 2
        monkeypatch.setenv("JUDGE_KEY", KEY + "x")
        again = ("--judge_cache", str(tmp_path / "new.sqlite"), "--judge_key_env", "JUDGE_KEY")
        code, _, _ = command(tmp_path, server, rows, *again)
        assert code == 1
    shown = capsys.readouterr()
    assert "JUDGE_KEY" in shown.err
    assert shown.err.strip().count("\n") <= 2
    assert KEY not in shown.err + shown.out
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_judge_must_be_named(tmp_path, capsys):
    with Server(answer) as server:
        assert command(tmp_path, server, [K12 | {"response": "x"}], "--judge_model", "")[0] == 1
    assert "--judge_model" in capsys.readouterr().err


def test_options_of_the_request_can_be_left_out(tmp_path):
    plain = []

    def loose(body):
        plain.append(body)
        return '<think>hm</think>{"extraction": "two cups"}'

    options = ("--judge_schema", "off", "--judge_temperature", "-1", "--judge_max_tokens", "77")
    with Server(loose) as server:
        _, out, _ = command(tmp_path, server, [K12 | {"response": "x"}], *options)
    assert out[0]["correct"]
    assert "response_format" not in plain[0]
    assert "temperature" not in plain[0]
    assert plain[0]["max_tokens"] == 77


def test_reports_name_the_judge_and_its_prompts(tmp_path):
    with Server(answer) as server:
        _, _, report = command(tmp_path, server, [K12 | {"response": "ANS: pots"}])
    assert report["judge"]["model"] == "judge-1"
    assert set(report["judge"]["prompts_sha256"]) >= {"match.jinja", "mathverse_judge.jinja"}
    assert "# mmk12, judge" in (tmp_path / "report.md").read_text()


def test_no_judgement_reaches_the_caller_of_ask(tmp_path):
    async def one(ask, item):
        try:
            return await ask("match", item, ("judgement",), float)
        except NoJudgement as error:
            return str(error)

    item = {"question": "?", "options": [], "gold": "HOPELESS", "unit": "", "extraction": "1"}
    with Server(judge_world.answer) as server:
        assert "replies of no use" in make_judge(server, tmp_path).map(one, [item])[0]


def test_with_the_published_extractions_the_published_outcomes_come_out(tmp_path):
    rows = [row for row in parity_rows("mathvista") if row["recheck_same"] and row["extraction"]]
    rows = rows[:300]
    published = {row["id"]: row["extraction"] for row in rows}
    asked = [
        without(row, "extraction", "prediction", "correct") | {"query": f"problem <{row['id']}>"}
        for row in rows
    ]

    def copy(body):
        name = prompt(body).rsplit("problem <", 1)[1].split(">")[0]
        return json.dumps({"extraction": published[name]})

    with Server(copy) as server:
        scored = scoring.score("mathvista", asked, "judge", judge=make_judge(server, tmp_path))
        assert server.requests == 300
    assert [r["prediction"] for r in scored] == [r["prediction"] for r in rows]
    assert [r["correct"] for r in scored] == [r["correct"] for r in rows]
