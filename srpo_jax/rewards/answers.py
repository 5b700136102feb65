"""What an answer block answers, and whether that is the gold answer: pure functions on strings.

A gold is one of three kinds. ``choice``: an option, given as its letter or its text. ``math``: a
number or expression. ``text``: words, a time, a date. ``decide`` settles every case that plain
comparison can settle and hands the rest, as a pair of expressions, to math-verify in a worker
process (verifier.py). An answer is read as a whole: nothing is found by searching inside it, so
"Paris" is not option A, and a list of options or numbers is not any one of them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from srpo_jax.rewards.braces import braced_spans
from srpo_jax.rewards.quantities import Quantity, canonical_unit, parse_quantity, same_quantity

MAX_ANSWER_CHARS = 2000  # a longer answer is wrong: no gold is that long, and checks cost more
LETTERS = "ABCDEFGHIJ"  # the options where no choices are given

_BRACE = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\[\s\S]|[{}]")
# What joins boxes into one list, white space aside.
_BOX_GLUE = re.compile(r"[$.,;]*(?:\\text\{|\\quad)*(?:and|or)?\}?(?:\\quad)*[$.,;]*")
_MAX_LIST = 50
_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|"
    r"mbox|hbox|emph|underline|boldsymbol|bm|operatorname)\s*\{([^{}]*)\}"
)
_SPACING = re.compile(r"\\(?:[,;: ]|quad\b|qquad\b)|~")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b[,\s]*)?(?:(?:the|my|our)\s+)?"
    r"(?:(?:final|correct|right|best|revised)\s+)*(?:answer|option|choice|result|solution)\s*"
    r"(?::|=|\b(?:is|would be|should be|must be)\b)[\s:]*",
    re.IGNORECASE,
)
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"))
_PAIRS += (("`", "`"), ('"', '"'), ("“", "”"), ("'", "'"))
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | {
    0x3000: " ", 0xA0: " ", 0x2212: "-", 0x2013: "-", 0x2014: "-", 0x3002: ".", 0x3001: ",",
}  # fmt: skip
_UNICODE_MATH = {
    "π": r"\pi ", "∞": r"\infty ", "°": r"^{\circ}", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "²": "^{2}", "³": "^{3}",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "θ": r"\theta ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
}  # fmt: skip
_TRAILING_UNIT = re.compile(
    r"(.*(?:[\d)}\]]|\\pi))\s*\{?\s*([A-Za-z]{2,}[^\\{}]*?(?:\^\{?[23]\}?)?)\s*\}?", re.DOTALL
)
_MATH_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[")

_PREFIX = r"(?:(?i:option|choice|answer)\s*)?"
_BARE_LETTER = re.compile(_PREFIX + r"[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:]*")
_LABEL = re.compile(
    _PREFIX + r"(?:\(([A-Z])\)[.:]?|\[([A-Z])\]|([A-Z])\)|([A-Z])\.(?=[\s\d\\$(-])|([A-Z]):|"
    r"([A-Z])\s+-\s|\(?([a-z])\)(?=\s+\w))\s*(\S.*)",
    re.DOTALL,
)
_LETTER_TEXT = re.compile(r"([A-Z])\s+(\S.*)", re.DOTALL)
# What follows a label and takes it back: more letters, or "or (B)".
_MORE_LETTERS = re.compile(r"(?:[\s,/&;]|\band\b|\bor\b|\(?\b[A-J]\b\)?[.:]?)+")
_OTHER_LABEL = re.compile(r"\b(?:or|and)\s+(?:\([A-J]\)|[A-J](?:[).:]|$))")

_TIME = re.compile(r"\d{1,2}:0\d|\d{1,2}(?::\d\d){0,2}\s*[ap]\.?\s*m\.?|\d{1,2}(?::\d\d){2}", re.I)
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,4}/\d{1,2}/\d{1,4}|\d+(?:st|nd|rd|th)")
_FUNCTIONS = set("sin cos tan cot sec csc log ln exp lim max min mod gcd lcm and or arcsin".split())
_OPERATOR = re.compile(r"[\d+*/^=<>_|()\[\]{}\\-]")


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
        lead = _LEAD.match(text)
        if lead and text[lead.end() :].strip():
            text = text[lead.end() :].strip()
        if text == before:
            break
    return text


@lru_cache(maxsize=4096)
def plain_text(text: str) -> str:
    r"""``text`` for comparison as words or numbers: fonts, spacing and escapes of LaTeX removed."""
    text = _unwrap(text)
    for _ in range(5):
        text, count = _FONT.subn(r"\1", text)
        if not count:
            break
    text = text.replace(r"\!", "").replace(r"\left", "").replace(r"\right", "")
    text = _SPACING.sub(" ", text).replace("{,}", ",")
    return _unwrap(text.replace(r"\$", "$").replace(r"\%", "%"))


# ------------------------------------------------------------------------------------- options


def _words(text: str) -> str:
    """Words for equality: case, articles, quotes, hyphens and closing punctuation do not count."""
    text = plain_text(text).casefold().replace("_", " ")
    text = re.sub(r"\s*\b([ap])\.\s?m\b\.?", r" \1m", text)
    text = re.sub(r"(?<=\d)\s+(?=[ap]m\b)", "", text)
    text = re.sub(r"(?<=\w)-(?=[a-z])", " ", text)
    text = re.sub(r"[\"'“”‘’]", "", text).rstrip(".,;:!").strip()
    return " ".join(re.sub(r"^(?:an?|the)\s+(?=\S)", "", text).split())


def _compact(text: str) -> str:
    """Everything but white space, case kept: x and X are two variables."""
    return "".join(plain_text(text).split())


def choice_indices(answer: str, choices: Sequence[str] = ()) -> frozenset[int] | None:
    """The option that a whole answer names, None if it names none; several only if they are equal.

    Read in this order: the exact text of an option; a letter ("B", "(b)", "B.", "Option B"); a
    letter and a text ("B. 57", "(B) cat": the letter counts, "B. or C." is nothing); an option's
    text by words; an option's number. Letters reach to J where ``choices`` is empty.
    """
    text = plain_text(answer)
    if not text:
        return None
    choices = tuple(choices)
    exact = _matching(choices, lambda option: _compact(option) == _compact(text))
    if exact:
        return exact
    letter = _option_letter(text, choices)
    if letter is not None:
        equal = _matching(choices, lambda option: _compact(option) == _compact(choices[letter]))
        return equal or frozenset({letter})
    words = _words(text)
    same = _matching(choices, lambda option: _words(option) == words) if words else frozenset()
    if same:
        return same
    number = parse_quantity(text)
    if number is None:
        return None
    return _matching(choices, lambda option: _same_number(option, number)) or None


def _matching(choices: tuple[str, ...], test) -> frozenset[int]:
    return frozenset(i for i, option in enumerate(choices) if test(option))


def _same_number(option: str, number: Quantity) -> bool:
    value = parse_quantity(plain_text(option))
    return value is not None and same_quantity(value, number)


def _option_letter(text: str, choices: tuple[str, ...]) -> int | None:
    """The option whose letter leads or is the text, None without one or where it is taken back."""
    count = len(choices) or len(LETTERS)

    def index(letter: str) -> int | None:
        place = ord(letter.upper()) - ord("A")
        return place if place < count else None

    bare = _BARE_LETTER.fullmatch(text)
    if bare:
        return index(bare[1])
    labelled = _LABEL.fullmatch(text) or _LETTER_TEXT.fullmatch(text)
    if labelled is None:
        return None
    letter, rest = filter(None, labelled.groups())
    place = index(letter)
    if place is None:
        return None
    if choices and _words(choices[place]) == _words(rest):
        return place
    if labelled.re is _LETTER_TEXT or _MORE_LETTERS.fullmatch(rest) or _OTHER_LABEL.search(rest):
        return None
    return place


# ---------------------------------------------------------------------------------------- golds


@dataclass(frozen=True)
class Gold:
    """A gold answer, read once per prompt."""

    kind: str  # "choice", "math" or "text"
    text: str  # without wrapping; an option's text for a choice, "" where it is not known
    indices: frozenset[int] = frozenset()  # of the right option
    number: Quantity | None = None


@lru_cache(maxsize=4096)
def _read_gold(gold: str, choices: tuple[str, ...]) -> Gold | str:
    """The gold answer, or the reason why no answer could be compared with it."""
    if not gold.strip():
        return "the answer is empty"
    if len(gold) > MAX_ANSWER_CHARS:
        return f"the answer has {len(gold)} characters, more than {MAX_ANSWER_CHARS}"
    text = extract_answer(gold)
    plain = plain_text(text)
    if not re.search(r"[^\W_]|[<>=+*/∞√%!^-]", plain):
        return f"the answer {gold!r} holds no word, number or symbol"
    shown = gold if len(gold) <= 60 else gold[:57] + "..."
    indices = choice_indices(text, choices)
    if choices:
        if indices is None:
            return f"the answer {shown!r} is none of the {len(choices)} choices"
        option = choices[min(indices)]
        return Gold("choice", _unwrap(option), indices, parse_quantity(plain_text(option)))
    if indices is not None and not re.fullmatch(r"[a-z]", plain):  # x and e are variables
        labelled = _LABEL.fullmatch(plain)
        option = labelled.groups()[-1] if labelled else ""
        return Gold("choice", option, indices, parse_quantity(option) if option else None)
    number = parse_quantity(plain)
    if number is not None:
        return Gold("math", text, number=number)
    if not _is_math(text):
        return Gold("text", text)
    if not _is_balanced(text):
        return f"the answer {shown!r} has braces or $ that do not match"
    return Gold("math", text)


def gold_kind(gold: str, choices: Sequence[str] = ()) -> str:
    """ "choice", "math" or "text"; ValueError with the reason for a gold that has a problem."""
    read = _read_gold(str(gold), tuple(choices))
    if isinstance(read, str):
        raise ValueError(read)
    return read.kind


def answer_problem(gold: str, choices: Sequence[str] = ()) -> str | None:
    """Why a gold answer cannot be compared with anything, None for a good one."""
    read = _read_gold(str(gold), tuple(choices))
    return read if isinstance(read, str) else None


def gold_problem(record) -> str | None:
    """Why a data record's ``answer`` (and ``choices``) cannot be graded, None for a good one.

    The loader drops such a record with this reason; nothing is ever rewarded for it.
    """
    return answer_problem(record.answer, record.choices or ())


def _is_math(text: str) -> bool:
    """Whether a gold that is no option and no plain number is an expression rather than words."""
    plain = plain_text(text)
    if _TIME.fullmatch(plain) or _DATE.fullmatch(plain):
        return False
    bare = re.sub(r"\\[A-Za-z]+", " ", plain)
    words = re.findall(r"[A-Za-z]{2,}", bare)
    if any(len(w) > 2 and w.lower() not in _FUNCTIONS or re.search("[A-Z]{2}|[A-Z][a-z]", w)
           for w in words):  # fmt: skip
        return "\\" in plain and not re.search(r"[A-Za-z]{3,}\s+[A-Za-z]{3,}", bare)
    if re.fullmatch(r"[A-Za-zα-ωΑ-Ω]", plain):
        return True
    return bool(_OPERATOR.search(plain)) or any(c in plain for c in _UNICODE_MATH)


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


def decide(gold: str, answer: str | None, choices: Sequence[str] = ()) -> bool | tuple[str, str]:
    """Whether an answer block's text gives the gold answer, or what math-verify must compare.

    Returns True or False, or (gold, prediction) as two expressions in ``$``. An answer that is
    missing, blank or longer than MAX_ANSWER_CHARS is wrong, and so is every answer to a gold with
    a problem.
    """
    target = _read_gold(str(gold), tuple(choices))
    if isinstance(target, str) or answer is None:
        return False
    predicted = extract_answer(answer)
    if not predicted or len(predicted) > MAX_ANSWER_CHARS:
        return False
    if target.kind == "choice":
        return _decide_choice(target, predicted, tuple(choices))
    if target.kind == "text":
        return bool(_words(target.text)) and _words(predicted) == _words(target.text)
    if _compact(predicted) == _compact(target.text):
        return True
    if target.number is not None:
        number = parse_quantity(_right_side(plain_text(predicted)))
        if number is not None:
            return same_quantity(target.number, number)
    if "," in target.text or re.search(r"\b(?:and|or)\b", target.text):
        predicted = _boxed_list(answer) or predicted
    if not _MATH_DELIMITER.search(predicted) and not _is_math(predicted):
        return False  # prose: as an expression it would only be a product of letters
    return _worker_pair(target, predicted)


def _decide_choice(
    target: Gold, predicted: str, choices: tuple[str, ...]
) -> bool | tuple[str, str]:
    """The letter or the option's text; an expression is compared with an option that is one."""
    indices = choice_indices(predicted, choices)
    if indices is not None:
        return not indices.isdisjoint(target.indices)
    if not target.text or _BARE_LETTER.fullmatch(plain_text(predicted)):
        return False
    if _words(predicted) == _words(target.text):
        return True
    number = parse_quantity(_right_side(plain_text(predicted)))
    if target.number is not None and number is not None:
        return same_quantity(target.number, number)
    if _is_math(predicted) and (target.number is not None or _is_math(target.text)):
        return _worker_pair(target, predicted)
    return False


def _worker_pair(target: Gold, predicted: str) -> bool | tuple[str, str]:
    """What math-verify compares; False for a prediction whose braces do not close."""
    if not _is_balanced(predicted):
        return False
    return _expression(target.text), _expression(predicted)


def _right_side(text: str) -> str:
    """What one assignment assigns ("x = 5" gives "5"); a list or a relation is left as it is."""
    head, equals, tail = text.rpartition("=")
    if not equals or re.search(r"[,;<>!]|\b(?:or|and)\b", head) or not tail.strip():
        return text
    return tail.strip()


def _expression(text: str) -> str:
    r"""An expression as math-verify reads it as a whole: LaTeX for symbols, between ``$``."""
    text = re.sub(r"√\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*(\w+)", r"\\sqrt{\1}", text)
    text = "".join(_UNICODE_MATH.get(c, c) for c in text)
    if _MATH_DELIMITER.search(text):
        return text
    return f"${_drop_unit(text)}$"


def _drop_unit(text: str) -> str:
    r"""An expression without a unit at its end: "12\pi cm^2", "\frac{3}{4}\pi{inches}"."""
    match = _TRAILING_UNIT.fullmatch(_SPACING.sub(" ", _FONT.sub(r"\1", text)))
    if match is None or canonical_unit(match[2], glued=True) is None:
        return text
    return match[1]
