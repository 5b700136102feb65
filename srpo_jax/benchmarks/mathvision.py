r"""MathVision's rule (mathllm/MATH-V, evaluation/): an answer by patterns, then equality by value.

The answer is a closing or opening option letter, a number after the last "is ", the text after the
last of four answer phrases, or the last ``\boxed{}``; it is lower-cased and stripped of LaTeX that
does not matter. It is right if it equals the gold, or the gold option's text: as a string, as a
tuple rounded to two decimals, or by value at two decimals (``latex_value``).
"""

from srpo_jax.benchmarks import common
from srpo_jax.benchmarks.latex.tokens import LatexError
from srpo_jax.benchmarks.latex.value import latex_value

_PHRASES = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_MARK = "oxed{"
_UNWRAPPED = tuple(f"({c})" for c in "abcde") + tuple(f"{{{c}}}" for c in "abcde")
# Removed one after the other, in this order, after the white space.
_REMOVED = (
    ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""),
    ("\\text", ""), ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""),
    ("{km}", ""), ("km", ""),
)  # fmt: skip
_STRIPPED = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""),
    ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""),
)  # fmt: skip


def official(row: common.Row) -> common.Scored:
    """The official outcome: ``extraction``, the same as prediction, and the verdict."""
    extraction, answer = common.extraction_or(extract, row), common.gold(row)
    option = common.option_text(answer, common.choices(row)) or ""
    correct = same(answer, extraction) or same(option, extraction)
    return common.Scored(extraction, extraction, correct)


# ---------------------------------------------------------------------------------- extraction


def extract(text: str) -> str:
    """The answer that a response gives, normalised; "" for an empty response."""
    answer = text.strip()
    for letter in "ABCDE":
        if answer.endswith((f" {letter}.", f" ({letter}).")) or answer.startswith(
            (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        ):
            answer = letter
    tail = answer.split("is ")[-1].rstrip(".")
    if common.is_number(tail):
        answer = tail
    boxes = answer.count(_MARK)
    if boxes == 0:
        answer = _after_phrases(answer)
    elif boxes > 1:
        answer = "\\boxed{" + answer.split(_MARK)[-1]
    answer = normalise(answer)
    for wrapped in _UNWRAPPED:
        answer = answer.replace(wrapped, wrapped[1])
    return answer.rstrip(".").lstrip(":").strip()


def _after_phrases(answer: str) -> str:
    """What the last answer phrase announces, to the end of its line or sentence."""
    for phrase in _PHRASES:
        for flag in (phrase, phrase.replace("the", "The")):
            found = flag in answer
            answer = answer.split(flag)[-1].strip()
            if found:
                answer = answer.split("\n")[0].split(". ")[0]
    return answer


def normalise(text: str) -> str:
    r"""A (boxed) answer in lower case, its last side of an equation, without spacing and units."""
    text = text.lower().replace("{}", "")
    start, end = text.find(_MARK), text.rfind("}")
    if 0 <= start and start + len(_MARK) <= end:
        text = text[start + len(_MARK) : end]
    closing, opening = text.find("}"), text.find("{")
    if closing >= 0 and (opening < 0 or closing < opening):
        text = text[:closing]
    text = text.split("=")[-1].split("\\approx")[-1].replace(" ", "")
    for old, new in _REMOVED:
        text = text.replace(old, new)
    return _strip(text)


def _strip(text: str) -> str:
    """The clean-up of the MATH benchmark, as MathVision's code has it."""
    for old, new in _STRIPPED:
        text = text.replace(old, new)
    text = text.split("\\text{ ")[0].replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    for mark in ("=", "\\approx"):
        if text.count(mark) == 1:
            text = text.split(mark)[-1]
    has_root = "sqrt" in text
    if has_root:
        head, *parts = text.split("\\sqrt")
        text = "\\sqrt".join([head, *map(_brace_first, parts)])
    text = text.replace(" ", "")
    if has_root:  # fractions are mended only beside roots
        text = _mend_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return _slash_to_fraction(text)


def _brace_first(text: str) -> str:
    r"""What follows a ``\sqrt``, with braces around its first character where it has none."""
    return text if not text or text[0] == "{" else f"{{{text[0]}}}{text[1:]}"


def _mend_fractions(text: str) -> str:
    r"""``\frac12`` and ``\frac1{2}`` with the braces they lack; unchanged where one is cut off."""
    head, *parts = text.split("\\frac")
    mended = [head]
    for part in parts:
        if part.startswith("{"):
            mended.append(part)
        elif len(part) < 2:
            return text
        else:
            over = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            mended.append(f"{{{part[0]}}}{over}")
    return "\\frac".join(mended)


def _slash_to_fraction(text: str) -> str:
    """ "3/4" as a fraction; anything but two plain integers stays as it is."""
    top, slash, bottom = text.partition("/")
    try:
        if slash and text == f"{int(top)}/{int(bottom)}":
            return f"\\frac{{{int(top)}}}{{{int(bottom)}}}"
    except ValueError:
        pass
    return text


# -------------------------------------------------------------------------------------- equality


def same(answer: str, extraction: str) -> bool:
    """Whether a gold and an extracted answer are equal; an empty one equals nothing."""
    left, right = answer.lower(), extraction.lower()
    if not left.replace(" ", "") or not right.replace(" ", ""):
        return False
    if left.strip() == right.strip():
        return True
    left, right = _rounded_tuple(left), _rounded_tuple(right)
    if left == right:
        return True
    try:
        return _rounded(right) == _rounded(left)
    except LatexError:
        return False


def _rounded(text: str) -> int | float:
    return round(latex_value(text), 2)


def _rounded_tuple(text: str) -> str:
    """A tuple or list of expressions with each rounded to two decimals; other text unchanged."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")):
        return text
    try:
        values = [
            part if "infty" in part or part in ("a", "-a") else str(_rounded(part))
            for part in parts
        ]
    except ValueError:  # no value, or an integer too long to print
        return text
    return f"{text[0]}{','.join(values)}{text[-1]}"


BENCHMARK = common.Benchmark(
    name="mathvision",
    counts={3040: "test", 304: "testmini"},
    form=common.Form("id question image|decoded_image options|choices answer level subject"),
    places={
        "test": common.Place("MathLLMs/MathVision", "test"),
        "testmini": common.Place("MathLLMs/MathVision", "testmini"),
    },
    groups=common.grouping(
        level="level{level}", subject="{subject}", subject_level="{subject}_level{level}"
    ),
    official=common.by_row(official),
)
