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
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from srpo_jax.data.files import AnyPath, absolute, write_json
from srpo_jax.run import checksums, host_state, processes
from srpo_jax.structs import Params, TrainState

FORMAT = 1  # raised when the layout of a step changes
FOLDER = "checkpoints"
DAMAGED = "damaged"  # beside it: steps that were set aside
META = "meta/metadata"  # where Orbax puts the JSON of a step

Meta = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, or does not fit the run that asks for it."""


class DamageError(CheckpointError):
    """A step does not hold what was saved; the message says what, and in which file."""


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


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` gives back."""

    step: int
    state: TrainState
    host: dict[str, Any]  # what this process passed as ``host`` to `save`
    arrays: dict[str, np.ndarray]  # what this process passed as ``arrays``
    meta: Meta


class Checkpoints:
    """The checkpoints of one run: written in the background, renamed into place when complete.

    Kept are the newest ``keep``, the best by the metric given to `note`, and every step that is a
    multiple of ``keep_every`` (0: none).
    """

    def __init__(self, workdir: AnyPath, *, keep: int = 2, keep_every: int = 0):
        if keep < 1:
            raise CheckpointError(f"keep={keep} must be >= 1")
        self.folder = absolute(workdir) / FOLDER
        self._best = _KeepBest()
        self._kept = [policies.LatestN(keep), self._best]
        if keep_every:
            self._kept.append(policies.EveryNSteps(keep_every))
        for step in _steps(self.folder):
            with contextlib.suppress(CheckpointError):  # of a step that nobody asks for
                if (metric := read_meta(self.folder / str(step)).get("metric")) is not None:
                    self._best.metrics[step] = metric

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
        return max(_steps(self.folder), default=None)

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
            write_json(self.folder / str(step) / META, _sealed(meta))
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
            meta: further JSON values, the same on every process.

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
            "config": config,
            "checksums": checksums.checksums(arrays_of),
        }
        record["checksums"]["host"] = host_state.item_checksum(host_item)
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(item) for name, item in arrays_of.items()},
            host=ocp.args.StandardSave(host_item),
            meta=ocp.args.JsonSave(_sealed(record)),
        )
        with self._writing():
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
            CheckpointError: no step, a damaged one, other shapes, or another number of processes.
        """
        self.wait()
        damage: dict[int, str] = {}
        for step in processes.gather(sorted(_steps(self.folder), reverse=True))[0]:
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
        self._best.metrics.pop(step, None)

    def wait(self) -> None:
        """Block until what was saved is complete on disk; CheckpointError where it is not."""
        if "_manager" in vars(self):
            with self._writing():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of Orbax, TensorStore or the file system
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written: {_in_short(error)}"
            ) from error

    def close(self) -> None:
        """Wait, then release the manager's threads."""
        if "_manager" in vars(self):
            try:
                self.wait()
            finally:
                with contextlib.suppress(Exception):  # `wait` said why
                    self._manager.close()


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
    stored = _read_metadata(folder, "params")
    _check_shapes(folder, stored, dict(shapes))
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=shardings[name])
        for name, leaf in stored.items()
    }
    params = _read_items(folder, {"params": target})["params"]
    same = {name for name, leaf in stored.items() if params[name].dtype == leaf.dtype}
    _check_sums(folder, read_meta(folder), {"params": {name: params[name] for name in same}})
    return own_buffers(params)


def save_params(path: AnyPath, params: Params, meta: Meta) -> None:
    """Write a parameter-only checkpoint, in place of one that is there (collective)."""
    record = {**meta, "format": FORMAT, "processes": jax.process_count()}
    record["checksums"] = checksums.checksums({"params": params})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(dict(params)), meta=ocp.args.JsonSave(_sealed(record))
        )
        writer.save(absolute(path), args=items, force=True)


def find_params(path: AnyPath) -> epath.Path:
    """The directory that holds ``params``: ``path`` itself, or the newest step of a run there.

    Raises:
        CheckpointError: neither is there.
    """
    path = absolute(path)
    if (path / "params").is_dir():
        return path
    folder = path if path.name == FOLDER else path / FOLDER
    steps = [step for step in _steps(folder) if (folder / str(step) / "params").is_dir()]
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint here; expected a parameter checkpoint, a step directory, or a "
            f"run's --workdir with a {FOLDER} folder"
        )
    return folder / str(max(steps))


def read_meta(path: AnyPath) -> Meta:
    """The JSON beside the parameters (config and so on) of any of `load_params`'s paths.

    DamageError where it cannot be read, or is not what was written.
    """
    return _read_meta(find_params(path))


def _read_meta(folder: epath.Path) -> Meta:
    file = folder / META
    try:
        meta = json.loads(file.read_text())
        seal = meta.pop("seal", None)
    except (OSError, ValueError, AttributeError) as error:
        raise DamageError(f"{file}: {_in_short(error)}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {meta.get('format')}, this program reads {FORMAT}"
        )
    if seal not in (None, _sealed(meta)["seal"]):
        raise DamageError(f"{file}: its text is not the one that was written")
    if folder.name.isdigit() and meta.get("step", int(folder.name)) != int(folder.name):
        raise DamageError(f"{file}: is of step {meta['step']}")
    return meta


def _sealed(meta: Meta) -> Meta:
    text = json.dumps(meta, sort_keys=True)
    return json.loads(text) | {"seal": zlib.crc32(text.encode())}


def _steps(folder: epath.Path) -> list[int]:
    """Numbers of the complete steps in a run's folder, in no order."""
    if not folder.is_dir():
        return []
    return [
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
    ]


# --- reading, and what tells that something is damaged ---------------------------------------


def _restore(folder: epath.Path, like: TrainState, check: Callable[[Meta], Any]) -> Restored:
    """One step; DamageError where it is damaged, CheckpointError where it does not fit."""
    targets, meta, problem = {}, {}, ""
    try:
        meta, targets = _prepare(folder, like, check)
    except DamageError as error:
        problem = str(error)
    got = _read_items(folder, targets, problem)
    host_item = got.pop("host")
    _check_sums(folder, meta, got, {"host": host_state.item_checksum(host_item)})
    params, optimizer = own_buffers(got["params"]), own_buffers(got["optimizer"])
    state = TrainState(
        params={k: params[k] for k in like.params},
        frozen={k: params[k] for k in like.frozen},
        **optimizer,
    )
    host, arrays = host_state.unpack_host(host_state.own_bytes(host_item))
    return Restored(step=meta["step"], state=state, host=host, arrays=arrays, meta=meta)


def _prepare(
    folder: epath.Path, like: TrainState, check: Callable[[Meta], Any]
) -> tuple[Meta, dict[str, Any]]:
    """A step's JSON values, and what to read its items into; raises as `_restore`."""
    missing = [n for n in ("params", "optimizer", "host", "meta") if not (folder / n).is_dir()]
    if missing:
        raise DamageError(f"{folder}: {', '.join(missing)} missing")
    meta = _read_meta(folder)
    check(meta)
    if meta["processes"] != jax.process_count():
        raise CheckpointError(
            f"{folder} was written by {meta['processes']} processes, this run has "
            f"{jax.process_count()}: the data position of each process is kept, so resume "
            "with the same number, or start a new run with --config.init_from"
        )
    wanted = {"params": {**like.params, **like.frozen}, "optimizer": _optimizer_item(like)}
    for name, item in wanted.items():
        _check_shapes(folder, _read_metadata(folder, name), item)
    stored = _read_metadata(folder, "host")
    host = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    return meta, abstract(wanted) | {"host": host}


def _read_items(folder: epath.Path, targets: dict[str, Any], problem: str = "") -> dict[str, Any]:
    """Items of a step, read into shapes and shardings; ``problem`` is one met before (collective).

    Through the handlers themselves: Orbax's managers would wait at a barrier for a process that
    met with damage.
    """
    got = {}
    for name, target in targets.items():
        try:
            with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                args = ocp.args.StandardRestore(target)
                got[name] = handler.restore(folder / name, args=args)
        except Exception as error:  # TensorStore's are ValueErrors, with a page of text
            problem = f"{folder / name}: {_in_short(error)}"
            break
    found = [text for text in processes.gather(problem) if text]
    if found:
        raise DamageError(found[0])
    return got


def _check_sums(
    folder: epath.Path, meta: Meta, items: dict[str, Any], more: dict[str, int] | None = None
) -> None:
    """DamageError unless the arrays are those that were saved (older steps do not tell)."""
    if "checksums" not in meta:
        return
    wrong = checksums.changed(meta["checksums"], checksums.checksums(items) | (more or {}))
    if wrong:
        rest = f" and {len(wrong) - 1} more are" if len(wrong) > 1 else " is"
        raise DamageError(f"{folder}: {wrong[0]}{rest} not what was saved (checksum)")


def _describe(damage: dict[int, str]) -> str:
    return "; ".join(f"step {step} is damaged ({text})" for step, text in damage.items())


def _in_short(error: BaseException) -> str:
    """What an error began with, in short: Orbax and TensorStore add pages. Its end says most."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join((str(error) or type(error).__name__).split())
    text = text.partition(" [source locations=")[0].partition(" [tensorstore_spec=")[0]
    return text if len(text) <= 320 else f"{text[:60]}... {text[-250:]}"


# --- shapes ----------------------------------------------------------------------------------


def abstract(tree: Any) -> Any:
    """ShapeDtypeStructs with the shardings of ``tree``'s leaves."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


_copy = jax.jit(jnp.copy)


def own_buffers(tree: Any) -> Any:
    """Copy each leaf into a buffer of XLA's own: restored buffers may refuse to be donated.

    Leaf by leaf, so that the peak is one leaf above the state.
    """
    leaves, treedef = jax.tree.flatten(tree)
    del tree
    for i, leaf in enumerate(leaves):
        leaves[i] = _copy(leaf)
    return jax.tree.unflatten(treedef, leaves)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}


def _read_metadata(folder: epath.Path, item: str) -> Any:
    """Tree of array metadata (shape, dtype) of one stored item."""
    try:
        return ocp.PyTreeCheckpointHandler().metadata(folder / item).tree
    except Exception as error:  # files missing, no JSON, damaged: each has an exception of its own
        raise DamageError(f"{folder / item}: {_in_short(error)}") from error


def _check_shapes(path: epath.Path, stored: Any, wanted: Any) -> None:
    """One error that lists every array that is missing, superfluous or of another shape."""
    old, new = (
        {
            checksums.path_name(k): tuple(leaf.shape)
            for k, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (stored, wanted)
    )
    wrong = [f"{k} missing" for k in sorted(new.keys() - old.keys())]
    wrong += [f"{k} superfluous" for k in sorted(old.keys() - new.keys())]
    both = sorted(old.keys() & new.keys())
    wrong += [f"{k} is {old[k]}, wanted {new[k]}" for k in both if old[k] != new[k]]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise CheckpointError(
            f"{path} does not fit: {shown}. Check the model's size and, for a run that goes on, "
            "frozen parameters and optimizer settings"
        )
