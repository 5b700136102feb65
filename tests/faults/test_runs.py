"""Runs that are killed, stopped or starved at any moment: in the end there is what an undisturbed
run leaves, bit for bit.
"""

import json
import random
import time
from pathlib import Path

import openai_server
import pytest
import reflection_world
from fault_runs import Fault, Run, differences, left_behind, litter

from srpo_jax.data.records import open_records
from srpo_jax.reflection.settings import Settings
from srpo_jax.run.command import AGAIN
from tools.demo import tiles

KINDS = ("export", "build", "evaluation", "sft", "srpo", "resample", "lora")
IN_A_ROW = 3  # kills of one run at most
SERVER = {"429": 0.04, "500": 0.03, "cut": 0.03, "not_json": 0.02}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """``undisturbed(kind, arguments)``: what a run leaves, and how long the first one took."""
    known = {}

    def look(kind: str, arguments) -> tuple[dict, float]:
        if kind not in known:
            workdir = tmp_path_factory.mktemp(kind) / "run"
            run = Run(kind, workdir, *arguments(workdir))
            assert run.end() == 0, run.said
            known[kind] = left_behind(workdir), run.took
            assert len(known[kind][0]) > 1 and not litter(workdir)
        return known[kind]

    return look


@pytest.fixture
def arguments(world, kind, monkeypatch):
    """``arguments(workdir)``: of the kind's command line, beside configuration and folder."""
    if kind == "build":
        if not (world / "tiles.jsonl").exists():
            problems = tiles.draw_splits(3, {"rl": 48})["rl"]
            drawn = tiles.records(problems, 3, "rl", reflect=False)
            tiles.write_jsonl(world / "tiles.jsonl", drawn)
        records = open_records(world / "tiles.jsonl")
        records = [records[i] for i in range(len(records))]
        reflection_world.write_world(world / "said.json", records, Settings())
        monkeypatch.setenv("REFLECTION_WORLD", str(world / "said.json"))
        monkeypatch.setattr(reflection_world, "_WORLD", {})
        with openai_server.Server(reflection_world.answer, SERVER, seed=1) as server:
            url = server.base_url
            yield lambda workdir: [
                *("run", "--workdir", str(workdir), "--records", str(world / "tiles.jsonl")),
                *("--policy_model", "p", "--policy_url", url, "--teacher_model", "t"),
                *("--teacher_url", url, "--concurrency", "4", "--share_correct", "-1"),
                *("--grading_workers", "1", "--validation_share", "0.2"),
            ]
    elif kind == "export":
        start = Path(json.loads((world / "world.json").read_text())["hf_dir"])
        run = Run(
            "export", world / "start", "import", f"--hf_dir={start}", f"--out={world / 'ours'}"
        )
        assert run.end() == 0, run.said
        yield lambda workdir: [
            *("export", f"--checkpoint={world / 'ours'}", f"--hf_dir={workdir / 'hf'}"),
            f"--reference={start}",
        ]
    elif kind == "sft":
        yield lambda workdir: [f"--config.export_hf_dir={workdir / 'hf'}"]
    else:
        yield lambda workdir: []


@pytest.fixture
def kills(request, kind) -> int:
    """This kind's share of all kills."""
    each, more = divmod(request.config.getoption("--kills"), len(KINDS))
    return each + (KINDS.index(kind) < more)


@pytest.mark.parametrize(
    "kind", ["export", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_a_run_killed_at_random_moments_leaves_what_an_undisturbed_one_leaves(
    tmp_path, kind, kills, arguments, undisturbed
):
    if not kills:
        pytest.skip("takes a larger --kills")
    wanted, seconds = undisturbed(kind, arguments)
    moment = random.Random(f"kill {kind}")
    seconds, killed, finished = seconds / 3, 0, 0  # most of it went into compiling
    while killed < kills:
        workdir = tmp_path / f"killed{finished}"
        for _ in range(min(IN_A_ROW, kills - killed)):
            run = Run(kind, workdir, *arguments(workdir))
            # Half of the moments are of all its life, half of that behind its first row.
            if moment.random() < 0.5:
                await_row(run, workdir, seconds)
                ended = run.ended_within(moment.uniform(0, seconds / 4))
            else:
                ended = run.ended_within(moment.uniform(0, seconds))
            if ended:
                break
            run.kill()
            killed += 1
            print(f"{kind} killed after {run.took:.2f} of {seconds:.2f} s: {held(workdir)}")
        # A folder that an export has made is whole, and the next export refuses it.
        if kind != "export" or not (workdir / "hf").exists():
            run = Run(kind, workdir, *arguments(workdir))
            assert run.end() == 0, run.said
            seconds = run.took
        finished += 1
        assert differences(wanted, left_behind(workdir)) == []
        assert litter(workdir) == []


def await_row(run: Run, workdir: Path, seconds: float) -> None:
    """Until the run adds to its rows or ends, or the time is over."""
    rows = [workdir / name for name in ("metrics.jsonl", "samples.jsonl.partial")]
    size = lambda: sum(path.stat().st_size for path in rows if path.exists())  # noqa: E731
    before, end = size(), time.monotonic() + seconds
    while size() == before and time.monotonic() < end and not run.ended_within(0.02):
        pass


def held(workdir: Path) -> str:
    """What a killed run had got to."""
    steps = [path.name for path in (workdir / "checkpoints").glob("*")]
    return ", ".join(sorted(steps)) or ", ".join(sorted(path.name for path in workdir.iterdir()))


# --- stopped or starved in every phase -----------------------------------------------------------

# In the order in which one run meets them, start after start. A phase's number says at which of its
# times since the start.
STOPPED = {
    "sft": ["weights", "data", "update", "save", "evaluation", "note", "export"],
    "srpo": ["sample", "grade", "update", "write"],
    "evaluation": ["batch", "batch", "conclusion"],
}
STARVED = [
    ("sft", "full", ["row", "note", "export"]),
    ("sft", "read-only", ["weights", "save", "export"]),
    ("srpo", "full", ["write", "save"]),
    ("evaluation", "full", ["batch", "conclusion"]),
    ("evaluation", "read-only", ["batch", "conclusion"]),
]


def chained(kind: str, phases: list[str], act: str, workdir: Path, arguments, check) -> None:
    """One start after the other with a fault in each phase, each looked at by ``check``, and one
    that comes to its end."""
    for phase in phases:
        run = Run(kind, workdir, *arguments(workdir), fault=Fault(phase, act))
        code = run.end()
        print(f"{kind}, {act} in {phase}: exit code {code}, {run.said.splitlines()[-1:]}")
        check(phase, code, run.said)
        for path in (workdir, *workdir.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    run = Run(kind, workdir, *arguments(workdir))
    assert run.end() == 0, run.said


@pytest.mark.slow
@pytest.mark.parametrize("kind", STOPPED)
def test_sigterm_in_any_phase_ends_with_the_code_to_run_again(
    tmp_path, kind, arguments, undisturbed
):
    def check(phase: str, code: int, said: str) -> None:
        # What it began behind the last step, it ends.
        assert code == (0 if phase in ("export", "conclusion") else AGAIN), (phase, said)
        assert "Traceback" not in said and "step 0 of 6, saved" not in said

    wanted, _ = undisturbed(kind, arguments)
    chained(kind, STOPPED[kind], "SIGTERM", tmp_path / "run", arguments, check)
    assert differences(wanted, left_behind(tmp_path / "run")) == []
    assert litter(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "act", "phases"), STARVED)
def test_a_disk_that_takes_nothing_more_is_one_line_and_costs_nothing_that_was_saved(
    tmp_path, kind, act, phases, arguments, undisturbed
):
    def check(phase: str, code: int, said: str) -> None:
        last = said.splitlines()[-1]
        assert code == 1 and last.startswith("error: "), (phase, said)
        assert str(tmp_path) in last and ".lock" not in last, (phase, said)
        assert "Traceback" not in said

    wanted, _ = undisturbed(kind, arguments)
    chained(kind, phases, act, tmp_path / "run", arguments, check)
    assert differences(wanted, left_behind(tmp_path / "run")) == []
