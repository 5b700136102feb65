"""MathVerse (ZrrSkywalker/MathVerse, evaluation/): judged by a language model, in two stages.

Without a judge only the official quick match exists: the given extraction must equal the gold, as
text. A row without a given extraction has no answer by rule.
"""

from srpo_jax.benchmarks.common import (
    Groups,
    Row,
    Scored,
    each,
    field,
    given_extraction,
    gold,
)

NAME = "mathverse"
COUNTS = {3940: "testmini", 788: "testmini, one version"}
NEEDS_MODEL = "MathVerse's extraction is a language model's; by rule only a given one is matched"


def official(rows: list[Row], pool=None) -> list[Scored]:
    """The quick match of each row."""
    return each(_official, rows)


def groups(row: Row) -> Groups:
    """The official tables: subjects, subfields of a subject, versions of the problems."""
    subject, subfield = field(row, "subject"), field(row, "subfield")
    tables: Groups = {}
    if subject is not None:
        tables["subject"] = [str(subject)]
        if subfield is not None:
            tables["subfield"] = [f"{subject}-{subfield}"]
    version = field(row, "problem_version")
    if version is not None:
        tables["problem_version"] = [str(version)]
    return tables


def _official(row: Row) -> Scored:
    extraction = given_extraction(row)
    if extraction is None:
        return Scored(None, None, False, NEEDS_MODEL)
    text = str(extraction)
    return Scored(text, text, text == gold(row))
