"""One HTML page of training runs: warnings, evaluations, curves, rollouts, configuration."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from srpo_jax.data.files import AnyPath, absolute, read_jsonl
from srpo_jax.data.hf_folder import read_json
from srpo_jax.report import curves, glance, rollouts
from srpo_jax.report.accounting import trade_off
from srpo_jax.report.chart import Line, chart
from srpo_jax.report.health import findings
from srpo_jax.report.html import render
from srpo_jax.report.rollouts import Pictures
from srpo_jax.report.table import HEAD, rate_rows
from srpo_jax.run.metrics import EVALUATIONS as ANSWERS
from srpo_jax.run.metrics import VERSIONS, read_rows
from srpo_jax.run.recipe import read_config_of
from srpo_jax.run.resume import flat_config
from srpo_jax.run.stored import CheckpointError, read_meta, steps_in
from srpo_jax.structs import RunError

Config = Mapping[str, Any]

EVALUATIONS = 10  # of a run that stand in the table, the last ones
PARTS = {  # of the page: id -> heading
    "warnings-part": "Warnings",
    "evaluations-part": "Evaluations",
    "curves-part": "Curves",
    "rollouts-part": "Rollouts",
    "configuration-part": "Configuration",
}


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: str
    rows: Sequence[Mapping[str, Any]] = field(default=(), repr=False)  # of metrics.jsonl
    config: Config = field(default_factory=dict)  # nested; {}: not known
    origin: str = ""  # of its first weights
    steps: int = 0  # that it is to do; 0: not known
    versions: Mapping[str, str] = field(default_factory=dict)  # what its last start ran with
    answers: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict, repr=False)
    # ^ step of an evaluation -> rows of the same few held-out problems


def read(folder: AnyPath) -> Run:
    """A training run's folder; RunError where it is none."""
    path = absolute(folder)
    if not (path / "metrics.jsonl").exists():
        raise RunError(
            f"{path}: no metrics.jsonl there; --workdir and --compare take the --workdir of a "
            "training run"
        )
    meta = _newest_meta(path / "checkpoints")
    rows = read_rows(path / "metrics.jsonl")
    versions = read_json(path / VERSIONS)
    files = sorted((path / ANSWERS).glob("*.jsonl")) if (path / ANSWERS).exists() else []
    answers = {int(file.stem): read_jsonl(file) for file in files[-EVALUATIONS:]}
    config = meta.get("config") or read_config_of(path)
    steps = meta.get("total_steps") or config.get("steps") or 0
    return Run(str(path), rows, config, meta.get("origin", ""), steps, versions, answers)


def _newest_meta(folder: Any) -> dict[str, Any]:
    """What the newest checkpoint that can be read says of its run; {} without one."""
    for step in sorted(steps_in(folder), reverse=True):
        try:
            return read_meta(folder / str(step))
        except CheckpointError:
            continue
    return {}


# Each argument is a part of the page that may be left out.
def page(
    runs: Sequence[Run],
    pictures: Pictures = lambda run, row: (),
    *,
    samples: int = rollouts.SAMPLES,
    problems: int = rollouts.PICTURES,
    recipe: Callable[[Config], Config] = lambda config: config,
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page as text; the first run is the one that it is about.

    Args:
        runs: of `read`.
        pictures, samples, problems: of `rollouts.pack`.
        recipe: from a run's configuration to that of its recipe, without changes.
        evaluations: by name, the ``summary.json`` of evaluations to show beside those of the runs.
    """
    named = dict(zip(names([run.folder for run in runs]), runs, strict=True))
    folders = [f"{run.folder}/rollouts" for run in runs]
    packed = rollouts.pack(folders, pictures, samples=samples, problems=problems)
    rewards = [run.config.get("reward") for run in runs]  # what each is made of
    long = any(len(run.rows) > curves.MAX_POINTS for run in runs)
    return render(
        "run_page.html.jinja",
        title=f"Training run {next(iter(named))}",
        parts=PARTS,
        runs=[_view(name, run, evaluations or {}) for name, run in named.items()],
        warnings=[(name, findings(run.rows)) for name, run in named.items()],
        evaluation_head=HEAD,
        evaluations=rate_rows(_evaluations(named) | dict(evaluations or {})),
        trade=trade(evaluations or {}),
        other_rewards=len({json.dumps(own, sort_keys=True) for own in rewards if own}) > 1,
        problems=[(name, over_time(run)) for name, run in named.items() if run.answers],
        data=curves.charts({name: run.rows for name, run in named.items()})
        | {"part": rollouts.PART},
        thinned=curves.MAX_POINTS if long else None,
        packed=packed,
        keys=keys([run.config for run in runs], recipe),
        versions=_versions(runs),
    )


def trade(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy against tokens of evaluations, as SVG; "" where none tells of an early stop."""
    lines = [
        Line(name, [(tokens, 100 * share) for tokens, share in trade_off(summary["stop"])])
        for name, summary in evaluations.items()
        if summary.get("stop")
    ]
    words = "Accuracy against tokens", "mean tokens of a response", "accuracy, %"
    return chart(*words, lines, inline=True) if lines else ""


def over_time(run: Run) -> list[dict[str, Any]]:
    """Each held-out problem with its answers at the run's evaluations: question, gold, rows of
    (step, answers, correct, tokens, response)."""
    found: dict[str, dict[str, Any]] = {}
    for step, rows in sorted(run.answers.items()):
        for row in rows:
            own = {"question": row["prompt"], "gold": row["gold"], "rows": []}
            own = found.setdefault(row["origin"], own)
            own["rows"].append({"step": step, **row})
    return [*found.values()]


def _versions(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(what, in each run) of what the runs say that they ran with."""
    names = dict.fromkeys(name for run in runs for name in run.versions)
    return [(name, [run.versions.get(name, NO_KEY) for run in runs]) for name in names]


def _evaluations(named: Mapping[str, Run]) -> dict[str, Mapping[str, Any]]:
    """The last evaluations while training, by run and step."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, run in named.items():
        rows = [row for row in run.rows if {"acc@1", "acc@2", "records"} <= row.keys()]
        found |= {f"{name}, step {row['step']}": row for row in rows[-EVALUATIONS:]}
    return found


def keys(
    configs: Sequence[Config], recipe: Callable[[Config], Config]
) -> list[tuple[str, str, list[str], bool]]:
    """(key, in the recipe of the first run, in each run, whether it was changed) of every key.

    It was changed where some run has another value than its own recipe, or than another run.
    """
    flat = [flat_config(dict(config)) for config in configs]
    recipes = [flat_config(dict(recipe(config))) if config else {} for config in configs]
    rows = []
    for key in sorted(set().union(*flat)):
        values = [_value(own, key) for own in flat]
        planned = [_value(own, key) for own in recipes]
        pairs = zip(values, planned, strict=True)
        other = any(value != plan for value, plan in pairs if value != NO_KEY != plan)
        rows.append((key, planned[0], values, other or len({*values} - {NO_KEY}) > 1))
    return rows


NO_KEY = "–"


def _value(flat: Config, key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else NO_KEY


def names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell all apart; equal paths are numbered."""
    parts = [folder.rstrip("/").split("/") for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(own[-depth:]) for own in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{folder} ({n})" for n, folder in enumerate(folders, 1)]


def _view(name: str, run: Run, evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What stands at the top of the page of one run."""
    # An evaluation is of a run where its weights are: a checkpoint or an export in its folder.
    own = {
        name: rates
        for name, rates in evaluations.items()
        if rates.get("weights") and str(absolute(rates["weights"])).startswith(f"{run.folder}/")
    }
    return {
        "name": name,
        "folder": run.folder,
        "doing": glance.doing(run.config, run.origin),
        "progress": glance.progress(run.rows, run.steps),
        "helped": glance.helped(run.rows, own),
        "numbers": [*glance.numbers(run.rows)],
    }
