"""The paired test of two evaluation folders: which verdicts it compares, what it prints, errors."""

import json

import pytest

from srpo_jax.data.files import write_jsonl
from tools import compare_evals
from tools.lib import cli, eval_folders


def rows(first, final, **same):
    return [
        {"id": f"p{i}", "origin": f"f:{i}", "sample": 0, "gold": "1", "first_correct": bool(a),
         "final_correct": bool(b)} | same
        for i, (a, b) in enumerate(zip(first, final, strict=True))
    ]  # fmt: skip


def folder(path, samples, scored=None):
    write_jsonl(path / "samples.jsonl", samples)
    if scored is not None:
        write_jsonl(path / "scored.jsonl", scored)
    return str(path)


def compare(base, new, *extra):
    """Exit code of the command."""
    argv = ["--base", base, "--new", new, *extra]
    with pytest.raises(SystemExit) as caught:
        cli.run(compare_evals.main, compare_evals.make_parser(), argv)
    return caught.value.code


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", rows([1] * 8, [0] * 6 + [1, 1]))


def test_the_table_holds_accuracies_difference_and_p(tmp_path, base, capsys):
    new = folder(tmp_path / "new", rows([0] * 8, [1] * 7 + [0]))
    assert compare(base, new) == 0
    line = capsys.readouterr().out.splitlines()[2]
    # Six better and one worse of eight: p = 2 (1 + 7) / 2^7 = 0.125.
    assert line.startswith("| final_correct | 8 | 25.0 | 87.5 | +62.5 (")
    assert line.endswith("| 6 | 1 | 0.1250 | McNemar, exact |")


def test_keys_choose_the_verdict(tmp_path, base, capsys):
    new = folder(tmp_path / "new", rows([0] * 8, [1] * 8))
    assert compare(base, new, "--key", "first_correct", "--key", "final_correct") == 0
    first, final = capsys.readouterr().out.splitlines()[2:]
    assert "| first_correct | 8 | 100.0 | 0.0 | -100.0 (-100.0 to -100.0) |" in first
    assert "| final_correct | 8 | 25.0 | 100.0 |" in final


def test_official_verdicts_come_from_the_scored_rows(tmp_path, capsys):
    plain = rows([0, 0, 0, 0], [0, 0, 0, 0])
    scored = [
        {"origin": row["origin"], "sample": 0, "mode": "official_rule", "correct": i < 3}
        for i, row in enumerate(plain)
    ]
    base = folder(tmp_path / "base", plain, rows([0] * 4, [0] * 4, mode="official_rule"))
    new = folder(tmp_path / "new", plain, scored[::-1])
    assert compare(base, new, "--key", "official", "--output", str(tmp_path / "o.json")) == 0
    assert "| official | 4 | 0.0 | 75.0 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())
    assert [r["key"] for r in found] == ["official"]
    assert (found[0]["better"], found[0]["p"]) == (3, 0.25)


def test_official_first_is_the_first_answers_verdict_under_the_rule(tmp_path, capsys):
    plain = rows([1, 1], [1, 1])
    base = folder(tmp_path / "base", plain, rows([0, 0], [1, 1], mode="strict"))
    new = folder(tmp_path / "new", plain, rows([1, 0], [1, 1], mode="strict"))
    assert compare(base, new, "--key", "official_first") == 0
    assert "| official_first | 2 | 0.0 | 50.0 |" in capsys.readouterr().out


def test_rules_are_not_mixed(tmp_path, capsys):
    plain = rows([1], [1])
    base = folder(tmp_path / "base", plain, rows([1], [1], mode="strict"))
    new = folder(tmp_path / "new", plain, rows([1], [1], mode="official_rule"))
    assert compare(base, new, "--key", "official") == 1
    assert "scored by strict in base, by official_rule in new" in capsys.readouterr().err


def test_other_problems_are_an_error_of_one_line(tmp_path, base, capsys):
    new = folder(tmp_path / "new", rows([0] * 7, [1] * 7))
    assert compare(base, new) == 1
    error = capsys.readouterr().err
    assert error == "error: different problems, by id: 1 only in the base rows (p7)\n"


def test_missing_files_are_named(tmp_path, base, capsys):
    assert compare(base, str(tmp_path / "none")) == 1
    assert "none: no such folder" in capsys.readouterr().err
    (tmp_path / "half").mkdir()
    assert compare(base, str(tmp_path / "half")) == 1
    assert "half has no samples.jsonl" in capsys.readouterr().err
    (tmp_path / "half" / "samples.jsonl.partial").write_text("{}\n")
    assert compare(base, str(tmp_path / "half")) == 1
    assert "half is not finished" in capsys.readouterr().err
    assert compare(base, base, "--key", "official") == 1
    assert "base has no scored.jsonl" in capsys.readouterr().err


def test_scored_rows_must_be_of_the_samples(tmp_path):
    short = folder(tmp_path / "short", rows([1, 1], [1, 1]), rows([1], [1]))
    with pytest.raises(ValueError, match="1 rows, but samples.jsonl beside it has 2, among them"):
        eval_folders.read(short, summary=False)
    long = folder(tmp_path / "long", rows([1], [1]), rows([1, 1], [1, 1]))
    with pytest.raises(ValueError, match="2 rows, but samples.jsonl beside it has 1$"):
        eval_folders.read(long, summary=False)
