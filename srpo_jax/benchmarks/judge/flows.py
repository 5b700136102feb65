"""The mode ``judge``: a language model extracts answers and compares them with the gold.

A benchmark's own flow says what its official scripts ask. Every other benchmark has one generic
extraction and one generic match, as MM-EUREKA's and SRPO's scripts do.

What needs no call gets none: an extraction that a row brings, an empty response, option letters,
and an answer that equals the gold by this project's strict rule. Asking itself is ``client``'s;
here is only what is asked, and what its answers mean.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from srpo_jax.benchmarks import common
from srpo_jax.benchmarks.judge.client import Judge
from srpo_jax.remote.judge import NoJudgement
from srpo_jax.remote.replies import BadReply
from srpo_jax.rewards.answers import Gold, choice_indices, decide, read_gold

# The end of a response holds its answer: an endless one must not cost a fortune.
MAX_RESPONSE = 20_000  # characters
NOTHING = "NO ANSWER"  # what the prompts ask for where a response has no answer
NO_ANSWER = "the judge finds no answer in the response"


def judged(
    benchmark: common.Benchmark, rows: Sequence[common.Row], judge: Judge
) -> list[common.Scored]:
    """The outcome of each row; rows without a judgement say why and count as wrong.

    Raises RowError, before anything is asked, where a field is missing; Fatal where no request can
    succeed.
    """
    common.each(lambda row: _check(benchmark, row), rows)
    flow = benchmark.judge or extract_and_match

    async def one(ask: common.Ask, row: common.Row) -> common.Scored:
        try:
            return await flow(row, benchmark.golds(row), ask)
        except NoJudgement as error:
            return common.Scored(None, None, False, no_judgement=str(error))

    return judge.map(one, rows)


def _check(benchmark: common.Benchmark, row: common.Row) -> None:
    """Everything that a row must have, so that a fault in the last one costs no calls."""
    for needed in (benchmark.golds, common.choices, benchmark.check):
        needed(row)
    if benchmark.shows_question(row) and question(row) is None:
        raise common.RowError("no 'question' (or 'problem'); the judge needs it")


def question(row: common.Row) -> str | None:
    """The question as its benchmark shows it to the judge; We-Math's options are one text."""
    value = common.field(row, "question_for_eval", "question", "problem", "query")
    if value is None:
        return None
    text, option = str(value).replace("<image>", " ").strip(), row.get("option")
    return f"{text}\n{option}" if isinstance(option, str) and option not in text else text


def shown(row: common.Row) -> str:
    """As much of the response as the judge sees."""
    return common.response(row)[-MAX_RESPONSE:]


# ------------------------------------------------------------------------------------- asking


async def extracted(ask: common.Ask, name: str, values: dict[str, Any]) -> str | None:
    """What the judge extracts; None where it finds no answer."""
    found = (await ask(name, values, ("extraction",)))["extraction"]
    return None if found.strip().strip(".").upper() == NOTHING else found


async def is_same(ask: common.Ask, name: str, values: dict[str, Any]) -> bool:
    """Whether the judge finds an answer to be the gold."""
    found = await ask(name, values, ("judgement",), float, check=_yes_or_no)
    return found["judgement"] == 1


def _yes_or_no(found: dict[str, float]) -> None:
    if found["judgement"] not in (0, 1):
        raise BadReply("a judgement that is neither 0 nor 1")


# -------------------------------------------------------------------------------------- flows


async def extract_and_compare(
    row: common.Row,
    ask: common.Ask,
    name: str,
    values: dict[str, Any],
    same: Callable[[str], Awaitable[bool]],
) -> common.Scored:
    """The given extraction, else the judge's by the prompt ``name``; compared by ``same``."""
    extraction = row.get("extraction")
    if extraction is None:
        if not common.response(row).strip():
            return common.Scored(None, None, False, common.EMPTY)
        extraction = await extracted(ask, name, values | {"response": shown(row)})
    if extraction is None:
        return common.Scored(None, None, False, NO_ANSWER)
    text = str(extraction)
    return common.Scored(text, text, await same(text))


async def extract_and_match(row: common.Row, golds: list[str], ask: common.Ask) -> common.Scored:
    """The generic flow: any of the golds is right."""
    options, unit = common.choices(row), str(row.get("unit") or "")
    asked = {"question": question(row) or "", "options": options}

    async def same(text: str) -> bool:
        right = settled(golds, text, options, unit)
        if right is not None:
            return right
        more = {"gold": " or ".join(golds), "unit": unit, "extraction": text}
        return await is_same(ask, "match", asked | more)

    return await extract_and_compare(row, ask, "extract", asked, same)


def options_first(read: Callable[[common.Row], str | None]) -> common.Flow:
    """The generic flow where ``read`` finds no option: official code would draw one at random."""

    async def flow(row: common.Row, golds: list[str], ask: common.Ask) -> common.Scored:
        letter = read(row)
        if letter is None:
            return await extract_and_match(row, golds, ask)
        return common.Scored(letter, letter, letter in golds)

    return flow


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
    targets = [read_gold(target, tuple(options)) for target in golds]
    if all(isinstance(target, Gold) and target.kind == "choice" for target in targets):
        return None if choice_indices(text, options) is None else False
    return None
