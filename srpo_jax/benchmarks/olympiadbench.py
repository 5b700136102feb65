r"""OlympiadBench's rule (OpenBMB/OlympiadBench, eval/auto_scoring_judge.py and inference/judge.py).

The answer is what follows the last "So the final answer is", else the whole response; of either
the rule takes the ``\boxed{}`` contents, else the formulas of the last line. It splits lists,
expands \pm, and compares numbers within the problem's error (also as percent), expressions,
equations and intervals. The gold goes first, as the official code defines it. The comparison uses
sympy and runs in the workers (``olympiad_rule``). Proofs cannot be scored.
"""

import re
from collections.abc import Sequence

from srpo_jax.benchmarks import common
from srpo_jax.data.errors import shown
from srpo_jax.rewards.verifier import Verifier

WORKER_MODULES = ("srpo_jax.benchmarks.olympiad_rule",)
RULE = f"{WORKER_MODULES[0]}:equal_answers"
DEFAULT_ERROR = 1e-8

_ENGLISH = re.compile(r"So the final answer is (.*)")
_CHINESE = re.compile("所以最终答案是(.*)")


def official(rows: Sequence[common.Row], pool: Verifier | None) -> list[common.Scored]:
    """The official outcome of each row; answers are compared in the pool's workers."""
    assert pool is not None, "the rule needs workers"
    extractions = common.each(lambda row: common.extraction_or(extract, row), rows)
    golds = common.each(final_answer, rows)
    allowed_errors = common.each(errors, rows)
    correct: dict[int, bool] = {}
    for allowed in dict.fromkeys(allowed_errors):
        indices = [i for i, e in enumerate(extractions) if e and allowed_errors[i] == allowed]
        pairs = [(golds[i], extractions[i]) for i in indices]
        found = pool.verify_math(pairs, function=RULE, errors=list(allowed))
        correct |= zip(indices, found, strict=True)
    return [
        common.Scored(e or None, e or None, correct.get(i, False), None if e else common.EMPTY)
        for i, e in enumerate(extractions)
    ]


def final_answer(row: common.Row) -> str:
    """The gold answer: the first of ``final_answer``, or ``answer``; RowError without one."""
    value = common.first(row, "final_answer", "answer")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if value is None:
        raise common.RowError("no 'final_answer' (or 'answer'); proofs cannot be scored")
    return str(value)


def errors(row: common.Row) -> tuple[float, ...]:
    """The allowed absolute errors, one or one for each part of the answer."""
    value = row.get("error")
    if not value or "Tuple" in str(row.get("answer_type")):
        return (DEFAULT_ERROR,)
    try:
        return tuple(float(part) if part else DEFAULT_ERROR for part in str(value).split(","))
    except ValueError:
        raise common.RowError(f"'error' is no number or list of numbers: {shown(value)}") from None


def extract(text: str) -> str:
    """What a response announces as its final answer, in English or Chinese; else all of it."""
    for pattern in (_ENGLISH, _CHINESE):
        announced = pattern.findall(text)
        if announced:
            return announced[-1].strip()
    return text


BENCHMARK = common.Benchmark(
    name="olympiadbench",
    counts={150: "OE_MM_maths_en_COMP", 456: "OE_MM_physics_en_COMP"},
    form=common.Form(
        "id question final_answer answer_type",
        images=("images",),
        numbered=True,
        answer=("final_answer",),
    ),
    places={
        "maths": common.Place("Hothan/OlympiadBench", "train", ("OE_MM_maths_en_COMP",)),
        "physics": common.Place("Hothan/OlympiadBench", "train", ("OE_MM_physics_en_COMP",)),
    },
    groups=common.grouping(dataset="{dataset|source}", subfield="{subfield}"),
    official=official,
    worker_modules=WORKER_MODULES,
    golds=lambda row: [final_answer(row)],
)
