"""One benchmark is one object: what it says is all that loading, scoring and judging go by."""

import pytest

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import (
    Benchmark,
    Form,
    Measures,
    Place,
    Scored,
    by_row,
    gold,
    grouping,
)
from srpo_jax.benchmarks.load import load, scoring_row
from tests.benchmark_helpers import write_rows


def last_word(row):
    word = row["response"].split()[-1]
    return Scored(word, word, word == gold(row))


MINE = Benchmark(
    name="mine",
    counts={2: "all"},
    form=Form(
        "key text picture answer", question=("text",), images=("picture",), id=("key",),
        part="half", asked=lambda row, question: question.upper(),
    ),
    places={"all": Place("me/mine", "all")},
    groups=grouping("colour"),
    official=by_row(last_word),
    order=lambda group: -ord(group[0]),
    measures=Measures(
        entries=lambda rows: {"longest": max(len(row["response"]) for row in rows)},
        page=lambda summary: [f"longest: {summary['longest']}"],
        line=lambda summary: f"longest {summary['longest']}",
    ),
)  # fmt: skip


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "mine", MINE)


def rows(tmp_path):
    shared = {"key": 7, "text": "what?", "picture": "p.png"}
    path = write_rows(
        tmp_path / "mine.jsonl",
        [shared | {"half": "a", "answer": "no", "colour": "blue"},
         shared | {"half": "b", "answer": "yes", "colour": "red"}],
    )  # fmt: skip
    return [scoring_row(record, "I say yes") for record in load("mine", path)]


def test_a_benchmark_is_loaded_by_its_form(mine, tmp_path):
    found = rows(tmp_path)
    assert [row["id"] for row in found] == ["7_a", "7_b"]
    assert found[0]["question"] == "WHAT?"


def test_a_benchmark_is_scored_by_its_rule_and_shown_in_its_tables(mine, tmp_path):
    scored = scoring.score("mine", rows(tmp_path), "official_rule")
    summary = scoring.accuracies("mine", "official_rule", scored)
    assert (summary["accuracy"], summary["complete"], summary["longest"]) == (50.0, "all", 9)
    assert list(summary["tables"]["colour"]) == ["red", "blue"]
    assert scoring.markdown(summary).endswith("longest: 9\n")


def test_a_table_groups_by_a_field_or_by_a_template_of_fields():
    groups = grouping("skill", set="{set|source}", pair="{source}-{grade}")
    row = {"skill": ["add", 2, "add"], "source": "web", "metadata": {"grade": 7}}
    assert groups(row) == {"skill": ["add", "2"], "set": ["web"], "pair": ["web-7"]}
    assert groups({"set": "mine", "grade": 7}) == {"set": ["mine"]}


def test_every_benchmark_stands_under_its_own_name():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert benchmark.counts and benchmark.form.required and benchmark.places
