"""launch/: each file is valid, its command one of ours, and what stops early is started again."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from srpo_jax.run.command import AGAIN, STALLED, check_arguments, one_word_each
from srpo_jax.run.heartbeat import LOST

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
WORDS = ["srpo_jax.train_grpo", "--config=configs/grpo.py:size=7b", "--workdir=runs/a b"]


def check_command(words: list[str]) -> None:
    """A module of ours, and flags that it takes."""
    assert words[:2] == ["python", "-m"] and (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    flags = one_word_each(words[3:])
    check_arguments(flags)
    assert {"--config.distributed.enabled=True", "--workdir"} <= {
        *flags,
        flags[1].partition("=")[0],
    }


def run(script: str, folder: Path, codes: tuple[int, ...], environment: dict[str, str]):
    """A script of launch/ among programs that only note how they were called; and those calls."""
    notes, told = folder / "notes", folder / "codes"
    told.write_text("\n".join(map(str, codes)) + "\n")
    for name in ("srun", "scontrol", "gcloud", "xpk", "sleep"):
        code = f'code=$(head -1 {told}); sed -i 1d {told}; exit "${{code:-0}}"'
        end = code if name in ("srun", "gcloud", "xpk") else "exit 0"
        note = f"""printf '%s\\0' {name} "$@" >> {notes}; echo >> {notes}"""
        (folder / name).write_text(f"#!/bin/bash\n{note}\n{end}\n")
        (folder / name).chmod(0o755)
    more = os.environ | environment | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", LAUNCH / script, *WORDS], env=more, cwd=ROOT, check=False)
    calls = [line.split("\0")[:-1] for line in notes.read_text().splitlines()]
    return done.returncode, [call for call in calls if call[0] != "sleep"]


@pytest.mark.parametrize("path", [p for p in sorted(LAUNCH.iterdir()) if p.suffix != ".yaml"])
def test_scripts_are_valid_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (1, 0, False),
        (AGAIN, 9, True),
        (LOST, 4, True),
        (LOST, 5, False),
        (STALLED, 4, True),
        (137, 0, True),
    ],
)
def test_slurm_starts_a_process_a_node_and_queues_again_what_can_go_on(
    tmp_path, code, restarts, again
):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_RESTART_COUNT": str(restarts)}
    ended, (srun, *others) = run("slurm.sbatch", tmp_path, (code,), slurm)
    assert ended == code and others == ([["scontrol", "requeue", "7"]] if again else [])
    check_command(srun[2:])
    assert "--config.mesh.data=4" in srun
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --requeue\n" in text


def test_a_tpu_pod_starts_the_command_on_every_worker_until_it_has_ended(tmp_path):
    place = {"TPU": "pod", "ZONE": "z"}
    ended, (call,) = run("tpu_pod.sh", tmp_path, (0,), place)
    assert ended == 0 and "--worker=all" in call
    _, _, command = call[-1].partition(" && . .venv/bin/activate && bash launch/again.sh ")
    check_command(["python", "-m", *shlex.split(command)])


@pytest.mark.parametrize(
    ("codes", "ended", "count"),
    [((AGAIN, LOST, STALLED, 137, 0), 0, 5), ((AGAIN, 1, 0), 1, 2), ((LOST,) * 9, LOST, 3)],
)
def test_what_can_go_on_is_started_again_and_an_error_is_not(tmp_path, codes, ended, count):
    tries = {"PYTHON": "srun", "TRIES": "3" if ended == LOST else "20"}
    found, calls = run("again.sh", tmp_path, codes, tries)
    assert found == ended and len(calls) == count
    assert all(call == ["srun", "-m", *WORDS] for call in calls)


def test_xpk_is_told_slices_and_exit_codes(tmp_path):
    place = {"CLUSTER": "c", "TPU_TYPE": "v5p-64", "IMAGE": "i", "SLICES": "2"}
    ended, (call,) = run("xpk.sh", tmp_path, (0,), place)
    assert ended == 0 and f"--restart-on-exit-codes={LOST},{STALLED},{AGAIN}" in call
    command = shlex.split(call[-1].removeprefix("--command="))
    check_command(command)
    assert "--num-slices=2" in call and "--config.mesh.data=2" in command


def test_the_jobset_tells_each_process_its_place_and_tries_again_what_can_go_on():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    name, spec = jobset["metadata"]["name"], jobset["spec"]
    (job,) = spec["replicatedJobs"]
    inner = job["template"]["spec"]
    (container,) = inner["template"]["spec"]["containers"]
    check_command(container["command"])
    count = inner["completions"]
    assert count == inner["parallelism"] and f"--config.mesh.data={count}" in container["command"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    subdomain, port = spec["network"]["subdomain"], container["ports"][0]["containerPort"]
    assert variables == {
        "SRPO_COORDINATOR": f"{name}-{job['name']}-0-0.{subdomain}:{port}",
        "SRPO_NUM_PROCESSES": str(count),
        "SRPO_PROCESS_ID": None,
    }
    (rule,) = inner["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert {AGAIN, LOST, STALLED} <= {*rule["onExitCodes"]["values"]}
    assert spec["failurePolicy"]["maxRestarts"]


def test_processes_of_this_machine_get_their_places_and_the_first_failure_is_the_code(tmp_path):
    (tmp_path / "show.py").write_text(
        "import os, sys\n"
        "names = ('SRPO_PROCESS_ID', 'SRPO_NUM_PROCESSES', 'SRPO_COORDINATOR')\n"
        "told = [*(os.environ[n] for n in names), os.environ['XLA_FLAGS'], str(sys.argv[1:])]\n"
        "os.write(1, (' '.join(told) + '\\n').encode())\n"  # at once: both write to one pipe
        "sys.exit(75 * (os.environ['SRPO_PROCESS_ID'] == '1'))\n"
    )
    environment = os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": ""}
    environment.pop("SRPO_COORDINATOR", None)
    words = ["bash", LAUNCH / "local.sh", "2", "4", "show", "--a=b c"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    devices = "--xla_force_host_platform_device_count=4"
    assert sorted(done.stdout.splitlines()) == [
        f"{i} 2 localhost:8476  {devices} ['--a=b c']" for i in range(2)
    ]
    assert done.returncode == AGAIN, done.stderr
