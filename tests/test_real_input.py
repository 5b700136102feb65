"""The run on real input, in its short form: real vocabulary, real diagrams, SIGTERM and resume."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import real_input

ROOT = Path(__file__).resolve().parent.parent


def test_english_problems_are_split_and_carry_the_gold_in_the_template(tmp_path, shared_data):
    data = shared_data / "geometry3k_formalgeo_1500"
    train, held = real_input.write_records(data, tmp_path)
    assert (train, held) == (1200 - real_input.HELD_OUT, real_input.HELD_OUT)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert not {row["id"] for row in rows} & {row["id"] for row in kept}
    assert all(row["first_answer"] == row["second_answer"] == row["answer"] for row in rows)
    assert (data / rows[0]["images"][0]).is_file()


def test_too_few_records_are_refused(tmp_path):
    row = {"id": "1", "question": "q", "lang": "en", "answer": "1", "image": "a.png"}
    row |= {"choices": [], "source": "s"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="too few"):
        real_input.write_records(tmp_path, tmp_path)


def test_a_failed_check_ends_the_run(capsys):
    check = real_input.Checks()
    check("one holds", True, 3)
    assert "ok: one holds (3)" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="two holds: 4"):
        check("two holds", False, 4)


@pytest.mark.slow
def test_the_short_run_passes_all_its_checks(tmp_path, shared_data, one_device_env):
    done = subprocess.run(
        [sys.executable, "-m", "tools.real_input", "--short", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env=one_device_env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "greedy output equals ours" in done.stdout or "torch is not installed" in done.stdout
