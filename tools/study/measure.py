"""From an arm's training and evaluation files to the small result that is kept of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srpo_jax.data.files import read_jsonl
from srpo_jax.report.accounting import stop_curve, trade_off
from srpo_jax.report.rates import rates
from tools.demo.report import alarms

CURVE_POINTS = 12
RATES = ("acc@1", "acc@2", "fix", "harm", "format_rate", "tokens", "reflected")


def training_rows(folder: Path) -> list[dict[str, Any]]:
    """One row for each step, the last that was written of it; none where nothing was trained."""
    path = folder / "metrics.jsonl"
    rows = read_jsonl(path, skip_broken=True) if path.exists() else []
    by_step = {row["step"]: row for row in rows if row.get("split") == "train"}
    return [by_step[step] for step in sorted(by_step)]


def tokens_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute in tokens: those sampled, those that updates learned from, and both."""
    sampled = sum(row["tokens"] for row in rows)
    updated = sum(row.get("trained_tokens", 0.0) for row in rows)
    return {"sampled": sampled, "updated": updated, "total": sampled + updated}


def steps_within(rows: Sequence[dict[str, Any]], total: float, most: int) -> int:
    """How many steps spend ``total`` tokens, going on as the last ten did; ``most`` at most."""
    left, recent = total - tokens_of(rows)["total"], tokens_of(rows[-10:])["total"]
    pace = recent / max(len(rows[-10:]), 1)
    return min(most, len(rows) + max(0, round(left / max(pace, 1.0))))


def learning_curve(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """At a dozen points: tokens spent so far, and what the samples since the last were like."""
    points, spent = [], 0.0
    for part in np.array_split(np.arange(len(rows)), min(CURVE_POINTS, len(rows)) or 1):
        own = [rows[i] for i in part]
        if not own:
            continue
        spent += tokens_of(own)["total"]
        names = ("accuracy/first", "accuracy/final", "completion_length/mean", "reflected_share")
        points.append({"tokens": spent} | {n: _mean(row[n] for row in own) for n in names})
    return points


def evaluated(folder: Path) -> dict[str, Any]:
    """Rates of one evaluation, what verdicts are worth, accuracy against tokens, and ``right``:
    of each problem, how many samples have a right final answer, a digit each."""
    rows = read_jsonl(folder / "samples.jsonl")
    found = rates(rows)
    right: dict[str, int] = {}
    for row in rows:
        right[row["id"]] = right.get(row["id"], 0) + bool(row["final_correct"])
    return {
        **{name: round(found[name], 5) for name in RATES},
        "acc@2/reflected": round(found["acc@2/reflected"], 5),
        "acc@2/one_round": round(found["acc@2/one_round"], 5),
        **{name: round(share, 5) for name, share in alarms(rows).items()},
        "stop": [
            [round(tokens, 3), round(share, 5)] for tokens, share in trade_off(stop_curve(rows))
        ],
        "right": "".join(str(right[name]) for name in sorted(right)),
    }


def _mean(values: Any) -> float:
    found = list(values)
    return float(np.mean(found)) if found else 0.0
