"""LaTeX answers by value: the language of latex2sympy2 and the two ways of evaluating it."""

import math
import time

import pytest

from srpo_jax.benchmarks.latex.tokens import LatexError
from srpo_jax.benchmarks.latex.value import latex_value

# Values were taken from latex2sympy2 1.9.1 with its output run as Python, as MathVision does.
VALUES = {
    r"2\sqrt{13}": 7.21,
    r"\frac{1}{2}": 0.5,
    r"\dfrac{\sqrt{6}}{6}": 0.41,
    r"\sqrt[3]{8}": 2.0,
    r"4\frac{2}{7}": 1.14,  # no mixed numbers: a product
    r"1/2\pi": 0.16,  # factors bind closer than the slash
    r"12/2/3": 2.0,
    r"2^3^2": 64,
    r"-2^2": -4,
    r"(-2)^2": 4,
    r"2^{-1}": 0.5,
    r"3!!": 720,
    r"2^3!": 40320,
    r"\frac{3^{1008}-1}{3^{1009}}": 0.33,  # integers are exact
    r"\binom{5}{2}": 10,
    r"1:2": 0.5,
    r"50\%": 0.5,
    r"1,234.5": 1234.5,
    r"1,2345": 6170,  # a comma and three digits, then a factor
    r"2<3": 1,
    r"5\leq6": 1,
    r"\log_{2}(8)": 3.0,
    r"\log 100": 2.0,
    r"\sin 2 \times 3": -0.28,  # without parentheses the whole product is the argument
    r"\sin(2)^2": 0.83,
    r"\sin^{2}(2)": 0.83,
    r"\sin^{-1}(1)": 1.57,
    r"\sin 2\cos 3": -0.9,
    r"e^{2}": 7.39,
    r"e^0": 1,
    r"\lfloor2.5\rfloor": 2,
    r"\left(3\right)": 3,
    r"[5]": 5,
    r"--5": 5,
    r"2-3(-4)": 14,
    r"(3)_{2}": 6.0,
    r"$4 \pi$": 12.57,
    r"3\quad 4": 12,
}


@pytest.mark.parametrize("text", VALUES)
def test_expressions_have_their_value(text):
    assert round(latex_value(text), 2) == VALUES[text]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4.therefore", 4),
        ("18.since%", 18),
        (r"10}therefore", 10),
        ("5_3", 5),
        (r"5\to6", 5),
        (r"5\\6", 5),
        ("3&4", 3),
        ("5triangles", 5),  # the keyword "tr" ends it
        ("7floors", 7),
        ("12cols", 12),
    ],
)
def test_what_cannot_go_on_a_whole_expression_is_ignored(text, value):
    assert latex_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "2kg", "5e", "e", r"\infty", r"\ln 2", "|3|", r"\lceil2.5\rceil", r"\sec 1",
        r"\frac12", r"\sqrt3", r"\frac{360}7", "2+", "(3", "5^", "5^-1", "1,2", "5;", "[1,2]",
        "x=5",
        "5`", "5%", "30°", r"10\sqrt{2}" + "\\", "5cm", r"\text{five}", r"\sqrt{-4}",
        r"(-8)^{\frac{1}{3}}", r"\frac{1}{0}", "2.5!", r"5\mod3", r"\int_0^1 x", r"\max(1,2)",
        "-4310^{\\circ",
    ],
)  # fmt: skip
def test_what_the_official_code_cannot_evaluate_has_no_value(text):
    with pytest.raises(LatexError):
        round(latex_value(text), 2)


def test_negated_quotients_lose_brackets_as_in_the_official_print():
    root3 = math.sqrt(3)
    assert latex_value(r"\frac{1}{2\sqrt{3}}") == pytest.approx(1 / (2 * root3))
    assert latex_value(r"-\frac{1}{2\sqrt{3}}") == pytest.approx(-1 / 2 * root3)
    assert latex_value(r"9-\frac{3}{2\sqrt{3}}") == pytest.approx(9 - 3 / 2 * root3)
    assert latex_value("-7/0.5") == pytest.approx(-7 / 1 / 2)
    assert latex_value(r"-\frac{\pi}{2\sqrt{3}}") == pytest.approx(-math.pi / (2 * root3))
    assert latex_value(r"-\frac{1}{2\sqrt{3}}", printed=False) == pytest.approx(-1 / (2 * root3))


def test_evaluated_by_sympy_more_functions_have_values():
    assert latex_value(r"\ln(e)", printed=False) == pytest.approx(1)
    assert latex_value("|-3|", printed=False) == 3
    assert latex_value("x=5", printed=False) == 5
    assert latex_value(r"\lceil2.5\rceil", printed=False) == 3
    assert latex_value(r"\cot(1)", printed=False) == pytest.approx(1 / math.tan(1))


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}", "9^9^9^9^9^9^9^9^9^9", "100000!!", "(" * 10**6, "{" * 10**6 + "}" * 10**6,
        "9" * 10**6, "2" + "+2" * 50_000 + "^", r"\frac{" * 10**5, "-" * 10**5 + "5",
        "2^{400000}2^{400000}",
    ],
)  # fmt: skip
def test_work_is_bounded(text):
    start = time.process_time()
    with pytest.raises(LatexError):
        latex_value(text)
    assert time.process_time() - start < 10
