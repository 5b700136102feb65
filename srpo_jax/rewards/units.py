"""Units of measure behind a number, in one spelling each. Pure functions on short strings."""

import re
from functools import lru_cache

MAX_UNIT = 40  # characters
UPRIGHT = "\u2009"  # white space before letters that were set upright
# Canonical name, then its other spellings (plurals in -s are found by themselves).
_UNITS = {
    spelling: names.split()[0]
    for names in (
        "% percent pct percentage|"
        "mm millimeter millimetre|cm centimeter centimetre|dm decimeter decimetre|"
        "m meter metre|km kilometer kilometre|in inch inche|ft foot feet|yd yard|mi mile|"
        "mg milligram|g gram gramme|kg kilogram kilo|t ton tonne|lb pound|oz ounce|"
        "ms millisecond|s sec second|min minute|h hr hour|day|week|month|yr year|"
        "ml milliliter millilitre|l liter litre|n newton|j joule|kj kilojoule|w watt|kw kilowatt|"
        "v volt|a amp ampere|ohm ω|hz hertz|khz|mhz|pa pascal|kpa|k kelvin|mol mole|mph|kph|"
        "rad radian|degree deg|celsius degc|fahrenheit degf|dollar usd|euro eur €|£ gbp|"
        "¥ yen|cent|unit"
    ).split("|")
    for spelling in names.split()
}
_LETTERS = set("mgshlLNJWVAKω%")  # as units, where white space stands before them
_PART = re.compile(r"\s*([/·*]?)\s*([a-zµμω€£¥%]++)(?:\s*\^\s*\{?(-?[123])\}?|([23]))?\s*")
_SPELLED = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"degrees?\s+(?=celsius|fahrenheit)", ""),
        (r"\bper ?cent\b", "%"),
        (r"\b(?:sq|square)\.?\s+([a-z]+)", r"\1^2"),
        (r"\bcubic\s+([a-z]+)", r"\1^3"),
        (r"\s+squared\b", "^2"),
        (r"\s+cubed\b", "^3"),
        (r"\bper\b", "/"),
    )
)
# A noun that is counted ends in -s; these words do too, and make another number or a doubt of it.
_NOT_COUNTED = re.compile(
    r"(?:time|half|halve|third|quarter|ten|hundred|thousand|million|billion|trillion|dozen|pair|"
    r"\w*th|plu|minu|les|perhap|thi|doe|alway|unles|versu|squared?|acro)s|\w*[su]s"
)
_COUNTED = set("people men women children mice fish sheep".split())


@lru_cache(maxsize=4096)
def canonical_unit(text: str, *, glued: bool = False) -> str | None:
    """The canonical form of a unit, "" for none, None where the text is no unit.

    ``glued``: no white space before it, so that ``5m`` and ``2ab`` stay algebra.
    """
    text = text.strip().rstrip(".").strip()
    if not text or len(text) > MAX_UNIT or (len(text) == 1 and text not in _LETTERS):
        return None if text else ""
    text = text.lower()
    for pattern, instead in _SPELLED:
        text = pattern.sub(instead, text)
    names, position = [], 0
    while position < len(text):
        part = _PART.match(text, position)
        if part is None or (name := _unit_name(part[2], glued=glued)) is None:
            return None
        power = part[3] or part[4]
        names.append(("/" if part[1] == "/" else "") + name + (f"^{power}" if power else ""))
        position = part.end()
    joined = " ".join(names)
    if "%" in joined and joined != "%":
        return None
    return "" if re.sub(r"\^[23]$", "", joined) == "unit" else joined


def _unit_name(word: str, *, glued: bool) -> str | None:
    """The canonical spelling of one word of a unit, None for what cannot be one."""
    for form in (word, word.removesuffix("s"), word.removesuffix("es")):
        if form in _UNITS:
            return None if glued and len(form) == 1 and form.isalpha() else _UNITS[form]
    counted = word in _COUNTED or (len(word) > 3 and word.endswith("s"))
    return word.removesuffix("s") if counted and not _NOT_COUNTED.fullmatch(word) else None
