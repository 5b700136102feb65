r"""EMMA's rule (EMMA-Bench/EMMA, evaluation/): a quick extraction, then equality.

The answer is a leading option letter, a number, the last ``\boxed{}`` (a ``\text{}`` inside it
first), or what follows the last of five phrases. It is right if it equals the gold or the gold
option's text: in lower case, as a number written in words, or by value at two decimals.
"""

import re

from srpo_jax.benchmarks import common
from srpo_jax.benchmarks.latex.tokens import LatexError
from srpo_jax.benchmarks.latex.value import latex_value
from srpo_jax.benchmarks.word_numbers import word_number
from srpo_jax.rewards.braces import braced_spans

_PHRASES = ("final answer is", "correct answer is", "answer should be", "answer is", "answer:")
_BRACE = re.compile(r"(\\boxed\{)|[{}]")  # an escaped brace counts, as in the official code
_TEXT = re.compile(r"\\text{(.*?)}")


def official(row: common.Row) -> common.Scored:
    """The official outcome."""
    extraction = common.extraction_or(lambda text: extract(text) if text else None, row)
    targets = _targets(row)
    if extraction is None:
        return common.Scored(None, None, False, common.EMPTY)
    return common.Scored(
        extraction, extraction, any(same(extraction, target) for target in targets)
    )


def _targets(row: common.Row) -> list[str]:
    """The gold, and the text of the option where it is a letter."""
    answer = common.gold(row)
    content = row.get("gt_content")
    if content is None:
        content = common.option_text(answer, common.choices(row))
    return [answer] if content is None else list(dict.fromkeys([answer, str(content)]))


def extract(text: str) -> str:
    """The answer that a response gives; "" where no pattern finds one."""
    text = text.strip()
    for letter in "ABCDEFGH":
        if text.upper() == letter or text.startswith((f"{letter}:", f"{letter}.")):
            return letter
    if common.is_number(text):
        return text
    boxes = _boxes(text)
    if boxes:
        inner = _TEXT.findall(boxes[-1])
        return (inner or boxes)[-1].strip()
    lowered = text.lower()
    for phrase in _PHRASES:
        if phrase in lowered:
            return lowered.split(phrase)[-1].strip().split("\n")[0].split(".")[0]
    return ""


def _boxes(text: str) -> list[str]:
    r"""The contents of the outermost \boxed{}, up to one that is not closed."""
    contents, position = [], 0
    for start, inner, end in braced_spans(text, _BRACE):
        if end is None:
            break
        if start >= position:
            contents.append(text[inner:end])
            position = end
    return contents


def same(extraction: str, target: str) -> bool:
    """Equality in lower case, of a number in words ("three") with the gold, or of values."""
    left, right = extraction.lower(), target.lower()
    if left.strip() == right.strip():
        return True
    number = word_number(left)
    if number is not None and str(number) == right.strip():
        return True
    try:
        return _rounded(left) == _rounded(right)
    except (LatexError, OverflowError):  # an integer beyond floats
        return False


def _rounded(text: str) -> float:
    return round(float(latex_value(text, printed=False)), 2)


_SUBJECTS = ("Chemistry", "Coding", "Math", "Physics")
BENCHMARK = common.Benchmark(
    name="emma",
    counts={2788: "EMMA", 400: "EMMA-mini"},
    form=common.Form(
        "pid|id question options answer subject type",
        images=(),
        numbered=True,
        id=("pid", "id"),
    ),
    places={
        "test": common.Place("luckychao/EMMA", "test", _SUBJECTS),
        "mini": common.Place("luckychao/EMMA-mini", "test", _SUBJECTS),
    },
    groups=common.grouping("subject", subject_category="{subject}_{category}", task="{task}"),
    official=common.by_row(official),
)
