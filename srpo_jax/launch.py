"""The commands of an installation, and where recipes and tools lie: in a checkout or in the wheel.

Their packages keep the names ``configs`` and ``tools`` in both.
"""

import ast
import difflib
import os
import runpy
import sys
from pathlib import Path

from srpo_jax import importing

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "checkout"
HOME = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent  # holds configs/ and tools/


def reach_home() -> None:
    """``configs`` and ``tools`` can be imported, here and in Python processes started from here."""
    if str(HOME) not in sys.path:
        sys.path.insert(0, str(HOME))
        known = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), known]))


def program() -> str:
    """What the user has called, for messages: srpo-convert, or python -m tools.convert_hf."""
    words = sys.orig_argv[1:]
    if "-m" in words[:-1]:
        return f"python -m {words[words.index('-m') + 1]}"
    name = Path(words[0]).name if words else "python"
    kept = {"srpo-tool", "srpo-data"} & {name}
    return " ".join([name, *words[1:2]]) if kept else name


_COMMANDS = {
    "train_grpo": ("srpo-train-grpo", "srpo_jax.train_grpo"),
    "evaluate": ("srpo-evaluate", "srpo_jax.evaluate"),
    "report": ("srpo-report", "tools.report"),
    "eval_report": ("srpo-tool eval_report", "tools.eval_report"),
    "plan": ("srpo-plan", "tools.plan"),
    "transformers_check": ("srpo-tool transformers_check", "tools.lib.transformers_check"),
}


def command(name: str) -> str:
    """How to call a program here: by its command where the package is installed."""
    installed, module = _COMMANDS[name]
    return installed if _INSTALLED.is_dir() else f"python -m {module}"


def _run(module: str) -> None:
    """As ``python -m`` does."""
    importing()
    reach_home()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def train_sft() -> None:
    """Stage 1."""
    _run("srpo_jax.train_sft")


def train_grpo() -> None:
    """Stage 2."""
    _run("srpo_jax.train_grpo")


def evaluate() -> None:
    """Evaluation on a file of problems."""
    _run("srpo_jax.evaluate")


def convert() -> None:
    """Hugging Face directory <-> checkpoint."""
    _run("tools.convert_hf")


def report() -> None:
    """A training run as a page."""
    _run("tools.report")


def plan() -> None:
    """Memory and time of a recipe."""
    _run("tools.plan")


DATA = {"build": "tools.build_reflection_data", "check": "tools.check_data"}  # of srpo-data


def data() -> None:
    """``srpo-data build`` makes reflection data, ``srpo-data check`` looks at records."""
    _choose(DATA)


def tools() -> dict[str, str]:
    """Name -> module of every program of tools/."""
    names = {path.stem for path in (HOME / "tools").glob("[!_]*.py")}
    names |= {path.parent.name for path in (HOME / "tools").glob("*/__main__.py")}
    found = {name: f"tools.{name}" for name in names}
    found |= {"reflect": "tools.demo.reflect", "transformers_check": "tools.lib.transformers_check"}
    return dict(sorted(found.items()))


def tool() -> None:
    """``srpo-tool NAME``: any program of tools/."""
    _choose(tools())


def _choose(modules: dict[str, str]) -> None:
    """Run the program that the first argument names; the list of them where it names none."""
    given = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if given in modules:
        del sys.argv[1]
        return _run(modules[given])
    name = Path(sys.argv[0]).name
    if not given.startswith("-"):
        near = difflib.get_close_matches(given, modules, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"error: {name} has no {given}{meant} (see {name} --help)")
    print(f"usage: {name} NAME ...   ({name} NAME --help for its options)\n")
    for known, module in modules.items():
        print(f"  {known:{max(map(len, modules))}}  {_purpose(module)}")


def source(module: str) -> ast.Module:
    """A program's source, which says what it is and takes without importing it."""
    path = HOME / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text("utf-8"))


def _purpose(module: str) -> str:
    """The first line of a program."""
    return (ast.get_docstring(source(module)) or "").partition("\n")[0].rstrip(".")
