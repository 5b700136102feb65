"""One HTML page of training runs: curves laid over each other, and their rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from srpo_jax.data.files import AnyPath, absolute
from srpo_jax.report import curves, rollouts
from srpo_jax.report.html import render
from srpo_jax.report.rollouts import Pictures
from srpo_jax.run.metrics import read_rows
from srpo_jax.structs import RunError

PARTS = {"curves-part": "Curves", "rollouts-part": "Rollouts"}  # of the page: id -> heading


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: str
    rows: Sequence[Mapping[str, Any]] = field(default=(), repr=False)  # of metrics.jsonl


def read(folder: AnyPath) -> Run:
    """A training run's folder; RunError where it is none."""
    path = absolute(folder)
    if not (path / "metrics.jsonl").exists():
        raise RunError(
            f"{path}: no metrics.jsonl there; --workdir and --compare take the --workdir of a "
            "training run"
        )
    return Run(folder=str(path), rows=read_rows(path / "metrics.jsonl"))


def page(
    runs: Sequence[Run],
    pictures: Pictures = lambda run, row: (),
    *,
    samples: int = rollouts.SAMPLES,
    problems: int = rollouts.PICTURES,
) -> str:
    """The page as text; the first run is the one that it is about.

    The other arguments are those of `rollouts.pack`.
    """
    named = dict(zip(names([run.folder for run in runs]), runs, strict=True))
    long = any(len(run.rows) > curves.MAX_POINTS for run in runs)
    folders = [f"{run.folder}/rollouts" for run in runs]
    packed = rollouts.pack(folders, pictures, samples=samples, problems=problems)
    return render(
        "run_page.html.jinja",
        title=f"Training run {next(iter(named))}",
        parts=PARTS.items(),
        runs=[
            {"name": name, "folder": run.folder, "words": _words(run)}
            for name, run in named.items()
        ],
        data=curves.charts({name: run.rows for name, run in named.items()})
        | {"part": rollouts.PART},
        thinned=curves.MAX_POINTS if long else None,
        packed=packed,
    )


def names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell all apart; equal paths are numbered."""
    parts = [folder.rstrip("/").split("/") for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(own[-depth:]) for own in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{folder} ({n})" for n, folder in enumerate(folders, 1)]


def _words(run: Run) -> str:
    """How far a run is."""
    if not run.rows:
        return "no step yet"
    steps = {row["step"] for row in run.rows if row["split"] == "train"}
    return f"{len(steps):,} steps logged, the last one {max(steps, default=0):,}"
