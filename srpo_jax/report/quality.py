r"""How good reflections are: measures by rule, and the paper's rubric by a judge.

By rule, for every reflection of every model, so that baselines can be scored too: lengths in words,
the shares of the reflection and of the second think that are copied from the first think, whether
the reflection states an answer or gives the right one away, and its verdict on the first attempt.
By a judge (SRPO, appendix B.1): logic, missing assumptions, clarity and suggestions, 0 to 5 each.

Rules read words, not meaning: they are for comparing models over many rows, not for single rows.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from srpo_jax.benchmarks.common import Ask, Row, RowError, choices, each, first, option_text, table
from srpo_jax.benchmarks.judge.client import Judge
from srpo_jax.data.errors import shown
from srpo_jax.data.prompts import split_at_marks
from srpo_jax.remote.judge import NoJudgement
from srpo_jax.remote.replies import BadReply
from srpo_jax.report.rates import interval
from srpo_jax.rewards.answers import boxed, decide
from srpo_jax.rewards.profiles import PAPER
from srpo_jax.rewards.template import Completion, parse_response
from srpo_jax.structs import BLOCKS

GRAM = 3  # words of a run that counts as copied
RESAMPLES = 2000  # of the bootstrap
MAX_SHOWN = 20_000  # characters of a block that the judge is shown
RUBRIC = ("logic", "missing_assumptions", "clarity", "suggestions")
TOP = 5  # of the rubric

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
# Words that announce an answer, and what only an answer, not a remark on it, begins with.
_ANNOUNCED = re.compile(
    r"(?:\banswer\s*(?:is|:|=|should\s+be|must\s+be|would\s+be|becomes)|答案(?:是|为|应为|[:：]))"
    r"[\s*:：]*(?=[$\\(\"“]|[-−]?\d|(?:option|choice)\b|(?-i:[A-J])(?:\b|(?=[\u3400-\u9fff])))"
    r"([^\n]{1,200})",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\(([A-J])\)|\b(?:option|choice)\s+\(?([A-J])\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[^\d\s])[.;,!?](?:\s|$)|(?<=\d)[.;,!?](?:\s|$)|[。；，]")

_RIGHT = frozenset("correct right accurate valid sound consistent holds verified confirmed".split())
_WRONG = frozenset(
    "incorrect wrong mistake mistakes mistaken error errors erroneous flaw flaws flawed inaccurate "
    "invalid misread misreads overlooked overlooks miscalculated miscounted misinterpreted "
    "inconsistent".split()
)
_NEGATIONS = frozenset("not no without never nothing neither nor free hardly".split())
_REACH = 3  # words over which a negation is felt
# "the correct value" and "to correct this" say nothing about the attempt; "right angle" neither.
_BEFORE_NO_VERDICT = frozenset("the to a an any this your".split())
_AFTER_RIGHT = frozenset(
    "angle angled angles triangle triangles side hand of end half part now after before to corner "
    "edge column prism circular isosceles".split()
)
_CHINESE_WRONG = re.compile("不正确|不对|错误(?!的是)|有误|算错|看错")
_CHINESE_RIGHT = re.compile("(?<!不)正确|无误|没有错误|无错误|没错")
_CHINESE_NO_ERROR = re.compile("没有错误|无错误")


# ------------------------------------------------------------------------------------- blocks


def blocks(row: Row) -> dict[str, str | None]:
    """The texts of the five blocks, None where one is missing or blank.

    A row with a ``reflection`` gives the blocks as fields of their own (a baseline's text without
    our tags, or a record of stage 1's data); else they are parsed from its ``response``. RowError
    where it has neither.
    """
    if row.get("reflection") is not None:
        return {name: _text(row, name) for name in BLOCKS}
    if not isinstance(row.get("response"), str):
        raise RowError("no 'response' and no 'reflection' (with first_think, ... as fields)")
    completion = Completion.of_text(row["response"])
    spans = parse_response(completion, PAPER.template).spans
    return {name: (completion.decode(span) or None) if span else None
            for name, span in spans.items()}  # fmt: skip


def _text(row: Row, name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{name!r} must be text, found {shown(value)}")
    return (value or "").strip() or None


def words(text: str | None) -> list[str]:
    """Runs of letters or digits in lower case; each Chinese character is a word."""
    return _WORD.findall((text or "").casefold())


# -------------------------------------------------------------------------------- measures by rule


def copied(text: str | None, source: str | None) -> float | None:
    """The share of a text's runs of three words that stand in ``source`` too; None without any."""
    runs = _runs(words(text))
    if not runs:
        return None
    known = set(_runs(words(source)))
    return sum(run in known for run in runs) / len(runs)


def _runs(found: list[str]) -> list[tuple[str, ...]]:
    return list(zip(*(found[i:] for i in range(GRAM)), strict=False))


def stated_answers(text: str) -> list[str]:
    r"""The answers that a text states: its last \boxed{}, and what "answer is" or ":" announces."""
    out = [] if (box := boxed(text)) is None else [box]
    for match in _ANNOUNCED.finditer(text):
        tail = match[1].strip()
        out.append(_SENTENCE_END.split(tail, maxsplit=1)[0].strip("* "))
    return [answer for answer in out if answer]


def _gold(row: Row) -> str | None:
    value = first(row, "answer", "gold")
    return None if value is None else str(value)


def gives_away(row: Row, found: dict[str, str | None]) -> bool | None:
    """Whether a reflection holds the right answer, which the first attempt did not find.

    Right is the gold (``answer`` or ``gold``), else the second answer. It is given away where the
    reflection states it, or holds its words, which the first attempt does not. None without a right
    answer.
    """
    target = _gold(row) or found["second_answer"]
    if not target:
        return None
    options, text = choices(row), found["reflection"] or ""
    target = boxed(target) or target
    if decide(target, found["first_answer"], options) is True:
        return False
    stated = stated_answers(text) + [a or b for a, b in _OPTION.findall(text)]
    if any(decide(target, answer, options) is True for answer in stated):
        return True
    wanted = words(option_text(target, options) or target)
    if not wanted or (len(wanted) == 1 and re.fullmatch("[a-z]", wanted[0])):
        return False  # a letter alone stands in every text
    before = words(found["first_think"]) + words(found["first_answer"])
    return _holds(words(text), wanted) and not _holds(before, wanted)


def _holds(found: list[str], wanted: list[str]) -> bool:
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found)))


def verdict(text: str) -> str | None:
    """What a reflection says of the first attempt: "right", "wrong", "mixed", or None.

    Told from words such as "correct" and "mistake", turned round by a negation shortly before.
    """
    right, wrong = len(_CHINESE_RIGHT.findall(text)), len(_CHINESE_WRONG.findall(text))
    wrong -= len(_CHINESE_NO_ERROR.findall(text))
    found = words(re.sub("n['’]t\\b", " not", text))
    for i, word in enumerate(found):
        good = word in _RIGHT
        if not good and word not in _WRONG:
            continue
        if good and i and found[i - 1] in _BEFORE_NO_VERDICT:
            continue
        if word == "right" and i + 1 < len(found) and found[i + 1] in _AFTER_RIGHT:
            continue
        if _NEGATIONS.intersection(found[max(0, i - _REACH) : i]):
            good = not good
        right, wrong = right + good, wrong + (not good)
    if right > 0 and wrong > 0:
        return "mixed"
    return "right" if right > 0 else "wrong" if wrong > 0 else None


def measure(row: Row) -> dict[str, Any]:
    """The measures by rule of one row; None where one has no meaning.

    ``*_words`` are lengths in words, ``*_copied`` shares of runs of three words (0 to 1).
    ``verdict_fits`` tells whether the verdict agrees with ``first_correct``, or with the strict
    rule where that can tell.
    """
    found = blocks(row)
    text = found["reflection"]
    out: dict[str, Any] = {"has_reflection": text is not None}
    out |= {f"{name}_words": len(words(found[name])) if found[name] else None for name in BLOCKS}
    if text is None:
        empty = "reflection_copied second_copied states_answer gives_away verdict verdict_fits"
        return out | dict.fromkeys(empty.split())
    think, said, right = found["first_think"], verdict(text), _first_correct(row, found)
    clear = said in ("right", "wrong") and right is not None
    return out | {
        "reflection_copied": copied(text, think) if think else None,
        "second_copied": copied(found["second_think"], think) if think else None,
        "states_answer": bool(stated_answers(text)),
        "gives_away": gives_away(row, found),
        "verdict": said,
        "verdict_fits": (said == "right") == right if clear else None,
    }


def _first_correct(row: Row, found: dict[str, str | None]) -> bool | None:
    if isinstance(row.get("first_correct"), bool):
        return row["first_correct"]
    target = _gold(row)
    if target is None or found["first_answer"] is None:
        return None
    result = decide(target, found["first_answer"], choices(row))
    return None if isinstance(result, tuple) else bool(result)


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows with their measures as ``quality``; RowError, with the index, for a faulty row."""
    return each(lambda row: row | {"quality": measure(row)}, rows)


# -------------------------------------------------------------------------------------- rubric


def rated(rows: Sequence[Row], judge: Judge) -> list[Row]:
    """Measured rows with the judge's ratings in ``quality``: ``rubric`` and its ``mean``, 0 to 5.

    ``no_judgement`` says why there is none, or the row has no reflection. Raises Fatal where no
    request can succeed.
    """

    async def one(ask: Ask, row: Row) -> Row:
        if not row["quality"]["has_reflection"]:
            return row
        try:
            ratings = await ask("rubric", _shown(row), RUBRIC, float, check=_in_range)
        except NoJudgement as error:
            return row | {"quality": row["quality"] | {"no_judgement": str(error)}}
        mean = sum(ratings.values()) / len(ratings)
        return row | {"quality": row["quality"] | {"rubric": ratings, "rubric_mean": mean}}

    return judge.map(one, rows)


def _shown(row: Row) -> dict[str, str]:
    found = blocks(row)
    question = next((row[k] for k in ("question", "problem") if isinstance(row.get(k), str)), "")
    names = {"think": "first_think", "answer": "first_answer", "reflection": "reflection"}
    texts = {key: (found[name] or "")[:MAX_SHOWN] for key, name in names.items()}
    return {"question": " ".join(split_at_marks(question)).strip()} | texts


def _in_range(found: dict[str, float]) -> None:
    if not all(0 <= value <= TOP for value in found.values()):
        raise BadReply("a rating outside 0 to 5")


# ------------------------------------------------------------------------------------- summary


def measure_means(rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Counts, and for every measure its mean with a bootstrap 95 % interval.

    Problems (rows of one ``origin``, else of one ``id``) are resampled, not rows: samples of one
    problem are not independent. A measure counts the rows in which it has a meaning.
    """
    values = [_numbers(row["quality"]) for row in rows]
    names = list(dict.fromkeys(name for one in values for name in one))
    keys = [row.get("origin", row.get("id", ("row", i))) for i, row in enumerate(rows)]
    places = {key: i for i, key in enumerate(dict.fromkeys(map(str, keys)))}
    found = np.array([[one.get(name) for name in names] for one in values], float)  # NaN: None
    sums, counts = np.zeros((2, len(places), len(names)))
    owners = [places[str(key)] for key in keys]
    np.add.at(sums, owners, np.nan_to_num(found))
    np.add.at(counts, owners, ~np.isnan(found))
    low, high = interval(sums, counts, resamples=RESAMPLES, seed=seed, empty=np.nan)
    totals = counts.sum(0)
    return {
        "rows": len(rows),
        "problems": len(places),
        "reflections": sum(row["quality"]["has_reflection"] for row in rows),
        "no_judgement_rows": sum("no_judgement" in row["quality"] for row in rows),
        "measures": {
            name: {
                "mean": round(float(sums[:, j].sum() / totals[j]), 4),
                "low": round(float(low[j]), 4),
                "high": round(float(high[j]), 4),
                "rows": int(totals[j]),
            }
            for j, name in enumerate(names)
            if totals[j]
        },
    }


def _numbers(quality: dict[str, Any]) -> dict[str, float | None]:
    """The measures of a row as numbers: truth values as 0 and 1, verdicts as one each."""
    out = {k: v for k, v in quality.items() if k not in ("verdict", "rubric", "no_judgement")}
    for name in ("right", "wrong", "mixed"):
        has = quality["has_reflection"]
        out[f"verdict_{name}"] = quality["verdict"] == name if has else None
    out |= {f"rubric_{name}": value for name, value in quality.get("rubric", {}).items()}
    return out


def markdown(summary: dict[str, Any]) -> str:
    """The summary as a table."""
    rows = [
        (name, f"{m['mean']:.3g}", f"{m['low']:.3g} to {m['high']:.3g}", m["rows"])
        for name, m in summary["measures"].items()
    ]
    return (
        "# Reflection quality\n\n"
        f"{summary['reflections']} reflections in {summary['rows']} rows of {summary['problems']} "
        "problems; means with bootstrap 95 % intervals over problems\n\n"
        f"{table(('measure', 'mean', '95 %', 'rows'), rows)}\n"
    )
