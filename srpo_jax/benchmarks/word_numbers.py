"""English number words as numbers, as EMMA's rule reads them (after the package word2number).

Words that are no number words are passed over, wherever they stand: "there are two of them" is 2.
"""

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBERS = (*range(20), *range(20, 101, 10))
_VALUES: dict[str, int] = dict(zip((*_SMALL, *_TENS, "hundred"), _NUMBERS, strict=True))
_SCALES = {"billion": 10**9, "million": 10**6, "thousand": 10**3}
_DIGITS = set(_SMALL[:10])
_WORDS = set(_VALUES) | set(_SCALES) | {"point"}


def word_number(text: str) -> int | float | None:
    """The number that a text's number words make, None where they make none."""
    text = text.replace("-", " ").lower()
    if text.isdigit():
        try:
            return int(text)
        except ValueError:  # superscripts are digits to Python, but no number
            return None
    words = [word for word in text.split() if word in _WORDS]
    if not words or any(words.count(word) > 1 for word in (*_SCALES, "point")):
        return None
    decimals: list[str] = []
    if "point" in words:
        place = words.index("point")
        words, decimals = words[:place], words[place + 1 :]
    whole = _whole(words)
    if whole is None or not decimals or not set(decimals) <= _DIGITS:
        return whole
    return whole + float("0." + "".join(str(_VALUES[word]) for word in decimals))


def _whole(words: list[str]) -> int | None:
    """The integer of number words; None where the scales do not fall or one stands alone."""
    if not words:
        return 0
    if len(words) == 1:
        return (_VALUES | _SCALES)[words[0]]
    total, rest = 0, words
    for scale, factor in _SCALES.items():
        if scale in rest:
            place = rest.index(scale)
            head, rest = rest[:place], rest[place + 1 :]
            if not head or set(head) & set(_SCALES):
                return None
            total += factor * _below_thousand(head)
    if set(rest) & set(_SCALES):
        return None
    return total + (_below_thousand(rest) if rest else 0)


def _below_thousand(words: list[str]) -> int:
    """A few number words as one number, with the package's own reading of unusual ones."""
    values = [_VALUES[word] for word in words]
    match values:
        case [a, b]:
            return a * b if 100 in values else a + b
        case [a, b, c, *rest] if len(rest) <= 1:
            return a * b + c + sum(rest)
    return values[0]
