"""What the pages name exists: modules, options, configuration keys, programs and files."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]*\bpython -m [^`]*)`")


def commands() -> list[tuple[str, list[str]]]:
    """(module, arguments) of every ``python -m`` command, blocks and inline code alike."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        lines = [line for block in BLOCK.findall(text) for line in _joined(block)]
        lines += [" ".join(code.split()) for code in INLINE.findall(text)]
        for line in lines:
            _, python, rest = line.partition("python -m ")
            if python:
                if rest.count('"') % 2:  # the command stands inside another one's quotes
                    rest = rest.rpartition('"')[0]
                words = shlex.split(rest.replace("…", ""), comments=True)
                found.append((words[0], words[1:]))
    return found


def _joined(block: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", block).splitlines()


def options_of(module: str, words: list[str]) -> set[str]:
    """The options that a tool takes; of the named subcommand where it has them."""
    tool = importlib.import_module(module)
    if hasattr(tool, "__path__"):
        tool = importlib.import_module(f"{module}.__main__")
    if hasattr(tool, "make_parser"):
        parser = tool.make_parser()
        found = set(parser._option_string_actions)
        for action in parser._actions:
            choices = action.choices if isinstance(action, argparse._SubParsersAction) else {}
            for name in choices.keys() & set(words):
                found |= set(choices[name]._option_string_actions)
        return found
    command = [sys.executable, "-m", module, *words[:1], "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return set(re.findall(r"--\w+", done.stdout))


COMMANDS = commands()


def test_the_pages_show_commands():
    shown = {module for module, _ in COMMANDS}
    assert {"srpo_jax.train_sft", "srpo_jax.train_grpo", "srpo_jax.evaluate"} <= shown
    assert {"tools.plan", "tools.build_reflection_data", "tools.score_eval"} <= shown


@pytest.mark.parametrize(("module", "words"), COMMANDS, ids=[m for m, _ in COMMANDS])
def test_a_shown_command_has_its_options_and_keys(module, words):
    file = next((word.removeprefix("--config=") for word in words if "--config=" in word), None)
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    overrides = {name for name in given if name.startswith("--config.")}
    if file is not None:
        path, _, arg = file.partition(":")
        recipe = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        known = recipe.get_config(arg or None)
        for name in overrides:
            section = known
            for part in name.removeprefix("--config.").split("."):
                assert part in section, f"{module}: {name}"
                section = section[part]
    options = {"--config", "--workdir"} if module.startswith("srpo_jax.") else set()
    if module.startswith("tools."):
        options = options_of(module, words)
    else:
        importlib.import_module(module)
    assert given - overrides - {"--config"} <= options | {"--config"}, module


def test_readme_has_a_row_for_every_tool():
    table = (ROOT / "README.md").read_text("utf-8").partition("## Tools")[2].partition("\n## ")[0]
    programs = {path.stem for path in (ROOT / "tools").glob("[!_]*.py")}
    programs |= {path.parent.name for path in (ROOT / "tools").glob("*/__main__.py")}
    assert set(re.findall(r"^\| `python -m tools\.(\w+)", table, re.MULTILINE)) == programs


RECIPES = [importlib.import_module(f"configs.{n}").get_config() for n in ("sft", "grpo", "eval")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_keys_are_there(page):
    text = re.sub("^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    if page.name == "coming_from.md":  # the first column holds keys of others
        text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
    for word in re.findall("`([^`\n]+)`", text):
        if re.fullmatch(r"(srpo_jax|tools|tests|configs|docs)/[a-z0-9_./*]+", word):
            assert list(ROOT.glob(word)), word
        for name, key in re.findall(r"^(?:--config\.)?([a-z]+)\.([a-z_]+)(?:=|$)", word):
            sections = [recipe[name] for recipe in RECIPES if name in recipe]
            assert not sections or any(key in section for section in sections), word


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.is_file(), target
            assert not anchor or anchor in slugs(file), target


def test_every_page_stands_in_the_table_of_contents():
    listed = set(re.findall(r"\b(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= listed
