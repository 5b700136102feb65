"""Every command of README, CONTRIBUTING and docs/ is taken by the program it names, key by key."""

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from srpo_jax import launch
from srpo_jax.run.command import one_word_each
from srpo_jax.run.settings import evaluate_settings, grpo_settings, sft_settings
from tools.lib import recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python -m |srpo-|bash |sbatch )[^`]*)`")
# First words of what no parser of ours reads.
FOREIGN = {"pip", "python3", ".", "ruff", "pyright", "mkdocs", "hf", "vllm"}
PROGRAMS = {
    "srpo-train-sft": "srpo_jax.train_sft",
    "srpo-train-grpo": "srpo_jax.train_grpo",
    "srpo-evaluate": "srpo_jax.evaluate",
    "srpo-convert": "tools.convert_hf",
    "srpo-report": "tools.report",
    "srpo-plan": "tools.plan",
}
SETTINGS = {"sft": sft_settings, "grpo": grpo_settings, "eval": evaluate_settings}
FLAGS = {"--config", "--overrides", "--workdir", "--debug", "--help"}


class Shown(NamedTuple):
    """A command of a page; ``whole``: in a block, with all that it needs."""

    place: str
    words: list[str]
    whole: bool


def shown(page: Path) -> Iterator[Shown]:
    """The commands of a page, with the line where each begins."""
    text = page.read_text("utf-8")
    for block in FENCE.finditer(text):
        if block[1] == "bash":
            first = text.count("\n", 0, block.start(2)) + 1
            yield from _of_block(page.name, first, block[2])
    rest = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for code in INLINE.finditer(rest):
        place = f"{page.name}:{rest.count(chr(10), 0, code.start()) + 1}"
        words = _split(code[1])
        if not {"/", "NAME"} & {*words}:  # a command, no pattern of several
            yield Shown(place, words, whole=False)


def _of_block(name: str, first: int, block: str) -> Iterator[Shown]:
    lines = block.splitlines()
    while lines:
        number, line = first, lines.pop(0)
        while line.endswith("\\"):
            line = line[:-1] + lines.pop(0)
            first += 1
        first += 1
        words: list[str] = []
        for word in [*_split(line), "&&"]:
            if word not in ("&&", "|"):
                words.append(word)
            elif words:
                yield Shown(f"{name}:{number}", words, whole=True)
                words = []


def _split(text: str) -> list[str]:
    words = [word for word in shlex.split(text.replace("…", ""), comments=True) if word != "..."]
    while words and re.match("[A-Z_]+=", words[0]):  # set for the command alone
        del words[0]
    return words


COMMANDS = [command for page in PAGES for command in shown(page)]


# --- what takes them ---------------------------------------------------------------------------


def check(words: list[str], whole: bool) -> list[str]:
    """The programs of ours that a command calls, each with its arguments taken."""
    first, *rest = words
    if first == "python" and rest[:1] == ["-c"]:
        ast.parse(rest[1])
    elif first == "python":
        assert rest[0] == "-m", words
        return check_program(rest[1], rest[2:], whole)
    elif first in ("srpo-tool", "srpo-data"):
        modules = launch.tools() if first == "srpo-tool" else launch.DATA
        if rest:
            return check_program(modules[rest[0]], rest[1:], whole)
    elif first.startswith("srpo-"):
        return check_program(PROGRAMS[first], rest, whole)
    elif first in ("bash", "sbatch"):
        return check_script([word for word in rest if not re.match("--nodes=", word)], whole)
    elif first == "pytest":
        check_pytest(rest)
    else:
        assert first in FOREIGN, f"{first}: neither a program of ours nor in FOREIGN"
        check_foreign(words)
    return []


def check_script(words: list[str], whole: bool) -> list[str]:
    """A script that is there, and what it hands on."""
    script, *rest = words
    assert (ROOT / script).is_file(), script
    if script == "tools/quickstart.sh":
        return check_program("tools.demo", rest, whole)
    if script == "tools/test.sh":
        check_pytest(rest[1:] if rest[:1] in (["--slow"], ["--all"]) else rest)
        return []
    return check_program(rest[0], rest[1:], whole)  # launch/


def check_pytest(words: list[str]) -> None:
    """Test files that are there."""
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words


def check_foreign(words: list[str]) -> None:
    """The files and extras of ours that another program is told."""
    for before, word in zip(words, words[1:], strict=False):
        if before in ("-r", "-f"):
            assert (ROOT / word).is_file(), word
    extras = re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text("utf-8"), re.M)
    for word in words:
        assert not (extra := re.fullmatch(r"\.\[(\w+)\]", word)) or extra[1] in extras, word


def check_program(module: str, words: list[str], whole: bool) -> list[str]:
    """One of our modules takes the words: flags, types, what is required, configuration keys."""
    program = importlib.import_module(module)
    if hasattr(program, "__path__"):
        program = importlib.import_module(f"{module}.__main__")
    if module.startswith("srpo_jax."):
        flags = one_word_each(words)
        given = dict(word.partition("=")[::2] for word in flags if not word.startswith("--config."))
        assert given.keys() <= FLAGS, f"{module} takes {FLAGS}, not {given.keys() - FLAGS}"
        assert not whole or given.keys() >= {"--config", "--workdir"}, f"{module}: incomplete"
        changes = [word for word in flags if word.startswith("--config.")]
        check_config(given.get("--config"), changes)
        return [module]
    make = getattr(program, "parser_for", lambda _: program.make_parser())
    rest = [word for word in words if not word.startswith("--config.")]
    if not whole:
        taken = options(program.make_parser(), rest)
        unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - taken
        assert not unknown, f"{module} has no {unknown}"
        return [module]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = make(rest).parse_args(rest)
    except SystemExit:
        raise AssertionError(f"{module}: {said.getvalue()}") from None
    if hasattr(args, "changes"):
        check_config(args.config, [word for word in words if word.startswith("--config.")])
    return [module]


def options(parser: argparse.ArgumentParser, words: list[str]) -> set[str]:
    """The options of a parser, with those of the sub-command that is named."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        choices = action.choices if isinstance(action, argparse._SubParsersAction) else {}
        for name in choices.keys() & set(words):
            found |= set(choices[name]._option_string_actions)
    return found


def check_config(recipe: str | None, changes: list[str]) -> None:
    """The recipe is one of ours, has the keys, and a run would begin with the values."""
    assert recipe or not changes, "--config.KEY without --config"
    if recipe:
        args: Any = SimpleNamespace(config=recipe, overrides=None, changes=changes)
        name = re.split(r"[/:.]", recipe.removeprefix("configs/"))[0]
        SETTINGS[name](recipes.read(args))


@pytest.mark.parametrize("command", COMMANDS, ids=[command.place for command in COMMANDS])
def test_a_command_of_a_page_is_taken_by_its_program(command):
    check(command.words, command.whole)


@pytest.mark.parametrize(
    "line",
    [
        "python -m srpo_jax.train_grpo --config=configs/grpo.py:size=8b --workdir=w",
        "python -m srpo_jax.train_grpo --config=configs/grpo.py --workdir=w --config.optim.lrr=1",
        "python -m srpo_jax.train_sft --config=sft --workdir=w --config.data.tokens=many",
        "python -m srpo_jax.train_sft --config=sft --workdir=w --config.optim.kind=sgd",
        "python -m srpo_jax.evaluate --config=configs/eval.py",
        "python -m srpo_jax.evaluate --config=configs/eval.py --workdir=w --workers=3",
        "python -m tools.plan --config=grpo --topology=cuda:h100:1x8 --price_per_hour=free",
        "python -m tools.plan --config=grpo --topology=cuda:h100:1x8 --config.mesh.pipe=2",
        "python -m tools.convert_hf export --checkpoint runs/rl --hf_dir trained",
        "python -m tools.no_such_tool",
        "srpo-tool make_fh",
        "bash tools/quick.sh",
        "pip install -r requirements-none.txt",
        "pip install .[gpus]",
        "conda install srpo_jax",
    ],
)
def test_a_wrong_command_would_be_found(line):
    with pytest.raises((AssertionError, KeyError, ValueError, RuntimeError, ImportError)):
        check(shlex.split(line), whole=True)


# --- what runs them ----------------------------------------------------------------------------

# Program and what tells its uses apart -> the test that runs it so, at small size.
DEMO = "test_demo.py::test_the_whole_demo_in_its_quick_form_and_the_notebook_that_shows_it"
WHEEL = "test_package.py::test_the_wheel_works_outside_of_a_checkout"
RUN_BY = {
    "srpo_jax.train_sft": WHEEL,
    "srpo_jax.train_grpo": DEMO,
    "srpo_jax.train_grpo mode=debug": "test_train.py::"
    "test_grpo_row_has_what_is_promised_and_filtered_groups_teach_nothing",
    "srpo_jax.evaluate": DEMO,
    "srpo_jax.evaluate --config.eval.benchmark": "test_benchmark_evaluation.py::"
    "test_a_benchmark_in_its_published_form_is_answered_and_scored",
    "tools.demo": DEMO,
    "tools.convert_hf": WHEEL,
    "tools.check_data": WHEEL,
    "tools.make_hf": WHEEL,
    "tools.convert_records": "test_convert_records.py::"
    "test_conversations_of_llava_and_what_has_no_answer",
    "tools.build_reflection_data": "test_reflection_build.py::"
    "test_killed_twenty_times_the_data_set_is_that_of_an_undisturbed_run",
    "tools.plan": "test_aot.py::test_the_7b_recipe_compiles_and_fits_eight_devices",
    "tools.plan --estimate": "test_aot.py::test_a_step_is_estimated_and_nothing_compiled",
    "tools.plan --search": "test_plan.py::"
    "test_a_search_gives_what_fits_and_can_be_told_as_overrides",
    "tools.bench": "test_bench.py::test_every_part_runs_beside_transformers",
    "tools.download_benchmark": "test_download_benchmark.py::"
    "test_a_download_is_what_load_reads_with_the_published_bytes",
    "tools.eval_report": "test_report.py::test_the_command_writes_tables_numbers_and_page",
    "tools.compare_evals": "test_compare_evals.py::"
    "test_the_table_holds_accuracies_difference_and_p",
    "tools.score_eval": "test_benchmark_evaluation.py::"
    "test_an_evaluation_is_scored_anew_strictly_and_by_a_judge",
    "tools.report": "test_run_page.py::test_the_command_writes_the_page_beside_the_run",
    "tools.report --serve": "test_run_page.py::test_a_served_page_is_new_and_comes_anew",
    "tools.study": "test_study.py::test_what_a_study_runs_is_listed_seed_by_seed",
    "tools.study --summary": "test_study.py::test_the_page_is_filled_in_between_its_markers",
}


def use(module: str, words: list[str]) -> str:
    """The key of `RUN_BY` that a command stands under."""
    for key in RUN_BY:
        name, _, mark = key.partition(" ")
        if mark and name == module and any(mark in word for word in words):
            return key
    return module


def test_every_whole_command_is_run_at_small_size_by_a_test():
    whole = [command for command in COMMANDS if command.whole]
    uses = {use(m, c.words) for c in whole for m in check(c.words, whole=True)}
    assert uses == RUN_BY.keys()
    for test in RUN_BY.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), test
