"""Records of others become ours: each form, what is left out, and rows of another form."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srpo_jax.data.records import open_records
from srpo_jax.rewards.answers import gold_problem
from tools import convert_records
from tools.lib import cli

IMAGE = {"bytes": b"\x89PNG...", "path": None}


def converted(tmp_path: Path, form: str, rows: list[dict], *words: str, suffix: str = ".json"):
    """The records that rows of a form become."""
    given, out = tmp_path / f"given{suffix}", tmp_path / "out.parquet"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), given)
    else:
        given.write_text(json.dumps(rows))
    argv = ["--form", form, "--input", str(given), "--out", str(out), *words]
    convert_records.main(convert_records.make_parser().parse_args(argv))
    source = open_records(str(out))
    return [source[i] for i in range(len(source))]


def test_a_parquet_file_of_verl(tmp_path):
    chat = [{"role": "user", "content": "<image>Find x. Think step by step."}]
    row = {"prompt": chat, "reward_model": {"style": "rule", "ground_truth": "12"}}
    row |= {"images": [IMAGE], "data_source": "geo3k"}
    (found,) = converted(
        tmp_path, "verl", [row], "--remove", "Think step by step.", suffix=".parquet"
    )
    assert (found.question, found.answer, len(found.images)) == ("<image>Find x.", "12", 1)


def test_chats_with_text_or_parts(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    rows = [
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1?"}],
            "solution": "<think>two</think><answer>2</answer>",
        },
        {"prompt": [{"role": "user", "content": parts}], "answer": 7, "image": "a.png"},
    ]
    (tmp_path / "a.png").touch()
    first, second = converted(tmp_path, "chat", rows)
    assert (first.question, first.answer, len(first.images)) == ("1 + 1?", "2", 0)
    assert (second.question, second.answer, len(second.images)) == ("<image>How many?", "7", 1)


def test_conversations_of_llava_and_what_has_no_answer(tmp_path, capsys):
    def row(value: str) -> dict:
        human = {"from": "human", "value": "<image>\nWhich one?"}
        return {
            "id": 3,
            "image": "a.png",
            "conversations": [human, {"from": "gpt", "value": value}],
        }

    said = ["The answer is B", "<SUMMARY>a</SUMMARY>\n<CONCLUSION> 5 </CONCLUSION>", "B\nor C"]
    said.append(r"Half of it.\nSo \boxed{\frac{1}{2}}")
    found = converted(tmp_path, "llava", [row(value) for value in said])
    assert [one.answer for one in found] == ["B", "5", r"\frac{1}{2}"]
    told = capsys.readouterr().out
    assert "3 records" in told and "1 left out: no answer" in told
    assert f"--config.data.root={tmp_path}" in told


def test_a_row_of_scienceqa_has_its_choices(tmp_path):
    row = {"question": "Which?", "hint": "Look.", "choices": ["west", "east"], "answer": 1}
    (found,) = converted(tmp_path, "scienceqa", [row | {"image": IMAGE}], suffix=".parquet")
    assert (found.question, found.answer, found.choices) == (
        "Look.\nWhich?",
        "east",
        ("west", "east"),
    )
    assert gold_problem(found) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "?"}], "given.json:1: is not of the form verl (KeyError: 'reward_model')"),
        ({"a": 1}, "given.json: must hold a list of rows"),
    ],
)
def test_what_is_of_another_form_is_one_line(tmp_path, capsys, rows, message):
    given = tmp_path / "given.json"
    given.write_text(json.dumps(rows))
    argv = ["--form", "verl", "--input", str(given), "--out", str(tmp_path / "out.parquet")]
    with pytest.raises(SystemExit):
        cli.run(convert_records.main, convert_records.make_parser(), argv)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.parquet").exists()
