"""math-verify itself as a check for the pool: another grader to compare with."""

from collections.abc import Sequence
from typing import Any


def math_equal(
    gold: str,
    predicted: str,
    *,
    match_types: Sequence[str] = ("latex", "expr"),
    float_rounding: int = 6,
    strict: bool = True,
    allow_set_relation_comp: bool = False,
) -> bool:
    """math-verify on two texts, gold first, with its own alarms off; may run without end.

    ``match_types`` of "latex", "expr" and "string" say what is extracted from the prediction and
    the gold; the other options are those of ``math_verify.verify``.
    """
    import math_verify as mv  # heavy, and needed in the workers only

    kinds = {
        "latex": mv.LatexExtractionConfig,
        "expr": mv.ExprExtractionConfig,
        "string": mv.StringExtractionConfig,
    }
    targets = [kinds[name]() for name in match_types]

    def parse(text: str) -> list[Any]:
        # No number of seconds turns the alarm off, only what the library's annotation lacks.
        return mv.parse(text, targets, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    gold_parsed = parse(gold)
    if not gold_parsed:
        return False
    return bool(
        mv.verify(
            gold_parsed,
            parse(predicted),
            float_rounding=float_rounding,
            strict=strict,
            allow_set_relation_comp=allow_set_relation_comp,
            timeout_seconds=None,
        )
    )
