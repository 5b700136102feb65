"""Completion in a shell: what it offers is what programs and recipes take, and no jax is needed."""

import argparse
import functools
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from srpo_jax import launch
from srpo_jax.run.keys import keys
from tools import completion

ROOT = Path(__file__).resolve().parent.parent
script = functools.cache(completion.script)


def offered(line: str) -> list[str]:
    """What bash puts behind the last = or : (or space) of a line, at a Tab at its end."""
    breaks = r"""COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'; """
    tab = 'COMP_LINE=$1; COMP_POINT=${#1}; _srpo; printf "%s\\n" "${COMPREPLY[@]}"'
    code = script("bash") + breaks + tab
    done = subprocess.run(
        ["bash", "-c", code, "-", line], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("srpo-tool quick", []),
        ("srpo-tool pla", ["plan"]),
        ("srpo-data ", ["build", "check"]),
        ("/opt/bin/srpo-convert exp", ["export"]),
        ("srpo-tool make_hf --vision_d", ["--vision_depth"]),
        ("srpo-data build run --budget", ["--budget_usd"]),
        ("srpo-train-grpo --conf", ["--config=", "--config."]),
        ("srpo-train-grpo --config=g", ["grpo:"]),
        ("srpo-train-grpo --config=grpo:size=7", ["7b", "72b"]),
        (
            "srpo-train-grpo --config=grpo:size=7b,rec",
            [f"7b,recipe={name}" for name in ("authors", "best", "paper")],
        ),
        ("srpo-train-sft --config=sft:size=7b --config.data.pac", ["--config.data.pack="]),
        ("srpo-train-grpo --config.data.pa", ["--config.data.patch_budgets="]),
        ("srpo-plan --config=configs/sft.py:size=7b --config.epo", ["--config.epochs="]),
        ("srpo-train-grpo --config.freeze=", []),
    ],
)
def test_a_tab_offers_what_may_stand_there(line, ends):
    assert sorted(offered(line)) == sorted(ends)


def test_every_key_of_a_recipe_is_offered_to_its_program():
    found = offered("srpo-train-grpo --config=grpo:size=7b --config.")
    assert sorted(found) == sorted(f"--config.{key.name}=" for key in keys("grpo"))


def test_commands_are_those_of_the_installation():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    installed = set(re.findall(r'^(srpo-[\w-]+) = "srpo_jax.launch', text, re.M))
    assert {name for name in completion.programs() if " " not in name} == installed


@pytest.mark.parametrize("name", launch.tools())
def test_options_read_from_the_source_are_those_of_the_parser(name):
    module = launch.tools()[name]
    tool = importlib.import_module(module)
    tool = importlib.import_module(f"{module}.__main__") if hasattr(tool, "__path__") else tool
    taken: set[str] = set()
    parsers = [tool.make_parser()]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            taken |= {*action.choices}
            parsers += action.choices.values()
        elif action.dest == "command":
            taken |= {*(action.choices or ())}
    taken |= {word for parser in parsers for word in parser._option_string_actions}
    found = {word.rstrip("=.") for word in completion.words(module)}
    assert found == {word for word in taken if word.startswith("--") or word[0] != "-"}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_shell_reads_its_script(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script(shell), text=True, check=True)


def test_fish_offers_the_same(tmp_path):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    file = tmp_path / "srpo.fish"
    file.write_text(script("fish"))
    for line, word in {
        "srpo-tool pla": "plan",
        "srpo-train-grpo --config=grpo:size=7b,mode=d": "--config=grpo:size=7b,mode=debug",
        "srpo-train-sft --config.data.pac": "--config.data.pack=",
    }.items():
        code = f"source {file}; complete -C '{line}'"
        done = subprocess.run(["fish", "-c", code], cwd=tmp_path, capture_output=True, check=True)
        assert done.stdout.decode().split() == [word]


def test_the_script_is_made_without_jax():
    code = "import sys, tools.completion as c; c.script('bash'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
