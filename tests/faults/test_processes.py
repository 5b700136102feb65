"""Four processes of one run, of which one dies or stalls: the others name it and end."""

import socket
from pathlib import Path

import pytest
from fault_runs import Fault, Run

from srpo_jax.run.heartbeat import LOST

TIMEOUT = 8  # seconds; a process that is killed is mostly known at once


def start(workdir: Path, victim: int, fault: Fault) -> list[Run]:
    """SRPO on four processes with a device each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        place = f"localhost:{probe.getsockname()[1]}"
    words = [
        *("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.distributed.enabled=True"),
        *(f"--config.distributed.coordinator={place}", "--config.distributed.num_processes=4"),
        f"--config.distributed.timeout={TIMEOUT}",
    ]
    return [
        Run(
            "srpo",
            workdir,
            *words,
            f"--config.distributed.process_id={i}",
            fault=fault if i == victim else None,
        )
        for i in range(4)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "phase", "act"),
    [
        (1, "data", "SIGSTOP"),
        (0, "sample", "SIGKILL"),
        (3, "grade", "SIGSTOP"),
        (2, "update", "SIGKILL"),
        (0, "save", "SIGSTOP"),
    ],
)
def test_of_four_processes_one_that_is_killed_or_stopped_in_any_phase_ends_the_others(
    world, tmp_path, victim, phase, act
):
    runs = start(tmp_path / "run", victim, Fault(phase, act))
    try:
        for i in {*range(4)} - {victim}:
            code = runs[i].end(180)
            told = [line for line in runs[i].said.splitlines() if "error" in line.lower()]
            assert code == LOST, "\n---\n".join(run.said for run in runs)
            (line,) = told
            assert line.startswith(f"error: process {victim} (")
            assert line.endswith("run the same command again: it goes on from the last checkpoint")
        assert not runs[victim].ended_within(0) or act == "SIGKILL"
    finally:
        for run in runs:
            run.kill()
