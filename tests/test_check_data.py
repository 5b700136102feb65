"""Data looked at before a run: what is told, and what makes the exit code 1."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import train_helpers as helpers
from data_helpers import write_jsonl
from PIL import Image

from tools import check_data
from tools.lib import recipes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """A function that runs the tool on the small world -> (exit code, lines printed)."""
    hf_dir = helpers.make_hf_dir(tmp_path)

    def run(*words: str, config: str = "grpo") -> tuple[int, str]:
        small = {"hf_dir": hf_dir, "max_pixels": 3136, "data.patch_budgets": "(64,)"}
        small |= {"data.prompt_tokens": 64}
        small |= {} if config == "eval" else {"data.global_batch_size": 4}
        given = {word.removeprefix("--config.").partition("=")[0] for word in words}
        command = ["check_data", f"--config={ROOT}/configs/{config}.py:size=tiny"]
        command += [f"--config.{key}={small[key]}" for key in small.keys() - given]
        monkeypatch.setattr(sys, "argv", [*command, *words])
        with pytest.raises(SystemExit) as ended:
            recipes.run(check_data.main, check_data.make_parser())
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    return run


def test_good_data_pass_and_their_lengths_answers_and_pictures_are_told(run, tmp_path):
    train = helpers.write_records(tmp_path / "train.jsonl", 12)
    held_out = helpers.write_records(tmp_path / "held_out.jsonl", 6, seed=1)
    code, told = run(f"--config.data.train={train}", f"--config.eval.file={held_out}")
    assert code == 0 and "PROBLEM" not in told
    assert f"data.train={train}: 12 records, 0 cannot be used" in told
    assert f"eval.file={held_out}: 6 records, 0 cannot be used" in told
    assert "most 2" in told and "; data.prompt_tokens=64" in told
    assert "most 64; the largest of data.patch_budgets is 64" in told
    assert "with images: 12, without: 0" in told and "answers: math 12" in told
    assert "14 for the template, up to 4 for an image, 46 left for the question" in told
    assert "in both files: 0 problems, 0 more with the same picture" in told


def test_everything_that_would_stop_or_shrink_the_run_or_spoil_its_evaluation_is_listed(
    run, tmp_path
):
    train = helpers.write_records(tmp_path / "train.jsonl", 12)
    held_out = helpers.write_records(tmp_path / "held_out.jsonl", 4, seed=1)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    other = json.loads(held_out.read_text().splitlines()[2])
    rows[1] |= {"problem": "How many dots? " * 40}
    rows[2] |= {"images": ["nowhere.png"]}
    rows[3] |= {"answer": "n/a"}
    rows[5] |= {"id": rows[4]["id"], "answer": "B", "choices": ["3", "4"]}
    rows[6] = rows[7] | {"id": "other"}
    rows[8] = other | {"id": "leaked"}
    rows[9] = other | {"id": "picture", "problem": "What else is there?"}
    write_jsonl(train, rows)
    bad = tmp_path / "bad.jsonl"
    words = f"--config.data.train={train}", f"--config.eval.file={held_out}", f"--bad={bad}"
    code, told = run(*words, "--config.data.max_bad_share=0.5")
    assert code == 1
    for line in (
        f"{train}:2: ",
        "tokens exceed data.prompt_tokens=64; raise it, or lower max_pixels",
        f"{train}:3: image 'nowhere.png' cannot be read",
        f"{train}:4: the answer 'n/a' stands for a missing one",
        "ids that occur twice: 1\n    'train-4': 2 times",
        f"copies: 1\n    {train}:8 is {train}:7 again",
        "math 8, choice 1",
        f"in both files: 1 problems, 1 more with the same picture\n    {train}:9 and {held_out}:3",
        f"    {train}:10 and {held_out}:3",
        "PROBLEM data.train: 3 of 12 records are bad and would be left out",
        "PROBLEM 1 problems of eval.file are trained on",
    ):
        assert line in told, line
    assert [json.loads(row)["origin"] for row in bad.read_text().splitlines()] == [
        f"{train}:{row}" for row in (2, 3, 4)
    ]
    assert "the run would stop" in run(*words, "--config.data.max_bad_share=0")[1]
    few = "PROBLEM data.train: 9 records for data.global_batch_size=16"
    assert few in run(*words, "--config.data.global_batch_size=16")[1].splitlines()


def test_reflection_data_and_evaluation_files_are_looked_at_as_their_programs_read_them(
    run, tmp_path
):
    train = helpers.write_records(tmp_path / "train.jsonl", 5)
    code, told = run(f"--config.data.train={train}", config="sft")
    assert code == 0 and "; data.tokens=4096" in told
    assert "left for the question and response" in told
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    del rows[0]["reflection"]
    write_jsonl(train, rows)
    code, told = run("--records", str(train), config="sft")
    assert code == 1 and "no text in the fields ['reflection']" in told
    code, told = run("--records", str(train), config="eval")
    assert code == 0 and f"eval.file={train}: 5 records, 0 cannot be used" in told


def test_a_wrong_command_is_one_line(run):
    assert run() == (
        1,
        "error: data.train is empty: pass --config.data.train=FILE (.jsonl, .parquet, ...)\n",
    )
    code, told = run("--config.data.tarin=x")
    assert code == 1 and told.count("\n") == 1 and "did you mean --config.data.train?" in told


def test_the_same_picture_in_another_size_is_found(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels)
    for name, side in (("a", 112), ("b", 224)):
        image.resize((side, side), Image.Resampling.NEAREST).save(tmp_path / f"{name}.png")
    files = []
    for name, question in (("a", "How many dots?"), ("b", "how many  dots ?")):
        row = {"problem": question, "answer": "4", "images": [f"{name}.png"]}
        files.append(write_jsonl(tmp_path / f"{name}.jsonl", [row]))
    code, told = run(
        f"--config.data.train={files[0]}", f"--config.eval.file={files[1]}",
        "--config.data.global_batch_size=1", "--config.grpo.updates_per_rollout=1",
    )  # fmt: skip
    assert code == 1 and f"{files[0]}:1 and {files[1]}:1" in told
