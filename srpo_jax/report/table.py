"""Markdown tables of evaluations beside the paper's numbers (paper.json), with what they mean.

A summary is the object of an evaluation's ``summary.json``; its key ``benchmark``, where there is
one, holds the rates under the benchmark's rule. Percent throughout, except tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srpo_jax.benchmarks.common import table

Summary = Mapping[str, Any]

MODES = {
    "official_rule": "the benchmark's own rule, with our answer blocks as its extractions",
    "judge": "the benchmark's own prompts, answered by a language model",
    "strict": "this project's grader, the same for every benchmark",
}
OWN_GRADER = "own grader"  # a file of problems that is no benchmark
MAX_GROUPS = 40  # of a table; one with more is left to the JSON
NONE = "–"
# Count of a summary -> what it says of an answer, first or final.
QUALMS = {
    "no_answer_rows": "{} completions have no {} answer by rule and count as wrong",
    "drawn_rows": "{} {} answers were drawn at random with the official seed",
    "unread_rows": "{} {} answers are to problems that could not be read: wrong in the whole, and "
    "left out of its groups",
    "gold_problem_rows": "{} golds cannot be graded; their {} answers count as wrong",
}

HEAD = ("evaluation", "scored by", "problems", "first answer", "final answer", "fix", "harm",
         "net gain", "tokens")  # fmt: skip


def paper() -> dict[str, Any]:
    """The paper's accuracies in percent: {"source", "unit", "models": [{"name", "table",
    "accuracy": {benchmark: percent, or {subject: percent}}}]}."""
    return json.loads(Path(__file__).with_name("paper.json").read_text("utf-8"))


def markdown(summaries: Mapping[str, Summary]) -> str:
    """A table of our rates, one beside the paper's numbers, and notes on how to read them.

    Args:
        summaries: by a name to show; the benchmark is ``summary["benchmark"]["name"]``, or else
            that name.
    """
    parts = ["## Accuracy, %, with 95 % intervals", table(HEAD, rate_rows(summaries))]
    beside = _beside(summaries)
    if beside:
        parts += ["## Beside the paper, %", beside]
    parts += ["## How to read this", "\n".join(f"- {note}" for note in notes(summaries))]
    return "\n\n".join(parts) + "\n"


def categories(summary: Summary) -> str:
    """Both answers by the groups of the official tables; "" where the summary has none.

    Of a table with more than MAX_GROUPS groups only their number is given.
    """
    scored = summary.get("benchmark") or {}
    first, final = (scored.get(which, {}).get("tables", {}) for which in ("first", "final"))
    parts = []
    for name, groups in final.items():
        if len(groups) > MAX_GROUPS:
            parts.append(f"{name}: {len(groups)} groups, left out here")
            continue
        rows = [
            (group, counts["total"],
             f"{first[name][group]['accuracy']:.1f}", f"{counts['accuracy']:.1f}")
            for group, counts in groups.items()
        ]  # fmt: skip
        parts.append(f"{name}:\n\n" + table(("group", "answers", "first", "final"), rows))
    return "\n\n".join(parts)


def notes(summaries: Mapping[str, Summary]) -> list[str]:
    """What a reader of the tables must know, one line each."""
    out = [
        "first and final answer: before and after the reflection. fix: wrong first answers made "
        "right; harm: right ones made wrong; net gain: final - first, in points. Intervals are "
        "bootstrapped over problems.",
    ]
    modes = dict.fromkeys(_scored_by(s) for s in summaries.values())
    out += [f"scored by {mode}: {MODES[mode]}." for mode in modes if mode in MODES]
    if any(_percent_of_paper(name, s) for name, s in summaries.items()):
        out += [
            "The published evaluation code asks for a single answer, without the reflection "
            "template, and scores the FIRST answer block: the paper's numbers compare with our "
            "first answer, if with either.",
            "The paper's numbers are of one run each, without intervals; it does not say which "
            "split, setting or decoding they are of, and its code extracts or judges answers with "
            f"GPT-4o. Source: {paper()['source']}.",
        ]
    for name, summary in summaries.items():
        out += [f"{name}: {note}." for note in _qualms(summary)]
    return out


def _qualms(summary: Summary) -> list[str]:
    """What qualifies the numbers of one evaluation."""
    scored = summary.get("benchmark") or {}
    out = []
    if scored and not scored.get("final", {}).get("complete"):
        out.append(f"not the full benchmark ({summary['records']} problems)")
    if scored and summary["samples"] > summary["records"]:
        share = summary["samples"] / summary["records"]
        out.append(f"mean over {share:g} samples a problem, where benchmarks take one")
    if summary.get("unasked"):
        out.append(f"{summary['unasked']} problems could not be asked and count as wrong")
    for which in ("first", "final"):
        counts = scored.get(which, {})
        out += [text.format(counts[key], which) for key, text in QUALMS.items() if counts.get(key)]
    if summary.get("truncated"):
        out.append(f"{100 * summary['truncated']:.1f} % of the completions were cut off at the "
                   "length limit")  # fmt: skip
    return out


def _scored_by(summary: Summary) -> str:
    return (summary.get("benchmark") or {}).get("mode", OWN_GRADER)


def rate_rows(summaries: Mapping[str, Summary]) -> list[tuple[str, ...]]:
    """The cells under HEAD: rates with their intervals, of each summary."""
    rows = []
    for name, summary in summaries.items():
        scored = summary.get("benchmark") or {}
        split = scored.get("final", {}).get("complete") or ("not all" if scored else "")
        problems = f"{summary['records']:,.0f}" + (f" ({split})" if split else "")
        cells = [
            _percent(scored or summary, key)
            for key in ("acc@1", "acc@2", "fix", "harm", "net_gain")
        ]
        rows.append((name, _scored_by(summary), problems, *cells, f"{summary['tokens']:,.0f}"))
    return rows


def _percent(rates: Summary, key: str) -> str:
    """NONE where no first answer is wrong ("fix"), or none right ("harm")."""
    if rates["acc@1"] == {"fix": 1, "harm": 0}.get(key):
        return NONE
    text = f"{100 * rates[key]:.1f}"
    low, high = rates.get("interval", {}).get(key, (None, None))
    return text if low is None else f"{text} ({100 * low:.1f} to {100 * high:.1f})"


def _beside(summaries: Mapping[str, Summary]) -> str:
    """First and final answer beside each of the paper's models; "" where it has no number."""
    names = [model["name"] for model in paper()["models"]]
    rows = []
    for name, summary in summaries.items():
        theirs = _percent_of_paper(name, summary)
        for part in dict.fromkeys(p for values in theirs.values() for p in values):
            own = _own(summary, part)
            if own is None:
                continue
            cells = [theirs.get(model, {}).get(part) for model in names]
            shown = [NONE if cell is None else f"{cell:.1f}" for cell in cells]
            rows.append((f"{name}, {part}" if part else name, *own, *shown))
    return table(("evaluation", "ours, first", "ours, final", *names), rows) if rows else ""


def _own(summary: Summary, part: str) -> tuple[str, str] | None:
    """First and final accuracy, of a subject where ``part`` names one; None where it is absent."""
    if not part:
        rates = summary.get("benchmark") or summary
        return f"{100 * rates['acc@1']:.1f}", f"{100 * rates['acc@2']:.1f}"
    cells = []
    for which in ("first", "final"):
        groups = summary.get("benchmark", {}).get(which, {}).get("tables", {}).get("subject", {})
        found = next((c for group, c in groups.items() if group.lower().startswith(part)), None)
        if found is None:
            return None
        cells.append(f"{found['accuracy']:.1f}")
    return cells[0], cells[1]


def _percent_of_paper(name: str, summary: Summary) -> dict[str, dict[str, float]]:
    """{model: {subject, or "" for the whole: percent}} of one benchmark."""
    benchmark = (summary.get("benchmark") or {}).get("name", name)
    out = {}
    for model in paper()["models"]:
        value = model["accuracy"].get(benchmark)
        if value is not None:
            out[model["name"]] = value if isinstance(value, dict) else {"": value}
    return out
