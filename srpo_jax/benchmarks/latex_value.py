r"""The number that a LaTeX answer comes to where MathVision evaluates it.

MathVision turns an answer into a sympy expression without evaluating it, prints that and runs the
print as Python with the names of ``math``. What has a value is decided by that detour: names have
none, nor have infinity, ``\ln`` (printed with E), |x|, ceilings and secants, which ``math`` lacks;
and sympy's printer drops brackets in some negated quotients (see ``_product``). Here the tree is
evaluated with the same outcome and bounded work.
"""

import math
from collections.abc import Callable
from fractions import Fraction

from srpo_jax.benchmarks.latex_tokens import LatexError
from srpo_jax.benchmarks.latex_tree import Tree, parse

MAX_BITS = 400_000  # of an integer; a larger one counts as having no value
_MAX_FACTORIAL = 20_000

Number = int | float

_FUNCTIONS: dict[str, Callable] = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "sinh": math.sinh, "cosh": math.cosh,
    "tanh": math.tanh, "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan,
    "arsinh": math.asinh, "arcosh": math.acosh, "artanh": math.atanh, "arcsinh": math.asinh,
    "arccosh": math.acosh, "arctanh": math.atanh, "floor": math.floor,
}  # fmt: skip
_RELATIONS: dict[str, Callable] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def latex_value(text: str) -> Number:
    """The value of a LaTeX answer, as Python computes it: exact for integers, else a float.

    Raises LatexError where it has none.
    """
    try:
        return _value(parse(text))
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise LatexError(str(error)) from None


def _value(tree: Tree) -> Number:
    name, *operands = tree
    if name == "number":
        value = operands[0]
        return value.numerator if value.denominator == 1 else value.numerator / value.denominator
    if name == "pi":
        return math.pi
    if name == "name":
        raise LatexError(f"{operands[0]} has no value")
    if name == "=" and operands[0][0] == "name":  # x = 5 is 5
        return _value(operands[1])
    if name == "exp":
        return _exponential(operands[0])
    if name in ("mul", "div") or (name == "neg" and _number(tree) is None):
        return _product(_factors(tree))
    if name == "sub" and _number(operands[1]) is None:
        return _value(operands[0]) + _value(("neg", operands[1]))
    values = [_value(operand) for operand in operands]
    result = _operation(name, values)
    if isinstance(result, complex):
        raise LatexError("a complex number")
    return result


def _operation(name: str, values: list[Number]) -> Number:
    match name, values:
        case "add", [a, b]:
            return a + b
        case "sub", [a, b]:
            return a - b
        case "neg", [a]:
            return -a
        case "pow", [a, b]:
            return _power(a, b)
        case "root", [a, r]:
            return math.sqrt(a) if r == 2 else a ** (1 / r)
        case "factorial", [a]:
            if isinstance(a, int) and a > _MAX_FACTORIAL:
                raise LatexError("too large")
            return math.factorial(a)
        case "binom", [int(n), int(k)] if n < MAX_BITS**0.5:
            return math.comb(n, k)
        case "log", [a]:
            return math.log(a, 10)
        case "log", [a, b]:
            return math.log(a, b)
    if name in _RELATIONS:
        return _RELATIONS[name](*values)
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](*values)
    raise LatexError(f"{name} has no value")


def _number(tree: Tree) -> Fraction | None:
    """The number that a tree is as it stands, with its signs; None for any other."""
    if tree[0] == "number":
        return tree[1]
    inner = _number(tree[1]) if tree[0] == "neg" else None
    return None if inner is None else -inner


def _factors(tree: Tree) -> list[tuple[Tree, bool]]:
    """(operand, whether it divides) of a product, flat as far as sympy holds it flat."""
    name, *operands = tree
    if name == "div":
        return [(operands[0], False), (operands[1], True)]
    if name == "mul":
        return _factors(operands[0]) + _factors(operands[1])
    if name == "neg" and _number(tree) is None:
        return [(("number", Fraction(-1)), False), *_factors(operands[0])]
    return [(tree, False)]


def _product(factors: list[tuple[Tree, bool]]) -> Number:
    """The value of a product, as Python reads sympy's print of it.

    That print starts with a negative number in some products, and then a sole divisor loses its
    brackets: -1/(2 sqrt(3)) comes out as -1/2*sqrt(3), -7/0.5 as -7/1/2.
    """
    top = 1
    for tree, divides in factors:
        if not divides:
            value = _value(tree)
            _bound(top, value)
            top = top * value
    divisors = [tree for tree, divides in factors if divides]
    if not divisors:
        return top
    numbers = [None if divides else _number(tree) for tree, divides in factors]
    if len(divisors) == 1 and numbers[0] is not None and numbers[0] < 0:
        divisor = divisors[0]
        number = _number(divisor)
        if number is not None and number > 0:
            return top / number.numerator / number.denominator
        parts = _factors(divisor)
        if len(parts) > 1 and any(n is not None for n in numbers[1:]) and not _is_negative(parts):
            return _product_after(top, parts)
    bottom = 1
    for tree in divisors:
        value = _value(tree)
        _bound(bottom, value)
        bottom = bottom * value
    return top / bottom


def _is_negative(factors: list[tuple[Tree, bool]]) -> bool:
    first = _number(factors[0][0])
    return first is not None and first < 0


def _product_after(top: Number, factors: list[tuple[Tree, bool]]) -> Number:
    """top/a*b/(c*d) for the product a*b/(c*d), without the brackets around the whole of it."""
    first, *others = [tree for tree, divides in factors if not divides]
    value = top / _value(first)
    for tree in others:
        value = value * _value(tree)
    for tree in (tree for tree, divides in factors if divides):
        value = value / _value(tree)
    return value


def _bound(a: Number, b: Number) -> None:
    """LatexError where a product of two integers would be too large."""
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() + b.bit_length() > MAX_BITS:
        raise LatexError("too large")


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0
    if whole and base.bit_length() * exponent > MAX_BITS:
        raise LatexError("too large")
    return base**exponent


def _exponential(exponent: Tree) -> Number:
    """sympy evaluates exp(0) and exp(1) at once: 1, and E, which is no Python name."""
    if exponent == ("number", Fraction(0)):
        return 1
    if exponent == ("number", Fraction(1)):
        raise LatexError("E has no value")
    return math.exp(_value(exponent))
