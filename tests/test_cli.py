"""The command line that all tools share: what is wrong is one line, before any work is done."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import srpo_jax
from tools.lib import cli


def parser():
    out = cli.base_parser("A tool.", "python -m tools.it")
    out.add_argument("--temperature", type=float)
    out.add_argument("--size", type=cli.above_zero)
    out.add_argument("--output", type=cli.output_file)
    sub = out.add_subparsers().add_parser("export")
    sub.add_argument("--kind", choices=("a", "b"))
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temprature=1"], "unrecognized arguments: .* did you mean --temperature?"),
        (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["--size", "-1"], "argument --size: must be a number above 0, is -1"),
        (["--size", "nan"], "argument --size: must be a number above 0, is nan"),
        (["--output", "tests"], "argument --output: 'tests' is a folder; name a file in it"),
        (["export", "--kind", "c"], "argument --kind: invalid choice: 'c'"),
    ],
)
def test_a_wrong_option_is_one_line_with_what_was_meant(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda args: None, parser(), words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.match(f"error: {message}.*--help", error)


@pytest.mark.parametrize("program", ["srpo_jax.train_grpo", "tools.convert_hf", "tools.plan"])
def test_ctrl_c_while_a_program_imports_is_one_line(program, tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_is_an_exception_again_when_a_program_has_begun():
    before = signal.signal(signal.SIGINT, srpo_jax._leave)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda args: signal.raise_signal(signal.SIGINT), parser(), [])
        assert stop.value.code == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_that_cannot_be_opened_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda args: open(tmp_path / "nope").close(), parser(), [])
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nope'}: No such file or directory\n"
