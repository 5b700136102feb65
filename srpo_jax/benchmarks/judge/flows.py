"""The mode ``judge``: a language model extracts answers and compares them with the gold.

MathVista: the model extracts, the benchmark's own rule normalises and compares. MathVerse: it
extracts, then says yes or no. Every other benchmark: one generic extraction and one generic match,
as MM-EUREKA's and SRPO's scripts do; of MMMU and MMMU-Pro the official patterns read the options,
and the model is asked only where they find none and the official code would draw at random.

What needs no call gets none: the official shortcuts of MathVista, an extraction that a row brings,
an empty response, option letters, and an answer that equals the gold by this project's strict rule.
Asking itself is ``judge_client``'s; here is only what is asked, and what its answers mean.
"""

from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any

from srpo_jax.benchmarks import mathverse, mathvista, mmmu, mmmu_pro
from srpo_jax.benchmarks.common import (
    Row,
    RowError,
    Scored,
    choices,
    each,
    field,
    given_extraction,
    gold,
    response,
)
from srpo_jax.benchmarks.judge.client import Ask, Judge, NoJudgement
from srpo_jax.remote.replies import BadReply
from srpo_jax.rewards.answers import choice_indices, decide, gold_kind

# The end of a response holds its answer: an endless one must not cost a fortune.
MAX_RESPONSE = 20_000  # characters
NOTHING = "NO ANSWER"  # what the prompts ask for where a response has no answer
NO_ANSWER = "the judge finds no answer in the response"
EMPTY = "the response is empty"


def judged(
    module: ModuleType,
    rows: Sequence[Row],
    judge: Judge,
    advance: Callable[[int], Any] = lambda n: None,
) -> list[Scored]:
    """The outcome of each row; rows without a judgement say why and count as wrong.

    Raises RowError, before anything is asked, where a field is missing; Fatal where no request can
    succeed.
    """
    each(lambda row: _check(module, row), rows)
    flow = FLOWS.get(module, _generic)

    async def one(ask: Ask, row: Row) -> Scored:
        try:
            return await flow(module, row, ask)
        except NoJudgement as error:
            return Scored(None, None, False, no_judgement=str(error))

    return judge.map(one, rows, advance)


def _check(module: ModuleType, row: Row) -> None:
    """Everything that a row must have, so that a fault in the last one costs no calls."""
    _golds(module, row), choices(row)
    if module is mathvista:
        if "question_type" not in row or "answer_type" not in row:
            raise RowError("no 'question_type' or no 'answer_type'; MathVista's rule needs both")
        mathvista.normalise(row, "1")
    if module in (mmmu, mmmu_pro) and not _is_open(module, row) and not choices(row):
        raise RowError("no 'choices' (or 'options') for a multiple-choice question")
    if module is not mmmu_pro and _question(row) is None and _asks(module, row):
        raise RowError("no 'question' (or 'problem'); the judge needs it")


def _asks(module: ModuleType, row: Row) -> bool:
    """Whether the question is shown to the judge, unless a shortcut comes first."""
    if module is mathvista:
        return given_extraction(row) is None and mathvista.extract(row, quick=False) is None
    return given_extraction(row) is not None or bool(response(row).strip())


def _question(row: Row) -> str | None:
    """The question as its benchmark shows it to the judge; We-Math's options are one text."""
    value = field(row, "question_for_eval", "question", "problem", "query")
    if value is None:
        return None
    text, option = str(value).replace("<image>", " ").strip(), row.get("option")
    return f"{text}\n{option}" if isinstance(option, str) and option not in text else text


def _golds(module: ModuleType, row: Row) -> list[str]:
    return module.golds(row) if hasattr(module, "golds") else [gold(row)]


def _shown(row: Row) -> str:
    return response(row)[-MAX_RESPONSE:]


# ------------------------------------------------------------------------------------- asking


async def _extraction(ask: Ask, name: str, values: dict[str, Any]) -> str | None:
    """What the judge extracts; None where it finds no answer."""
    found = (await ask(name, values, ("extraction",)))["extraction"]
    return None if found.strip().strip(".").upper() == NOTHING else found


async def _judgement(ask: Ask, name: str, values: dict[str, Any]) -> bool:
    found = await ask(name, values, ("judgement",), float, check=_yes_or_no)
    return found["judgement"] == 1


def _yes_or_no(found: dict[str, float]) -> None:
    if found["judgement"] not in (0, 1):
        raise BadReply("a judgement that is neither 0 nor 1")


# ---------------------------------------------------------------------------------- benchmarks


async def _mathvista(module: ModuleType, row: Row, ask: Ask) -> Scored:
    extraction = given_extraction(row)
    if extraction is None:
        extraction = mathvista.extract(row, quick=False)
    if extraction is None:
        query = row.get("query")
        extraction = await _extraction(
            ask,
            "mathvista_extract",
            {
                "question": _question(row) if query is None else str(query),
                "kind": str(row["answer_type"]),
                "response": _shown(row),
            },
        )
    if extraction is None:
        return Scored(None, None, False, NO_ANSWER)
    prediction = mathvista.normalise(row, extraction)
    return Scored(str(extraction), prediction, prediction == gold(row))


async def _mathverse(module: ModuleType, row: Row, ask: Ask) -> Scored:
    extraction = given_extraction(row)
    if extraction is None:
        if not response(row).strip():
            return Scored(None, None, False, EMPTY)
        extraction = await _extraction(ask, "mathverse_extract", {"response": _shown(row)})
    if extraction is None:
        return Scored(None, None, False, NO_ANSWER)
    text, target = str(extraction), gold(row)
    right = text == target or await _judgement(
        ask, "mathverse_judge", {"question": _question(row), "gold": target, "extraction": text}
    )
    return Scored(text, text, right)


async def _options_first(module: ModuleType, row: Row, ask: Ask) -> Scored:
    """MMMU and MMMU-Pro: the official patterns, and the judge where these find no option."""
    if _is_open(module, row):
        return await _generic(module, row, ask)
    letter, options = given_extraction(row), choices(row)
    if letter is None and module is mmmu_pro:
        letter = mmmu_pro.after_answer(response(row), options)
    if letter is None:
        letter = mmmu_pro.parse_choice(response(row), options, spaced=module is mmmu)
    if letter is None:
        return await _generic(module, row, ask)
    return Scored(str(letter), str(letter), str(letter) in _golds(module, row))


def _is_open(module: ModuleType, row: Row) -> bool:
    return module is mmmu and mmmu.is_open(row)


async def _generic(module: ModuleType, row: Row, ask: Ask) -> Scored:
    extraction, options = given_extraction(row), choices(row)
    question = _question(row) or ""
    if extraction is None:
        if not response(row).strip():
            return Scored(None, None, False, EMPTY)
        extraction = await _extraction(
            ask, "extract", {"question": question, "options": options, "response": _shown(row)}
        )
    if extraction is None:
        return Scored(None, None, False, NO_ANSWER)
    text, golds, unit = str(extraction), _golds(module, row), str(row.get("unit") or "")
    right = settled(golds, text, options, unit)
    if right is None:
        right = await _judgement(
            ask,
            "match",
            {
                "question": question,
                "options": options,
                "gold": " or ".join(golds),
                "unit": unit,
                "extraction": text,
            },
        )
    return Scored(text, text, right)


def settled(golds: Sequence[str], text: str, options: Sequence[str], unit: str) -> bool | None:
    """The verdict that needs no judge, None where it needs one.

    Equal text is right, and so is what the strict rule finds equal, unless the gold's unit stands
    apart from it, where a wrong unit would pass. Of options, two that both can be read differ for
    certain.
    """
    if text in golds:
        return True
    if not unit and any(decide(target, text, options) is True for target in golds):
        return True
    read = choice_indices(text, options) is not None
    return False if read and all(_is_choice(target, options) for target in golds) else None


def _is_choice(target: str, options: Sequence[str]) -> bool:
    try:
        return gold_kind(target, options) == "choice"
    except ValueError:  # a gold that the strict rule cannot read, the judge may
        return False


FLOWS: dict[ModuleType, Callable[[ModuleType, Row, Ask], Awaitable[Scored]]] = {
    mathvista: _mathvista,
    mathverse: _mathverse,
    mmmu: _options_first,
    mmmu_pro: _options_first,
}
