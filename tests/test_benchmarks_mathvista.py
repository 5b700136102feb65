"""MathVista's rule: shortcuts of extraction, normalisation, and published results."""

import time

import pytest
from rapidfuzz.distance import Levenshtein

from srpo_jax.benchmarks import mathvista
from srpo_jax.benchmarks.common import RowError
from tests.benchmark_helpers import parity_rows


def choice_row(extraction=None, response="", choices=("cat", "dog", "bird"), answer="dog"):
    return {
        "question_type": "multi_choice", "answer_type": "text", "choices": list(choices),
        "answer": answer, "response": response, "precision": None, "extraction": extraction,
    }  # fmt: skip


def number_row(kind, extraction=None, response="", answer="5", precision=None):
    return {
        "question_type": "free_form", "answer_type": kind, "choices": None, "answer": answer,
        "response": response, "precision": precision, "extraction": extraction,
    }  # fmt: skip


def outcome(row):
    return mathvista.official(row)


@pytest.mark.parametrize(
    ("extraction", "option"),
    [
        ("B", "dog"),
        ("(B)", "dog"),
        ("(b) dog", "dog"),
        ("The answer is (C), not (B)", "bird"),
        ("dog", "dog"),
        ("  B ", "dog"),
        ("b", "cat"),  # a small letter is only text: nearest by edit distance, the first of equals
        ("D", "cat"),
        ("B.", "cat"),
        ("dogs", "dog"),
        ("birdy", "bird"),
        ("(Z)", "cat"),
        ("", "cat"),
        ("N/A", "cat"),
        ("（B）", "cat"),  # full-width brackets are no brackets
    ],
)
def test_every_extraction_names_an_option(extraction, option):
    assert outcome(choice_row(extraction)).prediction == option


@pytest.mark.parametrize(
    ("extraction", "prediction"),
    [("5", "5"), ("5.0", "5"), ("5.9", "5"), ("-7.5", "-7"), (" 5 ", "5"), ("1e3", "1000"),
     ("5 cm", None), ("1,000", None), ("", None), ("five", None), ("nan", None), ("inf", None),
     ("50%", None), ("５", "5")],
)  # fmt: skip
def test_integers_are_cut_off(extraction, prediction):
    assert outcome(number_row("integer", extraction)).prediction == prediction


@pytest.mark.parametrize(
    ("extraction", "precision", "prediction"),
    [("1.25", 1, "1.2"), ("1.26", 1, "1.3"), ("1", 2, "1.0"), ("1.234", 2, "1.23"),
     ("1.234", 2.0, "1.23"), ("1.2 m", 1, None), ("", 1, None)],
)  # fmt: skip
def test_floats_are_rounded_to_the_precision(extraction, precision, prediction):
    row = number_row("float", extraction, precision=precision)
    assert outcome(row).prediction == prediction


def test_lists_are_compared_as_text():
    assert outcome(number_row("list", "[1, 2]", answer="[1, 2]")).correct
    assert not outcome(number_row("list", "[1,2]", answer="[1, 2]")).correct


def test_a_verdict_is_equality_of_text():
    assert outcome(number_row("float", "1.2", answer="1.2", precision=1)).correct
    assert not outcome(number_row("float", "1.2", answer="1.20", precision=1)).correct
    assert not outcome(number_row("integer", "five", answer="5")).correct


@pytest.mark.parametrize(
    ("row", "extraction"),
    [
        (choice_row(response=""), ""),
        (choice_row(response="dog"), "dog"),
        (choice_row(response='The answer is "dog". Yes.'), "dog"),
        (number_row("integer", response=" 5 "), "5"),
        (number_row("float", response="5", precision=1), "5.0"),
        (number_row("list", response='The answer is "[1, 2]".'), "[1, 2]"),
    ],
)
def test_shortcuts_of_the_extraction(row, extraction):
    assert outcome(row).extraction == extraction


@pytest.mark.parametrize(
    "row",
    [
        choice_row(response="It is (B)."),
        choice_row(response="I cannot tell."),
        number_row("integer", response="5.0"),
        number_row("integer", response="There are 5."),
        number_row("float", response="1.2 m", precision=1),
    ],
)
def test_where_the_official_extraction_is_a_models_there_is_no_answer(row):
    assert outcome(row).no_answer == mathvista.NEEDS_MODEL
    assert outcome(row).prediction is None
    assert not outcome(row).correct


def test_missing_fields_are_named():
    with pytest.raises(RowError, match="question_type"):
        outcome({"answer": "5", "response": "5"})
    with pytest.raises(RowError, match="precision"):
        outcome(number_row("float", "1.2"))
    with pytest.raises(RowError, match="choices"):
        outcome(choice_row("B", choices=()))
    with pytest.raises(RowError, match="answer"):
        outcome(choice_row("B") | {"answer": None})


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
     ("abcdef", "abcdef", 0), ("abc", "cba", 2), ("x" * 70, "y" * 80, 80),
     ("None of the options", "135°", 19), ("Sunday", "Saturday", 3), ("ab", "ba", 2)],
)  # fmt: skip
def test_edit_distance(a, b, distance):
    assert Levenshtein.distance(a, b) == distance
    assert Levenshtein.distance(b, a) == distance


def test_the_tables_are_the_official_keys():
    row = {
        "question_type": "free_form", "answer_type": "integer",
        "metadata": {"task": "math word problem", "skills": ["algebraic reasoning", "arithmetic"]},
    }  # fmt: skip
    assert mathvista.BENCHMARK.groups(row) == {
        "question_type": ["free_form"],
        "answer_type": ["integer"],
        "task": ["math word problem"],
        "skills": ["algebraic reasoning", "arithmetic"],
    }


def test_long_extractions_are_cheap():
    start = time.process_time()
    assert outcome(choice_row("x" * 10**6)).prediction == "cat"
    assert outcome(choice_row("bird " * 200_000)).prediction == "bird"
    assert outcome(number_row("integer", "9" * 10**6)).prediction is None
    assert time.process_time() - start < 20


def test_published_results_are_reproduced_where_the_official_code_still_gives_them():
    rows = parity_rows("mathvista")
    scored = mathvista.BENCHMARK.official(rows, None)
    differing = [
        row["id"]
        for row, result in zip(rows, scored, strict=True)
        if (row["prediction"], row["correct"]) != (result.prediction, result.correct)
    ]
    assert differing == [row["id"] for row in rows if not row["recheck_same"]]
