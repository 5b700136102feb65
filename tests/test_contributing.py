"""The examples of CONTRIBUTING.md do what the page says, and the changelog knows the version."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

import srpo_jax
from configs import grpo
from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.loader import Loader
from srpo_jax.data.processing import Processor
from srpo_jax.data.readers import OPENERS
from srpo_jax.data.records import open_records
from srpo_jax.data.stream import LoaderConfig
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import SIZES, size_config
from srpo_jax.rewards.answers import Question
from srpo_jax.rewards.grade import grade_sequences
from srpo_jax.rewards.template import TokenText
from srpo_jax.rewards.verifier import Verifier
from tests.data_helpers import make_hf_dir

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = re.compile(
    r"^<!-- example: ([\w ]+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
EXAMPLES = dict(EXAMPLE.findall(PAGE))


def run(name: str) -> dict[str, Any]:
    """What an example defines."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(EXAMPLES[name], f"CONTRIBUTING.md, {name}", "exec"), names)
    return names


def test_every_example_of_the_page_is_run_here():
    assert list(EXAMPLES) == ["reward profile", "benchmark", "model size", "record source"]
    assert PAGE.count("```python") == len(EXAMPLES)


def test_a_reward_profile_grades_responses():
    profile = run("reward profile")["FINAL_ONLY"]
    first = "<think>one and two</think><answer>3</answer>"
    second = "<reflection>Count again.</reflection><think>two and two</think><answer>4</answer>"
    written = [first + second, first]
    with Verifier(workers=1) as verifier:
        verdict, _ = grade_sequences(
            [list(text.encode()) for text in written],
            [Question("4")] * 2,
            token_text=TokenText([bytes([i]) for i in range(256)]),
            verifier=verifier,
            profile=profile,
        )
    assert profile.rewards(verdict).total.tolist() == [1.5, 0.0]


def test_a_benchmark_scores_rows(monkeypatch):
    benchmark = run("benchmark")["BENCHMARK"]
    monkeypatch.setitem(BENCHMARKS, benchmark.name, benchmark)
    rows = [
        {"question": "what?", "answer": "echo", "topic": "sound", "response": "It is an echo."},
        {"question": "what?", "answer": "shadow", "topic": "light", "response": "a mirror"},
    ]
    scored = scoring.score("riddles", rows, "official_rule")
    assert [row["correct"] for row in scored] == [True, False]
    summary = scoring.accuracies("riddles", "official_rule", scored)
    assert (summary["accuracy"], summary["complete"]) == (50.0, "test")
    assert summary["tables"]["topic"]["sound"]["accuracy"] == 100.0


def test_a_model_size_is_a_model_and_a_recipe(monkeypatch):
    example = run("model size")
    for name, size in example["ENTRY"].items():
        monkeypatch.setitem(SIZES, name, size)
    assert size_config("14b", dtype="bfloat16") == example["MODEL"]
    count = sum(math.prod(p.shape) for p in abstract_params(example["MODEL"]).values())
    assert 15e9 < count < 16e9
    config: Any = grpo.get_config("size=14b")
    assert (config.mesh.tensor, config.data.prompts_per_row) == (2, 1)


def test_a_record_source_gives_batches(monkeypatch, tmp_path):
    for suffix, opener in run("record source")["SUFFIX"].items():
        monkeypatch.setitem(OPENERS, suffix, opener)
    path = tmp_path / "train.csv"
    path.write_text("id,problem,answer\na,What is 1 + 1?,2\nb,What is 2 + 2?,4\n")
    encode = PromptEncoder(Processor(make_hf_dir(tmp_path / "hf")))
    config = LoaderConfig(global_batch_size=2, token_budget=2048, shuffle=False)
    batch = next(Loader(open_records(path), encode, config))
    assert [(r.id, r.answer, r.origin) for r in batch.records] == [
        ("a", "2", f"{path}:1"),
        ("b", "4", f"{path}:2"),
    ]
    assert batch.arrays.tokens.shape == (2, 2048) and np.all(batch.arrays.lengths > 10)


def test_the_changelog_starts_with_this_version():
    heading = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heading and heading[1] == srpo_jax.__version__
