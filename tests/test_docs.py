"""What the pages name exists: tools, configuration keys, files, headings."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from srpo_jax import train_grpo
from srpo_jax.run.settings import grpo_settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_the_api_page_names_what_is_there_and_has_a_docstring():
    named = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.M)
    assert len(named) > 20
    for module, name in named:
        assert getattr(importlib.import_module(module), name).__doc__, f"{module}.{name}"


PYTHON = [
    pytest.param(block, id=f"{page.name}:{block.string.count(chr(10), 0, block.start()) + 1}")
    for page in PAGES
    for block in re.finditer(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
]


@pytest.mark.parametrize("block", PYTHON)
def test_python_of_a_page_imports_what_is_there(block):
    for node in ast.walk(ast.parse(block[1])):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                found = getattr(module, alias.name, None)
                assert found or importlib.import_module(f"{node.module}.{alias.name}")


def test_the_example_of_the_api_page_is_a_run_that_would_begin(monkeypatch):
    (block,) = re.findall("```python\n(.*?)```", (ROOT / "docs/api.md").read_text("utf-8"), re.S)
    begun = []
    monkeypatch.setattr(train_grpo, "train", lambda *given: begun.append(grpo_settings(*given)))
    exec(compile(block, "docs/api.md", "exec"), {})
    assert begun[0].data.train == "rl.jsonl" and str(begun[0].workdir) == "runs/rl"
