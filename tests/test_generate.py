"""tools.generate through files: its rows, resuming, what a sample depends on, error lines."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from srpo_jax.data.prompts import plain_messages
from srpo_jax.model.sharding import make_mesh
from tests.data_helpers import noise_image
from tests.tool_helpers import read_jsonl, write_hf
from tools import generate
from tools.lib import cli, loading

# Two images each: one shape of batch, and so few programs.
RECORDS = [
    {"id": "a", "problem": "What is the sum of the dots?", "images": ["one.png", "two.png"]},
    {"id": "b", "question": "the sum <image> and <image>?", "images": ["two.png", "one.png"]},
    {"id": 3, "problem": "Think", "choices": ["1", "2"], "images": ["one.png", "one.png"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An HF directory, records, and their images."""
    folder = tmp_path_factory.mktemp("generate")
    write_hf(folder, std=0.05)
    noise_image(60, 40).save(folder / "one.png")
    noise_image(30, 90, seed=1).save(folder / "two.png")
    write(folder / "prompts.jsonl", RECORDS)
    return folder


def use_devices(patch: pytest.MonkeyPatch, data: int) -> None:
    """Run the tool on that many devices, and compile a sampler of equal settings once."""
    patch.setattr(loading, "make_mesh", lambda **_: make_mesh(data, devices=jax.devices()[:data]))
    patch.setattr(generate, "make_sampler", lambda model, args: SAMPLERS(model, args, data))


class Samplers(dict):
    """Samplers by settings, since a sampler owns its compiled programs."""

    def __call__(self, model, args, data: int):
        key = (args.n, args.temperature, args.top_p, data)
        if key not in self:
            self[key] = make_sampler(model, args)
        return self[key]


SAMPLERS, make_sampler = Samplers(), generate.make_sampler


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, output: Path, *arguments, source: str = "prompts.jsonl") -> list[dict]:
    files = ["--hf_dir", folder / "hf", "--input", folder / source, "--output", output]
    arguments = [*files, "--plain", "--max_new_tokens", 12, *arguments]
    generate.main(generate.make_parser().parse_args([str(a) for a in arguments]))
    return read_jsonl(output)


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    """Four samples of each prompt, all prompts in one batch."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        return run(folder, folder / "out.jsonl", "--n", 4, "--batch_size", 3)


def test_every_sample_has_its_line_in_the_order_of_the_input(folder, rows):
    assert [(row["id"], row["sample"]) for row in rows] == [
        (record["id"], sample) for record in RECORDS for sample in range(4)
    ]
    processor = loading.Processor(folder / "hf")
    for row in rows:
        assert list(row) == ["id", "sample", "completion", "token_ids", "logprobs", "finished"]
        assert len(row["token_ids"]) == len(row["logprobs"]) <= 12
        ended = row["token_ids"][-1] in processor.eos_ids
        assert row["finished"] == ended and (ended or len(row["token_ids"]) == 12)
        said = row["token_ids"][: -1 if ended else None]
        assert row["completion"] == processor.tokenizer.decode(said)
        assert not set(row["token_ids"]) & set(processor.forbidden_ids)
        assert max(row["token_ids"]) < processor.vocab_size  # the model's vocabulary is larger
        assert max(row["logprobs"]) < 0
    assert len({row["completion"] for row in rows}) == len(rows)
    assert not list(folder.glob("*.partial"))


def test_a_stopped_run_is_continued_and_its_samples_are_those_of_an_unbroken_one(
    folder, rows, monkeypatch
):
    output = folder / "resumed.jsonl"
    sampled, sample = [], generate.sample

    def stop_at_second(model, sampler, samples, ids, args):
        if sampled == ["a"]:
            raise KeyboardInterrupt
        sampled.extend(ids)
        return sample(model, sampler, samples, ids, args)

    monkeypatch.setattr(generate, "sample", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(folder, output, "--n", 4, "--batch_size", 1)
    assert not output.exists()
    with open(str(output) + ".partial", "a") as file:
        file.write('{"id": "b", "rows": [{"id": "b", "sam')  # what a kill may leave
    with pytest.raises(ValueError, match=r"other settings \(temperature\)"):
        run(folder, output, "--n", 4, "--temperature", 0.5)
    sampled.append("go on")
    resumed = run(folder, output, "--n", 4, "--batch_size", 1)
    assert sampled == ["a", "go on", "b", "3"]
    assert_equal(resumed, rows)
    assert not list(folder.glob("resumed.jsonl.partial"))


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    """The same lines; log-probs but for rounding."""
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["logprobs"], two["logprobs"], atol=1e-5)
        assert one | {"logprobs": 0} == two | {"logprobs": 0}


def test_samples_depend_on_the_id_but_not_on_devices_order_or_neighbours(folder, rows, monkeypatch):
    use_devices(monkeypatch, 2)
    text_only = {"id": "text", "problem": "Think"}
    write(folder / "changed.jsonl", [RECORDS[2], text_only, RECORDS[0] | {"id": "z"}, RECORDS[1]])
    out = run(folder, folder / "c.jsonl", "--n", 4, "--batch_size", 4, source="changed.jsonl")
    found = {(row["id"], row["sample"]): row["token_ids"] for row in out}
    assert len(found) == 16
    for row in rows:
        if row["id"] == "a":
            assert row["token_ids"] != found["z", row["sample"]]
        else:
            assert row["token_ids"] == found[row["id"], row["sample"]]


def test_a_conversation_and_the_record_it_comes_from_give_the_same_samples(folder, rows):
    names = iter(RECORDS[0]["images"])
    system, user = plain_messages(RECORDS[0]["problem"], 2)
    parts = [
        part | {"image": next(names)} if part["type"] == "image" else part
        for part in user["content"]
    ]
    write(folder / "talk.jsonl", [{"id": "a", "messages": [system, {**user, "content": parts}]}])
    assert_equal(
        run(folder, folder / "t.jsonl", "--n", 4, "--batch_size", 1, source="talk.jsonl"), rows[:4]
    )


def fail(capsys, *arguments) -> str:
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        cli.run(generate.main, generate.make_parser(), [str(a) for a in arguments])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_errors_are_one_line_that_names_file_and_row(folder, capsys):
    bad = folder / "bad.jsonl"
    base = ["--hf_dir", folder / "hf", "--output", folder / "x.jsonl", "--input", bad]
    bad.write_text('{"id": 1, "problem": "a"}\n\n{"id": 1, "problem": "b"}\n')
    assert "bad.jsonl:3: the id '1' is that of" in fail(capsys, *base)
    bad.write_text('{"id": 1}\nnot json\n')
    assert "bad.jsonl:2: not valid JSON" in fail(capsys, *base)
    write(bad, [RECORDS[2], {"id": 2, "problem": "see", "images": ["missing.png"]}])
    line = fail(capsys, *base)
    assert "bad.jsonl:2" in line and "missing.png" in line
    assert "no/such" in fail(capsys, *base[:-1], folder / "no/such.jsonl")
    assert "top_p: must be in (0, 1]" in fail(capsys, *base, "--top_p", 0)
    assert not (folder / "x.jsonl").exists() and not (folder / "x.jsonl.partial").exists()


def test_debug_shows_the_traceback_and_wrong_arguments_exit_with_2(folder, capsys):
    base = ["--hf_dir", "none", "--output", "x", "--input", folder / "none.jsonl"]
    with pytest.raises(FileNotFoundError):
        cli.run(generate.main, generate.make_parser(), [str(a) for a in [*base, "--debug"]])
    with pytest.raises(SystemExit) as stop:
        cli.run(generate.main, generate.make_parser(), [str(a) for a in [*base, "--n", 0]])
    assert stop.value.code == 2 and "--n: must be at least 1" in capsys.readouterr().err


def test_help_ends_with_an_example(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate"])
    with pytest.raises(SystemExit) as stop:
        generate.make_parser().parse_args(["--help"])
    assert stop.value.code == 0
    assert "example:\n  python -m tools.generate --hf_dir" in capsys.readouterr().out
