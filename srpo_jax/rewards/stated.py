"""What a reflection says of the first answer: that it is right, that it is wrong, or neither."""

import re
from collections.abc import Collection
from dataclasses import dataclass

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_NEGATIONS = {"not", "no", "never", "without", "hardly", "cannot"}
# May stand between a negation and the word that it turns over.
_BRIDGES = {
    *("a", "an", "any", "the", "this", "that", "is", "be", "find", "see", "spot", "contain"),
    *("entirely", "completely", "fully", "quite", "really"),
}


@dataclass(frozen=True)
class Words:
    """Words, in small letters, that state a verdict; ``right`` the adjective is none, for angles
    and sides are right, too."""

    right: tuple[str, ...] = ("correct", "accurate", "yes", "ok")
    wrong: tuple[str, ...] = ("incorrect", "inaccurate", "wrong", "mistaken", "mistake", "error")


def stated(text: str, words: Words) -> int:
    """1 where ``text`` says right, -1 where it says wrong, 0 where it says neither, or both.

    A negation before a word turns it over ("not correct", "no error", "cannot find an error").
    Both at once is no statement, so that nothing is won by saying everything.
    """
    found = {verdict for verdict in _statements(text.lower(), words)}
    return found.pop() if len(found) == 1 else 0


def _statements(text: str, words: Words) -> list[int]:
    tokens, at, said = _WORD.findall(text), 0, []
    known = {*words.right, *words.wrong}
    while at < len(tokens):
        start = at
        negated = _negates(tokens[at], known, tokens[at + 1 :])
        at += negated
        if tokens[at] in known:
            sign = 1 if tokens[at] in words.right else -1
            said.append(-sign if negated else sign)
        at = max(at, start) + 1
    return said


def _negates(token: str, known: Collection[str], after: list[str]) -> int:
    """How many tokens further the word stands that ``token`` turns over; 0: it turns none over."""
    if token not in _NEGATIONS and not token.endswith(("n't", "n’t")):
        return 0
    for ahead, word in enumerate(after[:3], start=1):
        if word in known:
            return ahead
        if word not in _BRIDGES:
            return 0
    return 0
