"""The house stays in order: who may import whom, where third-party code appears, module size."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "srpo_jax"

# A module imports only what stands above it; names in one string share a level's order.
ORDER = """
structs
data.files data.prompts data.images data.records data.vision_arrays data.batching data.processing
data.encoders data.quarantine data.stream data.loader
model.config model.sizes model.layers model.attention model.vision model.text model.qwen2_5_vl
model.hf_table model.hf_write model.hf model.sharding
sampling.logits sampling.slots sampling.sampler
rewards.template rewards.quantities rewards.braces rewards.answers rewards.verifier
rewards.terms rewards.profiles rewards.grade
learn.losses learn.optim learn.grpo learn.state learn.steps
run.settings run.resume run.processes run.checkpoint run.metrics run.guard run.parts run.feed
run.rollout
run.pool run.session run.command
remote.limits remote.protocol remote.replies remote.client remote.batch
reflection.store reflection.settings reflection.teach reflection.duplicates reflection.check
reflection.accept reflection.items reflection.select reflection.drive reflection.batches
reflection.stages reflection.write
benchmarks.common benchmarks.judge.cache benchmarks.judge.client benchmarks.judge.flows
benchmarks.latex.tokens benchmarks.latex.tree benchmarks.latex.value
benchmarks.mathvision benchmarks.mathvista benchmarks.mmmu_pro benchmarks.mmmu
benchmarks.word_numbers benchmarks.emma benchmarks.mathverse benchmarks.wemath benchmarks.mmk12
benchmarks.olympiad_rule benchmarks.olympiadbench benchmarks.all benchmarks.scoring
benchmarks.load benchmarks.both_answers benchmarks.download
report.rates report.quality report.accounting report.table report.html
report.eval_page report.reflection_page
evaluate train_sft train_grpo
""".split()

# Folder or module -> third-party packages that may appear there.
CORE = {"jax", "flax", "optax", "numpy"}
THIRD_PARTY = {
    "structs": CORE,
    "model": CORE | {"safetensors"},
    "data": {
        "numpy",
        "grain",
        "tensorflow_datasets",
        "PIL",
        "transformers",
        "pyarrow",
        "absl",
        "tokenizers",
        "array_record",
    },
    "sampling": CORE,
    "rewards.terms": CORE,
    "rewards.profiles": CORE,
    "rewards": {"numpy", "math_verify", "sympy", "latex2sympy2_extended"},
    "remote": {"openai", "aiohttp", "httpx2"},
    "reflection": {"numpy", "PIL", "jinja2", "transformers"},
    "benchmarks.download": {"datasets"},
    "benchmarks": {"sympy", "jinja2", "rapidfuzz"},
    "report": {"jinja2", "PIL", "numpy"},
    "learn": CORE,
}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, from srpo_jax..."
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_every_module_has_a_place_in_the_order():
    assert set(_modules()) <= set(ORDER), set(_modules()) - set(ORDER)


@pytest.mark.parametrize("name", sorted(_modules()))
def test_a_module_imports_only_modules_above_it(name):
    place = ORDER.index(name)
    inner = {
        n.removeprefix("srpo_jax.") for n in _imports(_modules()[name]) if n.startswith("srpo_jax.")
    }
    for other in ORDER[place:]:
        assert other not in inner, f"{name} imports {other}, which stands at or below it"
    outer = {n.split(".")[0] for n in _imports(_modules()[name])}
    assert not outer & {"tools", "configs", "tests", "torch"}, f"{name} imports {outer}"


@pytest.mark.parametrize("name", sorted(_modules()))
def test_third_party_packages_stay_in_their_place(name):
    allowed = THIRD_PARTY.get(name, THIRD_PARTY.get(name.split(".")[0]))
    if allowed is None:  # entry points and run-time set-up may use all of requirements.txt
        return
    outer = {n.split(".")[0] for n in _imports(_modules()[name])} - {"srpo_jax"}
    third = {n for n in outer if n not in sys.stdlib_module_names}
    assert third <= allowed, f"{name} imports {third - allowed}"


def test_safetensors_is_used_by_the_hf_table_only():
    for name, path in _modules().items():
        if name.startswith("model.") and name != "model.hf":
            assert not any(n.startswith("safetensors") for n in _imports(path)), name


@pytest.mark.parametrize(
    "path",
    sorted(p for d in ("srpo_jax", "tools", "configs") for p in (ROOT / d).rglob("*.py")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_modules_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert text.count("\n") <= 500, f"{path.name} has {text.count(chr(10))} lines"
    assert ast.get_docstring(ast.parse(text)), f"{path.name} has no first-line purpose"


def test_grading_workers_start_without_jax():
    code = "import sys, srpo_jax.rewards.verifier; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("tool", ["score_benchmark", "score_reflections", "download_benchmark"])
def test_tools_that_may_ask_a_judge_start_without_its_client(tool):
    code = f"import sys, tools.{tool}; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_reflection_builder_starts_without_transformers():
    code = "import sys, tools.build_reflection_data; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
