"""What a run shows: plain lines, JSON, compilations with what an earlier run knew."""

import io
import json

from rich.console import Console as Terminal

from srpo_jax.run import console
from srpo_jax.run.compiles import CompileNotes
from srpo_jax.run.console import Console

ROW = {"reward/mean": 0.5, "accuracy/first": 0.25, "fix_rate": float("nan"), "time/step": 2.0}


def test_a_step_is_a_plain_line_with_the_time_left_and_nan_as_nan(capsys):
    Console(5, ("reward/mean", "fix_rate")).row(2, "train", ROW)
    assert capsys.readouterr().out == "step 2/5  reward/mean 0.5  fix_rate NaN  0:00:06 left\n"


def test_json_lines_hold_the_whole_row_and_notes(capsys):
    one = Console(5, (), mode="json")
    one.row(2, "train", ROW)
    one.say("a word")
    row, note = map(json.loads, capsys.readouterr().out.splitlines())
    assert row == {"split": "train", "step": 2, **ROW, "fix_rate": "nan"}
    assert note == {"note": "a word"}


def test_the_table_shows_progress_answers_phases_and_a_compilation(monkeypatch):
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
    one = Console(8, ())
    try:
        one.row(2, "train", ROW | {"time/sample": 1.5})
        one.begin("compiling update (about 40 s, 3 of 7)")
        with one.bar("evaluation", 6) as advance:
            advance(3)
            page = Terminal(file=io.StringIO(), width=80, record=True)
            page.print(one._table())
    finally:
        one.close()
    text = page.export_text()
    times = ("2 s/step  0:00:12 left", "seconds: sample 1.5", "update (about 40 s, 3 of 7): 0 s so")
    for told in ("step 2/8", "25 %", "reward 0.500  first 25.0%  fix NaN", *times, "3/6"):
        assert told in text
    assert console._live is None


def test_a_compilation_is_told_with_the_seconds_and_number_of_the_run_before(tmp_path, monkeypatch):
    monkeypatch.setattr("srpo_jax.run.compiles.LONG", 0.0)
    told: list[str] = []
    for _ in range(2):
        shown = Console(1, ())
        monkeypatch.setattr(shown, "begin", told.append)
        notes = CompileNotes(tmp_path, shown)
        for name in ("encode", "update"):
            notes.tell(name, False)
            notes.tell(name, True)
        notes.close()
    assert told == [
        "compiling encode (1)",
        "compiling update (2)",
        "compiling encode (about 0 s, 1 of 2)",
        "compiling update (about 0 s, 2 of 2)",
    ]
