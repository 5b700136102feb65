"""What holds a run together: the recompile guard, agreement of processes, stopping on a signal."""

import errno
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.model.sharding import AXES
from srpo_jax.run import adapters, command, compiler, processes, resume
from srpo_jax.run import guard as guard_module
from srpo_jax.run.guard import QUIET_STEPS, CompileGuard, Progress, Stopped, StopRequest
from srpo_jax.run.processes import check_agreement, join, once, speakers
from srpo_jax.run.resume import check_config, moved_from
from srpo_jax.structs import RunError, Stalled


@pytest.fixture
def guard():
    one = CompileGuard()
    yield one
    one.close()


def test_guard_lets_each_bucket_compile_once(guard):
    double = guard.watch(jax.jit(lambda x: x * 2))
    for bucket, size in (("a", 3), ("b", 4), ("a", 3), ("b", 4)):
        with guard.step(bucket):
            double(jnp.ones(size))


def test_guard_names_function_bucket_and_shapes_when_a_seen_bucket_compiles_again(guard):
    @jax.jit
    def grpo_step(batch):
        return batch["tokens"] + 1

    step = guard.watch(grpo_step)
    inputs = [{"tokens": jnp.ones((2, n))} for n in (3, 3, 5)]
    for batch in inputs[:2]:
        with guard.step("tokens 3"):
            step(batch)
    with pytest.raises(RunError) as error:
        with guard.step("tokens 3"):
            step(inputs[2])
    assert "grpo_step" in str(error.value) and "bucket tokens 3" in str(error.value)
    assert "tokens float32[2, 5]" in str(error.value)


def test_guard_sees_a_changed_dtype_in_a_function_it_was_not_told_of(guard):
    hidden = jax.jit(lambda x: x - 1)
    inputs = [jnp.ones(7), jnp.ones(7, jnp.bfloat16)]
    with guard.step("a"):
        hidden(inputs[0])
    with pytest.raises(RunError, match="recompiled after warm-up"):
        with guard.step("a"):
            hidden(inputs[1])


def test_guard_counts_a_step_inside_a_step_by_its_own_bucket(guard):
    f = jax.jit(lambda x: x * 5)

    def run(*sizes, last=0):
        with guard.step("whole"):
            for size in sizes:
                with guard.step(f"part {size}"):
                    f(jnp.ones(size))
            f(jnp.ones(last)) if last else None

    run(3, 4)
    run(4, 5)  # a part not seen before may compile, whatever the whole has done
    run(5, last=2)  # and so may the whole, its own for the first time
    with pytest.raises(RunError, match="for bucket part 3"):
        f.clear_cache()
        run(3)


def test_guard_ignores_what_is_compiled_between_steps_and_in_other_threads(guard):
    f = jax.jit(lambda x: x / 3)
    with guard.step("a"):
        f(jnp.ones(5))
    f(jnp.ones(6))
    with guard.step("a"):
        thread = threading.Thread(target=lambda: f(jnp.ones(8)))
        thread.start()
        thread.join()


def test_guard_passes_an_error_of_the_step_on(guard):
    with pytest.raises(KeyError, match="of the step"):
        with guard.step("a"):
            raise KeyError("of the step")


def test_processes_that_disagree_are_named_with_key_and_values():
    check_agreement([{"step": 3, "config": "ab"}] * 3)
    with pytest.raises(
        RunError, match="disagree on step: process 0: 3, process 1: 4, process 2: 3"
    ):
        check_agreement([{"config": "ab", "step": s} for s in (3, 4, 3)])
    with pytest.raises(RunError, match="cursor.*process 1: None"):
        check_agreement([{"cursor": 1}, {}])


def test_distributed_settings_given_by_half_are_refused(monkeypatch):
    monkeypatch.delenv("SRPO_COORDINATOR", raising=False)
    join(False)  # nothing asked for, nothing done
    with pytest.raises(RunError, match="give all three"):
        join(True, coordinator="localhost:1", num_processes=2)


@pytest.mark.parametrize(
    ("coordinator", "index", "message"),
    [
        ("localhost", 0, "coordinator=localhost: write HOST:PORT"),
        ("localhost:99999", 1, "coordinator=localhost:99999: write HOST:PORT"),
        ("localhost:8476", 2, "process_id=2: must be below num_processes=2"),
    ],
)
def test_places_that_cannot_be_are_refused_before_jax_sees_them(coordinator, index, message):
    with pytest.raises(RunError, match=message):
        join(True, coordinator=coordinator, num_processes=2, process_id=index)


def test_a_number_of_processes_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("SRPO_NUM_PROCESSES", "two")
    with pytest.raises(RunError, match="SRPO_NUM_PROCESSES=two: expected a whole number"):
        join(True)


def test_a_coordinator_whose_port_is_taken_or_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(processes, "MEET_SECONDS", 0.1)
    with socket.create_server(("", 0)) as other:
        place = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(RunError, match=rf"{place}: process 0 cannot listen .*another port"):
            join(True, coordinator=place, num_processes=2, process_id=0)
    with pytest.raises(RunError, match=rf"{place}: process 0 did not answer .*Connection refused"):
        join(True, coordinator=place, num_processes=2, process_id=1)
    assert capsys.readouterr().err.count(f"{place}: waiting for process 0") == 1


def under_slurm(monkeypatch, **more) -> list:
    """The variables of a step of two nodes; what jax is then told to join."""
    nodes = {"SLURM_JOB_ID": "4099", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node[1-2]"}
    nodes |= {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    for name, value in (nodes | more).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "")
    monkeypatch.delenv("JAX_COORDINATOR_PORT")
    begun = []
    record = lambda *args, **settings: begun.append((args, settings))  # noqa: E731
    monkeypatch.setattr("jax.distributed.initialize", record)
    return begun


def test_what_was_found_is_told_and_a_process_takes_all_devices_of_a_node_of_its_own(
    monkeypatch, capsys
):
    begun = under_slurm(monkeypatch)
    join(True)
    told = "distributed: 2 processes, told by SLURM; 0 is at node1:61443\n"
    assert capsys.readouterr().err == told
    assert begun[0][1]["local_device_ids"] is None
    # Eight of a node: one device each.
    begun = under_slurm(monkeypatch, SLURM_STEP_TASKS_PER_NODE="8(x2)", SLURM_LOCALID="3")
    join(True)
    assert begun[0][1]["local_device_ids"] == [3]


def test_where_nothing_is_found_the_three_are_asked_for(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.ClusterEnv._cluster_types", [])
    with pytest.raises(RunError, match="neither SLURM, .*: give distributed.coordinator, num_proc"):
        join(True)


def test_jax_is_given_more_time_than_the_heartbeat(monkeypatch):
    begun = under_slurm(monkeypatch, SLURM_PROCID="1")
    monkeypatch.setattr(processes, "_start_heartbeat", lambda *args: begun.append(args))
    join(True, timeout=120.0)
    ((address, *_), settings), started = begun
    assert address.startswith("127.0.0.1:") and settings["heartbeat_timeout_seconds"] == 460
    assert started[:3] == (1, 2, 120.0)


def test_a_port_that_is_taken_is_one_line_under_slurm_too(monkeypatch):
    begun = under_slurm(monkeypatch)
    join(True)
    assert begun[0][0] == ("node1:61443", 2, 0)
    assert os.environ["JAX_COORDINATOR_PORT"] == "61443"  # as jax has it
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        monkeypatch.setenv("JAX_COORDINATOR_PORT", port)
        with pytest.raises(RunError, match=f"SLURM, JAX_COORDINATOR_PORT={port}: process 0 cannot"):
            join(True)
        monkeypatch.setenv("SLURM_PROCID", "1")
        join(True)


def test_first_signal_asks_and_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    said = []
    with StopRequest(said.append) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and "SIGTERM" in said[0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_is_finished_where_half_of_the_grace_will_do_and_given_up_else(monkeypatch):
    clock = types.SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr(guard_module, "time", clock)
    now, stop = 0.0, StopRequest(lambda text: None)
    stop.grace = 20.0

    def begin_then_ask(seconds: float) -> None:
        nonlocal now
        stop.requested = False
        stop._begun, now = now, now + seconds
        stop._receive(signal.SIGTERM, None)

    with stop.step():
        now += 60  # so long took the one before
    begin_then_ask(51)  # 9 of it are left
    stop.between_phases()
    now += 30  # it takes longer than the one before
    with pytest.raises(Stopped):
        stop.between_phases()
    begin_then_ask(49)
    with pytest.raises(Stopped):
        stop.between_phases()
    with pytest.raises(Stopped):
        stop.between_batches()
    fresh = StopRequest(lambda text: None)
    fresh.between_phases()
    fresh.between_batches()
    fresh.grace = 1e9
    fresh._receive(signal.SIGTERM, None)  # nothing tells how long the first step takes
    with fresh.step(), pytest.raises(Stopped):
        fresh.between_phases()


def test_second_signal_kills():
    code = (
        "import os, signal, time\n"
        "from srpo_jax.run.guard import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(5)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout.count("finishing this step") <= 1


def test_changed_config_is_refused_by_key_unless_the_key_is_free(monkeypatch):
    saved = {"optim": {"lr": 1e-6, "betas": (0.9, 0.95)}, "log": {"every": 1}, "steps": 5}
    now = {"optim": {"lr": 1e-5, "betas": [0.9, 0.95]}, "log": {"every": 9}, "steps": 5}
    with pytest.raises(RunError, match=r"optim.lr was 1e-06, is 1e-05") as error:
        check_config(saved, now)
    assert "log.every" not in str(error.value) and "betas" not in str(error.value)
    with pytest.raises(RunError, match="steps was 5, is None"):
        check_config(saved, {"optim": saved["optim"], "log": {}})
    monkeypatch.setattr(resume, "FREE", ("log", "optim.lr"))
    check_config(saved, now)


def test_more_steps_need_no_permission_and_a_permission_names_its_keys():
    saved = {"optim": {"lr": 1e-6, "b1": 0.9}, "steps": 5, "epochs": 1.0, "seed": 0}
    check_config(saved, saved | {"steps": 8, "epochs": 2.0})
    newer = saved | {"later": {"kind": "", "share": 0.0, "on": False, "of": ()}}  # all of it off
    check_config(saved, newer)
    check_config(newer, saved)
    for one, other in ((saved, newer | {"share": 0.5}), (saved | {"share": 0.5}, newer)):
        with pytest.raises(RunError, match="share was (None, is 0.5|0.5, is None)"):
            check_config(one, other)
    with pytest.raises(RunError, match="steps was 5, is 4"):
        check_config(saved, saved | {"steps": 4})
    now = {"optim": {"lr": 1e-5, "b1": 0.8}, "steps": 5, "epochs": 1.0, "seed": 1}
    with pytest.raises(RunError, match=r"allow_changes=optim\.b1,optim\.lr,seed$"):
        check_config(saved, now)
    with pytest.raises(RunError, match="another config: seed was 0, is 1"):
        check_config(saved, now, "optim")
    check_config(saved, now, "optim.lr, optim.b1,seed")
    check_config(saved, now, "True")
    with pytest.raises(RunError, match="allow_changes=optim.rl: there is no key optim.rl"):
        check_config(saved, now, "optim.rl")


def test_devices_and_rows_may_change_between_two_runs_and_the_batch_may_not():
    saved = {"mesh": {"data": 2}, "data": {"global_batch_size": 8, "prompts_per_row": 4}}
    check_config(saved, {"mesh": {"data": 1}, "data": saved["data"] | {"prompts_per_row": 1}})
    with pytest.raises(RunError, match="was 8, is 4 .devices, processes and .* the batch may not"):
        check_config(saved, saved | {"data": saved["data"] | {"global_batch_size": 4}})
    meta = {"processes": 2, "devices": 4, "config": saved}
    assert moved_from(meta, {"data": 1}) == (
        "going on elsewhere (processes were 2, are 1; devices were 4, are 8; mesh were "
        "{'data': 2}, are {'data': 1}): the same batches, and the same losses but for the order "
        "of sums"
    )
    assert moved_from(meta | {"processes": 1, "devices": 8}, saved["mesh"]) == ""


def test_to_begin_from_an_unfinished_run_is_said(capsys):
    for step in (3, 9, None):
        adapters._tell_if_unfinished("init_from=runs/sft", {"step": step, "total_steps": 9})
    said = capsys.readouterr().out
    assert said.startswith("init_from=runs/sft: that run is not finished; these are the weights ")
    assert said.endswith("after step 3 of 9\n") and said.count("\n") == 1


def test_a_full_disk_is_one_line_that_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        command._fail(OSError(errno.ENOSPC, "No space left on device", "runs/x/rows.jsonl"))
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 28] No space left on device: 'runs/x/rows.jsonl'; free ")
    assert said.count("\n") == 1 and "goes on from what is saved" in said


def test_data_that_do_not_come_are_one_line_and_an_exit_code_of_their_own(capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)  # at once: a worker may hang in a disk
    with pytest.raises(SystemExit) as ended:
        command._fail(Stalled("record 7 of train.jsonl did not come"))
    assert ended.value.code == command.STALLED
    assert capsys.readouterr().err == "error: record 7 of train.jsonl did not come\n"


# --- processes that hold the same rows -------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "processes", "wanted"),
    [
        ((2, 2, 2), 1, [0]),
        ((2, 2, 2), 2, [0, 1]),
        ((1, 1, 8), 2, [0]),  # tensor spans both
        ((1, 2, 4), 4, [0, 2]),
        ((2, 4, 1), 4, [0, 1, 2, 3]),  # fsdp spans them: other rows each
    ],
)
def test_one_process_speaks_for_each_part_of_the_rows(shape, processes, wanted):
    count = math.prod(shape)
    devices = np.empty(count, object)
    devices[:] = [types.SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    mesh = types.SimpleNamespace(
        devices=devices.reshape(shape), shape=dict(zip(AXES, shape, strict=True))
    )
    assert speakers(mesh) == wanted
    assert once([f"rows of {i}" for i in range(processes)], mesh) == [
        f"rows of {i}" for i in wanted
    ]


def test_processes_of_the_same_rows_do_their_work_once(monkeypatch):
    devices = np.empty(8, object)
    devices[:] = [types.SimpleNamespace(process_index=i // 2) for i in range(8)]
    shape = dict(zip(AXES, (1, 2, 4), strict=True))  # tensor spans processes 0 and 1, 2 and 3
    mesh: Any = types.SimpleNamespace(devices=devices.reshape(1, 2, 4), shape=shape)
    made = []
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(processes, "gather", lambda own: ["a", None, "b", None])
    for index in range(4):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found = processes.from_speaker(lambda index=index: made.append(index), mesh)
        assert found == "ab"[index // 2] and processes.data_place(mesh) == (index // 2, 2)
        assert processes.speaks(mesh) == (index in (0, 2))
    assert made == [0, 2]


# --- steps that change nothing ---------------------------------------------------------------


def test_updates_that_are_not_finite_again_and_again_end_the_run():
    progress = Progress(max_skipped=5, skipped=7, say=pytest.fail)
    progress.look(1, 2, {"skipped": 9.0, "update_norm": 0.0})
    progress.look(2, 0, {})  # no update at all: nothing is known
    progress.look(3, 2, {"skipped": 10.0, "update_norm": 0.1})  # one of two was good
    for step in (4, 5):
        progress.look(step, 2, {"skipped": 12.0 + 2 * (step - 4), "update_norm": 0.0})
    with pytest.raises(
        RunError, match="^step 6: none of the last 6 updates was finite .*max_skipped"
    ):
        progress.look(6, 2, {"skipped": 16.0, "update_norm": 0.0})


@pytest.mark.parametrize(
    ("updates", "metrics", "told"),
    [
        (0, {}, "no group lay between filter.low and filter.high"),
        (1, {"update_norm": 0.1, "groups_without_signal": 1.0}, "earned the same reward"),
        (1, {"update_norm": 0.0}, "is optim.lr 0"),
    ],
)
def test_steps_in_a_row_that_teach_nothing_are_told_once(updates, metrics, told):
    lines: list[str] = []
    progress = Progress(max_skipped=5, skipped=0, say=lines.append)
    good = (1, {"update_norm": 0.1, "groups_without_signal": 0.5})
    for step in range(1, QUIET_STEPS):
        progress.look(step, updates, metrics)
    progress.look(QUIET_STEPS, *good)
    assert not lines
    for step in range(100, 103 + QUIET_STEPS):
        progress.look(step, updates, metrics)
    (line,) = lines
    assert line.startswith(f"step {99 + QUIET_STEPS}: the last 10 steps taught nothing")
    assert told in line


def test_compilers_are_told_what_the_environment_does_not_say(monkeypatch):
    name, other = "--xla_tpu_overlap_compute_collective_tc", "--xla_enable_async_all_gather=true"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"{name}=false --mine=1")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    compiler.prepare()
    flags = os.environ["LIBTPU_INIT_ARGS"].split()
    assert flags[:2] == [f"{name}=false", "--mine=1"] and other in flags
    assert len(flags) == len({flag.partition("=")[0] for flag in flags})
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5"
    compiler.prepare()  # of a second run in the same process
    assert os.environ["LIBTPU_INIT_ARGS"].split() == flags
    assert other in compiler.tune("tpu", 8) and compiler.tune("cpu", 8) == ""
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    compiler.prepare()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.92"
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")
    compiler.prepare()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ  # jax refuses both


@pytest.mark.parametrize(
    ("devices", "variable", "value", "level"),
    [
        (8, "UNRELATED", "", "O1"),
        (1, "UNRELATED", "", "UNKNOWN"),
        (8, "JAX_OPTIMIZATION_LEVEL", "O0", "UNKNOWN"),
        (8, "XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false", "UNKNOWN"),
    ],
)
def test_gpus_hide_collectives_unless_told_otherwise(monkeypatch, devices, variable, value, level):
    monkeypatch.delenv("JAX_OPTIMIZATION_LEVEL", raising=False)
    monkeypatch.setenv(variable, value)
    try:
        told = compiler.tune("gpu", devices)
        assert getattr(jax.config, "jax_optimization_level") == level  # noqa: B009
        assert ("jax_optimization_level=O1" in told) is (level == "O1")
    finally:
        jax.config.update("jax_optimization_level", "UNKNOWN")
