"""All talk between the processes of a run: joining, agreeing, gathering.

Every function here that talks is collective: all processes call it, in the same order. With one
process each of them is the identity.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from srpo_jax.data import lock
from srpo_jax.data.files import AnyPath
from srpo_jax.model import sharding
from srpo_jax.run import console, heartbeat
from srpo_jax.structs import RunError

T = TypeVar("T")
MEET_SECONDS = 300.0  # that processes wait for each other at the start, as jax does


_heartbeat: heartbeat.Heartbeat | None = None  # where there are other processes
# What errors of a collective say where the other end is gone: Gloo, NCCL, gRPC.
_BROKEN = "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|[Cc]oordination service|reset by peer"


def join(
    enabled: bool,
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    timeout: float = 0.0,
) -> None:
    """Join the other processes of this run, once, before anything touches a device.

    From then on all of them end within ``timeout`` of the death of one (`heartbeat`).

    Args:
        enabled: the config's switch. The variable SRPO_COORDINATOR asks for it too.
        coordinator: ``host:port`` of process 0; empty: SRPO_COORDINATOR, and without that what
            jax finds by itself on a TPU pod, under SLURM, Open MPI or Kubernetes.
        num_processes: how many; 0: SRPO_NUM_PROCESSES, or found by jax.
        process_id: which one this is; -1: SRPO_PROCESS_ID, or found by jax.
        timeout: seconds without a sign of life; 0: no heartbeat but jax's own.

    Raises:
        RunError: some of the three are given and some are not, or nothing is found; process 0
            cannot listen or cannot be reached, or joining failed.
    """
    coordinator = coordinator or os.environ.get("SRPO_COORDINATOR", "")
    if not (enabled or coordinator) or jax.distributed.is_initialized():
        return
    num_processes = num_processes or _from_environment("SRPO_NUM_PROCESSES", 0)
    process_id = process_id if process_id >= 0 else _from_environment("SRPO_PROCESS_ID", -1)
    given = [bool(coordinator), num_processes > 0, process_id >= 0]
    if any(given) and not all(given):
        raise RunError(
            f"distributed: coordinator={coordinator!r}, num_processes={num_processes}, "
            f"process_id={process_id}: give all three, or none where jax finds them (TPU, SLURM)"
        )
    found = "the configuration or SRPO_COORDINATOR"
    if all(given):
        _meet(coordinator, num_processes, process_id)
    else:
        found, coordinator, num_processes, process_id = _detected()
    if process_id == 0:
        _tell(f"distributed: {num_processes} processes, told by {found}; 0 is at {coordinator}")
    gone, address = threading.Event(), coordinator
    if timeout and process_id:
        address = heartbeat.relay(coordinator, gone)
    try:
        with _ended_by_ctrl_c():
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                local_device_ids=_own_device(),
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=100 + int(3 * timeout),  # of jax's own: after ours
            )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"distributed: joining the other processes failed ({error})") from error
    if timeout and num_processes > 1:
        _start_heartbeat(process_id, num_processes, timeout, gone)


def _start_heartbeat(index: int, count: int, timeout: float, gone: threading.Event) -> None:
    global _heartbeat
    store = distributed.global_state.client  # jax offers no other way to it
    assert store is not None
    _heartbeat = heartbeat.Heartbeat(store, index, count, timeout, gone=gone)
    _heartbeat.start()
    atexit.register(_heartbeat.at_exit)


def name_the_lost(error: str) -> None:
    """Where an error may come from the loss of another process: end with that one's name."""
    if _heartbeat and re.search(_BROKEN, error):
        _heartbeat.suspect()


def leave(error: str = "") -> None:
    """This process is about to end, as the others do too, or with an error that they end with."""
    if _heartbeat:
        _heartbeat.leave(error)


_CLUSTERS = {
    "slurm": "SLURM",
    "ompi": "Open MPI",
    "gketpu": "the TPU slice on GKE",
    "gcetpu": "the TPU pod",
    "": "Kubernetes",
}


def _detected() -> tuple[str, str, int, int]:
    """What jax finds by itself: in words, process 0's address, how many, which one this is."""
    _check_slurm_port()
    kinds = clusters.ClusterEnv._cluster_types
    found = next(
        (one for one in kinds if not one.opt_in_only_method and one.is_env_present()), None
    )
    if found is None:
        raise RunError(
            "distributed.enabled=True: neither SLURM, Open MPI, a TPU pod nor Kubernetes (with its "
            "Python package) is found: give distributed.coordinator, num_processes and process_id"
        )
    port = os.environ.get("JAX_COORDINATOR_PORT")
    try:
        told = os.environ.get("JAX_COORDINATOR_ADDRESS") or found.get_coordinator_address(
            timeout_secs=int(MEET_SECONDS), override_coordinator_port=port
        )
        place = told, found.get_process_count(), found.get_process_id()
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise RunError(
            f"distributed: {_CLUSTERS[found.name]} does not tell all ({error})"
        ) from None
    return _CLUSTERS.get(found.name, found.name), *place


def _own_device() -> list[int] | None:
    """The one device of this process where a launcher started several on its machine, else all.

    (jax takes one under SLURM and Open MPI in any case, and leaves the others of the machine idle.)
    """
    for local, count in (
        ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ):
        several = not re.fullmatch(r"1(\(x\d+\))?", os.environ.get(count, "1"))
        if several and os.environ.get(local, "").isdecimal():
            return [int(os.environ[local])]
    return None


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise RunError(f"{name}={text}: expected a whole number") from None


def _meet(coordinator: str, num_processes: int, process_id: int) -> None:
    """Process 0 can listen at ``coordinator`` and the others reach it; RunError where not.

    jax ends the process over either, in C++ and with a page of its own.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise RunError(f"distributed.coordinator={coordinator}: write HOST:PORT, as in node0:8476")
    if process_id >= num_processes:
        raise RunError(
            f"distributed.process_id={process_id}: must be below num_processes={num_processes}; "
            "the first process is 0"
        )
    place = f"distributed.coordinator={coordinator}"
    if process_id:
        _wait_for(host.strip("[]"), int(port), place)
        return
    _check_free(int(port), place)
    if num_processes > 1:
        _tell(f"{place}: waiting for {num_processes - 1} other processes, {MEET_SECONDS:.0f} s")


def _check_slurm_port() -> None:
    """Under SLURM, of which jax finds all by itself: process 0 can listen at the job's port.

    The port is the one that jax derives from the job, set for it in its own variable.
    """
    told = [os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "PROCID", "STEP_NODELIST")]
    if not all(told) or not told[0].isdecimal() or "JAX_COORDINATOR_ADDRESS" in os.environ:
        return
    port = os.environ.setdefault("JAX_COORDINATOR_PORT", str(61_440 + int(told[0]) % 4_096))
    if told[1] == "0" and port.isdecimal():
        _check_free(int(port), f"SLURM, JAX_COORDINATOR_PORT={port}")


def _check_free(port: int, place: str) -> None:
    """RunError, naming the setting ``place``, unless this process can listen at ``port``."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise RunError(
            f"{place}: process 0 cannot listen at port {port} of this machine "
            f"({os.strerror(error.errno or 0)}): does another run use it? Give another port, the "
            "same to all processes"
        ) from None


def _wait_for(host: str, port: int, place: str) -> None:
    """Return when process 0 listens; RunError after ``MEET_SECONDS``."""
    end, told = time.monotonic() + MEET_SECONDS, False
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except OSError as error:
            reason = error.strerror or error
        if time.monotonic() > end:
            raise RunError(
                f"{place}: process 0 did not answer for {MEET_SECONDS:.0f} s ({reason}): was it "
                "started there, and is the port open between the machines?"
            )
        if not told:
            _tell(f"{place}: waiting for process 0 ({reason})")
        told = True
        time.sleep(0.5)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process meanwhile: Python's handler would wait until C++ returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say(text: str, fact: str = "", **values: Any) -> None:
    """One line of the first process, see `console.say`."""
    if jax.process_index() == 0:
        console.say(text, fact, **values)


@contextlib.contextmanager
def hold(folder: AnyPath) -> Iterator[None]:
    """The folder to this run alone; RunError on every process where another program has it."""
    problem = ""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock.hold(folder, say))
            except (RuntimeError, OSError) as error:
                problem = str(error)
        problem = gather(problem)[0]
        if problem:
            raise RunError(problem)
        yield


# --- agreement -------------------------------------------------------------------------------


def agree(values: Mapping[str, Any]) -> None:
    """Stop with a clear error unless every process holds the same ``values`` (JSON values).

    Called before the first collective of each step: processes that are about to run different
    programs would hang in it without a word. RunError names the first value that differs and what
    each process holds.
    """
    check_agreement(gather(dict(values)))


def check_agreement(held: list[dict[str, Any]]) -> None:
    """Raise RunError for the first key on which the processes' values differ."""
    for key in {key: None for values in held for key in values}:
        seen = [values.get(key) for values in held]
        if any(value != seen[0] for value in seen):
            shown = ", ".join(f"process {i}: {value!r}" for i, value in enumerate(seen))
            raise RunError(
                f"processes disagree on {key}: {shown}. Start all of them with the same config, "
                "code, data files and checkpoint"
            )


class Lockstep:
    """Agreement before each batch of a run: the same config, step, shapes and number of batches."""

    def __init__(self, config: str):
        self._config, self._batches = config, 0

    def __call__(self, step: int, bucket: str) -> None:
        """RunError unless all processes are about to run the same step on the same shapes."""
        self._batches += 1
        agree({"config": self._config, "step": step, "bucket": bucket, "batches": self._batches})


def maximum(value: int) -> int:
    """The largest value over all processes."""
    return int(maxima(np.int32(value)))


def maxima(values: np.ndarray | np.generic) -> np.ndarray:
    """Element by element, the largest value over all processes."""
    return _gather(np.asarray(values, np.int32)).max(axis=0)


def any_true(values: Sequence[bool] | np.ndarray) -> list[bool]:
    """Element by element, whether any process holds True."""
    return np.any(_gather(np.asarray(values, bool)), axis=0).tolist()


def add_up(values: Sequence[float]) -> list[float]:
    """Element by element, the sum over all processes."""
    return _gather(np.asarray(values, np.float32)).sum(axis=0).tolist()


def gather(own: Any) -> list[Any]:
    """The JSON values that each process passed, in process order, on every process."""
    return [json.loads(text) for text in gather_bytes(json.dumps(own).encode())]


def gather_bytes(own: bytes) -> list[bytes]:
    """What each process passed, in process order, on every process."""
    sizes = _gather(np.int32(len(own)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    return [row[:n].tobytes() for row, n in zip(_gather(padded), sizes, strict=True)]


def _gather(own: np.ndarray | np.generic) -> np.ndarray:
    """[processes, ...]; the collective under all of them."""
    if jax.process_count() == 1:
        return np.asarray(own)[None]
    gathered = np.asarray(multihost_utils.process_allgather(own))
    return gathered.reshape(jax.process_count(), *np.shape(own))


# --- this process's part ---------------------------------------------------------------------


def data_place(mesh: Mesh) -> tuple[int, int]:
    """(index, count) of this process among those that read different data.

    Processes that hold the same data shards (``tensor`` spans them) read the same rows.
    """
    own = sharding.process_shards(mesh)
    count = sharding.num_data_shards(mesh) // len(own)
    if own != list(range(own[0], own[0] + len(own))) or own[0] % len(own):
        raise RunError(f"mesh: this process holds the data shards {own}, which are not one block")
    return own[0] // len(own), count


def speakers(mesh: Mesh) -> list[int]:
    """For each place of `data_place` the process that speaks for it: the first that holds it."""
    rows = mesh.devices.reshape(sharding.num_data_shards(mesh), -1)
    return [*dict.fromkeys(min(device.process_index for device in row) for row in rows)]


def speaks(mesh: Mesh) -> bool:
    """Whether this process is one of the `speakers`."""
    return jax.process_index() in speakers(mesh)


def once(held: Sequence[T] | np.ndarray, mesh: Mesh) -> list[T]:
    """Of what all processes hold (`gather`): one for each place of `data_place`, in their order."""
    return [held[process] for process in speakers(mesh)]


def all_rows(own: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Rows of this process's part of an array -> those of all parts, in the order of shards."""
    return np.concatenate(once(_gather(own), mesh))


def from_speaker(make: Callable[[], T], mesh: Mesh) -> T:
    """``make()``, JSON values, but where several processes hold the same rows, that of one of them.

    What need not come out alike twice (a check that runs out of time) is alike on all of them.
    """
    if len(speakers(mesh)) == jax.process_count():
        return make()
    held = gather(make() if speaks(mesh) else None)
    return once(held, mesh)[data_place(mesh)[0]]


def to_local(tree: Any) -> Any:
    """Global arrays -> numpy arrays with the rows of this process, in order (no communication)."""

    def fetch(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        parts = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])

    jax.tree.map(lambda x: x.copy_to_host_async() if isinstance(x, jax.Array) else None, tree)
    return jax.tree.map(fetch, tree)
