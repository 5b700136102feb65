"""What a round's completions were like, beyond what the update sees: counted on the host.

Counts of every process add up (``NAME/count`` of ``NAME/of``); `rates_of` makes rates of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from srpo_jax.run.rollout import Round

SOURCES = 32  # of the records, at most, whose accuracies a row holds

# Count -> what its rate is called, where that is not NAME_rate.
_NAMES = {
    "duplicates": "duplicate_share",
    "repeats": "repeat_share",
    "reflected": "reflected_share",
    "right_reflected": "accuracy/final_reflected",
    "right_one_round": "accuracy/final_one_round",
    "stated": "stated_share",
    "tokens_right": "completion_length/right",
    "tokens_wrong": "completion_length/wrong",
}


Counts = Mapping[str, float]


def counts_of(one: Round) -> Counts:
    """Of this process's samples: equal ones in a group, repeats, right ones by source.

    ``duplicates`` are samples equal to an earlier one of their group. ``repeats`` adds up each
    sample's `longest_repeat` as a share of its tokens. Sources are those of the records.
    """
    counts: defaultdict[str, float] = defaultdict(float)
    rollout, verdict = one.graded.rollout, one.graded.verdict
    for record, p in zip(one.sampled.records, one.sampled.slots.tolist(), strict=True):
        lengths = rollout.completion_mask[p].sum(-1)
        samples = [ids[:n] for ids, n in zip(rollout.completions[p], lengths, strict=True)]
        group = len(samples)
        counts["duplicates/count"] += group - len({ids.tobytes() for ids in samples})
        counts["repeats/count"] += sum(longest_repeat(x) / max(len(x), 1) for x in samples)
        for name in ("duplicates/of", "repeats/of"):
            counts[name] += group
        if record.source:
            for which in ("first", "final"):
                right = int(getattr(verdict, f"{which}_correct")[p].sum())
                counts[f"accuracy/{which}/{record.source}/count"] += right
                counts[f"accuracy/{which}/{record.source}/of"] += group
    return counts


def added_up(several: Iterable[Counts]) -> Counts:
    """All counts together."""
    total: defaultdict[str, float] = defaultdict(float)
    for counts in several:
        for name, value in counts.items():
            total[name] += value
    return total


def rates_of(counts: Counts) -> dict[str, float]:
    """A rate for each count, 0 of nothing; of at most SOURCES sources, in alphabetic order."""
    names = [name.removesuffix("/of") for name in counts if name.endswith("/of")]
    of_sources = sorted({name.split("/", 2)[2] for name in names if name.count("/") >= 2})
    rates = {}
    for name in names:
        if name.count("/") >= 2 and name.split("/", 2)[2] not in of_sources[:SOURCES]:
            continue
        called = name if "/" in name else _NAMES.get(name, f"{name}_rate")
        rates[called] = counts[f"{name}/count"] / max(counts[f"{name}/of"], 1.0)
    return rates


def longest_repeat(ids: np.ndarray) -> int:
    """Tokens of the longest run that stands twice in ``ids``; the two may overlap.

    Runs are compared by a polynomial hash of 64 bits.
    """
    tokens = (ids.astype(np.uint64) + np.uint64(1)) * _MIX
    powers = np.full(len(tokens) + 1, _BASE)
    powers[:1] = 1
    powers = np.multiply.accumulate(powers)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(tokens * powers[:-1])])

    def twice(length: int) -> bool:
        # Each run's sum, brought to the power of the last one.
        runs = (sums[length:] - sums[:-length]) * powers[len(tokens) - length :: -1]
        return len(np.unique(runs)) < len(runs)

    low, high = 0, max(len(tokens) - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if twice(middle) else (low, middle - 1)
    return low


_MIX, _BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)  # odd
