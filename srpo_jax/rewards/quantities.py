"""Numbers with units, read and compared exactly: the fast path before any symbolic mathematics.

Pure functions on strings of bounded length. A string that is not plainly one number (with a sign,
thousands separators, a simple fraction, a power of ten, a percent sign, a currency or a unit) is
None here and left to math-verify.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_MAX_CHARS = 120
_MAX_EXPONENT = 300
_DECIMALS = 6  # a decimal counts as equal to an exact value at math-verify's rounding

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<currency>[$€£¥]?)\s*(?P<inner>[+-]?)\s*"
    r"(?:(?P<whole>\d{1,9})(?=\s*\\[dtc]?frac|\s+\d{1,2}\s*/\s*\d)\s*)?"
    rf"(?:\\[dtc]?frac\s*(?:\{{\s*(?P<top>-?(?:{_DIGITS}))\s*\}}|(?P<top1>\d))"
    rf"\s*(?:\{{\s*(?P<bottom>{_DIGITS})\s*\}}|(?P<bottom1>\d))"
    rf"|(?P<number>{_DIGITS})"
    r"(?:(?:e|\s*(?:\\times|\\cdot|\*|×|x)\s*10\s*\^)\s*\{?\s*(?P<power>[+-]?\d{1,4})\s*\}?"
    rf"|\s*/\s*(?P<over>{_DIGITS}))?)"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_UNIT_PART = re.compile(r"\s*([/·*]?)\s*([a-zµμω°$€£¥]++)(?:\s*\^\s*\{?(-?[123])\}?|([23]))?\s*")
_PERCENT = re.compile(r"%|per ?cent|pct|percentage", re.IGNORECASE)

_WORD_NUMBERS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}

# Canonical name, then its other spellings (plurals in -s are found by themselves).
_UNITS = {
    spelling: names.split()[0]
    for names in (
        "mm millimeter millimetre|cm centimeter centimetre|dm decimeter decimetre|"
        "m meter metre|km kilometer kilometre|in inch inche|ft foot feet|yd yard|mi mile|"
        "mg milligram|g gram gramme|kg kilogram kilo|t ton tonne|lb pound|oz ounce|"
        "ms millisecond|s sec second|min minute|h hr hour|day|week|month|yr year|"
        "ml milliliter millilitre|l liter litre|n newton|j joule|kj kilojoule|w watt|kw kilowatt|"
        "v volt|a amp ampere|ohm ω|hz hertz|khz|mhz|pa pascal|kpa|k kelvin|mol mole|mph|kph|"
        "rad radian|degree deg °|celsius °c|fahrenheit °f|dollar usd $|euro eur €|£ gbp|¥ yen|"
        "cent|unit"
    ).split("|")
    for spelling in names.split()
}
_SINGLE_LETTERS = set("mgshlnjwvakt")  # as units, where white space stands before them
_NO_UNIT = {"unit"}  # "5 units", "12 square units"
# Words after a number that make it another number, or a longer expression.
_NOT_UNITS = set(
    "hundred thousand million billion trillion dozen half third quarter times plus minus over or "
    "and to of pi sqrt sin cos tan cot sec csc log ln exp mod e i infinity point st nd rd th "
    "than more less not if for is are am pm".split()
)


@dataclass(frozen=True)
class Quantity:
    """One number: exact value, whether it was written as a decimal or percentage, and its unit."""

    value: Fraction
    decimal: bool = False
    percent: bool = False
    unit: str = ""  # canonical, "" where none was given


@lru_cache(maxsize=4096)
def parse_quantity(text: str) -> Quantity | None:
    """The quantity that a whole cleaned string is, or None ("5 cm", "-3/4", "1,000", "28 %")."""
    text = text.strip()
    if len(text) > _MAX_CHARS:
        return None
    if text.lower() in _WORD_NUMBERS:
        return Quantity(Fraction(_WORD_NUMBERS[text.lower()]))
    match = _QUANTITY.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    value = _value(match)
    rest = match["rest"]
    if value is None:
        return None
    decimal = "." in text[: match.start("rest")]
    if _PERCENT.fullmatch(rest.strip().rstrip(".")):
        return Quantity(value, decimal, percent=True)
    glued = bool(rest) and not rest[0].isspace()
    unit = canonical_unit(rest, glued=glued)
    if unit is None or (unit and match["currency"]):
        return None
    return Quantity(value, decimal, unit=unit or _UNITS.get(match["currency"], ""))


def _value(match: re.Match) -> Fraction | None:
    """The exact number of a match, None for a division by zero or an exponent out of range."""

    def number(digits: str) -> Fraction:
        digits = re.sub(r"[, ]", "", digits)
        return Fraction(digits + "0" if digits.endswith(".") else digits)

    top = match["top"] or match["top1"] or match["number"]
    bottom = match["bottom"] or match["bottom1"] or match["over"]
    value = number(top)
    if bottom:
        if number(bottom) == 0:
            return None
        value /= number(bottom)
    if match["whole"]:  # a mixed number
        value += int(match["whole"])
    if match["power"]:
        power = int(match["power"])
        if abs(power) > _MAX_EXPONENT:
            return None
        value *= Fraction(10) ** power
    return -value if "-" in (match["sign"], match["inner"]) else value


def canonical_unit(text: str, *, glued: bool = False) -> str | None:
    """The canonical form of a unit, "" for none, None where the text is no unit.

    ``glued``: no white space before it, so that ``5m`` and ``2ab`` stay algebra.
    """
    text = text.strip().rstrip(".").strip()
    if not text or len(text) > 40:
        return None if text else ""
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|º|˚", "°", text)
    text = text.replace("²", "^2").replace("³", "^3").replace("\\Omega", "ohm").lower()
    text = re.sub(r"degrees?\s+(?=celsius|fahrenheit)", "", text)
    text = re.sub(r"°\s*c\b", "celsius", re.sub(r"°\s*f\b", "fahrenheit", text))
    text = re.sub(r"\b(?:sq|square)\.?\s+([a-z]+)", r"\1^2", text)
    text = re.sub(r"\bcubic\s+([a-z]+)", r"\1^3", text)
    text = re.sub(r"\s+squared\b", "^2", re.sub(r"\s+cubed\b", "^3", text))
    text = re.sub(r"\bper\b", "/", text)
    names, position = [], 0
    while position < len(text):
        part = _UNIT_PART.match(text, position)
        if part is None or (name := _unit_name(part[2], glued=glued)) is None:
            return None
        power = part[3] or part[4]
        names.append(("/" if part[1] == "/" else "") + name + (f"^{power}" if power else ""))
        position = part.end()
    joined = " ".join(names)
    return "" if re.sub(r"\^[23]$", "", joined) in _NO_UNIT else joined


def _unit_name(word: str, *, glued: bool) -> str | None:
    """The canonical spelling of one word of a unit, None for what cannot be one."""
    if word in _NOT_UNITS or (len(word) == 1 and word.isalpha() and word not in _SINGLE_LETTERS):
        return word if word == "ω" else None
    for form in (word, word.removesuffix("s"), word.removesuffix("es")):
        if form in _UNITS:
            single = len(form) == 1 and form.isalpha()
            return None if glued and single else _UNITS[form]
    if glued or len(word) < 3:
        return None
    return word.removesuffix("s")  # "5 apples": a noun that is counted


def same_quantity(gold: Quantity, predicted: Quantity) -> bool:
    """Whether two quantities agree.

    A unit matters only where both give one. A percentage equals the same number and a hundredth of
    it ("10 %" is 10 and 0.1). Decimals agree with exact values after rounding to six places.
    """
    if gold.unit and predicted.unit and gold.unit != predicted.unit:
        return False
    if gold.percent == predicted.percent:
        return _same_value(gold.value, predicted.value, gold.decimal or predicted.decimal)
    percent, plain = (gold, predicted) if gold.percent else (predicted, gold)
    same = _same_value(percent.value, plain.value, percent.decimal or plain.decimal)
    return same or _same_value(percent.value / 100, plain.value, rounded=True)


def _same_value(a: Fraction, b: Fraction, rounded: bool) -> bool:
    """Equality, or after rounding; the relative bound keeps 1e-8 and 2e-8 apart."""
    if a == b:
        return True
    near = abs(a - b) * 1000 <= max(abs(a), abs(b))
    return rounded and near and round(a, _DECIMALS) == round(b, _DECIMALS)
