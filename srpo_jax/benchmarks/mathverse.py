"""MathVerse (ZrrSkywalker/MathVerse, evaluation/): judged by a language model, in two stages.

Without a judge only the official quick match exists: the given extraction must equal the gold, as
text. A row without a given extraction has no answer by rule.
"""

from srpo_jax.benchmarks import common
from srpo_jax.benchmarks.judge.flows import extract_and_compare, is_same, question

NEEDS_MODEL = "MathVerse's extraction is a language model's; by rule only a given one is matched"


def official(row: common.Row) -> common.Scored:
    """The quick match."""
    extraction = row.get("extraction")
    if extraction is None:
        return common.Scored(None, None, False, NEEDS_MODEL)
    text = str(extraction)
    return common.Scored(text, text, text == common.gold(row))


async def judged(row: common.Row, golds: list[str], ask: common.Ask) -> common.Scored:
    """The official two stages: the model extracts, then says yes or no."""

    async def same(text: str) -> bool:
        values = {"question": question(row), "gold": golds[0], "extraction": text}
        return text == golds[0] or await is_same(ask, "mathverse_judge", values)

    return await extract_and_compare(row, ask, "mathverse_extract", {}, same)


BENCHMARK = common.Benchmark(
    name="mathverse",
    counts={3940: "testmini", 788: "testmini, one version"},
    form=common.Form(
        "sample_index|id problem_version question image answer question_type",
        question=("query_cot", "query_wo", "question"),
        id=("sample_index", "id"),
    ),
    places={"testmini": common.Place("AI4Math/MathVerse", "testmini", ("testmini",))},
    groups=common.grouping(
        "subject", subfield="{subject}-{subfield}", problem_version="{problem_version}"
    ),
    official=common.by_row(official),
    judge=judged,
)
