"""The command that scores predictions: modes, output, report, errors, time."""

import json
import subprocess
import sys
import time

import pytest

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.rewards.verifier import Verifier
from tests.benchmark_helpers import parity_rows, without, write_rows
from tests.tool_helpers import read_jsonl
from tools import score_benchmark
from tools.lib import cli

VISION = {"id": "1", "choices": [], "answer": "60", "level": 2, "subject": "algebra"}
PRO = {
    "id": "test_Music_1", "subject": "Music", "answer": "B",
    "choices": ["apple pie", "banana split", "cherry tart", "date cake"],
}  # fmt: skip


def run(tmp_path, benchmark, rows, *extra):
    """Exit code, output rows and report of the command."""
    write_rows(tmp_path / "in.jsonl", rows)
    argv = ["--benchmark", benchmark, "--predictions", str(tmp_path / "in.jsonl")]
    argv += ["--output", str(tmp_path / "out.jsonl"), "--report", str(tmp_path / "report.json")]
    with pytest.raises(SystemExit) as caught:
        cli.run(score_benchmark.main, score_benchmark.make_parser(), [*argv, *extra])
    if caught.value.code:
        return caught.value.code, None, None
    report = json.loads((tmp_path / "report.json").read_text())
    return 0, read_jsonl(tmp_path / "out.jsonl"), report


def test_rows_keep_their_fields_and_gain_the_outcome(tmp_path):
    rows = [VISION | {"response": r"\boxed{60.0}"}, VISION | {"response": r"\boxed{61}", "x": 1}]
    code, out, report = run(tmp_path, "mathvision", rows)
    assert code == 0
    assert out[0] == rows[0] | {
        "extraction": "60.0", "prediction": "60.0", "correct": True, "mode": "official_rule"
    }  # fmt: skip
    assert out[1]["x"] == 1
    assert out[1]["correct"] is False
    assert (report["correct"], report["total"], report["accuracy"]) == (1, 2, 50.0)
    assert report["tables"]["level"] == {"level2": {"correct": 1, "total": 2, "accuracy": 50.0}}


def test_a_given_extraction_is_used_unless_it_is_to_be_made_anew(tmp_path):
    rows = [VISION | {"response": r"\boxed{61}", "extraction": "60"}]
    assert run(tmp_path, "mathvision", rows)[1][0]["correct"]
    anew = run(tmp_path, "mathvision", rows, "--re_extract")[1][0]
    assert anew["extraction"] == "61"
    assert not anew["correct"]


def test_rows_without_an_answer_are_counted_apart(tmp_path, capsys):
    rows = [PRO | {"response": "Answer: B"}, PRO | {"response": "I refuse."}]
    _, out, report = run(tmp_path, "mmmu_pro", rows)
    assert out[1]["prediction"] is None
    assert "without a seed" in out[1]["no_answer"]
    assert report["no_answer_rows"] == 1
    assert report["accuracy"] == 50.0
    assert report["expected_if_drawn"] == 62.5
    assert "1 rows without an answer" in capsys.readouterr().err


def test_seeded_draws_are_marked(tmp_path):
    rows = [PRO | {"response": "I refuse.", "question_type": "multiple-choice"}]
    _, out, report = run(tmp_path, "mmmu", rows)
    assert out[0]["drawn"] is True
    assert report["drawn_rows"] == 1


def test_the_report_is_also_a_page_of_tables(tmp_path):
    run(tmp_path, "mmmu_pro", [PRO | {"response": "Answer: B"}])
    page = (tmp_path / "report.md").read_text()
    assert "# mmmu_pro, official_rule" in page
    assert "| Art and Design | 1 | 1 | 100.00 |" in page
    assert "not the full benchmark" in page


def test_wemath_reports_its_four_dimensions(tmp_path):
    rows = [
        {"ID": "7", "key": f"2steps_{part}", "answer": "A", "response": "Answer: A"}
        for part in ("1", "2", "multi")
    ]
    _, _, report = run(tmp_path, "wemath", rows)
    assert report["four_dimensions"]["strict"]["score"] == 100.0
    assert "CompleteMastery" in (tmp_path / "report.md").read_text()


def test_tables_are_in_the_official_order(tmp_path):
    rows = [
        PRO | {"id": f"test_{subject}_1", "subject": subject, "response": "Answer: B"}
        for subject in ("Agriculture", "Music", "Art", "Accounting")
    ]
    tables = run(tmp_path, "mmmu_pro", rows)[2]["tables"]
    assert list(tables["subject"]) == ["Art", "Music", "Accounting", "Agriculture"]
    assert list(tables["domain"]) == ["Art and Design", "Business", "Tech and Engineering"]


STRICT = [
    ("B", "Answer: B", True),
    ("B", r"... so \boxed{\text{(B)}}", True),
    ("B", "<think>A?</think><answer>A</answer><think>no</think><answer>B</answer>", True),
    ("B", "<answer>B</answer> or rather <answer>A</answer>", False),
    ("B", "The answer is **banana split**.", True),
    ("B", "**Answer:** B", True),
    ("B", "**Answer: B**", True),
    ("B", "The answer is A or B", False),
    ("B", "", False),
    ("B", "I cannot help with that.", False),
    ("B", "答案是 \\boxed{Ｂ}", True),  # full-width letter
    ("B", r"\boxed{A} \boxed{B}", True),
    ("B", r"\boxed{9^{9^{9^9}}}", False),
]


def test_strict_reads_the_final_answer_and_its_option(tmp_path):
    rows = [PRO | {"answer": gold, "response": response} for gold, response, _ in STRICT]
    _, out, report = run(tmp_path, "mmmu_pro", rows, "--mode", "strict")
    assert [row["correct"] for row in out] == [right for _, _, right in STRICT]
    assert {row["mode"] for row in out} == {"strict"}
    assert report["no_answer_rows"] == 1
    assert "expected_if_drawn" not in report


def test_strict_works_on_every_benchmark_and_compares_expressions():
    row = {"answer": r"2\sqrt{3}", "final_answer": [r"2\sqrt{3}"], "choices": []}
    rows = [row | {"response": r"\boxed{\sqrt{12}}"}, row | {"response": r"\boxed{\sqrt{13}}"}]
    with Verifier(1, 20) as pool:
        for name in BENCHMARKS:
            scored = scoring.score(name, rows, "strict", pool)
            assert [r["correct"] for r in scored] == [True, False], name


def test_strict_names_golds_that_cannot_be_graded(tmp_path):
    rows = [VISION | {"answer": "", "response": r"\boxed{60}"}]
    _, out, report = run(tmp_path, "mathvision", rows, "--mode", "strict")
    assert out[0]["gold_problem"] == "the answer is empty"
    assert report["gold_problem_rows"] == 1


@pytest.mark.parametrize(
    ("benchmark", "rows", "message"),
    [
        ("mathvision", [VISION], "in.jsonl:1: no 'response'"),
        ("mathvision", [VISION | {"response": "1"}, {"response": "1"}], "in.jsonl:2: no 'answer'"),
        ("mathvista", [{"answer": "1", "response": "1"}], "in.jsonl:1: no 'question_type'"),
        ("mmmu_pro", [{"answer": "A", "response": "A"}], "in.jsonl:1: no 'choices'"),
        ("mmk12", [VISION | {"response": "1"}], "--mode strict"),
        ("mathvision", [], "in.jsonl: no rows"),
    ],
)
def test_errors_are_one_line_and_name_the_row(tmp_path, capsys, benchmark, rows, message):
    assert run(tmp_path, benchmark, rows)[0] == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_runs_and_explains_itself():
    out = subprocess.run(
        [sys.executable, "-m", "tools.score_benchmark", "--help"], capture_output=True, text=True
    )
    assert out.returncode == 0
    assert "python -m tools.score_benchmark --benchmark" in out.stdout


@pytest.mark.parametrize("benchmark", ["mathvision", "mathvista", "mmmu_pro"])
def test_published_outcomes_come_out_of_the_command(tmp_path, benchmark):
    rows = parity_rows(benchmark)
    given = rows if benchmark == "mathvista" else [without(row, "extraction") for row in rows]
    bare = [without(row, "correct", "prediction") for row in given]
    _, out, _ = run(tmp_path, benchmark, bare)
    keys = ["extraction", "correct"] + (["prediction"] if benchmark == "mathvista" else [])
    differing = [a["id"] for a, b in zip(rows, out, strict=True) if any(a[k] != b[k] for k in keys)]
    assert differing == [row["id"] for row in rows if not row["recheck_same"]]


def test_a_thousand_items_take_seconds_in_either_mode():
    rows = parity_rows("mathvision")[:1000]
    for mode in scoring.MODES:
        start = time.process_time()
        with Verifier(2, 5) as pool:
            scoring.score("mathvision", [without(row, "extraction") for row in rows], mode, pool)
        assert time.process_time() - start < 60  # 20 s on two idle cores, with room for others


def test_pathological_answers_cost_one_worker_its_time_limit():
    hard = [
        r"\boxed{9^{9^{9^9}}}", r"\boxed{" + "x" * 10**6 + "}", r"\boxed{" * 10**5,
        r"\boxed{\frac{1}{2}", "<answer>" * 10**5, "the answer is " * 10**5, "}" * 10**6,
    ]  # fmt: skip
    rows = [VISION | {"answer": r"\sqrt{2}", "response": text} for text in hard]
    rows.append(VISION | {"answer": r"\sqrt{2}", "response": r"\boxed{\frac{2}{\sqrt{2}}}"})
    for mode in scoring.MODES:
        with Verifier(2, 3) as pool:
            pool.verify_math([("$1$", "$2-1$")])  # up and running
            start = time.process_time()
            scored = scoring.score("mathvision", rows, mode, pool)
            assert time.process_time() - start < 30
            assert [row["correct"] for row in scored] == [False] * len(hard) + [True]
            assert pool.timeouts <= 1
