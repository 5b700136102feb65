"""What a run shows: plain lines, JSON, the live table at any width, bars, compilations."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console as Terminal

from srpo_jax.run import console
from srpo_jax.run.compiles import CompileNotes
from srpo_jax.run.console import Console, packed, progress

ROW = {"reward/mean": 0.5, "accuracy/first": 0.25, "fix_rate": float("nan"), "time/step": 2.0}


@pytest.fixture
def as_json():
    console.use("json")
    yield
    console.use("auto")


@pytest.fixture
def table(monkeypatch):
    """-> the text of a live table in a terminal of so many columns."""
    monkeypatch.setattr(console, "_for_people", lambda stream: True)
    one = Console(8000, ("reward/mean",))

    def shown(width):
        page = Terminal(file=io.StringIO(), width=width, record=True)
        page.print(one)
        return page.export_text()

    yield one, shown
    one.close()


def test_a_step_is_a_plain_line_with_the_time_left_and_nan_as_nan(capsys):
    Console(5, ("reward/mean", "fix_rate")).row(2, "train", ROW)
    assert capsys.readouterr().out == "step 2/5  reward/mean 0.5  fix_rate NaN  0:00:06 left\n"


def test_in_json_every_line_is_a_row_a_fact_a_note_or_progress(capsys, monkeypatch, as_json):
    monkeypatch.setattr(console, "PLAIN_PROGRESS_SECONDS", 0.01)
    Console(5, ()).row(2, "train", ROW)
    console.say("a word")
    console.say("model: x, 5 parameters", "model", trained=5, share=float("inf"))
    with progress("loading", 10, "%") as advance:
        advance(5)
        time.sleep(0.05)
    row, note, fact, *moved = map(json.loads, capsys.readouterr().out.splitlines())
    assert row == {"split": "train", "step": 2, **ROW, "fix_rate": "nan"}
    assert note == {"note": "a word"}
    told = {"text": "model: x, 5 parameters", "trained": 5, "share": "inf"}
    assert fact == {"fact": "model", **told}
    assert moved[0] == {"progress": "loading", "done": 5, "total": 10, "unit": "%", "seconds": 0}


def test_the_table_shows_progress_answers_phases_and_a_compilation(table):
    one, shown = table
    one.row(2000, "train", ROW | {"time/sample": 1.5})
    one.begin("compiling update (about 40 s, 3 of 7)")
    with one.bar("evaluation", 6, "records") as advance:
        advance(3)
        text = shown(100)
    times = (
        "2 s/step  3:20:00 left",
        "seconds:  sample 1.5",
        "update (about 40 s, 3 of 7):  0 s so",
    )
    for told in ("step 2,000/8,000", "25 %", "reward 0.500  first 25.0%  fix NaN", *times, "3/6"):
        assert told in text
    one.close()
    assert console._live is None


@pytest.mark.parametrize("width", [12, 40, 80, 140])
def test_at_any_width_the_table_has_no_longer_line_and_nothing_is_lost(table, width):
    one, shown = table
    names = {name: 123456.0 for name, *_ in console._TABLE}
    one.row(2000, "train", names | {f"time/phase{n}": 1234.5 for n in range(12)})
    with one.bar("evaluation", 6000, "records"), one.bar("saving", None, ""):
        text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("1.23e+03") == 12 or width < 20
    cut = [line for line in text.splitlines() if line.endswith(("...", "…"))]
    assert bool(cut) == (width < 40)  # what does not fit says so


def test_items_stay_whole_and_in_order_unless_one_is_too_wide():
    assert [*packed(["ab 1", "cd 2", "ef 3"], 10)] == ["ab 1  cd 2", "ef 3"]
    assert [*packed(["long item", "x"], 6)] == ["lon...", "x"]
    assert [*packed([], 6)] == [] and [*packed(["abc"], 2)] == [".."]


def test_progress_of_unknown_length_is_told_in_seconds_where_there_is_no_terminal(
    capsys, monkeypatch
):
    monkeypatch.setattr(console, "PLAIN_PROGRESS_SECONDS", 0.02)
    with progress("reading"):
        time.sleep(0.05)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "reading: 0 s" and last == "reading: done in 0 s"
    with progress("short"):
        pass
    console.mute()
    with progress("of another process"):
        time.sleep(0.05)
    console.use("auto")
    assert capsys.readouterr().err == ""


def test_a_compilation_is_told_with_the_seconds_and_number_of_the_run_before(tmp_path, monkeypatch):
    monkeypatch.setattr("srpo_jax.run.compiles.LONG", 0.0)
    told: list[str] = []
    for _ in range(2):
        shown = Console(1, ())
        monkeypatch.setattr(shown, "begin", lambda text, **_: told.append(text))
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


SHOW = """
import sys
from srpo_jax.run import console
console.reach_any_locale()
one = console.Console(5, ("loss",))
one.row(5, "train", {"loss": 0.5, "time/step": 1.0})
console.say("records/\\u00fcber \\u2713.jsonl")
console.say("many words " * 9)
console.say("next: " + "a command " * 9, "next", command="")
with console.progress("export", 3) as advance:
    advance(3)
one.close()
"""


def on_a_terminal(width, **environment):
    """What a program writes to a pseudo-terminal of so many columns."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(width)} | environment
    code = [sys.executable, "-c", SHOW]
    run = subprocess.Popen(code, stdout=theirs, stderr=theirs, env=env, close_fds=True)
    os.close(theirs)
    told = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # its other end is closed
            part = b""
        if not part:
            break
        told += part
    os.close(ours)
    assert run.wait(60) == 0, told
    return told.decode("utf-8", "replace")


def test_a_terminal_without_colours_or_utf_8_is_served():
    assert "\x1b[3" in on_a_terminal(80)
    told = on_a_terminal(80, NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert "\x1b[3" not in told and "records/\\xfcber \\u2713.jsonl" in told
    assert "step 5/5" in told and "loss 0.5" in told
    assert "many words\r\n  many words" in told  # broken between words, but for commands
    assert "a command " * 9 in told
