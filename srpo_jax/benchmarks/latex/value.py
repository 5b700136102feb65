r"""The number that a LaTeX answer comes to, as MathVision and as EMMA evaluate it.

Both read it with latex2sympy2 (see ``tokens``). EMMA lets sympy evaluate the result.
MathVision prints the unevaluated expression and runs the print as Python with the names of
``math``. What has a value is decided by that detour (``printed``): infinity has none, nor ``\ln``
(printed with E), |x|, ceilings and secants, which ``math`` lacks; nor has "y = 5", because the
parser's table of assignments breaks at the first "dx" (in "indeed", say) that a run meets; and
sympy's printer drops brackets in some negated quotients (see ``_product``). Here the tree is
evaluated with the same outcomes and bounded work. Names have no value in either.

Why no library: on MathVision's 3,040 published rows this agrees with every official verdict, where
latex2sympy2_extended differs on 12 and takes 35 times as long.
"""

import math
import operator
from collections.abc import Callable
from fractions import Fraction

from srpo_jax.benchmarks.latex.tokens import LatexError
from srpo_jax.benchmarks.latex.tree import Tree, parse

MAX_BITS = 400_000  # of an integer; a larger one counts as having no value
_MAX_FACTORIAL = 20_000

Number = int | float
Factors = list[tuple[Tree, bool]]  # (operand, whether it divides)

_FUNCTIONS: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "neg": operator.neg,
    "root": lambda a, r: math.sqrt(a) if r == 2 else a ** (1 / r),
    "log": lambda a, base=10: math.log(a, base),
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "sinh": math.sinh, "cosh": math.cosh,
    "tanh": math.tanh, "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan,
    "arsinh": math.asinh, "arcosh": math.acosh, "artanh": math.atanh, "arcsinh": math.asinh,
    "arccosh": math.acosh, "arctanh": math.atanh, "floor": math.floor,
}  # fmt: skip
_SYMPY_FUNCTIONS: dict[str, Callable] = _FUNCTIONS | {
    "abs": abs,
    "ceil": math.ceil,
    "csc": lambda x: 1 / math.sin(x),
    "sec": lambda x: 1 / math.cos(x),
    "cot": lambda x: 1 / math.tan(x),
    "mod": operator.mod,
    "ln": math.log,
}
_RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def latex_value(text: str, *, printed: bool = True) -> Number:
    """The value of a LaTeX answer: exact for integers, else a float.

    Raises LatexError where it has none.
    """
    try:
        return _Evaluator(printed).value(parse(text))
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise LatexError(str(error)) from None


class _Evaluator:
    """Evaluates trees; ``printed`` as in the module's description."""

    def __init__(self, printed: bool):
        self._printed = printed
        self._functions = _FUNCTIONS | _RELATIONS if printed else _SYMPY_FUNCTIONS

    def value(self, tree: Tree) -> Number:
        name, *operands = tree
        if name == "number":
            exact = operands[0]
            return exact.numerator if exact.denominator == 1 else float(exact)
        if name == "pi":
            return math.pi
        if name == "=" and operands[0] == ("name",) and not self._printed:  # x = 5 is 5
            return self.value(operands[1])
        if name == "exp":
            return self._exponential(operands[0])
        if name in ("mul", "div") or (name == "neg" and _number(tree) is None):
            return self._product(_factors(tree))
        if name == "sub" and _number(operands[1]) is None:
            return self.value(operands[0]) + self.value(("neg", operands[1]))
        result = self._operation(name, [self.value(operand) for operand in operands])
        if isinstance(result, complex):
            raise LatexError("a complex number")
        return result

    def _operation(self, name: str, values: list[Number]) -> Number:
        match name, values:
            case "pow", [a, b]:
                return _power(a, b)
            case "factorial", [int(a)] if a <= _MAX_FACTORIAL:
                return math.factorial(a)
            case "binom", [int(n), int(k)] if n <= 1000:
                return math.comb(n, k)
        if name in self._functions:
            return self._functions[name](*values)
        raise LatexError(f"{name} has no value")

    def _exponential(self, exponent: Tree) -> Number:
        """sympy evaluates exp(0) and exp(1) at once: 1, and E, which is no Python name."""
        if exponent == ("number", Fraction(0)):
            return 1
        if self._printed and exponent == ("number", Fraction(1)):
            raise LatexError("E has no value")
        return math.exp(self.value(exponent))

    def _product(self, factors: Factors) -> Number:
        """The value of a product, as Python reads sympy's print of it.

        That print starts with a negative number in some products, and then a sole divisor loses
        its brackets: -1/(2 sqrt(3)) comes out as -1/2*sqrt(3), -7/0.5 as -7/1/2.
        """
        top = self._times(1, [tree for tree, divides in factors if not divides])
        divisors = [tree for tree, divides in factors if divides]
        if not divisors:
            return top
        if self._printed and len(divisors) == 1 and _is_negative(factors):
            number = _number(divisors[0])
            numbers = [_number(t) for t, divides in factors if not divides]
            has_number = any(n is not None for n in numbers[1:])
            whole = numbers[0] is not None and numbers[0].denominator == 1
            if number is not None and number > 0 and (has_number or whole):
                return top / number.numerator / number.denominator
            parts = _factors(divisors[0])
            if len(parts) > 1 and has_number and not _is_negative(parts):
                return self._divided_by_first(top, parts)
        return top / self._times(1, divisors)

    def _divided_by_first(self, top: Number, factors: Factors) -> Number:
        """top/a*b/(c*d) for the product a*b/(c*d), without the brackets around the whole of it."""
        first, *others = [tree for tree, divides in factors if not divides]
        bottom = self._times(1, [tree for tree, divides in factors if divides])
        number = _number(first)
        if number is None or any(_number(tree) is not None for tree in others):
            return self._times(top / self.value(first), others) / bottom
        # A leading decimal is printed as a fraction around the other factors: 3*sqrt(2)/2.
        return self._times(top / number.numerator, others) / number.denominator / bottom

    def _times(self, product: Number, trees: list[Tree]) -> Number:
        for tree in trees:
            value = self.value(tree)
            if isinstance(product, int) and isinstance(value, int):
                _check_bits(product.bit_length() + value.bit_length())
            product = product * value
        return product


def _number(tree: Tree) -> Fraction | None:
    """The number that a tree is as it stands, with its signs; None for any other."""
    if tree[0] == "number":
        return tree[1]
    inner = _number(tree[1]) if tree[0] == "neg" else None
    return None if inner is None else -inner


def _factors(tree: Tree) -> Factors:
    """The factors of a product, flat as far as sympy holds it flat."""
    name, *operands = tree
    if name == "div":
        return [(operands[0], False), (operands[1], True)]
    if name == "mul":
        return _factors(operands[0]) + _factors(operands[1])
    if name == "neg" and _number(tree) is None:
        return [(("number", Fraction(-1)), False), *_factors(operands[0])]
    return [(tree, False)]


def _is_negative(factors: Factors) -> bool:
    """Whether a product starts with a negative number."""
    first = _number(factors[0][0])
    return first is not None and first < 0


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        _check_bits(base.bit_length() * exponent)
    return base**exponent


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise LatexError("too large")
