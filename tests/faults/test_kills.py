"""SIGKILL at random moments: in the end there is what an undisturbed run leaves, bit for bit."""

import json
import random
from pathlib import Path

import openai_server
import pytest
import reflection_world
from fault_runs import Run, differences, left_behind, litter

from srpo_jax.data.records import open_records
from srpo_jax.reflection.settings import Settings
from tools.demo import tiles

KINDS = ("sft", "srpo", "resample", "lora", "evaluation", "build", "export")
IN_A_ROW = 3  # kills of one run at most
SERVER = {"429": 0.04, "500": 0.03, "cut": 0.03, "not_json": 0.02}


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
        run = Run("export", world / "start", "import", f"--hf_dir={start}", f"--out={world / 'ours'}")
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_moments_leaves_what_an_undisturbed_one_leaves(
    tmp_path, kind, kills, arguments
):
    calm = Run(kind, tmp_path / "calm", *arguments(tmp_path / "calm"))
    assert calm.end() == 0, calm.said
    wanted = left_behind(tmp_path / "calm")
    assert len(wanted) > 1 and not litter(tmp_path / "calm")
    moment = random.Random(f"kill {kind}")
    seconds, killed, finished = calm.took / 3, 0, 0  # most of it went into compiling
    while killed < kills:
        workdir = tmp_path / f"killed{finished}"
        for _ in range(min(IN_A_ROW, kills - killed)):
            run = Run(kind, workdir, *arguments(workdir))
            if run.ended_within(moment.uniform(0, seconds)):
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


def held(workdir: Path) -> str:
    """What a killed run had got to."""
    steps = [path.name for path in (workdir / "checkpoints").glob("*")]
    return ", ".join(sorted(steps)) or ", ".join(sorted(path.name for path in workdir.iterdir()))
