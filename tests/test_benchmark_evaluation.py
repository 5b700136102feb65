"""Benchmarks answered by our own models: both answers under the official rule, resumable."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_helpers as helpers
from openai_server import Server

from srpo_jax import evaluate
from srpo_jax.benchmarks.both_answers import answer_row, score_rows
from srpo_jax.data.fields import Record
from srpo_jax.structs import BLOCKS, RunError
from tools import score_eval

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("12", "15", "7", "9")
EXTRA = {"level": 2, "subject": "counting", "split": "test", "question_type": "multi-choice"}


def record(answer: str = "B", choices: tuple[str, ...] = OPTIONS, **extra) -> Record:
    return Record("m-1", "How many?", answer, choices=choices, extra=EXTRA | extra, origin="f:1")


def sampled(first: str | None, final: str | None, response: str = "?", **more) -> dict:
    blocks = dict.fromkeys(BLOCKS) | {"first_answer": first, "second_answer": final}
    row = {"origin": "f:1", "response": response, "blocks": blocks, "sample": 0}
    return row | {"first_correct": False, "final_correct": False} | more


@pytest.mark.parametrize(
    ("answer", "letter"),
    [(r"$\boxed{B}$", "B"), ("(B)", "B"), ("B. 15", "B"), ("15", "B"), ("the answer is C", "C")],
)
def test_an_option_in_an_answer_block_is_handed_over_as_its_letter(answer, letter):
    assert answer_row(record(), sampled(answer, None), "first")["extraction"] == letter


def test_open_answers_are_handed_over_without_their_box():
    row = answer_row(record("15", ()), sampled(r"$3+12=\boxed{15}$", None), "first")
    assert row["extraction"] == "15"


def test_the_final_answer_is_the_second_or_else_the_only_one():
    both = sampled(r"\boxed{A}", r"\boxed{B}")
    assert answer_row(record(), both, "first")["extraction"] == "A"
    assert answer_row(record(), both, "final")["extraction"] == "B"
    assert answer_row(record(), sampled(r"\boxed{A}", None), "final")["extraction"] == "A"


def test_a_response_without_answer_blocks_goes_to_the_rule_as_it_is():
    row = answer_row(record(), sampled(None, None, r"so it is \boxed{B}"), "final")
    assert "extraction" not in row
    assert row["response"] == r"so it is \boxed{B}"


def test_both_answers_are_scored_by_the_official_rule_with_its_groups():
    rows = [
        sampled(r"\boxed{A}", r"\boxed{B}"),
        sampled(r"\boxed{B}", r"\boxed{D}", sample=1),
    ]
    scored, summaries = score_rows("mathvision", [record()], rows, "official_rule")
    assert [r["first_correct"] for r in scored] == [False, True]
    assert [r["final_correct"] for r in scored] == [True, False]
    assert summaries["first"]["correct"] == summaries["final"]["correct"] == 1
    assert summaries["final"]["tables"]["subject"]["counting"]["total"] == 2
    assert scored[0]["categories"]["level"] == ["level2"]


def test_a_problem_that_was_not_asked_is_wrong_whatever_a_rule_reads_in_an_empty_response():
    fields = {"question_type": "multi_choice", "answer_type": "text", "precision": None}
    fields |= dict.fromkeys(("query", "metadata"))
    problem = record("7", **fields)  # of the options the one nearest to nothing at all
    scored, summaries = score_rows(
        "mathvista", [problem], [sampled(None, None, "", reason="too long")], "official_rule"
    )
    assert scored[0]["first_correct"] is scored[0]["final_correct"] is False
    assert scored[0]["no_answer"] == "too long" and summaries["final"]["total"] == 1
    assert score_rows("mathvista", [problem], [sampled(None, None, "")], "official_rule")[0][0][
        "final_correct"
    ]
    unread = sampled(None, None, "", reason="not JSON") | {"origin": "f:2"}
    rows = [sampled(None, r"\boxed{7}"), unread]
    scored, summaries = score_rows("mathvista", [problem], rows, "official_rule")
    assert [row["origin"] for row in scored] == ["f:1", "f:2"]
    assert not scored[1]["final_correct"] and scored[1]["categories"] == {}
    assert scored[1]["no_answer"] == "not JSON"
    for summary in summaries.values():  # in the denominator, but nobody knows of which group
        assert summary["total"] == 2 and summary["unread_rows"] == 1
        assert {c["total"] for t in summary["tables"].values() for c in t.values()} <= {1}
        assert summary["accuracy"] == 50 * summary["correct"]


# --------------------------------------------------------------------------------- real sampling


def write_mathvision(folder: Path, count: int = 5) -> Path:
    """A file in MathVision's own form."""
    helpers.write_records(folder / "pictures.jsonl", count)
    rows = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    path = folder / "test.jsonl"
    with open(path, "w") as file:
        for i, row in enumerate(rows):
            fields = {"id": str(i), "question": "How many?\n<image1>", "image": row["images"][0]}
            fields |= {"options": [], "answer": row["answer"], "level": 1, "subject": "counting"}
            file.write(json.dumps(fields) + "\n")
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return helpers.world(folder) | {"benchmark": str(write_mathvision(folder))}


def config(paths: dict[str, str]):
    one = helpers.evaluation_config(paths)
    one.eval.file, one.eval.benchmark, one.eval.any_count = paths["benchmark"], "mathvision", True
    return one


def test_a_benchmark_in_its_published_form_is_answered_and_scored(paths, tmp_path):
    summary = evaluate.evaluate(config(paths), tmp_path)
    found = summary["benchmark"]
    assert found["name"] == "mathvision"
    assert found["mode"] == "official_rule"
    assert found["final"]["total"] == summary["records"] == 5
    assert found["final"]["complete"] is None
    assert found["final"]["tables"]["subject"]["counting"]["total"] == 5
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["id"] for row in scored] == ["0", "1", "2", "3", "4"]
    assert {"extraction", "prediction", "final_correct", "response"} <= set(scored[0])


def test_an_unknown_benchmark_mode_or_number_of_problems_is_one_line(paths, tmp_path):
    for key, value, message in (
        ("benchmark", "mathvison", "eval.benchmark=mathvison: choose one of"),
        ("scoring", "by_heart", "eval.scoring=by_heart: choose"),
        ("file", "", "eval.file is empty: where is mathvision"),
        ("stop_after", "second", "eval.stop_after=second: choose one of first"),
        ("benchmark", "mmk12", "mmk12 has no official rule.*eval.scoring=strict"),
    ):
        one = config(paths)
        one.eval[key] = value
        with pytest.raises(RunError, match=message):
            evaluate.evaluate(one, tmp_path / key)
    one = config(paths)
    one.eval.any_count = False
    with pytest.raises(ValueError, match="5 rows, but mathvision has 3040"):
        evaluate.evaluate(one, tmp_path / "count")


def test_an_evaluation_is_scored_anew_strictly_and_by_a_judge(paths, tmp_path, monkeypatch, capsys):
    before = evaluate.evaluate(config(paths), tmp_path)
    rows = (tmp_path / "samples.jsonl").read_text()
    common = ["--workdir", str(tmp_path), "--benchmark", "mathvision"]
    common += ["--file", paths["benchmark"], "--workers", "1"]
    assert run_tool(*common, "--mode", "strict") == 0
    strict = json.loads((tmp_path / "summary.json").read_text())
    assert strict["benchmark"]["mode"] == "strict"
    assert {k: v for k, v in strict.items() if k != "benchmark"} == {
        k: v for k, v in before.items() if k != "benchmark"
    }

    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    asked = []

    def answer(body):
        asked.append(body)
        schema = body["response_format"]["json_schema"]["schema"]
        wanted = {"extraction": "7", "judgement": 1}
        return json.dumps({key: wanted[key] for key in schema["properties"]})

    with Server(answer) as server:
        more = ["--mode", "judge", "--judge_model", "m", "--judge_url", server.base_url]
        assert run_tool(*common, *more) == 0
        first_run = len(asked)
        assert run_tool(*common, *more) == 0
    assert first_run == len(asked) > 0
    judged = json.loads((tmp_path / "summary.json").read_text())["benchmark"]
    assert judged["acc@1"] == judged["acc@2"] == 1.0
    assert judged["judge"]["calls"] == 0 and judged["judge"]["cached"] > 0
    assert (tmp_path / "samples.jsonl").read_text() == rows
    assert "mathvision, judge: first 100.00 %, final 100.00 % of 5" in capsys.readouterr().out


def test_rows_of_another_benchmark_are_not_scored(paths, tmp_path):
    evaluate.evaluate(config(paths), tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(paths["benchmark"]).read_text().splitlines()[0])
    arguments = ["--workdir", str(tmp_path), "--benchmark", "mathvision", "--file", str(other)]
    with pytest.raises(ValueError, match="not among the benchmark's; another file"):
        run_tool(*arguments)


def run_tool(*arguments: str) -> int:
    return score_eval.main(score_eval.make_parser().parse_args(list(arguments)))


# --------------------------------------------------------------------------------- slow: killed


@pytest.mark.slow
def test_mathvision_killed_twice_and_resumed_scores_as_undisturbed(
    tmp_path, shared_data, one_device_env
):
    hf_dir = tmp_path / "hf"
    sizes = "--hidden 32 --layers 2 --heads 2 --kv_heads 1 --mlp 64 --vision_hidden 32"
    more = "--vision_depth 2 --vision_heads 2 --vision_mlp 64 --full_blocks 1 --tied"
    tokenizer = str(shared_data / "tokenizer_qwen2_5_vl")
    make = ["--out", str(hf_dir), "--tokenizer", tokenizer, *sizes.split(), *more.split()]
    subprocess.run([sys.executable, "-m", "tools.make_hf", *make], cwd=ROOT, check=True)

    def command(workdir: Path) -> list[str]:
        settings = {
            "hf_dir": hf_dir, "eval.file": shared_data / "mathvision_1000/data.jsonl",
            "eval.benchmark": "mathvision", "eval.any_count": True, "eval.limit": 256,
            "max_pixels": 12544,
            "sampling.max_new_tokens": 8, "sampling.segment": 8, "data.patch_budgets": "(2048,)",
            "data.prompts_per_row": 16, "eval.batch_size": 32, "grading.workers": 1,
            "data.prompt_tokens": 768, "compilation_cache_dir": tmp_path / "compiled",
        }  # fmt: skip
        return [
            *(sys.executable, "-m", "srpo_jax.evaluate", "--config=configs/eval.py:size=tiny"),
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in settings.items()),
        ]

    run = dict(cwd=ROOT, env=one_device_env | {"PYTHONUNBUFFERED": "1"})
    log = open(tmp_path / "log", "w")
    run |= dict(stdout=log, stderr=log)
    subprocess.run(command(tmp_path / "calm"), check=True, **run)
    for kills in (1, 2):
        process = subprocess.Popen(command(tmp_path / "killed"), **run)
        partial, before = tmp_path / "killed/samples.jsonl.partial", 0
        while before < 1 + 2 * kills:  # two of eight batches further each time
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
            before = len(partial.read_text().splitlines()) if partial.exists() else 0
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "killed"), check=True, **run)
    summaries = [
        json.loads((tmp_path / d / "summary.json").read_text()) for d in ("calm", "killed")
    ]
    assert summaries[0] == summaries[1]
    assert summaries[0]["records"] == 256
    scored = [(tmp_path / d / "scored.jsonl").read_text() for d in ("calm", "killed")]
    rows = [[json.loads(line) | {"seconds": 0} for line in text.splitlines()] for text in scored]
    assert rows[0] == rows[1]
