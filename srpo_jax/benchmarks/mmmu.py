"""MMMU's rule (MMMU-Benchmark/MMMU, mmmu/): an option letter by patterns; open answers by parts.

Where nothing names an option, the official code draws one with Python's generator seeded with 42,
subject after subject. That order is defined, so the draw is made here as there, and the row says
so (``drawn``). An open answer is right if any of its parts or numbers holds or equals the gold.
"""

import ast
import contextlib
import random
import re
from collections.abc import Sequence
from typing import Any

from srpo_jax.benchmarks import common
from srpo_jax.benchmarks.judge.flows import options_first
from srpo_jax.benchmarks.mmmu_pro import DOMAINS, groups, order, parse_choice, subject_of

SEED = 42

# The order of the official run, which decides what is drawn for whom.
_SUBJECTS = tuple(sorted(subject for subjects in DOMAINS.values() for subject in subjects))
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")

Part = str | float


def official(rows: Sequence[common.Row], pool: Any = None) -> list[common.Scored]:
    """The official outcome of each row: a letter, or the parts of an open answer."""
    for needed in (golds, _check):
        common.each(needed, rows)
    generator = random.Random(SEED)
    scored = {
        i: _official(rows[i], generator)
        for i in sorted(range(len(rows)), key=lambda i: _place(rows[i]))
    }
    return [scored[i] for i in range(len(rows))]


def _check(row: common.Row) -> None:
    if not is_open(row):
        common.needed_choices(row)


def _place(row: common.Row) -> int:
    subject = subject_of(row)
    return _SUBJECTS.index(subject) if subject in _SUBJECTS else len(_SUBJECTS)


def _official(row: common.Row, generator: random.Random) -> common.Scored:
    wanted = golds(row)
    if is_open(row):
        parts = parse_open(common.extraction_or(str, row))
        shown = sorted(parts, key=str)
        extraction = "; ".join(str(part).strip() for part in shown)
        return common.Scored(extraction, shown, open_correct(wanted, parts))
    letter = read_option(row)
    if letter is not None:
        return common.Scored(letter, letter, letter in wanted)
    letter = generator.choice(common.LETTERS[: len(common.choices(row))])
    return common.Scored(None, letter, letter in wanted, drawn=True)


def read_option(row: common.Row) -> str | None:
    """The option letter that the row brings or its response names; None for open questions."""
    if is_open(row):
        return None
    options = common.choices(row)
    return common.extraction_or(lambda text: parse_choice(text, options, spaced=True), row)


def is_open(row: common.Row) -> bool:
    """Whether a question has no options, by its type or, without one, by the options."""
    kind = row.get("question_type")
    return not common.choices(row) if kind is None else kind != "multiple-choice"


def golds(row: common.Row) -> list[str]:
    """The gold answers; the hub holds several as the text of a list."""
    value = row.get("answer")
    if value is None:
        raise common.RowError("no 'answer' (the gold)")
    if isinstance(value, str) and value.startswith("[") and is_open(row):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]


# --------------------------------------------------------------------------------- open answers


def parse_open(text: str) -> list[Part]:
    """The parts of an open answer: what follows the words that announce one, and its numbers."""
    phrases = _key_phrases(text)
    numbers = [
        number
        for phrase in phrases
        for pattern in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE)
        for number in pattern.findall(phrase)
    ]
    parts = [part for piece in phrases + numbers for part in comparable(piece)]
    return list(dict.fromkeys(parts))


def _key_phrases(text: str) -> list[str]:
    """The shortest announced phrase of each line; the whole text where nothing is announced."""
    text = text.strip().strip(".").lower()
    # The official code splits sentences at capitals after having made the text lower case: it
    # splits lines only.
    lines = text.split("\n")
    phrases = []
    for i, line in enumerate(lines):
        indicators = _INDICATORS + (("=",) if i == len(lines) - 1 else ())
        shortest = ""
        for indicator in indicators:
            if indicator in line:
                tail = line.split(indicator)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            phrases.append(shortest)
    return phrases or [text]


def comparable(text: str) -> list[Part]:
    """A number rounded to two decimals, or the text in lower case; one letter with a space."""
    text = text.strip()
    if common.is_number(text.replace(",", "")):
        return [round(float(text.replace(",", "")), 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_correct(answers: list[str], parts: list[Part]) -> bool:
    """Whether a part holds a gold text, or is a gold number."""
    wanted = [part for answer in answers for part in comparable(answer)]
    texts = [answer for answer in wanted if isinstance(answer, str)]
    return any(
        any(answer in part for answer in texts) if isinstance(part, str) else part in wanted
        for part in parts
    )


BENCHMARK = common.Benchmark(
    name="mmmu",
    counts={900: "validation"},
    form=common.Form("id question options answer question_type", images=(), numbered=True),
    places={"validation": common.Place("MMMU/MMMU", "validation", _SUBJECTS)},
    groups=groups,
    official=official,
    golds=golds,
    order=order,
    judge=options_first(read_option),
    check=_check,
)
