"""What an answer block answers, and whether that is the gold answer: pure functions on strings.

A gold is one of three kinds. ``choice``: an option, given as its letter or its text. ``math``: a
number or expression. ``text``: words, a time, a date. ``decide`` settles every case that plain
comparison can settle and hands the rest, as a pair of expressions, to a worker process
(equality.py, verifier.py). An answer is read as a whole: nothing is found by searching inside it,
so "Paris" is not option A, and a list of options or numbers is not any one of them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from srpo_jax.data.errors import shown
from srpo_jax.rewards.braces import braced_spans
from srpo_jax.rewards.expressions import Tree, tree_of, without_fonts
from srpo_jax.rewards.quantities import (
    EXACT,
    Tolerance,
    parse_quantity,
    quantity_of,
    same_quantity,
)

if TYPE_CHECKING:  # workers read no records, and start without numpy
    from srpo_jax.data.fields import Record

MAX_ANSWER_CHARS = 2000  # a longer answer is wrong: no gold is that long, and checks cost more
LETTERS = "ABCDEFGHIJ"  # the options where no choices are given
Pair = tuple[str, str]

_BRACE = re.compile(r"(\\(?:boxed|fbox|framebox)\s*\{)|\\[\s\S]|[{}]")
# What joins boxes into one list, white space aside.
_BOX_GLUE = re.compile(r"[$.,;]*(?:\\text\{|\\quad)*(?:and|or)?\}?(?:\\quad)*[$.,;]*")
_MAX_LIST = 50
_SPACING = re.compile(r"\\(?:[,;: ]|quad\b|qquad\b)|~")
_LEAD = re.compile(
    r"#+\s+(?=\S)|(?:(?:so|thus|hence|therefore)\b[,\s]*)?(?:(?:the|my|our)\s+)?"
    r"(?:(?:final|correct|right|best|revised)\s+)*(?:answer|option|choice|result|solution)\s*"
    r"(?::|=|\b(?:is|would be|should be|must be)\b|(?=[$*]|\\\[|\\\())[\s:]*"
    r"|(?:so|thus|hence|therefore),?\s(?=[\d$\\(+-])"
    r"|the\s(?:[a-z]+\s){1,4}(?:is|equals)\s(?=[\d$\\(+-])|i\s(?:choose|pick|select)\s"
    r"|(?:approximately|approx\.?|about|around|roughly)\s(?=[\d$\\(.-])|\\approx(?![a-z])|[≈~=]"
    r"|(?:正确)?(?:答案|选项|结果|故选|应选|选择|选)\s*[是为]?\s*:?",
    re.IGNORECASE,
)
# "Area = 12": words that name what follows, of which no part is another relation or a hedge.
_NAMED = re.compile(
    r"(?!.*\b(?:or|not|maybe|if|except|sin|cos|tan|cot|sec|csc|log|lim|max|min|gcd|lcm|exp|det)\b)"
    r"(?:\\text\{)?\s*[A-Za-z]{3,}(?:\s[A-Za-z]{2,})*\s*\}?\s*="
    r"(?=[^=<>≠≤≥≈]*$)(?!.*\\(?:neq?|l[et]q?|g[et]q?|approx)\b)",
    re.I,
)
_ANNOUNCED = re.compile(r"[.;:,!?]\s(?:so\s)?(?:the\s)?(?:final\s|correct\s)?answer\sis\b", re.I)
_TAIL = re.compile(
    r"\sis\s(?:(?:the\s)?(?:correct|right)(?:\s(?:answer|option|choice|one))?"
    r"|(?:the|our|my)\s(?:final\s)?(?:answer|solution|result))$",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(?<![\w)}])(\*\*|__)(?=[^\s*_])([^*_]+)\1")
_TAGGED = re.compile(r"<(\w+)>\s*([^<>]*\S)\s*</\1>")
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"))
_PAIRS += (("```", "```"), ("`", "`"), ('"', '"'), ("“", "”"), ("'", "'"))
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | {
    0x3000: " ", 0xA0: " ", 0x2212: "-", 0x2013: "-", 0x2014: "-", 0x3002: ".", 0x3001: ",",
}  # fmt: skip
_NOBODYS = {"nan", "n/a", "null", "inf", "-inf", "-"}  # written for "missing"

_PREFIX = r"(?:(?i:option|choice|answer)\s*)?"
_BARE_LETTER = re.compile(_PREFIX + r"[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:]*")
_LABEL = re.compile(
    _PREFIX + r"(?:\(([A-Z])\)[.:]?|\[([A-Z])\]|([A-Z])\)|([A-Z])\.(?=[\s\d\\$(-])|([A-Z]):|"
    r"([A-Z])\s+-\s|\(?([a-z])\)(?=\s+\w))\s*(\S.*)",
    re.DOTALL,
)
_LETTER_TEXT = re.compile(r"([A-Z])\s*[\s=,(]\s*(\S.*?)\)?", re.DOTALL)
_SEVERAL_LETTERS = re.compile(r"\(?[A-J]\)?(?:(?:[\s,/&;]|\band\b)*\(?[A-J]\)?)+")
# What follows a label and takes it back: more letters, "or (B)", "is wrong".
_MORE_LETTERS = re.compile(r"(?:[\s,/&;]|\band\b|\bor\b|\(?\b[A-J]\b\)?[.:]?)+")
_OTHER_LABEL = re.compile(
    r"\b(?:or|and)\s+(?:\([A-J]\)|[A-J](?:[).:]|$))|^n?or\b|^(?:is|was)\s+(?:not|wrong|incorrect|false)"
)

_TIME = re.compile(r"\d{1,2}:0\d|\d{1,2}(?::\d\d){0,2}\s*[ap]\.?\s*m\.?|\d{1,2}(?::\d\d){2}", re.I)
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d")
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,4}/\d{1,2}/\d{1,4}|\d+(?:st|nd|rd|th)")
_HYPHENATED = re.compile(r"[A-Za-z]+(?:-[A-Za-z]{2,})+")
_OPERATOR = re.compile(r"[\d+*/^=<>_|()\[\]{}\\π∞°×÷·≤≥≠±½¼¾θ∪∩∈√∅-]")


# ---------------------------------------------------------------------------------- extraction


def _closed_boxes(text: str) -> list[tuple[int, int, int]]:
    r"""(start, content start, content end) of every closed \boxed{..}, by start."""
    spans = braced_spans(text, _BRACE)
    return [(start, inner, end) for start, inner, end in spans if end is not None]


def boxed(text: str, *, first: bool = False) -> str | None:
    r"""The content of the last (or first) closed \boxed{}, braces balanced; None without one."""
    boxes = _closed_boxes(text)
    if not boxes:
        return None
    _, start, end = boxes[0] if first else boxes[-1]
    return text[start:end].strip()


def _boxed_list(text: str) -> str | None:
    r"""The boxes at the end that only commas and conjunctions separate, as one list."""
    boxes = _closed_boxes(text)
    run = boxes[-1:]
    for box in reversed(boxes[-_MAX_LIST:-1]):
        glue = text[box[2] + 1 : run[0][0]]
        if box[2] >= run[0][0] or len(glue) > 40:
            break
        if not _BOX_GLUE.fullmatch("".join(glue.split())):
            break
        run.insert(0, box)
    return ", ".join(text[start:end] for _, start, end in run) if len(run) > 1 else None


def extract_answer(block: str) -> str:
    r"""What an answer block answers: its last \boxed{}, or else its text, without wrapping.

    Wrapping is math delimiters, emphasis, quotes, "The answer is", and a closing full stop.
    """
    content = boxed(block)
    return _unwrap(block if content is None else content)


def _unwrap(text: str) -> str:
    """The text without what only wraps it; white space, dashes and full-width forms unified."""
    text = " ".join(text.translate(_FULL_WIDTH).split())
    for _ in range(8):
        before = text
        for left, right in _PAIRS:
            inner = text[len(left) : len(text) - len(right)]
            wrapped = text.startswith(left) and text.endswith(right) and inner.strip()
            if wrapped and left not in inner and right not in inner:
                text = inner.strip()
        text = text.rstrip(",;").rstrip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        tagged = _TAGGED.fullmatch(text)
        text = tagged[2] if tagged else text
        lead = _LEAD.match(text) or _NAMED.match(text)
        if lead and text[lead.end() :].strip():
            text = text[lead.end() :].strip()
        if text == before:
            break
    return text


def _said(text: str) -> str:
    """``_unwrap`` without emphasis inside, an announcement before or praise behind."""
    text = _unwrap(_BOLD.sub(r"\2", _unwrap(text)))
    announced = [match.end() for match in _ANNOUNCED.finditer(text)]
    text = text[announced[-1] :] if announced and text[announced[-1] :].strip() else text
    return _unwrap(_TAIL.sub("", text))


@lru_cache(maxsize=4096)
def plain_text(text: str) -> str:
    r"""``text`` for comparison as words or numbers: fonts, spacing and escapes of LaTeX removed."""
    text = without_fonts(_said(text), r"\1")
    text = text.replace(r"\!", "").replace(r"\left", "").replace(r"\right", "")
    text = _SPACING.sub(" ", text).replace("{,}", ",")
    return _said(text.replace(r"\$", "$").replace(r"\%", "%"))


# ------------------------------------------------------------------------------------- options


def _words(text: str) -> str:
    """Words for equality: case, articles, quotes, hyphens and closing punctuation do not count."""
    text = " ".join(plain_text(text).casefold().replace("_", " ").split())
    text = re.sub(r"\s*\b([ap])\.\s?m\b\.?", r" \1m", text)
    text = re.sub(r"(?<=\d)\s+(?=[ap]m\b)", "", text)
    text = re.sub(r"(?<=\w)-(?=[a-z])", " ", text)
    text = re.sub(r"[\"'“”‘’]", "", text).rstrip(".,;:!").strip()
    return " ".join(re.sub(r"^(?:an?|the)\s+(?=\S)", "", text).split())


def _compact(text: str) -> str:
    """White space only between digits, case kept: x and X are two variables, 1 2 is not 12."""
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", " ".join(plain_text(text).split()))


def choice_indices(answer: str, choices: Sequence[str] = ()) -> frozenset[int] | None:
    """The option that a whole answer names, None if it names none; several only if they are equal.

    Read in this order: the exact text of an option, unless all are letters; a letter ("B", "(b)",
    "B.", "Option B"); a letter and a text ("B. 57", "(B) cat": the letter counts, "B. or C." is
    nothing); an option's text by words; an option's number. Letters reach to J where ``choices``
    is empty.
    """
    text = plain_text(answer)
    if not text:
        return None
    choices = tuple(choices)
    exact = _matching(choices, lambda option: _compact(option) == _compact(text))
    labels_only = all(re.fullmatch("[A-Z]", option.strip()) for option in choices)
    letter = _option_letter(text, choices)
    if exact and (letter is None or not labels_only):
        return exact
    if letter is not None:
        equal = _matching(choices, lambda option: _compact(option) == _compact(choices[letter]))
        return equal or frozenset({letter})
    words, number = _words(text), parse_quantity(text)
    same = _matching(choices, lambda option: _words(option) == words) if words else None
    if same or number is None:
        return same or None
    values = [parse_quantity(plain_text(option)) for option in choices]
    return frozenset(i for i, v in enumerate(values) if v and same_quantity(v, number)) or None


def _matching(choices: tuple[str, ...], test: Callable[[str], bool]) -> frozenset[int]:
    return frozenset(i for i, option in enumerate(choices) if test(option))


def _option_letter(text: str, choices: tuple[str, ...]) -> int | None:
    """The option whose letter leads or is the text, None without one or where it is taken back."""
    alone = _BARE_LETTER.fullmatch(text)
    labelled = alone or _LABEL.fullmatch(text) or _LETTER_TEXT.fullmatch(text)
    if labelled is None:
        return None
    letter, rest = (*filter(None, labelled.groups()), "")[:2]
    place = ord(letter.upper()) - ord("A")
    if place >= (len(choices) or len(LETTERS)):
        return None
    if alone or (choices and _words(choices[place]) == _words(rest)):
        return place
    if labelled.re is _LETTER_TEXT or _MORE_LETTERS.fullmatch(rest) or _OTHER_LABEL.search(rest):
        return None
    return place


# ---------------------------------------------------------------------------------------- golds


@dataclass(frozen=True)
class Question:
    """What answers to one question are graded against."""

    gold: str
    choices: tuple[str, ...] = ()  # none: an open question
    tolerance: Tolerance = EXACT


@dataclass(frozen=True)
class Gold:
    """A gold answer, read once per prompt."""

    kind: str  # "choice", "math" or "text"
    text: str  # without wrapping; an option's text for a choice, "" where it is not known
    indices: frozenset[int] = frozenset()  # of the right option
    tree: Tree | None = None  # of what can be read as mathematics


@lru_cache(maxsize=4096)
def read_gold(gold: str, choices: tuple[str, ...] = ()) -> Gold | str:
    """The gold answer, or the reason why no answer could be compared with it."""
    if not gold.strip():
        return "the answer is empty"
    if len(gold) > MAX_ANSWER_CHARS:
        return f"the answer has {len(gold)} characters, more than {MAX_ANSWER_CHARS}"
    text = extract_answer(gold)
    plain = plain_text(text)
    if not re.search(r"[^\W_]|[<>=+*/∞√%!^∅{-]", plain):
        return f"the answer {shown(gold)} holds no word, number or symbol"
    indices = choice_indices(text, choices)
    if choices:
        if indices is None:
            return f"the answer {shown(gold)} is none of the {len(choices)} choices"
        option = _unwrap(choices[min(indices)])
        return Gold("choice", option, indices, tree_of(option))
    if plain.casefold() in _NOBODYS:
        return f"the answer {shown(gold)} stands for a missing one"
    if indices is not None and not re.fullmatch(r"[a-z]", plain):  # x and e are variables
        labelled = _LABEL.fullmatch(plain)
        option = labelled.groups()[-1] if labelled else ""
        return Gold("choice", option, indices, tree_of(option))
    if not _is_balanced(text) and parse_quantity(plain) is None:
        return f"the answer {shown(gold)} has braces or $ that do not match"
    return Gold("math", text, tree=tree_of(text)) if _is_math(text) else Gold("text", text)


def answer_problem(gold: str, choices: Sequence[str] = ()) -> str | None:
    """Why a gold answer cannot be compared with anything, None for a good one."""
    found = read_gold(gold, tuple(choices))
    return found if isinstance(found, str) else None


def gold_problem(record: "Record") -> str | None:
    """Why a data record cannot be graded, None for a good one.

    The loader drops such a record with this reason; nothing is ever rewarded for it.
    """
    try:
        tolerance_of(record)
    except ValueError as error:
        return str(error)
    return answer_problem(record.answer, record.choices or ())


def tolerance_of(record: "Record", relative: float = 0.0) -> Tolerance:
    """What a record's fields ``tolerance`` or ``decimals`` allow, else the ``relative`` one.

    ValueError where a field is no such number.
    """
    extra = getattr(record, "extra", {})
    fields = (extra.get(name) for name in ("tolerance", "decimals"))
    own = [None if value is None or value != value else value for value in fields]
    if own == [None, None]:
        return Tolerance(relative)
    return Tolerance(0.0 if own[0] is None else own[0], own[1])


def _is_math(text: str) -> bool:
    """Whether a gold that is no option is a number or an expression rather than words."""
    plain = plain_text(text)
    if _TIME.fullmatch(plain) or _DATE.fullmatch(plain) or _HYPHENATED.fullmatch(plain):
        return False
    tree = tree_of(text)
    if tree is None or (len(plain) == 1 and plain.isalpha()):
        return tree is not None
    return bool(_OPERATOR.search(text)) or quantity_of(tree) is not None


def _is_balanced(text: str) -> bool:
    """Whether braces and math delimiters of an expression close."""
    bare = re.sub(r"\\[\\{}$]", "", text)
    depth = 0
    for char in bare:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0 and bare.count("$") % 2 == 0


# ----------------------------------------------------------------------------------- comparison


def decide(
    gold: str, answer: str | None, choices: Sequence[str] = (), tolerance: Tolerance = EXACT
) -> bool | Pair | None:
    """Whether an answer block's text gives the gold answer, or what a worker must compare.

    Returns True or False, or (gold, prediction) as two expressions in ``$``; None for an answer
    that could not be read to its end, which is wrong. So is one that is missing, blank or longer
    than MAX_ANSWER_CHARS, and every answer to a gold with a problem.
    """
    target = read_gold(gold, tuple(choices))
    if isinstance(target, str) or answer is None:
        return False
    extracted = extract_answer(answer)
    if not extracted or len(extracted) > MAX_ANSWER_CHARS:
        return False
    predicted = _said(extracted)
    if target.kind == "choice":
        indices = choice_indices(predicted, choices)
        if indices is not None:
            return not indices.isdisjoint(target.indices)
        if not target.text or _BARE_LETTER.fullmatch(plain_text(predicted)):
            return None
        if _words(predicted) == _words(target.text):
            return True
    elif target.kind == "text":
        same = bool(_words(target.text)) and _words(predicted) == _words(target.text)
        return same or _same_letters(target.text, _boxed_list(answer) or predicted)
    elif _compact(predicted) == _compact(target.text):
        return True
    elif "," in target.text or re.search(r"\b(?:and|or)\b", target.text):
        predicted = _boxed_list(answer) or predicted
    return _same_expression(target, predicted, tolerance)


def _same_letters(gold: str, predicted: str) -> bool:
    """Whether both name the same options, in any order where something separates them."""
    texts = [plain_text(gold), plain_text(predicted)]
    if not all(map(_SEVERAL_LETTERS.fullmatch, texts)):
        return False
    named = [re.findall("[A-J]", text) for text in texts]
    separated = any(len(text) > len(letters) for text, letters in zip(texts, named, strict=True))
    return named[0] == named[1] or separated and sorted(named[0]) == sorted(named[1])


def _same_expression(target: Gold, predicted: str, tolerance: Tolerance) -> bool | Pair | None:
    """Numbers at once; two expressions that can be read are for a worker."""
    if _CLOCK.fullmatch(plain_text(predicted)) and _CLOCK.fullmatch(target.text):
        return False  # a time is met as written, a ratio is not reduced to one
    tree = tree_of(predicted)
    if tree is None or target.tree is None:
        return None if tree is None else False
    gold, number = quantity_of(target.tree), quantity_of(tree)
    if gold is not None and number is not None:
        return same_quantity(gold, number, tolerance)
    return tree == target.tree or (f"${target.text}$", f"${predicted}$")
