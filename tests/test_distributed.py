"""Two processes with 4 devices each against one process with 8: the same run."""

import json
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
    workdir.mkdir()
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
def test_two_processes_stopped_and_resumed_give_the_losses_of_one(tmp_path):
    helpers.world(tmp_path)
    run(1, tmp_path, tmp_path / "one")
    run(2, tmp_path, tmp_path / "two")

    for stage, names in (
        ("sft", ("loss", "grad_norm", "tokens")),
        ("grpo", ("loss", "kl", "reward/mean", "grad_norm", "filter/kept_share")),
    ):
        one, two = (
            read_rows(tmp_path / d / stage / "metrics.jsonl", "train") for d in ("one", "two")
        )
        assert [row["step"] for row in two] == [1, 2, 3]
        for a, b in zip(one, two, strict=True):
            for name in names:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), (stage, name)
        first, second = (stored_params(tmp_path / d / stage) for d in ("one", "two"))
        assert checkpoint.read_meta(tmp_path / "two" / stage)["processes"] == 2
        for name, value in first.items():
            np.testing.assert_allclose(second[name], value, atol=1e-5, err_msg=name)
        one, two = (
            read_rows(tmp_path / d / stage / "metrics.jsonl", "eval") for d in ("one", "two")
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
            for d in ("one", "two")
        )
        assert one == two and one

    exported = hf.load_params(tmp_path / "two" / "hf", load_config(tmp_path / "two" / "hf"))
    params = stored_params(tmp_path / "two" / "sft")
    for name, value in exported.items():
        np.testing.assert_array_equal(np.asarray(value), params[name])


@pytest.mark.slow
def test_processes_started_with_different_configs_say_so_instead_of_hanging(tmp_path):
    helpers.world(tmp_path)
    with pytest.raises(AssertionError, match="processes disagree on config: process 0: .* 1: "):
        run(2, tmp_path, tmp_path / "run", "differ")
