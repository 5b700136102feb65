"""From the metric rows of runs to charts: which names stand together, in which order, thinned."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]

MAX_POINTS = 2000  # of a curve; a longer one is drawn as means of steps in a row
_HEAD = ("run", "split", "step", "time", "nonfinite")  # of a row, beside its metrics
_COUNTS = ("*/count", "*/of")  # for adding up; their rate is drawn

# Section -> {chart: patterns of metrics}. A metric stands in the first chart that takes it; what
# none takes stands at the end, by its prefix.
SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "Reward": {
        "Reward": ("reward/mean",),
        "Spread of the reward": ("reward/std", "reward/group_std"),
        "Groups without a reward": ("reward/failed",),
        "Reward terms": ("reward/*",),
    },
    "Answers": {
        "Accuracy, first and final answer": ("accuracy/first", "accuracy/final"),
        "Gain of the final answer": ("accuracy/net",),
        "Final answer with a reflection and without": (
            "accuracy/final_reflected",
            "accuracy/final_one_round",
        ),
        "Accuracy by source": ("accuracy/*",),
        "Fixed of the wrong, harmed of the right": ("fix_rate", "harm_rate"),
        "Template holds": ("format_rate",),
        "Grading failures": ("grading/*",),
    },
    "Reflection": {
        "Detection and false alarm": ("detection_rate", "false_alarm_rate", "detection_margin"),
        "States a verdict": ("stated_share",),
        "Responses with a reflection": ("reflected_share",),
        "Tokens per block": ("block_tokens/*",),
    },
    "Samples": {
        "Completion length": ("completion_length/*",),
        "Cut off by the budget": ("truncated_share",),
        "Copies and repeats": ("duplicate_share", "repeat_share"),
        "Groups without signal, groups kept": ("groups_without_signal", "filter/kept_share"),
        "Filter": ("filter/*",),
    },
    "Update": {
        "Loss": ("loss", "loss/*"),
        "KL": ("kl", "kl/*", "kl_*"),
        "Entropy": ("entropy",),
        "With the image against masked ones": ("perception/*",),
        "Clipped": ("clip/*",),
        "Ratio to the old policy": ("ratio/*",),
        "Gradient and update norm": ("grad_norm", "update_norm"),
        "Learning rate": ("lr",),
        "Updates left out": ("skipped",),
        "Sampler against policy": ("sampler/*",),
    },
    "Speed": {
        "Seconds by phase": ("time/*",),
        "Seconds hidden behind the device": ("hidden/*",),
        "Tokens per second": ("tokens_per_second",),
        "Model FLOPs utilisation": ("mfu",),
        "Padding and idle share": ("update/padding_share", "sampling/idle_share"),
        "Amounts of a step": ("tokens", "samples", "trained_tokens", "updates", "conversations"),
    },
}
# Charts that stand at the top of the page too: the first KEYS of these that there are.
KEY = (
    "Accuracy, first and final answer",
    "Fixed of the wrong, harmed of the right",
    "Reward",
    "Loss",
    "Gradient and update norm",
    "Learning rate",
)
KEYS = 3
# Of an evaluation, the same for each split that is no training.
EVALUATION: dict[str, tuple[str, ...]] = {
    "acc@1 and acc@2": ("acc@1", "acc@2"),
    "fix and harm": ("fix", "harm"),
    "net gain": ("net_gain",),
    "tokens": ("tokens",),
    "tokens per block": ("tokens/*",),
    "template holds, truncated": ("format_rate", "truncated"),
}
_FIRST = "train"  # the split that SECTIONS is about


def charts(runs: Mapping[str, Rows]) -> dict[str, Any]:
    """What the page draws: {"runs": names, "axes": [steps], "charts": [chart], "key": [title]}.

    A chart is {"section", "title", "series": [{"name", "run", "axis", "values"}]}; ``run`` and
    ``axis`` are places in the lists, a value that is not finite or not there is None.

    Args:
        runs: by name, the rows of `srpo_jax.run.metrics.read_rows`.
    """
    axes: list[list[int]] = []
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    splits = dict.fromkeys(row["split"] for rows in runs.values() for row in rows)
    for split in sorted(splits, key=lambda split: (split != _FIRST, split)):
        for number, rows in enumerate(runs.values()):
            own = [row for row in rows if row["split"] == split]
            steps = np.array([row["step"] for row in own])
            axes.append(_thin(steps, max) if own else [])
            for name in _metrics(own):
                values = np.array([_number(row.get(name)) for row in own])
                series = {
                    "name": name,
                    "run": number,
                    "axis": len(axes) - 1,
                    "values": [_short(value) for value in _thin(values, _mean)],
                }
                found.setdefault(_place(split, name), []).append(series)
    order = [(section, chart) for section, own in SECTIONS.items() for chart in own]
    known = [key for key in order if key in found]
    rest = [key for key in found if key not in order]
    titles = {title for _, title in found}
    return {
        "runs": [*runs],
        "axes": axes,
        "key": [title for title in KEY if title in titles][:KEYS],
        "charts": [
            {"section": key[0], "title": key[1], "series": found[key]} for key in known + rest
        ],
    }


def _metrics(rows: Rows) -> list[str]:
    """Names with a number in some row, in alphabetic order; counts of a rate are left out."""
    names = {
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return sorted(n for n in names.difference(_HEAD) if not _matches(n, _COUNTS))


def _place(split: str, name: str) -> tuple[str, str]:
    """Section and chart of a metric."""
    prefix = name.rpartition("/")[0] or "by themselves"
    if split != _FIRST:
        title = next((t for t, own in EVALUATION.items() if _matches(name, own)), prefix)
        return f"Evaluation: {split}", title
    for section, own in SECTIONS.items():
        for title, patterns in own.items():
            if _matches(name, patterns):
                return section, title
    return "Others", prefix


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _thin(values: np.ndarray, joined: Any) -> list[Any]:
    """At most MAX_POINTS: steps in a row joined to one."""
    each = -(-len(values) // MAX_POINTS)
    if each <= 1:
        return values.tolist()
    return [joined(values[i : i + each]).item() for i in range(0, len(values), each)]


def _mean(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    return finite.mean() if len(finite) else np.array(np.nan)


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None
