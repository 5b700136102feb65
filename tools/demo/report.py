"""From the evaluations' files to the demo's table, its gains, and what they mean."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srpo_jax.data.files import read_jsonl
from srpo_jax.report.accounting import accuracy_at, trade_off
from srpo_jax.rewards.stated import Words, stated
from srpo_jax.structs import BLOCKS

MODELS = ("init", "SFT", "SRPO", "GRPO", "segments")
MODES = {"sampled": "sampled at temperature 1", "greedy": "greedy"}
COLUMNS = {  # of the table -> key of a row
    "acc@1": "acc@1",
    "acc@2": "acc@2",
    "fix": "fix",
    "harm": "harm",
    "format": "format_rate",
    "detect": "detect",
    "false alarm": "false_alarm",
}
WORDS = Words(right=("yes",), wrong=("no",))  # of the task's reflections
SHARE = 0.6  # of the tokens of GRPO's responses, at which accuracy is compared
REQUIRED_GAIN = 0.10  # of SRPO over SFT, final answer, sampled
BOOTSTRAP = 2000


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The graded samples that an evaluation wrote."""
    return read_jsonl(workdir / "samples.jsonl")


def measure(workdir: Path) -> dict[str, Any]:
    """One row of the table: the summary's rates, accuracy against tokens (``stop``), and what the
    reflections' verdicts are worth (`alarms`)."""
    summary = json.loads((workdir / "summary.json").read_text())
    keys = ("samples", "acc@1", "acc@2", "fix", "harm", "format_rate", "truncated", "tokens")
    row = {key: summary[key] for key in keys}
    row["stop"] = trade_off(summary["stop"])
    row["blocks"] = [summary[f"tokens/{block}"] for block in BLOCKS]
    return row | alarms(read_rows(workdir))


def alarms(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``detect``: the share of wrong first answers of which the reflection says "no";
    ``false_alarm``: that of right ones; both among samples that have a reflection, 0 of none."""
    said: dict[bool, list[bool]] = {False: [], True: []}
    for row in rows:
        if text := row["blocks"]["reflection"]:
            said[bool(row["first_correct"])].append(stated(text, WORDS) == -1)
    shares = {right: float(np.mean(no)) if no else 0.0 for right, no in said.items()}
    return {"detect": shares[False], "false_alarm": shares[True]}


def paired_gain(base: Path, new: Path, key: str = "final_correct") -> dict[str, float]:
    """Mean difference of ``key`` over the same problems, with a 95 % bootstrap interval."""
    before = {row["id"]: float(row[key]) for row in read_rows(base)}
    after = {row["id"]: float(row[key]) for row in read_rows(new)}
    if before.keys() != after.keys():
        raise ValueError(f"{base} and {new} were evaluated on different problems")
    change = np.array([after[i] - before[i] for i in before])
    draws = np.random.default_rng(0).integers(0, len(change), (BOOTSTRAP, len(change)))
    low, high = np.percentile(change[draws].mean(1), [2.5, 97.5])
    return {"gain": float(change.mean()), "low": float(low), "high": float(high)}


def gains(folders: dict[tuple[str, str], Path]) -> dict[str, dict[str, float]]:
    """The comparisons that the reading is about, by name."""
    out = {}
    for mode in MODES:
        sft, srpo, grpo = (folders[name, mode] for name in ("SFT", "SRPO", "GRPO"))
        out[f"SRPO - SFT, final, {mode}"] = paired_gain(sft, srpo)
        out[f"GRPO - SFT, final, {mode}"] = paired_gain(sft, grpo)
        out[f"SRPO - GRPO, final, {mode}"] = paired_gain(grpo, srpo)
        out[f"segments - GRPO, final, {mode}"] = paired_gain(grpo, folders["segments", mode])
        out[f"SRPO - SFT, first, {mode}"] = paired_gain(sft, srpo, "first_correct")
        out[f"GRPO - SFT, first, {mode}"] = paired_gain(sft, grpo, "first_correct")
    return out


def table(seeds: Sequence[dict[str, Any]], split: str = "test") -> str:
    """Markdown: one table a decoding mode; mean over the seeds, and their spread with several."""
    parts = []
    for mode, words in MODES.items():
        head = ["", *COLUMNS, f"at {SHARE:.0%} of the tokens".replace("%", " %"), "tokens"]
        head += ["tokens per block"]
        count = seeds[0]["rows"][mode]["SFT"]["samples"]
        title = f"{count:,} {split} problems, {words}:"
        lines = [title, "", _line(head), _line(["---"] * len(head))]
        for name in MODELS:
            rows = [seed["rows"][mode][name] for seed in seeds]
            cells = [_mean([row[key] for row in rows]) for key in COLUMNS.values()]
            cells.append(_at_share(seeds, mode, name))
            tokens = f"{np.mean([row['tokens'] for row in rows]):.1f}"
            blocks = np.mean([row["blocks"] for row in rows], axis=0)
            lines.append(_line([name, *cells, tokens, " / ".join(f"{x:.1f}" for x in blocks)]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def at_share(stop: Sequence[Sequence[float]], grpo_tokens: float) -> float | None:
    """Accuracy of a model that stops after confident first answers, at `SHARE` of the tokens of
    GRPO's responses; None where it has no shorter responses."""
    return accuracy_at(stop, SHARE * grpo_tokens)


def _at_share(seeds: Sequence[dict[str, Any]], mode: str, name: str) -> str:
    rows = [seed["rows"][mode] for seed in seeds]
    return _mean([at_share(row[name]["stop"], row["GRPO"]["tokens"]) for row in rows])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(values: Sequence[float | None]) -> str:
    """A rate in percent; with several seeds +- their standard deviation; a dash for one unknown."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    text = f"{100 * np.mean(known):.1f}"
    return text if len(known) == 1 else f"{text} ± {100 * np.std(known, ddof=1):.1f}"


def gain_lines(seeds: Sequence[dict[str, Any]]) -> str:
    """One line a comparison: points, and the interval (one seed) or each seed's value."""
    lines = []
    for name in seeds[0]["gains"]:
        found = [seed["gains"][name] for seed in seeds]
        mean = 100 * np.mean([g["gain"] for g in found])
        if len(found) == 1:
            detail = f"95 % interval {100 * found[0]['low']:+.1f} to {100 * found[0]['high']:+.1f}"
        else:
            detail = "seeds " + ", ".join(f"{100 * g['gain']:+.1f}" for g in found)
        lines.append(f"  {name:<28} {mean:+6.1f} points ({detail})")
    return "\n".join(lines)


def verdict(seeds: Sequence[dict[str, Any]]) -> list[str]:
    """What the demo promises and did not keep, one line each; empty when it kept it all."""
    broken = []
    sampled = np.mean([s["gains"]["SRPO - SFT, final, sampled"]["gain"] for s in seeds])
    greedy = np.mean([s["gains"]["SRPO - SFT, final, greedy"]["gain"] for s in seeds])
    if sampled < REQUIRED_GAIN:
        broken.append(
            f"SRPO gained {100 * sampled:.1f} points of final-answer accuracy at temperature 1 "
            f"over SFT, less than {100 * REQUIRED_GAIN:.0f}"
        )
    if greedy < 0:
        broken.append(f"SRPO lost {-100 * greedy:.1f} points of final-answer accuracy at greedy")
    return broken


def reading(seeds: Sequence[dict[str, Any]]) -> str:
    """What the numbers show, what they do not, and what is so by construction."""

    def gain(name: str) -> float:
        return 100 * float(np.mean([s["gains"][name]["gain"] for s in seeds]))

    def rate(mode: str, model: str, key: str) -> float:
        return 100 * float(np.mean([s["rows"][mode][model][key] for s in seeds]))

    shown = ("GRPO", "SRPO", "segments")
    apart = gain("SRPO - GRPO, final, sampled")
    intervals = [s["gains"]["SRPO - GRPO, final, sampled"] for s in seeds]
    clear = all(g["low"] > 0 for g in intervals) or all(g["high"] < 0 for g in intervals)
    difference = "more than chance" if clear else "no more than chance"
    lines = [
        "How to read it (in percent; acc@1 first answer, acc@2 final answer; fix: wrong first "
        "answers made right; harm: right ones made wrong; detect and false alarm: reflections "
        "that say 'no' to a wrong and to a right first answer; tokens per block: first think, "
        "first answer, reflection, second think, second answer, the rest of a response are tags):",
        "- By construction acc@2 is above acc@1: the first round writes one tile down and answers, "
        "the second computes from both. Half of the first attempts that SFT imitates are wrong on "
        "purpose, which keeps its sampled acc@1 low.",
        f"- Part of what RL gains at temperature 1 is sharpening: SFT has "
        f"{rate('greedy', 'SFT', 'acc@2'):.1f} greedy and {rate('sampled', 'SFT', 'acc@2'):.1f} "
        f"sampled, SRPO {rate('sampled', 'SRPO', 'acc@2'):.1f} sampled. What is new shows at "
        f"greedy: {gain('SRPO - SFT, final, greedy'):+.1f} points.",
        f"- The plain-GRPO control, paid for the final answer alone, ends within "
        f"{abs(apart):.1f} points of SRPO on the final answer ({difference}): this task shows that "
        "RL works, not that SRPO beats GRPO on the final answer.",
        "- Three fifths of GRPO's tokens, spent by stopping after confident first answers, bring "
        + ", ".join(f"{n} to {_at_share(seeds, 'sampled', n)}" for n in shown)
        + ". segments (grpo.credit, profile balanced) pays the first round for its own answer; its "
        f"final answer ends {gain('segments - GRPO, final, sampled'):+.1f} points from GRPO's.",
        f"- The first answer moves by {gain('SRPO - SFT, first, sampled'):+.1f} points sampled, "
        f"{gain('SRPO - SFT, first, greedy'):+.1f} greedy, under SRPO, whose reward pays for it, "
        f"and by {gain('GRPO - SFT, first, sampled'):+.1f} and "
        f"{gain('GRPO - SFT, first, greedy'):+.1f} under GRPO, whose reward does not.",
        f"- Nothing pays for the reflection's verdict itself; after SRPO it says 'no' to "
        f"{rate('sampled', 'SRPO', 'detect'):.0f} % of the wrong and "
        f"{rate('sampled', 'SRPO', 'false_alarm'):.0f} % of the right first answers.",
    ]
    return "\n".join(lines)
