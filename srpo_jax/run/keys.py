"""Every key of a recipe with its default, meaning and source, read from the source of configs/."""

import ast
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from srpo_jax.launch import HOME
from srpo_jax.run.recipe import read_config
from srpo_jax.run.resume import flat_config

RECIPES = {"sft": "stage 1", "grpo": "stage 2", "eval": "evaluation"}
_SOURCES = ((r"\bP\b", "paper"), (r"\bR\b(?! has)", "authors' code"))

_HEAD = """# Configuration reference

<!-- Made by `python -m tools.configuration`; edit the comments in configs/ instead. -->

Every key of the recipes at `size=7b`, as the comments in `configs/` have it. P is the paper, R the
authors' repository; the source of a default is the paper, the authors' code or ours.
`--config.KEY=VALUE` changes a key, `--overrides FILE` several ([Installing](installing.md));
`srpo-train-grpo --help` shows the same."""


class Key(NamedTuple):
    """One key; ``source`` is "paper", "authors' code" or "ours"."""

    name: str
    default: Any
    meaning: str
    source: str


def keys(recipe: str) -> list[Key]:
    """The keys of "sft", "grpo" or "eval" at size 7b, by name."""
    told = {**_comments("common"), **_comments(recipe)}
    out = []
    for name, default in flat_config(read_config(f"{recipe}:size=7b").to_dict()).items():
        meaning = told.get(name, "")
        if name.startswith("data.columns."):
            meaning = 'a foreign name of this column of the records; "": its own'
        first = sorted((m.start(), word) for at, word in _SOURCES if (m := re.search(at, meaning)))
        out.append(Key(name, default, meaning, first[0][1] if first else "ours"))
    return out


def _comments(module: str) -> dict[str, str]:
    """Key -> its comments, above the line that sets it and behind it."""
    text = (HOME / "configs" / f"{module}.py").read_text("utf-8")
    lines, tree = ["", *text.splitlines()], ast.parse(text)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    sections = {"config": "", "sampling": "sampling.", "held_out": "eval.", "update": "grpo."}
    sections["engine"] = "sampling.engine."
    # `config.data = data = ...` names a section, `reward.judge = judge = ...` one in it.
    for _ in range(2):
        for node in nodes:
            for target in node.targets:
                if isinstance(target, ast.Attribute) and (path := _path(target, sections)):
                    names = [other.id for other in node.targets if isinstance(other, ast.Name)]
                    sections |= dict.fromkeys(names, f"{path}.")
    sections |= {"reward": "reward.", "judge": "reward.judge."}
    found = {}
    for node in nodes:
        for target in node.targets:
            if isinstance(target, ast.Attribute) and (path := _path(target, sections)):
                if words := " ".join(_beside(lines, node)):
                    found.setdefault(path, words)
    return found


def _path(target: ast.Attribute, sections: dict[str, str]) -> str:
    """The dotted key that an assignment sets; "" where it sets none."""
    owner = target.value
    known = isinstance(owner, ast.Name) and owner.id in sections
    return f"{sections[owner.id]}{target.attr}" if known else ""  # pyright: ignore[reportAttributeAccessIssue]


def _beside(lines: list[str], node: ast.Assign) -> Iterator[str]:
    above, at = [], node.lineno - 1
    while lines[at].strip().startswith("#"):
        above.insert(0, lines[at].strip("# "))
        at -= 1
    yield from above
    if behind := re.search(r"  # (.*)", lines[node.end_lineno or node.lineno]):
        yield behind[1]


def help_text(recipe: str, width: int) -> str:
    """All keys for a terminal."""
    out = [f"keys of the configuration ({recipe}:size=7b), as --config.KEY=VALUE:"]
    for key in keys(recipe):
        out.append(f"  --config.{key.name}={_shown(key.default)}  [{key.source}]")
        out += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(out)


def page() -> str:
    """docs/configuration.md."""
    out = [_HEAD]
    for recipe, title in RECIPES.items():
        out += ["", f"## `{recipe}`: {title}", "", "| key | default | meaning | source |"]
        out.append("|---|---|---|---|")
        for key in keys(recipe):
            default = _shown(key.default).replace("|", r"\|")
            meaning = key.meaning.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")
            out.append(f"| `{key.name}` | `{default}` | {meaning} | {key.source} |")
    return "\n".join(out) + "\n"


def _shown(value: Any) -> str:
    return '""' if value == "" else str(value)
