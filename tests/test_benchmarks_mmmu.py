"""The rules of MMMU-Pro and MMMU: letters, option texts, open answers, random draws."""

import random

import pytest

from srpo_jax.benchmarks import mmmu, mmmu_pro
from srpo_jax.benchmarks.common import RowError
from tests.benchmark_helpers import parity_rows, without

FRUIT = ["apple pie", "banana split", "cherry tart", "date cake"]


def pro(response, answer="B", choices=FRUIT):
    return mmmu_pro.official({"response": response, "answer": answer, "choices": choices})


def multiple(response, choices=FRUIT, **fields):
    row = {"response": response, "answer": "B", "choices": choices} | fields
    return mmmu.official([row | {"question_type": "multiple-choice"}])[0]


def is_right(response, answer) -> bool:
    row = {"response": response, "answer": answer, "question_type": "open"}
    return mmmu.official([row])[0].correct


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("Answer: $B$", "B"),
        ("Answer: (B).", "B"),
        ("Answer: A\nNo. Answer: B", "B"),
        ("It is A. Answer: Banana", "B"),  # a letter inside a word counts after "Answer:"
        ("Answer: A or B, so (B)", "B"),  # not just one letter: the whole response is read
        ("(A) is wrong, (B) is right", "B"),
        ("(B) is right, (A) is wrong", "A"),  # the last in the text
        ("B is the one", "B"),
        ("the one is B", "B"),
        ("B", "B"),
        ("'B.'", "B"),
        ("Thus:B.because", "B"),
        ("OMB is here", "B"),  # "B " without a space before
        ("I would go for the banana split today, please", "B"),
        ("apple pie is nice, but I take the Banana Split", "B"),
        ("A B C or D", "D"),
        ("XA or XB", "A"),  # none stands alone: the first letter
    ],
)
def test_mmmu_pro_reads_a_letter(response, letter):
    scored = pro(response)
    assert scored.prediction == letter
    assert scored.correct == (letter == "B")


@pytest.mark.parametrize(
    "response",
    ["", "yes", "the banana split", "i cannot help with that request, sorry", "（B）", "b"],
)
def test_mmmu_pro_draws_nothing_at_random(response):
    scored = pro(response)
    assert scored.no_answer == mmmu_pro.DRAWS
    assert scored.prediction is None
    assert not scored.correct


def test_mmmu_pro_takes_an_error_object_as_no_response():
    assert pro({"error": "content filter"}).prediction is None


def test_mmmu_pro_options_may_be_the_text_of_a_list():
    row = {"response": "Answer: J", "answer": "J", "options": str(list("0123456789"))}
    assert mmmu_pro.official(row).correct
    with pytest.raises(RowError, match="not the text of a list"):
        mmmu_pro.official(row | {"options": "['a'"})
    with pytest.raises(RowError, match="needs them"):
        mmmu_pro.official(without(row, "options"))


def test_mmmu_pro_tables_are_domains_and_subjects():
    assert mmmu_pro.groups({"subject": "Music", "setting": "vision"}) == {
        "domain": ["Art and Design"],
        "subject": ["Music"],
        "setting": ["vision"],
    }
    assert mmmu_pro.groups({"id": "validation_Art_Theory_12"})["subject"] == ["Art_Theory"]


def test_mmmu_pro_reproduces_the_official_results_of_a_real_model():
    rows = [row for row in parity_rows("mmmu_pro") if row["deterministic"]]
    scored = mmmu_pro.BENCHMARK.official([without(row, "extraction") for row in rows], None)
    differing = [
        row["id"]
        for row, result in zip(rows, scored, strict=True)
        if (row["extraction"], row["correct"]) != (result.extraction, result.correct)
    ]
    assert len(rows) == 1730
    assert differing == []


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("The answer is B.", "B"),
        ("(A) or (B)", "B"),
        ("A then B then A again", "A"),
        ("I would go for the banana split today, please", "B"),
    ],
)
def test_mmmu_reads_a_letter(response, letter):
    assert multiple(response).prediction == letter
    assert not multiple(response).drawn


@pytest.mark.parametrize("response", ["", "OMB", "B.because", "the banana split"])
def test_mmmu_draws_with_the_official_seed_and_says_so(response):
    scored = multiple(response)
    assert scored.drawn
    assert scored.extraction is None
    assert scored.prediction == random.Random(42).choice("ABCD")


def test_mmmu_draws_in_the_official_order_of_subjects():
    rows = [
        {"id": f"validation_{subject}_1", "response": "", "answer": "A", "choices": FRUIT,
         "question_type": "multiple-choice"}
        for subject in ("Music", "Art", "Accounting")
    ]  # fmt: skip
    generator = random.Random(42)
    drawn = [generator.choice("ABCD") for _ in range(3)]
    assert [result.prediction for result in mmmu.official(rows)] == drawn[::-1]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 5.", "5"),
        ("5.004", "5"),
        ("so x = 1,234.5", "1234.5"),
        ("It is -3.", "-3"),
        ("1.2e3", "1200"),
        ("The answer is Paris, of course.", "paris"),
        ("Therefore it is ratio b", "['ratio a', 'ratio b']"),
        ("first 4\nthe result is 7", "7"),
        ("the capital is x yes", "x"),  # one letter needs a space beside it
        ("it is 50%", "50"),
    ],
)
def test_mmmu_open_answers_that_are_right(response, answer):
    assert is_right(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 15.", "5"),
        ("5.01", "5"),
        ("", "5"),
        ("The answer is London.", "Paris"),
        ("the capital is xyz", "x"),
        ("first 4\nthe result is 7", "4"),  # only what is announced counts
        ("I cannot say", "5"),
    ],
)
def test_mmmu_open_answers_that_are_wrong(response, answer):
    assert not is_right(response, answer)


def test_mmmu_missing_options_are_named():
    with pytest.raises(RowError, match="choices") as caught:
        mmmu.official([{"response": "B", "answer": "B", "question_type": "multiple-choice"}])
    assert caught.value.index == 0
