"""The house stays in order: README's map says who may import whom; packages, parameters, size."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "srpo_jax"
MAP = 'README.md, "A map of the house"'


def read_map() -> list[str]:
    """The modules of README's table ("data.files"), from top to bottom."""
    order = []
    section = (ROOT / "README.md").read_text("utf-8").partition("## A map of the house\n")[2]
    for line in section.splitlines():
        if line.startswith("| `"):
            room, _, modules = (re.findall("`([^`]+)`", cell) for cell in line.split("|")[1:4])
            files = [f"{room[0]}{name}.py" for name in modules] if modules else room
            order += [file.removesuffix(".py").replace("/", ".") for file in files]
    return order


ORDER = read_map()
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}
TRAINING = (
    "structs",
    "data",
    "model",
    "sampling",
    "rewards",
    "learn",
    "run",
    "train_sft",
    "train_grpo",
)

# Room or module -> third-party packages that may appear there; a room that is not named: any.
CORE = {"jax", "flax", "optax", "numpy"}
RECORDS = {"grain", "tensorflow_datasets", "pyarrow", "array_record", "absl"}
THIRD_PARTY = {
    "structs": CORE,
    "data": {"numpy", "etils", "PIL", "transformers", "tokenizers", "jinja2"} | RECORDS,
    "model": CORE,
    "model.hf_write": CORE | {"etils"},
    "model.hf_files": CORE | {"safetensors", "etils"},
    "model.hf": CORE | {"etils"},
    "model.peft": CORE | {"safetensors"},
    "sampling": CORE,
    "rewards": {"numpy", "sympy"},
    "rewards.terms": CORE,
    "rewards.profiles": CORE,
    "learn": CORE,
    "remote": {"openai", "aiohttp", "httpx2"},
    "remote.rollouts": CORE,
    "reflection": {"numpy", "PIL", "jinja2", "transformers"},
    "benchmarks": {"sympy", "jinja2", "rapidfuzz"},
    "report": {"jinja2", "PIL", "numpy"},
}


def imports(name: str) -> set[str]:
    """What a module imports, in full: "numpy", "srpo_jax.data", "srpo_jax.data.files"."""
    names = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports in full, from srpo_jax..."
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def imported_modules(name: str) -> set[str]:
    """The modules of this package among them."""
    return {n.removeprefix("srpo_jax.") for n in imports(name)} & MODULES.keys()


def test_the_map_names_every_module_once():
    missing, surplus = MODULES.keys() - set(ORDER), set(ORDER) - MODULES.keys()
    assert not missing, f"{MAP} lacks {missing}: give each the place below what it imports"
    assert not surplus, f"{MAP} names {surplus}, which are not there"
    twice = [name for name, count in Counter(ORDER).items() if count > 1]
    assert not twice, f"{MAP} names {twice} twice"


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_modules_above_it(name):
    above = ORDER[: ORDER.index(name)]
    for other in imported_modules(name):
        assert other in above, f"{name} imports {other}, which does not stand above it in {MAP}"


@pytest.mark.parametrize("name", ORDER)
def test_third_party_packages_stay_in_their_place(name):
    outer = {n.partition(".")[0] for n in imports(name)} - {"srpo_jax"} - sys.stdlib_module_names
    assert not outer & {"tools", "configs", "tests", "torch"}, f"{name} imports {outer}"
    allowed = THIRD_PARTY.get(name, THIRD_PARTY.get(name.partition(".")[0], outer))
    assert outer <= allowed, f"{name} imports {outer - allowed}; see THIRD_PARTY"


def test_training_reaches_reflection_and_benchmarks_only_through_evaluation():
    seen: set[str] = {"evaluate"}
    todo = [name for name in ORDER if name.partition(".")[0] in TRAINING]
    while todo:
        name = todo.pop()
        assert not name.startswith(("reflection.", "benchmarks.")), f"training imports {name}"
        seen.add(name)
        todo += imported_modules(name) - seen


@pytest.mark.parametrize("name", ORDER)
def test_functions_have_at_most_seven_parameters_or_say_why(name):
    lines = ["", *MODULES[name].read_text("utf-8").splitlines()]  # numbered from 1, as ast does
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = [n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)]
        count = len([arg for arg in given if arg not in ("self", "cls")])
        # Above the function, or on the first two lines or the last one of its signature.
        top = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        beside = (top - 1, node.lineno, node.lineno + 1, node.body[0].lineno - 1)
        assert count <= 7 or any("# " in lines[number] for number in beside), (
            f"{name}, line {node.lineno}: {node.name} has {count} parameters: join some, or say "
            "why in a comment beside its def"
        )


@pytest.mark.parametrize(
    "path",
    sorted(p for d in ("srpo_jax", "tools", "configs") for p in (ROOT / d).rglob("*.py")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_modules_are_short_and_say_what_they_are(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= 500, f"{path.name} has {text.count(chr(10))} lines"
    assert ast.get_docstring(ast.parse(text)), f"{path.name} has no first-line purpose"


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("srpo_jax.rewards.verifier", "jax"),  # starts in every worker
        ("tools.score_benchmark", "openai"),  # may ask a judge, mostly does not
        ("tools.score_reflections", "openai"),
        ("tools.download_benchmark", "openai"),
        ("tools.build_reflection_data", "transformers"),
    ],
)
def test_programs_start_without_what_they_may_not_need(program, package):
    code = f"import sys, {program}; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
