"""Two and four processes against one process with 8 devices: the same run."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import train_helpers as helpers
from checkpoint_helpers import stored_params

from srpo_jax.model import hf
from srpo_jax.model.config import load_config
from srpo_jax.run import checkpoint
from srpo_jax.run.metrics import read_rows

DRIVER = Path(__file__).resolve().parent / "distributed_run.py"


def run(count: int, world: Path, workdir: Path, *more: str) -> None:
    """All processes of one run; the output of one that failed is the message."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    workdir.mkdir(exist_ok=True)
    processes = []
    for index in range(count):
        log = open(workdir / f"log{index}", "w")
        arguments = [str(a) for a in (index, count, port, world, workdir, *more)]
        processes.append(
            subprocess.Popen([sys.executable, DRIVER, *arguments], stdout=log, stderr=log)
        )
    try:
        codes = [process.wait(timeout=3600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(workdir / f"log{i}").read_text() for i in range(count)]
    assert codes == [0] * count, "\n".join(log[-3000:] for log in logs)
    assert all("done" in log for log in logs)


@pytest.mark.slow
def test_processes_stopped_and_moved_elsewhere_give_the_losses_of_one(tmp_path):
    helpers.world(tmp_path)
    run(1, tmp_path, tmp_path / "one")
    # Four processes, one, two, on other devices each time.
    for count, until, mesh in ((4, 1, "2,2,1"), (1, 2, "1,4,1"), (2, 3, "2,1,2")):
        run(count, tmp_path, tmp_path / "moved", f"until={until}", f"mesh={mesh}")
    assert_alike(tmp_path, "moved")
    assert checkpoint.read_meta(tmp_path / "moved" / "sft")["processes"] == 2
    exported = hf.load_params(tmp_path / "moved" / "hf", load_config(tmp_path / "moved" / "hf"))
    params = stored_params(tmp_path / "moved" / "sft")
    for name, value in exported.items():
        np.testing.assert_array_equal(np.asarray(value), params[name])


def assert_alike(tmp_path: Path, other: str) -> None:
    """Losses, parameters, evaluations and completions of a run are those of "one"."""
    for stage, names in (
        ("sft", ("loss", "grad_norm", "tokens")),
        ("grpo", ("loss", "kl", "reward/mean", "grad_norm", "filter/kept_share")),
    ):
        one, two = (
            read_rows(tmp_path / d / stage / "metrics.jsonl", "train") for d in ("one", other)
        )
        assert [row["step"] for row in two] == [1, 2, 3]
        for a, b in zip(one, two, strict=True):
            for name in names:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), (stage, name)
        first, second = (stored_params(tmp_path / d / stage) for d in ("one", other))
        for name, value in first.items():
            np.testing.assert_allclose(second[name], value, atol=1e-5, err_msg=name)
        one, two = (
            read_rows(tmp_path / d / stage / "metrics.jsonl", "eval") for d in ("one", other)
        )
        assert [row["acc@2"] for row in one] == [row["acc@2"] for row in two] != []

    # Which prompts and completions: the same, whichever process holds them.
    for step in (1, 2, 3):
        one, two = (
            sorted(
                (row["id"], row["sample"], row["completion"], row["total"])
                for file in (tmp_path / d / "grpo" / "rollouts").glob(f"{step:06d}*.jsonl")
                for row in map(json.loads, file.read_text().splitlines())
            )
            for d in ("one", other)
        )
        assert one == two and one


@pytest.mark.slow
def test_groups_that_wait_move_and_go_through_a_checkpoint_as_if_never_stopped(tmp_path):
    helpers.world(tmp_path)
    run(2, tmp_path, tmp_path / "run", "resample")
    log = (tmp_path / "run" / "log0").read_text()
    assert re.search(r"had (\d+) groups, has (?!\1)", log)  # some did move
    straight, stopped = (
        read_rows(tmp_path / "run" / d / "metrics.jsonl", "train") for d in ("straight", "stopped")
    )
    names = ("loss", "reward/mean", "trained_tokens", "filter/pending_groups", "filter/age_mean")
    for name in names:
        assert [row[name] for row in straight] == [row[name] for row in stopped], name
    assert all(row["reward/mine"] > 0 for row in straight)
    assert any(row["filter/pending_groups"] for row in straight[:3])
    assert all(row["filter/age_max"] <= 1 and row["updates"] == 2 for row in straight)
    first, second = (stored_params(tmp_path / "run" / d) for d in ("straight", "stopped"))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


@pytest.mark.slow
def test_processes_that_hold_the_same_rows_share_verdicts_and_report_once(tmp_path):
    helpers.world(tmp_path)
    run(2, tmp_path, tmp_path / "run", "shared")
    one, two = (json.loads((tmp_path / f"run/told{i}.json").read_text()) for i in (0, 1))
    assert one["verdicts"] == two["verdicts"] != []
    assert one["records"] == two["records"] == 6
    rows = (tmp_path / "run/eval/samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(row)["id"] for row in rows) == [f"held_out-{i}" for i in range(6)]
    (file,) = (tmp_path / "run" / "grpo" / "rollouts").iterdir()
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({(s["id"], s["sample"]) for s in samples}) == len(samples) == 8 * 2
    own = {sample["mine"] for sample in samples}  # numbers of the worker that gave them
    assert len(own) == 1 and one["row"]["reward/mine"] == two["row"]["reward/mine"] == own.pop()
    assert one["row"]["accuracy/first"] == 1.0  # which is what the first process found
    assert one["row"]["filter/kept_share"] == two["row"]["filter/kept_share"] == 1.0


@pytest.mark.slow
def test_processes_started_with_different_configs_say_so_instead_of_hanging(tmp_path):
    helpers.world(tmp_path)
    with pytest.raises(AssertionError, match="processes disagree on config: process 0: .* 1: "):
        run(2, tmp_path, tmp_path / "run", "differ")
