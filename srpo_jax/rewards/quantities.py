"""Numbers with units, compared exactly or within a tolerance, before any symbolic mathematics."""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from srpo_jax.rewards.expressions import Tree, tree_of

_MAX_CHARS = 120
_DIGITS_SHOWN = 6  # significant digits with which a decimal may stand for another exact value
_FLOAT_NOISE = Fraction(1, 10**12)  # relative: what arithmetic in double precision leaves


@dataclass(frozen=True)
class Quantity:
    """One number: its exact value, how it was written, and its unit."""

    value: Fraction
    step: Fraction = Fraction(0)  # the unit of a decimal's last digit, 0 for an exact value
    percent: bool = False
    unit: str = ""  # canonical, "" where none was given


@dataclass(frozen=True)
class Tolerance:
    """How far from the gold a right number may be; exact by default.

    ``relative`` is a share of the gold; ``decimals`` allows half a unit of that decimal.
    ValueError for what is no such number.
    """

    relative: float = 0.0
    decimals: int | None = None

    def __post_init__(self):
        number = isinstance(self.relative, int | float) and not isinstance(self.relative, bool)
        if not number or not 0 <= self.relative < 1:
            raise ValueError(f"tolerance={self.relative!r}: must be at least 0 and below 1")
        if self.decimals is not None and self.decimals not in range(16):
            raise ValueError(f"decimals={self.decimals!r}: must be a whole number from 0 to 15")


EXACT = Tolerance()


@lru_cache(maxsize=4096)
def parse_quantity(text: str) -> Quantity | None:
    """The quantity that a whole string is, or None ("5 cm", "-3/4", "1,000", "28 %", "three")."""
    tree = tree_of(text) if len(text) <= _MAX_CHARS else None
    return None if tree is None else quantity_of(tree)


def quantity_of(tree: Tree) -> Quantity | None:
    """The quantity that a tree is: a number, a fraction or a mixed number, and its unit."""
    kind, *parts = tree
    if kind == "num":
        return Quantity(*parts)
    if kind == "unit":
        plain = quantity_of(parts[1])
        percent = parts[0] == "%"
        unit = "" if parts[0] in ("%", "unit") else parts[0]
        return plain and Quantity(plain.value, plain.step, percent, unit)
    if kind == r"\degree":
        plain = quantity_of(parts[0])
        return plain and Quantity(plain.value, plain.step, unit="degree")
    terms = [quantity_of(part) for part in parts] if kind in ("-", "/", "mixed") else [None]
    match kind, terms:
        case "-", [Quantity(value, step)]:
            return Quantity(-value, step)
        case "/", [Quantity(top), Quantity(bottom)] if bottom:
            return Quantity(top / bottom)
        case "mixed", [Quantity(whole), Quantity(part)]:
            return Quantity(whole + part)
    return None


def same_quantity(gold: Quantity, predicted: Quantity, tolerance: Tolerance = EXACT) -> bool:
    """Whether two quantities agree.

    A unit matters only where both give one. A percentage equals the same number and a hundredth of
    it ("10 %" is 10 and 0.1).
    """
    if gold.unit and predicted.unit and gold.unit != predicted.unit:
        return False
    pairs = [(gold, predicted)]
    if gold.percent != predicted.percent:
        pairs.append((_share(gold), _share(predicted)))
    return any(near(g.value, p.value, (g.step, p.step), tolerance) for g, p in pairs)


def _share(quantity: Quantity) -> Quantity:
    """A percentage as hundredths, another quantity as it is."""
    by = 100 if quantity.percent else 1
    return Quantity(quantity.value / by, quantity.step / by)


def near(
    gold: Fraction,
    predicted: Fraction,
    steps: tuple[Fraction, Fraction] = (Fraction(0), Fraction(0)),
    tolerance: Tolerance = EXACT,
) -> bool:
    """Whether two values are the same, or as near as the tolerance allows.

    ``steps`` are the units of the last digits of decimals, 0 for exact values: a decimal of six
    significant digits or more equals the exact value that it is a rounding of.
    """
    gap = abs(gold - predicted)
    if not gap or gap <= Fraction(str(tolerance.relative)) * abs(gold):
        return True
    if tolerance.decimals is not None and gap * 2 * 10**tolerance.decimals <= 1:
        return True
    noise = _FLOAT_NOISE * min(abs(gold), abs(predicted))
    if all(steps):
        return gap <= noise
    step, decimal = max(zip(steps, (gold, predicted), strict=True))
    return 0 < step * 10 ** (_DIGITS_SHOWN - 1) <= abs(decimal) and gap <= max(step / 2, noise)
