"""The scoring tool: fields, totals worked by hand, real token spans, errors, exit codes."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from srpo_jax.data.processing import token_bytes
from srpo_jax.rewards.profiles import PAPER
from srpo_jax.rewards.template import TokenText, parse_response
from srpo_jax.structs import BLOCKS
from tools import score_responses
from tools.lib import cli

TAG_BYTES = len(
    "<think></think><answer></answer><reflection></reflection><think></think><answer></answer>"
)
FIELDS = (
    "first_answer", "final_answer", "first_correct", "final_correct", "format_ok", "r_format",
    "r_acc", "i_eff", "i_ref", "f_len", "total",
)  # fmt: skip


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> str:
    """A directory that holds only tokenizer.json: byte-level BPE without merges, a token a byte."""
    directory = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


def respond(answer1="2", answer2="2", think1="a", think2="b", reflection="r") -> str:
    return (
        f"<think>{think1}</think><answer>{answer1}</answer><reflection>{reflection}</reflection>"
        f"<think>{think2}</think><answer>{answer2}</answer>"
    )


def run(rows: list, tokenizer: str, tmp_path: Path, *arguments: str) -> list[dict]:
    source, target = tmp_path / "responses.jsonl", tmp_path / "scored.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    source.write_text("\n".join(lines) + "\n", "utf-8")
    args = score_responses.make_parser().parse_args(
        ["--input", str(source), "--output", str(target), "--tokenizer", tokenizer,
         "--workers", "1", *arguments]
    )  # fmt: skip
    score_responses.main(args)
    return [json.loads(line) for line in target.read_text("utf-8").splitlines()]


OUTCOMES = (("2", "2"), ("3", "2"), ("2", "3"), ("3", "4"))


@pytest.mark.parametrize(
    ("profile", "totals"),
    [("paper", [1.5, 1.25, 1.0, 0.75]), ("openrlhf", [1.25, 1.5, 0.75, 0.5]),
     ("grpo", [1.5, 1.5, 0.5, 0.5])],
)  # fmt: skip
def test_totals_of_the_four_outcomes(byte_tokenizer, tmp_path, profile, totals):
    rows = [
        {"id": i, "response": respond(*answers), "answer": "2"}
        for i, answers in enumerate(OUTCOMES)
    ]
    scored = run(rows, byte_tokenizer, tmp_path, "--profile", profile)
    assert [row["total"] for row in scored] == totals  # k = 2, L = 93: f_len is 0 to 6 places
    assert [row["id"] for row in scored] == [0, 1, 2, 3]
    assert [(r["first_correct"], r["final_correct"]) for r in scored] == [
        (True, True), (False, True), (True, False), (False, False),
    ]  # fmt: skip


def test_every_field_and_the_length_term(byte_tokenizer, tmp_path):
    # k = 199 + 1 bytes; the whole is 2k = 400: f_len is 1 and the total 1.6, the maximum.
    rest = 400 - TAG_BYTES - 200 - 1 - 1
    row = {"id": "q", "response": respond(think1="x" * 199, think2="y" * rest), "answer": 2}
    longer = row | {"response": respond(think1="x" * 199, think2="y" * (rest + 100))}  # 2.5 k
    best, long = run([row, longer], byte_tokenizer, tmp_path)
    assert {k: best[k] for k in row} == row
    assert tuple(best)[len(row) : len(row) + len(FIELDS)] == FIELDS
    assert [best[k] for k in FIELDS] == ["2", "2", True, True, True, 0.5, 0.5, 0.25, 0.25, 1.0, 1.6]
    assert best["block_tokens"] == dict(zip(BLOCKS, (199, 1, 1, rest, 1), strict=True))
    assert (best["first_tokens"], best["total_tokens"], best["reflection_ok"]) == (200, 400, True)
    assert long["f_len"] == pytest.approx(0.367879, abs=1e-6)
    assert long["total"] == pytest.approx(1.536788, abs=1e-6)
    assert run([row], byte_tokenizer, tmp_path, "--alpha", "0")[0]["total"] == 1.5


def test_missing_blocks_choices_and_unusable_answers(byte_tokenizer, tmp_path, capsys):
    rows = [
        {"id": 0, "response": "<think>a</think><answer>2</answer>", "answer": "2"},
        {"id": 1, "response": "I do not know", "answer": "2"},
        {"id": 2, "response": respond("red", "(B)"), "answer": "blue", "choices": ["red", "blue"]},
        {"id": 3, "response": respond("Paris", "A. 57"), "answer": "A", "choices": None},
        {"id": 4, "response": respond("", ""), "answer": ""},
        {"id": 5, "response": respond("2", "2"), "answer": "green", "choices": ["red", "blue"]},
    ]
    scored = run(rows, byte_tokenizer, tmp_path)
    assert [row["total"] for row in scored] == [0.5, 0.0, 1.25, 1.25, 0.25, 0.75]
    assert scored[0]["final_answer"] == "2" and scored[0]["i_eff"] == 0.0
    assert scored[1]["first_answer"] is None and scored[1]["final_answer"] is None
    assert [row.get("gold_problem") for row in scored[:4]] == [None] * 4
    assert scored[4]["gold_problem"] == "the answer is empty"
    assert "none of the 2 choices" in scored[5]["gold_problem"]
    assert "2 answers that cannot be graded" in capsys.readouterr().err


def test_the_end_token_is_no_part_of_the_response(byte_tokenizer, tmp_path):
    row = {"id": 0, "response": respond() + "<|im_end|>", "answer": "2"}
    (scored,) = run([row], byte_tokenizer, tmp_path)
    assert scored["format_ok"] and scored["total_tokens"] == len(respond())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "responses.jsonl:3: not valid JSON"),
        ({"id": 1, "answer": "2"}, "responses.jsonl:3: no 'response'"),
        ({"id": 1, "response": "x"}, "responses.jsonl:3: no 'answer'"),
        ({"id": 1, "response": ["x"], "answer": "2"}, "responses.jsonl:3: 'response' must be text"),
        ({"id": 1, "response": "x", "answer": None}, "responses.jsonl:3: 'answer' must be text"),
        (
            {"id": 1, "response": "x", "answer": "A", "choices": "AB"},
            ":3: 'choices' must be a list",
        ),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(byte_tokenizer, tmp_path, row, message):
    good = {"id": 0, "response": "x", "answer": "2"}
    with pytest.raises(ValueError, match=message):
        run([good, "", row], byte_tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["responses.jsonl"]


def test_the_command_line_reports_errors_on_one_line(byte_tokenizer, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"id": 0, "response": "x", "answer": "2"}), "utf-8")

    def exit_code(tokenizer: str, *arguments: str) -> int:
        argv = ["--input", str(source), "--output", str(target), "--tokenizer", tokenizer]
        with pytest.raises(SystemExit) as stop:
            cli.run(score_responses.main, score_responses.make_parser(), [*argv, *arguments])
        return stop.value.code

    assert exit_code(str(tmp_path)) == 1 and not target.exists()
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "no tokenizer.json" in said.err
    assert exit_code(byte_tokenizer, "--profile", "best") == 2  # argparse: usage
    assert exit_code(byte_tokenizer, "--workers", "0") == 1
    assert exit_code(byte_tokenizer, "--workers", "1") == 0 and target.exists()


def test_help_shows_an_example():
    text = " ".join(score_responses.make_parser().format_help().split())
    assert "example: python -m tools.score_responses --input" in text


def test_spans_with_the_real_tokenizer(shared_data, tmp_path):
    directory = str(shared_data / "tokenizer_qwen2_5_vl")
    tokenizer = score_responses.load_tokenizer(directory)
    text = (
        "<think>\nx = {1}</think><answer>$\\boxed{2}</answer>\n<reflection>对吗? é</reflection>"
        "<think>so</think>\n<answer>$2$</answer><|im_end|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([i]) for i in ids]
    # What the hand count below rests on: where the first two blocks' tokens begin and end.
    assert pieces[:18] == [
        "<th", "ink", ">\n", "x", " =", " {", "1", "}</", "think", "><", "answer", ">$", "\\",
        "boxed", "{", "2", "}</", "answer",
    ]  # fmt: skip
    table = token_bytes(tokenizer)
    end = score_responses.end_ids(tokenizer, directory)
    assert set(end) == {151643, 151645}
    completion = TokenText(table, end).completion(ids)
    assert completion.text == text.removesuffix("<|im_end|>").encode()
    parsed = parse_response(completion, PAPER.template)
    assert parsed.block_tokens[:2] == (5, 6)  # x = { 1 }</ and >$ \ boxed { 2 }</
    assert parsed.first_tokens == 11 and parsed.total_tokens == len(ids) - 1
    assert parsed.format_ok and parsed.reflection_ok
    for name in BLOCKS:  # each block's tokens hold its text, and one token less does not
        start, stop = completion.token_span(parsed.spans[name])
        content = completion.text[slice(*parsed.spans[name])]
        assert content in b"".join(table[i] for i in ids[start:stop])
        assert content not in b"".join(table[i] for i in ids[start + 1 : stop])
        assert content not in b"".join(table[i] for i in ids[start : stop - 1])

    (scored,) = run([{"id": 0, "response": text, "answer": "2"}], directory, tmp_path)
    assert scored["block_tokens"]["first_think"] == 5 and scored["total"] == pytest.approx(
        1.5, abs=0.1
    )
