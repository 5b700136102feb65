"""Checkpoints through Orbax: everything a run needs to go on exactly, and parameters alone.

One step is one directory, ``<workdir>/checkpoints/<step>``, with four items: ``params`` (trained
and frozen parameters, one flat dict), ``optimizer`` (optimizer state, step, skipped updates),
``host`` (what each process keeps on the host: data iterator, pending groups) and ``meta`` (JSON:
config, and the metric where it was evaluated). A parameter-only checkpoint holds ``params`` and
``meta`` in the same layout, so that `load_params` reads either. Nothing is pickled.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from srpo_jax.data.buckets import on_bucket
from srpo_jax.data.files import AnyPath, absolute, write_json
from srpo_jax.run import checksums, host_state, processes
from srpo_jax.run.console import progress
from srpo_jax.run.stored import (
    FOLDER,
    FORMAT,
    META,
    CheckpointError,
    DamageError,
    Meta,
    check_shapes,
    check_sums,
    find_params,
    in_short,
    read_items,
    read_meta,
    read_metadata,
    sealed,
    steps_in,
)
from srpo_jax.structs import Params, TrainState

DAMAGED = "damaged"  # beside a run's FOLDER: steps that were set aside


class _KeepBest(policies.PreservationPolicy):
    """Orbax policy: keep the step with the best metric, of those that were given one.

    Orbax's own best-of-N wants a metric at every step.
    """

    def __init__(self):
        self.metrics: dict[int, float] = {}  # by step

    def step(self) -> int | None:
        """The best step; the newer of two equals."""
        return max(self.metrics, key=lambda s: (self.metrics[s], s), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [info.step == self.step() for info in checkpoints]


class _KeepApplied(policies.PreservationPolicy):
    """Orbax policy: keep the newest step whose last update was applied.

    Where updates are not finite and left out, the newest steps are no places to go back to.
    """

    def __init__(self):
        self.skipping: set[int] = set()  # steps whose last update was left out

    def step(self, steps: Iterable[int]) -> int | None:
        """That step, of those given."""
        return max((step for step in steps if step not in self.skipping), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = self.step(info.step for info in checkpoints)
        return [info.step == kept for info in checkpoints]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` gives back."""

    step: int
    state: TrainState
    hosts: list[host_state.Host]  # what each process passed as ``host`` and ``arrays`` to `save`
    meta: Meta


class Checkpoints:
    """The checkpoints of one run: written in the background, renamed into place when complete.

    Kept are the newest ``keep``, the newest whose last update was applied, the best by the metric
    given to `note`, and every step that is a multiple of ``keep_every`` (0: none).
    """

    def __init__(self, workdir: AnyPath, *, keep: int = 2, keep_every: int = 0):
        if keep < 1:
            raise CheckpointError(f"keep={keep} must be >= 1")
        self.folder = absolute(workdir) / FOLDER
        self._best, self._applied = _KeepBest(), _KeepApplied()
        self._kept = [policies.LatestN(keep), self._best, self._applied]
        if keep_every:
            self._kept.append(policies.EveryNSteps(keep_every))
        _remove_empty(self.folder)
        for step in steps_in(self.folder):
            with contextlib.suppress(CheckpointError):  # of a step that nobody asks for
                self._remember(step, read_meta(self.folder / str(step)))

    def _remember(self, step: int, meta: Meta) -> None:
        if (metric := meta.get("metric")) is not None:
            self._best.metrics[step] = metric
        if not meta.get("applied", True):
            self._applied.skipping.add(step)

    def _forget(self, step: int) -> None:
        self._best.metrics.pop(step, None)
        self._applied.skipping.discard(step)

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made by the first `save`: a run that fails before it leaves no folder, and no threads."""
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(self._kept),
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(steps_in(self.folder), default=None)

    def best_step(self) -> int | None:
        """The step with the best metric so far, or None where none was given one."""
        return self._best.step()

    def metric(self, step: int) -> float | None:
        """What `note` was given for a step, or None."""
        return self._best.metrics.get(step)

    def note(self, step: int, metric: float) -> None:
        """Write what an evaluation found to a saved step; the best one is kept (collective)."""
        self.wait()
        if jax.process_index() == 0:
            meta = read_meta(self.folder / str(step)) | {"metric": float(metric)}
            write_json(self.folder / str(step) / META, sealed(meta))
        self._best.metrics[step] = float(metric)

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        config: dict[str, Any],
        host: dict[str, Any] | None = None,
        arrays: dict[str, np.ndarray] | None = None,
        meta: Meta | None = None,
    ) -> bool:
        """Start writing one step; returns once the device buffers may be donated.

        CheckpointError where the step before could not be written.

        Args:
            step: number of the step; a step that is there already is left alone.
            config: the run's config as plain JSON values.
            host: JSON values and bytes that belong to THIS process (collective: all call).
            arrays: numpy arrays that belong to this process.
            meta: further JSON values, the same on every process; of them ``applied`` says whether
                the last update was (it is, where nothing is said).

        Returns:
            False where the step had been written before.
        """
        if step in self._manager.all_steps():
            return False
        params = {**state.params, **state.frozen}
        arrays_of = {"params": params, "optimizer": _optimizer_item(state)}
        host_item = host_state.gathered_item(host_state.pack_host(host or {}, arrays or {}))
        record = {
            **(meta or {}),
            "format": FORMAT,
            "step": int(step),
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "config": config,
            "checksums": checksums.checksums(arrays_of),
        }
        record["checksums"]["host"] = host_state.item_checksum(host_item)
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(item) for name, item in arrays_of.items()},
            host=ocp.args.StandardSave(host_item),
            meta=ocp.args.JsonSave(sealed(record)),
        )
        self._remember(step, record)
        with self._writing(), progress(f"saving step {step}"):
            return self._manager.save(step, args=items, force=True)

    def restore(
        self,
        like: TrainState,
        *,
        check: Callable[[Meta], Any] = lambda meta: None,
        fallback: bool = False,
    ) -> Restored:
        """Read the newest step into the shapes and shardings of ``like``.

        Args:
            like: train state of arrays or of ShapeDtypeStruct with shardings.
            check: called with a step's JSON values before its arrays are read.
            fallback: where the newest step is damaged, take the newest one that is whole, and move
                those after it to ``<workdir>/damaged``.

        Raises:
            CheckpointError: no step, a damaged one, or other shapes.
        """
        self.wait()
        damage: dict[int, str] = {}
        for step in processes.gather(sorted(steps_in(self.folder), reverse=True))[0]:
            try:
                got = _restore(self.folder / str(step), like, check)
            except DamageError as error:
                damage[step] = str(error)
                continue
            if damage and not fallback:
                raise CheckpointError(
                    f"{_describe(damage)}; step {step} is whole: pass "
                    "--config.checkpoint.fallback=True to go on from it"
                )
            for broken in damage:
                self._set_aside(broken)
            return got
        if damage:
            raise CheckpointError(
                f"{_describe(damage)}; no other step is whole: start anew in another --workdir, "
                "--config.init_from may name a checkpoint of another run"
            )
        raise CheckpointError(f"{self.folder}: no complete checkpoint")

    def _set_aside(self, step: int) -> None:
        """Move a step out of the way of the one that will have its number (collective)."""
        if jax.process_index() == 0:
            place = self.folder.parent / DAMAGED
            place.mkdir(parents=True, exist_ok=True)
            taken = sum(path.name.partition("-")[0] == str(step) for path in place.iterdir())
            (self.folder / str(step)).rename(place / (f"{step}-{taken}" if taken else str(step)))
        processes.agree({"set aside": step})
        self._forget(step)

    def applied_step(self) -> int | None:
        """The newest complete step whose last update was applied, or None (collective)."""
        self.wait()
        return processes.gather(self._applied.step(steps_in(self.folder)))[0]

    def roll_back(self, like: TrainState, step: int) -> Restored:
        """A step, its state into ``like``; the steps after it are deleted (collective).

        Raises as `restore`, except that no other step is sought.
        """
        got = _restore(self.folder / str(step), like, lambda meta: None)
        for later in processes.gather(sorted(steps_in(self.folder)))[0]:
            if later > step:
                with self._writing():
                    self._manager.delete(later)
                self._forget(later)
        return got

    def check(self) -> None:
        """Between two steps, without waiting: CheckpointError where a save has failed."""
        if "_manager" in vars(self) and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Block until what was saved is complete on disk; CheckpointError where it is not."""
        if "_manager" in vars(self):
            with contextlib.ExitStack() as around:
                around.enter_context(self._writing())
                if self._manager.is_saving_in_progress():
                    around.enter_context(progress("writing what was saved"))
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of Orbax, TensorStore or the file system
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written: {in_short(error)}"
            ) from error

    def close(self) -> None:
        """Wait, then release the manager's threads."""
        if "_manager" in vars(self):
            try:
                self.wait()
            finally:
                with contextlib.suppress(Exception):  # `wait` said why
                    self._manager.close()


def _remove_empty(folder: epath.Path) -> None:
    """Take folders of steps away that hold nothing at all: no step, and in the way of one."""
    if on_bucket(folder) or not folder.is_dir() or jax.process_index():
        return
    for path in folder.iterdir():
        if path.name.isdigit() and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


# --- parameters alone ------------------------------------------------------------------------


def load_params(
    path: AnyPath,
    shardings: Mapping[str, jax.sharding.Sharding],
    shapes: Mapping[str, Any],
    dtype: Any = None,
) -> Params:
    """Parameters of a parameter-only checkpoint, a step of a run, or a run's newest step.

    Args:
        path: that directory, a step's directory, or a ``--workdir``; see `find_params`.
        shardings: parameter path -> sharding, for every parameter.
        shapes: parameter path -> anything with ``shape``: those of the model.
        dtype: dtype to read into; None keeps the stored one.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or its names or shapes are not those
            wanted.
    """
    folder = find_params(path)
    stored = read_metadata(folder, "params")
    check_shapes(folder, stored, dict(shapes))
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=shardings[name])
        for name, leaf in stored.items()
    }
    with progress(f"reading {folder}"):
        params = read_items(folder, {"params": target})["params"]
    same = {name for name, leaf in stored.items() if params[name].dtype == leaf.dtype}
    check_sums(folder, read_meta(folder), {"params": {name: params[name] for name in same}})
    return own_buffers(params)


def save_params(path: AnyPath, params: Params, meta: Meta) -> None:
    """Write a parameter-only checkpoint, in place of one that is there (collective)."""
    record = {**meta, "format": FORMAT, "processes": jax.process_count()}
    record["checksums"] = checksums.checksums({"params": params})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(dict(params)), meta=ocp.args.JsonSave(sealed(record))
        )
        writer.save(absolute(path), args=items, force=True)


# --- reading, and what tells that something is damaged ---------------------------------------


def _restore(folder: epath.Path, like: TrainState, check: Callable[[Meta], Any]) -> Restored:
    """One step; DamageError where it is damaged, CheckpointError where it does not fit."""
    targets, meta, problem = {}, {}, ""
    try:
        meta, targets = _prepare(folder, like, check)
    except DamageError as error:
        problem = str(error)
    with progress(f"reading {folder}"):
        got = read_items(folder, targets, problem)
    host_item = got.pop("host")
    check_sums(folder, meta, got, {"host": host_state.item_checksum(host_item)})
    params, optimizer = own_buffers(got["params"]), own_buffers(got["optimizer"])
    state = TrainState(
        params={k: params[k] for k in like.params},
        frozen={k: params[k] for k in like.frozen},
        **optimizer,
    )
    hosts = host_state.parts_of(host_item)
    return Restored(step=meta["step"], state=state, hosts=hosts, meta=meta)


def _prepare(
    folder: epath.Path, like: TrainState, check: Callable[[Meta], Any]
) -> tuple[Meta, dict[str, Any]]:
    """A step's JSON values, and what to read its items into; raises as `_restore`."""
    missing = [n for n in ("params", "optimizer", "host", "meta") if not (folder / n).is_dir()]
    if missing:
        raise DamageError(f"{folder}: {', '.join(missing)} missing")
    meta = read_meta(folder)
    check(meta)
    wanted = {"params": {**like.params, **like.frozen}, "optimizer": _optimizer_item(like)}
    for name, item in wanted.items():
        check_shapes(folder, read_metadata(folder, name), item)
    stored = read_metadata(folder, "host")
    host = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    return meta, abstract(wanted) | {"host": host}


def _describe(damage: dict[int, str]) -> str:
    return "; ".join(f"step {step} is damaged ({text})" for step, text in damage.items())


# --- shapes ----------------------------------------------------------------------------------


def abstract(tree: Any) -> Any:
    """ShapeDtypeStructs with the shardings of ``tree``'s leaves."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return jnp.copy(jax.device_put(x, jax.memory.Space.Device))


def own_buffers(tree: Any) -> Any:
    """Copy each leaf into a buffer of XLA's own: restored buffers may refuse to be donated.

    Leaf by leaf, so that the peak is one leaf above the state.
    """
    leaves, treedef = jax.tree.flatten(tree)
    del tree
    for i, leaf in enumerate(leaves):
        leaves[i] = jax.device_put(_copy(leaf), leaf.sharding)  # back to the host's memory
    return jax.tree.unflatten(treedef, leaves)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}
