"""Whether two expressions are equal, in a worker: exactly where both are exact, else by tolerance.

Values are compared at sixty digits, expressions with variables at fixed points as well.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy as sp

from srpo_jax.rewards.expressions import Tree, Unreadable, read
from srpo_jax.rewards.quantities import EXACT, Tolerance, near

_DIGITS = 60
_SAME_DIGITS = Fraction(1, 10**45)
_NOTHING = Fraction(1, 10**110)  # what rounding leaves of an irrational value that is 0
_POINTS = (1.3, 0.37, 2.7), (0.71, 1.93, 0.29), (19.3, 41.7, 3.1), (-1.19, -0.7, -23.7), (-41.3,)
_ZERO = Fraction(0)
_INEQUALITIES = {"<": sp.Lt, "<=": sp.Le, ">": sp.Gt, ">=": sp.Ge, "!=": sp.Ne}
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!=", "=": "="}
_SETS = {"R": sp.S.Reals, "Z": sp.S.Integers, "N": sp.S.Naturals, "Q": sp.S.Rationals}
_SET_OPERATORS = {r"\cup": sp.Union, r"\cap": sp.Intersection, r"\setminus": sp.Complement}
_CONSTANTS = {"pi": sp.pi, "e": sp.E, "i": sp.I, "infty": sp.oo}
_FUNCTIONS = {"ln": sp.log, "max": sp.Max, "min": sp.Min}
_OPERATORS: dict[str, Callable[..., Any]] = {
    "+": lambda a, b: a + b,
    "mixed": lambda a, b: a + b,
    "-": lambda a, b=None: -a if b is None else a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    ":": lambda a, b: a / b,
    "^": lambda a, b: a**b,
    "root": lambda degree, x: x ** (1 / degree),
    "!": sp.factorial,
    "|": sp.Abs,
    "binom": sp.binomial,
    r"\lfloor": sp.floor,
    r"\lceil": sp.ceiling,
}


def equal(gold: str, predicted: str, *, relative: float = 0.0, decimals: int | None = None) -> bool:
    """Whether two readable answers, in ``$`` or not, say the same.

    May run without end on hostile ones. Unreadable where one cannot be read.
    """
    trees = (read(text.removeprefix("$").removesuffix("$")) for text in (gold, predicted))
    return _Comparison(Tolerance(relative, decimals)).same(*trees)


def warm_up() -> None:
    """Import what sympy imports late, before the clock of a check runs."""
    equal(r"\sqrt{8}x", r"2\sqrt{2}x")
    equal("x<3", r"(-\infty, 3)")


@dataclass(frozen=True)
class _Comparison:
    """Equality of trees under one tolerance."""

    tolerance: Tolerance

    def same(self, gold: Tree, predicted: Tree) -> bool:
        """Whether two trees are the same answer; False where their kinds do not compare."""
        try:
            return gold == predicted or self._same(gold, predicted)
        except (Unreadable, TypeError):
            return False

    def _same(self, gold: Tree, predicted: Tree) -> bool:
        if any(part[0] == "dots" for part in (*_walk(gold), *_walk(predicted))):
            return False  # only the writer knows what an ellipsis stands for
        if not all(_is_equation(tree) for tree in (gold, predicted)):
            gold, predicted = _assigned(gold), _assigned(predicted)
        kinds = gold[0], predicted[0]
        if "unit" in kinds:
            return self._same_units(gold, predicted)
        if kinds == ("rel", "rel"):
            return self._same_relation(gold, predicted)
        listed = kinds == ("list", "list")
        if "rel" in kinds or not listed and (_is_region(gold) or _is_region(predicted)):
            return self._same_region(gold, predicted)
        if "tuple" in kinds:
            return self._same_tuple(gold, predicted)
        if kinds == ("matrix", "matrix"):
            same_rows = map(self._same_elements, gold[1:], predicted[1:])
            return len(gold) == len(predicted) and all(same_rows)
        if ":" in kinds:
            return self._same_ratio(_terms(gold), _terms(predicted))
        golds, answers = _elements(gold), _elements(predicted)
        if len(golds) == len(answers) == 1:
            return self._same_value(golds[0], answers[0])
        return self._same_elements(golds, answers, ordered=_names(golds) != _names(answers))

    def _same_units(self, gold: Tree, predicted: Tree) -> bool:
        """Units that differ make a difference, one that is missing does not."""
        (unit, body), (other, others) = (
            tree[1:] if tree[0] == "unit" else ("", tree) for tree in (gold, predicted)
        )
        if unit == other or ("%" not in (unit, other) and not (unit and other)):
            return self.same(body, others)
        if "%" not in (unit, other):
            return False
        hundred = ("num", Fraction(100), _ZERO)
        scaled = (("*", t, hundred) if u != "%" else t for u, t in ((unit, body), (other, others)))
        return self.same(body, others) or self.same(*scaled)

    def _same_elements(self, golds: Sequence, answers: Sequence, *, ordered: bool = True) -> bool:
        if len(golds) != len(answers) or ordered:
            return len(golds) == len(answers) and all(map(self.same, golds, answers))
        left = list(answers)
        for gold in golds:
            place = next((i for i, answer in enumerate(left) if self.same(gold, answer)), None)
            if place is None:
                return False
            left.pop(place)
        return True

    def _same_tuple(self, gold: Tree, predicted: Tree) -> bool:
        """Points and intervals; a list without brackets is a point in the same order."""
        both = gold[0] == predicted[0]
        golds, answers = (t[3:] if t[0] == "tuple" else _elements(t) for t in (gold, predicted))
        if len(golds) < 2 or (both and gold[1:3] != predicted[1:3]):
            return False
        return self._same_elements(golds, answers)

    def _same_ratio(self, golds: list[Tree], answers: list[Tree]) -> bool:
        """By cross products; a ratio of two is a fraction."""
        if len(answers) == 1 or len(golds) == 1:
            return max(len(golds), len(answers)) == 2 and self._same_value(
                *(("/", *terms) if len(terms) == 2 else terms[0] for terms in (golds, answers))
            )
        crossed = [("*", g, answers[0]) for g in golds], [("*", p, golds[0]) for p in answers]
        return len(golds) == len(answers) and all(map(self._same_value, *crossed))

    # --- relations and sets of numbers ---

    def _same_relation(self, gold: Tree, predicted: Tree) -> bool:
        """Equations up to a factor, inequalities by their solutions or up to a positive factor."""
        if gold[1] == predicted[1] and self._same_elements(gold[2:], predicted[2:]):
            return True
        if len(gold) == len(predicted) == 4 and {*gold[1], *predicted[1]} <= _FLIPPED.keys():
            a, b = (value(tree[2]) - value(tree[3]) for tree in (gold, predicted))
            # "2x = 10" does not yet say what x is.
            solved = any(map(_is_name, predicted[2:])) or not any(map(_is_name, gold[2:]))
            many = len(a.free_symbols) > 1 or not _is_equation(gold)
            factor = _factor(a, b) if solved or many else None
            if factor:
                (operator,) = predicted[1]
                return gold[1][0] == (operator if factor > 0 else _FLIPPED[operator])
        names = [{part for part in _walk(t) if part[0] == "name"} for t in (gold, predicted)]
        inequalities = not (_is_equation(gold) or _is_equation(predicted))
        return inequalities and names[0] == names[1] and self._same_region(gold, predicted)

    def _same_region(self, gold: Tree, predicted: Tree) -> bool:
        golds, answers = (_pieces(_region(tree)) for tree in (gold, predicted))
        return len(golds) == len(answers) and all(
            g[2:] == p[2:] and self._same_number(g[0], p[0]) and self._same_number(g[1], p[1])
            for g, p in zip(golds, answers, strict=True)
        )

    # --- values ---

    def _same_value(self, gold: Tree, predicted: Tree) -> bool:
        steps = _step(gold), _step(predicted)
        pairs = list(_at_points(value(gold), value(predicted)))
        return bool(pairs) and all(self._same_number(*pair, steps) for pair in pairs)

    def _same_number(
        self, a: Any, b: Any, steps: tuple[Fraction, Fraction] = (_ZERO, _ZERO)
    ) -> bool:
        if a == b or a.is_infinite or b.is_infinite:
            return a == b
        (ar, ai), (br, bi) = _parts(a), _parts(b)
        if a.is_Rational and b.is_Rational:
            return near(ar, br, steps, self.tolerance)
        noise = max(_SAME_DIGITS * max(map(abs, (ar, ai, br, bi))), _NOTHING)
        if abs(ai - bi) > noise:
            return False
        return abs(ar - br) <= noise or (abs(ai) <= noise and near(ar, br, steps, self.tolerance))


# --- trees ---


def _walk(tree: Any) -> Iterator[Tree]:
    if isinstance(tree, tuple) and tree:
        yield tree
        for part in tree:
            yield from _walk(part)


def _step(tree: Tree) -> Fraction:
    """The unit of the last digit of a tree that is one decimal, else 0."""
    if tree[0] == "-" and len(tree) == 2:
        return _step(tree[1])
    return tree[2] if tree[0] == "num" else _ZERO


def _is_name(tree: Tree) -> bool:
    """Whether a tree only names something, as the left side of an assignment does."""
    kinds = {part[0] for part in _walk(tree)}
    return "name" in kinds and kinds <= {"name", "*", "const", "tuple", ":"}


def _is_equation(tree: Tree) -> bool:
    return tree[0] == "rel" and set(tree[1]) == {"="}


def _assigned(tree: Tree) -> Tree:
    """What ``x = 5`` or ``2 + 3 = 5`` comes to; other trees as they are."""
    if tree[0] != "rel":
        return tree
    if tree[1] == (r"\in",) and _is_name(tree[2]):
        return tree[3] if tree[3][0] in ("set", "tuple") or _is_region(tree[3]) else tree
    values = [part for part in tree[2:] if not _is_name(part)] or [tree[-1]]
    if not set(tree[1]) <= {"=", "≈"} or len(values) < len(tree) - 3:
        return tree
    about = "≈" in tree[1]
    stated = values[0 if about else -1]
    comparison = _Comparison(Tolerance(0.05)) if about else _Comparison(EXACT)
    if not all(comparison.same(stated, part) for part in values):
        raise Unreadable("an equation that does not hold")
    return stated


def _elements(tree: Tree) -> list[Tree]:
    """The members of a list or set, with both signs of every plus-minus."""
    if tree[0] in ("list", "set"):
        items = tree[2:] if tree[0] == "list" else tree[1:]
        return [x for item in items for x in ([item] if item[0] == "set" else _elements(item))]
    signed = any(part[0] in (r"\pm", r"\mp") for part in _walk(tree))
    return [_signed(tree, sign) for sign in "+-"] if signed else [tree]


def _signed(tree: Any, sign: str) -> Any:
    """A tree with one sign of its plus-minus."""
    if not isinstance(tree, tuple) or not tree:
        return tree
    kind, *parts = (_signed(part, sign) for part in tree)
    if kind in (r"\pm", r"\mp"):
        kind = "+" if (kind == r"\pm") == (sign == "+") else "-"
    return parts[0] if kind == "+" and len(parts) == 1 else (kind, *parts)


def _terms(tree: Tree) -> list[Tree]:
    """The terms of a ratio from left to right."""
    return [*_terms(tree[1]), tree[2]] if tree[0] == ":" else [tree]


def _names(elements: Sequence[Tree]) -> set[Tree]:
    """What a list of equations assigns to, where each assigns to something else."""
    named = [item[2] for item in elements if _is_equation(item)]
    return set(named) if len(set(named)) == len(named) > 1 else set()


# --- sympy ---


def value(tree: Tree, turn: Any = 1) -> Any:
    """The sympy expression of a tree; ``turn`` is what a degree is. Unreadable for other trees."""
    kind, *parts = tree
    if kind == "num":
        return sp.Rational(parts[0].numerator, parts[0].denominator)
    if kind == "name":
        return sp.Symbol(parts[0], real=True)
    if kind == "const" and parts[0] in _CONSTANTS:
        return _CONSTANTS[parts[0]]
    if kind == r"\degree":
        return value(parts[0], turn) * turn
    if kind == "apply":
        return _applied(*parts)
    if kind == "*" and parts[1][:2] == ("rel", (r"\in",)):  # "(k \in Z)" only says what k is
        return value(parts[0], turn)
    if kind not in _OPERATORS:
        raise Unreadable(f"{kind} is no number")
    values = [value(part, turn) for part in parts]
    if sp.oo in values and (kind, len(values)) != ("-", 1):
        raise Unreadable("infinity in a computation")
    return _OPERATORS[kind](*values)


def _applied(name: str, base: Tree | None, argument: Tree) -> Any:
    arguments = argument[3:] if argument[0] == "tuple" else [argument]
    x = [value(part, sp.pi / 180) for part in arguments]
    if name == "log":
        x.append(value(base) if base else sp.Integer(10))
    name = "a" + name[3:] if name.startswith("arc") else name
    return (_FUNCTIONS.get(name) or getattr(sp, name))(*x)


def _parts(x: Any) -> tuple[Fraction, Fraction]:
    """Real and imaginary part to sixty digits."""
    found: Any = (x if x.is_Rational else sp.N(x, _DIGITS)).as_real_imag()
    real, imaginary = (Fraction(str(sp.Rational(part))) for part in found)
    return real, imaginary


def _at_points(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """Two expressions at fixed points; at negative ones only where both are real."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for numbers in _POINTS if symbols else (_POINTS[0],):
        coordinates = (
            sp.Rational(str(x)) * (7 + k) / 7 for k, x in enumerate(itertools.cycle(numbers))
        )
        at = dict(zip(symbols, coordinates, strict=False))
        left, right = (x.subs(at) for x in (a, b))
        if numbers[0] > 0 or (sp.N(left).is_real and sp.N(right).is_real):
            yield left, right


def _factor(a: Any, b: Any) -> Any:
    """The constant by which ``a`` is a multiple of ``b``; None where there is none."""
    if a.free_symbols != b.free_symbols or not a.free_symbols:
        return None
    found = [sp.N(left / right, _DIGITS) for left, right in _at_points(a, b) if right]
    same = found and all(_Comparison(EXACT)._same_number(x, found[0]) for x in found)
    return found[0] if same and found[0].is_real else None


def _is_region(tree: Tree) -> bool:
    if tree[0] == "list":
        return all(item[0] == "rel" and not _is_equation(item) for item in tree[2:])
    return tree[0] in _SET_OPERATORS or (tree[0] == "const" and tree[1].startswith("set "))


def _region(tree: Tree) -> Any:
    """The set of numbers that a tree describes; Unreadable where it describes none."""
    kind = tree[0]
    if kind in _SET_OPERATORS:
        return _SET_OPERATORS[kind](_region(tree[1]), _region(tree[2]))
    if kind == "tuple" and len(tree) == 5:
        return sp.Interval(value(tree[3]), value(tree[4]), tree[1] == "(", tree[2] == ")")
    if kind == "set":
        return sp.FiniteSet(*map(value, tree[1:]))
    if kind == "const" and _is_region(tree):
        return _SETS[tree[1][4:]]
    if kind == "list":
        return (sp.Union if tree[1] else sp.Intersection)(*map(_region, tree[2:]))
    if kind == "rel" and _INEQUALITIES.keys() >= set(tree[1]):
        pairs = zip(tree[1], map(value, tree[2:]), map(value, tree[3:]), strict=False)
        return sp.And(*(_INEQUALITIES[name](a, b) for name, a, b in pairs)).as_set()
    raise Unreadable(f"{kind} is no set of numbers")


def _pieces(region: Any) -> list[tuple[Any, Any, bool, bool]]:
    """The intervals of a set of real numbers in order, points as intervals of no length."""
    if isinstance(region, sp.Union):
        return sorted((p for part in region.args for p in _pieces(part)), key=lambda p: sp.N(p[0]))
    if isinstance(region, sp.FiniteSet):
        return [(x, x, False, False) for x in sorted(region, key=sp.N)]
    if region == sp.S.EmptySet:
        return []
    if region.is_Interval or region == sp.S.Reals:
        return [(region.inf, region.sup, bool(region.left_open), bool(region.right_open))]
    return [(sp.Symbol(str(region)), sp.oo, True, True)]
