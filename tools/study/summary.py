"""Results of all arms -> table, figures and targets, written into docs/study.md."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from srpo_jax.data.files import write_text
from srpo_jax.report.chart import Line, chart
from tools.demo import report
from tools.study.arms import ARMS

Result = dict[str, Any]
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
EQUAL = 0.05  # a difference whose whole interval lies above minus this is none that matters here
REFLECTED = 0.05  # of the responses, below which nothing is said of their verdicts
MARGIN = 0.3  # of detection over false alarms, that is asked for
HEAD = (
    *("arm", "seeds", "final", "final - GRPO's", "first", "greedy", "at 60 %"),
    *("at 60 % - GRPO's there", "at 60 % - GRPO's final"),
    *("tokens", "reflects", "margin", "steps", "M tokens"),
)


def read(folder: Path) -> dict[str, dict[str, dict[int, Result]]]:
    """Results by task, arm (in the order of ARMS) and seed."""
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        found.setdefault(one["task"], {}).setdefault(one["arm"], {})[one["seed"]] = one
    return {
        task: {name: arms[name] for name in ARMS if name in arms} for task, arms in found.items()
    }


# --- numbers -------------------------------------------------------------------------------------


def final(one: Result) -> float:
    """Accuracy of final answers at temperature 1."""
    return one["sampled"]["acc@2"]


def at_share(one: Result, grpo: Result) -> float | None:
    """Accuracy at 60 % of the tokens of GRPO's responses."""
    return report.at_share(one["sampled"]["stop"], grpo["sampled"]["tokens"])


def margin(one: Result) -> float | None:
    """How much more often a wrong first answer is called wrong than a right one; None where too few
    responses have a reflection to tell."""
    own = one["sampled"]
    return own["detect"] - own["false_alarm"] if own["reflected"] >= REFLECTED else None


def margins(arm: dict[int, Result]) -> list[float]:
    """`margin` of the seeds that have one."""
    return [found for one in arm.values() if (found := margin(one)) is not None]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval over seeds (Student's t); None for one seed."""
    x = np.array(values)
    if len(x) < 2:
        return float(x.mean()), None
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean()), float(half)


def paired(
    arm: dict[int, Result],
    grpo: dict[int, Result],
    value: Callable[[Result, Result], float | None],
    base: Callable[[Result, Result], float | None] = lambda one, _: final(one),
) -> tuple[float, float | None] | None:
    """`interval` of ``value(arm's, GRPO's) - base(GRPO's, GRPO's)`` over the seeds that both have;
    None where one is not known."""
    differences = []
    for seed in arm.keys() & grpo.keys():
        own, other = value(arm[seed], grpo[seed]), base(grpo[seed], grpo[seed])
        if own is None or other is None:
            return None
        differences.append(own - other)
    return interval(differences) if differences else None


# --- text ----------------------------------------------------------------------------------------


def percent(found: tuple[float, float | None] | None, sign: str = "") -> str:
    """A rate in per cent with its interval."""
    if found is None:
        return "-"
    mean, half = found
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


def row(name: str, arm: dict[int, Result], grpo: dict[int, Result]) -> list[str]:
    """One line of the table."""

    def mean(value: Callable[[Result], float]) -> float:
        return float(np.mean([value(one) for one in arm.values()]))

    own, known = name == "grpo", margins(arm)
    return [
        name,
        str(len(arm)),
        percent(interval([final(one) for one in arm.values()])),
        "" if own else percent(paired(arm, grpo, lambda one, _: final(one)), "+"),
        percent(interval([one["sampled"]["acc@1"] for one in arm.values()])),
        percent(interval([one["greedy"]["acc@2"] for one in arm.values()])),
        percent(paired(arm, grpo, at_share, lambda *_: 0.0)),
        "" if own else percent(paired(arm, grpo, at_share, at_share), "+"),
        percent(paired(arm, grpo, at_share), "+"),
        f"{mean(lambda one: one['sampled']['tokens']):.1f}",
        f"{100 * mean(lambda one: one['sampled']['reflected']):.0f}",
        f"{np.mean(known):+.2f}" if known else "-",
        f"{mean(lambda one: one['compute']['steps']):.0f}",
        f"{mean(lambda one: one['compute']['total']) / 1e6:.2f}",
    ]


def table(results: dict[str, dict[str, dict[int, Result]]]) -> str:
    """Markdown, a table for each task."""
    parts = []
    for task, arms in results.items():
        rows = [[*HEAD], ["---"] * len(HEAD)]
        rows += [row(name, arm, arms.get("grpo", {})) for name, arm in arms.items()]
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        parts.append("\n".join([f"**{task.replace('_', ' ')}**", "", *lines]))
    return "\n\n".join(parts) or "no results yet"


def targets(results: dict[str, dict[str, dict[int, Result]]]) -> str:
    """Which arms reach what was aimed at, a line each."""

    def those(holds: Callable[[str, dict[str, dict[int, Result]]], bool], tasks: list[str]) -> str:
        named = [n for n in ARMS if n != "grpo" and all(n in results[t] for t in tasks)]
        reached = [n for n in named if all(holds(n, results[t]) for t in tasks)]
        return ", ".join(reached) or "none"

    def above(low: float, found: tuple[float, float | None] | None) -> bool:
        return found is not None and found[1] is not None and found[0] - found[1] > low

    def equals_at_60(name: str, arms: dict[str, dict[int, Result]]) -> bool:
        return above(-EQUAL, paired(arms[name], arms["grpo"], at_share))

    def more_at_60(name: str, arms: dict[str, dict[int, Result]]) -> bool:
        return above(0.0, paired(arms[name], arms["grpo"], at_share, at_share))

    def beats(name: str, arms: dict[str, dict[int, Result]]) -> bool:
        return above(0.0, paired(arms[name], arms["grpo"], lambda one, _: final(one)))

    def knows(name: str, arms: dict[str, dict[int, Result]]) -> bool:
        found = margins(arms[name])
        return len(found) == len(arms[name]) and float(np.mean(found)) >= MARGIN

    several = [task for task in results if "grpo" in results[task]]
    equal = "at 60 % of GRPO's tokens GRPO's final accuracy or more (the whole interval above "
    equal += f"-{100 * EQUAL:.0f} points)"
    lines = [f"every task: {equal}: {those(equals_at_60, several)}."]
    for task in several:
        words = task.replace("_", " ")
        lines += [
            f"{words}: {equal}: {those(equals_at_60, [task])}.",
            f"{words}: at 60 % of the tokens beyond the interval of GRPO stopped at as many: "
            f"{those(more_at_60, [task])}.",
            f"{words}: a final answer beyond GRPO's interval: {those(beats, [task])}.",
            f"{words}: detection less false alarms of at least {MARGIN}: {those(knows, [task])}.",
        ]
    return "\n".join(f"- {line}" for line in lines)


def figures(results: dict[str, dict[str, dict[int, Result]]]) -> dict[str, str]:
    """File name -> SVG: accuracy against tokens and learning curves, means over seeds."""
    found = {}
    for task, arms in results.items():
        words = task.replace("_", " ")
        trade = [Line(name, mean_trade_off(list(arm.values()))) for name, arm in arms.items()]
        found[f"{task}_tokens.svg"] = chart(
            f"{words}: accuracy against tokens of a response",
            "mean tokens of a response",
            "accuracy, %",
            trade,
        )
        curves = [Line(name, learning(list(arm.values()))) for name, arm in arms.items()]
        if any(line.points for line in curves):
            found[f"{task}_learning.svg"] = chart(
                f"{words}: final answers of training samples against compute",
                "million tokens, sampled and learned from",
                "accuracy, %",
                [line for line in curves if line.points],
            )
    return found


def mean_trade_off(ones: Sequence[Result]) -> list[tuple[float, float]]:
    """Points of mean tokens and accuracy; of several seeds by the place on the curve."""
    curves = np.array([sorted(one["sampled"]["stop"]) for one in ones])
    return [(float(x), 100 * float(y)) for x, y in curves.mean(0)]


def learning(ones: Sequence[Result]) -> list[tuple[float, float]]:
    """Points of tokens spent, in millions, and final accuracy of the samples since the last."""
    curves = [one["curve"] for one in ones if one["curve"]]
    points = zip(*curves, strict=False)
    return [
        (
            float(np.mean([p["tokens"] for p in at])) / 1e6,
            100 * float(np.mean([p["accuracy/final"] for p in at])),
        )
        for at in points
    ]


def write(folder: Path, docs: Path) -> str:
    """docs/study.md between its markers, docs/measurements/study/*; the table.

    ValueError where there are no results, or the page has no markers.
    """
    results, page = read(folder), docs / "study.md"
    if not results:
        raise ValueError(f"{folder}: no results yet; run without --summary first")
    text = page.read_text(encoding="utf-8")
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise ValueError(f"{page}: the lines {BEGIN} and {END} are missing")
    out = docs / "measurements/study"
    out.mkdir(parents=True, exist_ok=True)
    drawn = figures(results)
    for name, svg in drawn.items():
        write_text(out / name, svg)
    for task, arms in results.items():
        rows = [one for arm in arms.values() for one in arm.values()]
        lines = ",\n".join(json.dumps(one) for one in rows)
        write_text(out / f"{task}.json", f"[\n{lines}\n]\n")
    images = "\n".join(f"![{name[:-4]}](measurements/study/{name})" for name in drawn)
    body = "\n\n".join([BEGIN, table(results), targets(results), images, END])
    write_text(page, text[: text.find(BEGIN)] + body + text[text.find(END) + len(END) :])
    return table(results)
