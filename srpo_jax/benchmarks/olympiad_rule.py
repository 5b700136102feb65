r"""OlympiadBench's comparison of two answers (the official ``judge`` program, a rule, no model).

Runs in a worker process: sympy may take for ever.
"""

import contextlib
import io
import math
import re
from functools import cache
from typing import Any

import sympy
from sympy.parsing.latex import _parse_latex_antlr as antlr

from srpo_jax.rewards.braces import braced_spans

# The parser asks for antlr 4.11 by name; its tables are in the format that 4.10 to 4.13 share, and
# requirements.txt has the last one of these.
antlr.version = lambda package: "4.11"

_REPLACED = {
    "\\left": "", "\\right": "", "∶": ":", "，": ",", "$": "", "\\approx": "=", "\\simeq": "=",
    "\\sim": "=", "^\\prime": "'", "^{\\prime}": "'", "^\\circ": "", "%": "",
}  # fmt: skip
_EDGES = "\n$,.:;^_=+`!@#$%^&*~，。"
_BRACE = re.compile(r"(\\boxed\{)|[{}]")  # an escaped brace counts, as in the official code
_FONT = re.compile(r"\\(?:mathrm|mathbf)\{~?([^}]*)\}")
_CHINESE = re.compile(r"[\u4e00-\u9fff]+")
_FORMULA = re.compile(r"\$(.*?)\$")
_DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")
_MAX_EXPONENT = 1000
_SLACK = 1.01


def equal_answers(gold: str, answer: str, *, errors: list[float]) -> bool:
    """Whether an answer gives the gold: all their parts pair off as equal.

    ``errors`` holds the allowed absolute error, one for all parts or one for each.
    """
    try:
        left, right = _prepare(gold), _prepare(answer)
    except ValueError:
        return False
    if left == right:
        return True
    lefts, rights = (_parts(_CHINESE.sub("", text)) for text in (left, right))
    if len(lefts) != len(rights):
        return False
    allowed = errors * len(lefts) if len(errors) <= 1 else list(errors)
    index = -1
    while lefts:
        index = (index + 1) % len(lefts)
        if index >= len(allowed):
            return False
        part, error = lefts[index], allowed[index]
        match = next((other for other in rights if _equal(part, other, error)), None)
        if match is None:
            return False
        lefts.remove(part)
        rights.remove(match)
        allowed.remove(error)
    return True


# ------------------------------------------------------------------------------------ preparation


def _prepare(text: str) -> str:
    """What is compared of a text, with the symbols that do not matter replaced."""
    text = _content(text)
    if "\\in " in text:
        text = text.split("\\in ")[1]
    for old, new in _REPLACED.items():
        text = text.replace(old, new)
    return _FONT.sub(r"\1", text.strip(_EDGES))


def _content(text: str) -> str:
    r"""The contents of all \boxed{}, else the formulas of the last line, else the text.

    ValueError for a box that is not closed.
    """
    boxes = braced_spans(text, _BRACE)
    if any(end is None for _, _, end in boxes):
        raise ValueError("a box that is not closed")
    if boxes:
        return "".join(f"{text[start:end]}," for _, start, end in boxes)
    formulas = _FORMULA.findall(text.strip().split("\n")[-1])
    return "".join(f"{formula}," for formula in formulas) or text


def _parts(text: str) -> list[str]:
    r"""The parts between commas outside of brackets, with each \pm as two parts."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    if start < len(text):
        parts.append(text[start:].strip())
    return [
        part.replace("\\pm", sign) for part in parts for sign in ("+-" if "\\pm" in part else "+")
    ]


# --------------------------------------------------------------------------------------- equality


def _equal(left: str, right: str, error: float) -> bool:
    """Whether two parts are equal as text, intervals, numbers, expressions or equations."""
    if left == right and left:
        return True
    if _is_interval(left) and _is_interval(right):
        try:
            if _same_intervals(left, right, error):
                return True
        except Exception:
            return False
    with contextlib.suppress(ValueError):
        if _same_numbers(float(left), float(right), error):
            return True
    if _DECIMAL.fullmatch(left) and _DECIMAL.fullmatch(right):
        return False  # as expressions they would differ by the same error
    both_equations = "=" in left and "=" in right
    checks = [] if both_equations else [lambda: _same_expressions(left, right, error)]
    for check in [*checks, lambda: _same_equations(left, right)]:
        with contextlib.suppress(Exception):  # of the parser or sympy: not equal in this way
            if check():
                return True
    return False


def _is_interval(text: str) -> bool:
    return text.startswith(("(", "[")) and text.endswith((")", "]"))


def _same_numbers(gold: float, answer: float, error: float) -> bool:
    """Within the error, also where one of the two is in percent."""
    return any(abs(g - answer) <= error * _SLACK for g in (gold / 100, gold, gold * 100))


def _same_expressions(left: str, right: str, error: float) -> bool:
    """Equality of what stands behind the first "=" of each, by sympy."""
    left, right = (text.split("=")[1] if "=" in text else text for text in (left, right))
    a, b = (sympy.sympify(_parse(text.strip())) for text in (left, right))
    if a == b:
        return True
    pi = _parse("\\pi")
    a, b = a.subs(pi, math.pi), b.subs(pi, math.pi)
    if a.has(sympy.Symbol) != b.has(sympy.Symbol):
        return False
    if not a.has(sympy.Symbol):
        computable = _is_computable(a) and _is_computable(b)
        return computable and bool(abs(a.evalf() - b.evalf()) <= error * _SLACK)
    return bool(abs(sympy.simplify(a - b).evalf()) < 1e-3)


def _is_computable(expression: Any) -> bool:
    """Whether an expression is no power, or one of numbers with a bearable exponent."""
    if not isinstance(expression, sympy.Pow):
        return True
    base, exponent = expression.as_base_exp()
    numeric = base.is_number and exponent.is_number
    return bool(numeric and not abs(exponent.evalf()) > _MAX_EXPONENT)


def _same_equations(left: str, right: str) -> bool:
    """Whether one equation, with all on one side, is a whole multiple of the other."""
    sides = []
    for text in (left, right):
        a, b = text.split("=")
        sides.append(sympy.simplify(_parse(a) - _parse(b)))
    ratios = sympy.simplify(sides[0] / sides[1]), sympy.simplify(sides[1] / sides[0])
    return any(ratio.is_Integer and ratio != 0 for ratio in ratios)


def _same_intervals(left: str, right: str, error: float) -> bool:
    """Unions of intervals with the same brackets and equal ends."""
    lefts, rights = left.split("\\cup"), right.split("\\cup")
    if len(lefts) != len(rights):
        return False
    for a, b in zip(lefts, rights, strict=True):
        if (a[0], a[-1]) != (b[0], b[-1]):
            return False
        ends = zip(a.strip("[]()").split(","), b.strip("[]()").split(","), strict=False)
        if not all(_same_expressions(*pair, error) for pair in ends):
            return False
    return True


def warm_up() -> None:
    """Load sympy's parser, before a worker's first comparison is timed."""
    _equal("\\frac{1}{2}x=1", "2x=1", 1e-8)


@cache
def _parse(text: str) -> Any:
    """sympy's tree of a LaTeX text."""
    with contextlib.redirect_stdout(io.StringIO()):  # a note on the version, each time
        return antlr.parse_latex(text)
