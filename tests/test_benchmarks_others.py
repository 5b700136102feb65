"""The rules of EMMA, OlympiadBench, We-Math and MathVerse, and number words."""

import time

import pytest

from srpo_jax.benchmarks import emma, mathverse, olympiadbench, wemath
from srpo_jax.benchmarks.common import EMPTY, RowError
from srpo_jax.benchmarks.word_numbers import word_number
from srpo_jax.rewards.verifier import Verifier

# ------------------------------------------------------------------------------------------ EMMA


def emma_right(response, answer, options=()):
    row = {"response": response, "answer": answer, "options": list(options)}
    return emma.official(row).correct


@pytest.mark.parametrize(
    ("response", "extraction"),
    [
        ("b", "B"),
        ("B: because", "B"),
        ("B. because", "B"),
        (" 12.5 ", "12.5"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{ (C) cat }}", "(C) cat"),
        (r"\boxed{\boxed{4}}", r"\boxed{4}"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("The correct answer is\n D.", "d"),
        ("The final answer is: x. The answer is y", ": x"),
        ("Answer: seven\nbye", "seven"),
        ("I cannot help.", ""),
        ("（B）", ""),
    ],
)
def test_emma_extraction(response, extraction):
    assert emma.extract(response) == extraction


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{b}", "B"),
        (r"\boxed{Dog}", "B"),
        (r"\boxed{two}", "2"),
        (r"\boxed{there are two of them}", "2"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{0.501}", "0.5"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{\ln(e)}", "1"),
        (r"\boxed{-\frac{1}{2\sqrt{3}}}", r"-\frac{\sqrt{3}}{6}"),
    ],
)
def test_emma_answers_that_are_right(response, answer):
    assert emma_right(response, answer, ["cat", "dog"] if answer == "B" else [])


@pytest.mark.parametrize(
    ("response", "answer"),
    [(r"\boxed{0.52}", "0.5"), (r"\boxed{x}", "y"), ("", "5"), ("no idea", "5"),
     (r"\boxed{3 or 4}", "4"), (r"\boxed{9^{9^{9^9}}}", "1"), (r"\boxed{5 cm}", "5")],
)  # fmt: skip
def test_emma_answers_that_are_wrong(response, answer):
    assert not emma_right(response, answer)


def test_emma_says_where_there_is_no_response():
    assert emma.official({"response": "", "answer": "5"}).no_answer == EMPTY


@pytest.mark.parametrize(
    ("words", "number"),
    [("two", 2), ("twenty-one", 21), ("one hundred and five", 105), ("two thousand three", 2003),
     ("three million", 3_000_000), ("two point five", 2.5), ("112", 112), ("a hundred", 100),
     ("cat", None), ("", None), ("two thousand thousand", None), ("thousand million", None)],
)  # fmt: skip
def test_number_words(words, number):
    assert word_number(words) == number


# --------------------------------------------------------------------------------- OlympiadBench


@pytest.fixture(scope="module")
def pool():
    with Verifier(2, 20, modules=olympiadbench.WORKER_MODULES) as out:
        yield out


OLYMPIAD_RIGHT = [
    ("5", r"\boxed{5}", None),
    ("5", "So the final answer is 5.", None),
    ("$5$", "所以最终答案是$5$。", None),
    ("5", "long proof\n\nThus $5$", None),
    ("1,2", r"\boxed{2,1}", None),
    ("1,2", r"\boxed{1} and \boxed{2}", None),
    (r"\pm 3", r"\boxed{3,-3}", None),
    (r"\frac{1}{2}", r"\boxed{0.5}", None),
    ("50", r"\boxed{50%}", None),
    ("50", r"\boxed{0.5}", None),  # percent
    ("x=2", r"\boxed{2}", None),
    (r"x^2-1", r"\boxed{(x-1)(x+1)}", None),
    ("2x+y=1", r"\boxed{4x+2y=2}", None),
    ("(1,2]", r"\boxed{(1,2]}", None),
    (r"[\frac{1}{2},3)", r"\boxed{[0.5,3)}", None),
    (r"(0,1)\cup(2,3)", r"\boxed{(0,1.0)\cup(2,3)}", None),
    ("5.00", r"\boxed{5.04}", "0.05"),
    ("1,2", r"\boxed{1.04,2.2}", "0.05,0.3"),
    ("30^\\circ", r"\boxed{30}", None),
    ("1，2", r"\boxed{1,2}", None),  # full-width comma
    ("能", r"\boxed{能}", None),
    ("能", r"\boxed{不能}", None),  # words are removed: nothing equals nothing, officially
]
OLYMPIAD_WRONG = [
    ("5", "", None),
    ("5", r"\boxed{6}", None),
    ("5", r"\boxed{5", None),
    ("1,2", r"\boxed{1}", None),
    ("(1,2]", r"\boxed{(1,2)}", None),
    ("x", r"\boxed{y}", None),
    ("5.00", r"\boxed{5.06}", "0.05"),
    ("1,2", r"\boxed{1.04,2.2}", "0.05"),
    ("I refuse", r"\boxed{5}", None),
    ("50", r"\boxed{50\%}", None),  # "50\" is no number
    (r"(0,1)\cup(2,3)", r"\boxed{(0,1) \cup (2,3.0)}", None),  # " " is no bracket
    ("能", r"\boxed{5}", None),
]


def olympiad(cases, pool):
    rows = [{"final_answer": [g], "response": r, "error": e} for g, r, e in cases]
    return [result.correct for result in olympiadbench.official(rows, pool)]


def test_olympiadbench_answers_that_are_right(pool):
    verdicts = olympiad(OLYMPIAD_RIGHT, pool)
    assert [c for c, right in zip(OLYMPIAD_RIGHT, verdicts, strict=True) if not right] == []


def test_olympiadbench_answers_that_are_wrong(pool):
    verdicts = olympiad(OLYMPIAD_WRONG, pool)
    assert [c for c, right in zip(OLYMPIAD_WRONG, verdicts, strict=True) if right] == []


def test_olympiadbench_takes_the_gold_first(pool):
    # The percent of the gold counts: 1 within 100 errors of 0.01 x 100, but not the other way.
    cases = [("1.0", r"\boxed{100.4}", "0.5"), ("100.4", r"\boxed{1.0}", "0.0045")]
    assert olympiad(cases, pool) == [True, True]
    assert olympiad([("100.4", r"\boxed{1.0}", "0.001")], pool) == [False]


def test_olympiadbench_pathological_answers_cost_their_time_limit():
    with Verifier(2, 2, modules=olympiadbench.WORKER_MODULES) as pool:
        assert olympiad([("5", r"\boxed{5.0}", None)], pool) == [True]  # up and running
        start = time.process_time()
        cases = [
            ("5", r"\boxed{9^{9^{9^9}}}", None),
            ("5", "x" * 10**6, None),
            ("5", r"\boxed{" * 1000, None),
            ("5", r"\boxed{5}", None),
        ]
        assert olympiad(cases, pool) == [False, False, False, True]
        assert time.process_time() - start < 60


def test_olympiadbench_names_what_is_missing(pool):
    with pytest.raises(RowError, match="final_answer") as caught:
        olympiadbench.official([{"final_answer": ["1"], "response": "1"}, {"response": "1"}], pool)
    assert caught.value.index == 1
    with pytest.raises(RowError, match="'error'"):
        olympiadbench.official([{"final_answer": ["1"], "response": "1", "error": "x"}], pool)


# --------------------------------------------------------------------------- We-Math, MathVerse


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("<Answer>: <B>.", "B"),
        ("Answer A, no: Answer: C. cat", "C"),
        ("D", "D"),
        ("Dog", "D"),  # its first letter
        ("Answer: b", None),
        ("Answer: I", None),
        ("The correct one is B", None),
        ("", None),
        ("Answer：B", None),  # a full-width colon stays
    ],
)
def test_wemath_extraction(response, letter):
    assert wemath.extract(response) == letter


def wemath_rows(steps, *verdicts_by_problem):
    rows, correct = [], []
    for number, verdicts in enumerate(verdicts_by_problem):
        parts = [str(i + 1) for i in range(steps)] + ["multi"]
        rows += [{"ID": f"{steps}-{number}", "key": f"{steps}steps_{part}"} for part in parts]
        correct += list(verdicts)
    return rows, correct


def test_wemath_four_dimensions():
    rows, correct = wemath_rows(
        2,
        (True, True, True),  # mastery
        (True, False, True),  # strict: rote; loose: mastery
        (False, False, True),  # rote
        (True, True, False),  # generalization
        (True, False, False),  # knowledge
    )
    metrics = wemath.four_dimensions(rows, correct)
    assert metrics["problems"] == 5
    assert metrics["InsufficientKnowledge"] == {"count": 1, "percent": 20.0}
    assert metrics["InadequateGeneralization"] == {"count": 1, "percent": 20.0}
    assert metrics["strict"]["CompleteMastery"] == {"count": 1, "percent": 20.0}
    assert metrics["strict"]["RoteMemorization"] == {"count": 2, "percent": 66.67}
    assert metrics["loose"]["CompleteMastery"] == {"count": 2, "percent": 40.0}
    assert metrics["loose"]["RoteMemorization"] == {"count": 1, "percent": 33.33}
    assert metrics["strict"]["score"] == pytest.approx(100 * (5 - 0.5 - 2 - 1) / 5)
    assert metrics["loose"]["score"] == pytest.approx(100 * (5 - 0.5 - 1 - 1) / 5)


def test_wemath_problems_of_two_and_three_steps_are_counted_together():
    two, right_two = wemath_rows(2, (True, True, True))
    three, right_three = wemath_rows(3, (True, True, True, False))
    metrics = wemath.four_dimensions(two + three, right_two + right_three)
    assert metrics["problems"] == 2
    assert metrics["InadequateGeneralization"]["count"] == 1
    assert wemath.four_dimensions([{"ID": "1"}], [True]) is None


def test_mathverse_matches_a_given_extraction_only():
    rows = [
        {"answer": "A", "extraction": "A", "response": "B"},
        {"answer": "A", "extraction": "a", "response": "A"},
        {"answer": "A", "response": "A"},
    ]
    scored = mathverse.BENCHMARK.official(rows, None)
    assert [result.correct for result in scored] == [True, False, False]
    assert [result.no_answer for result in scored] == [None, None, mathverse.NEEDS_MODEL]


def test_mathverse_tables():
    row = {"problem_version": "Text Lite", "metadata": {"subject": "Plane", "subfield": "Angle"}}
    assert mathverse.BENCHMARK.groups(row) == {
        "subject": ["Plane"],
        "subfield": ["Plane-Angle"],
        "problem_version": ["Text Lite"],
    }
