"""Checkpoints through Orbax: everything a run needs to go on exactly, and parameters alone.

One step is one directory, ``<workdir>/checkpoints/<step>``, with four items: ``params`` (trained
and frozen parameters, one flat dict), ``optimizer`` (optimizer state, step, skipped updates),
``host`` (what each process keeps on the host: data iterator, pending groups) and ``meta`` (JSON:
config, best metric). A parameter-only checkpoint holds ``params`` and ``meta`` in the same layout,
so that `load_params` reads either. Nothing is pickled.
"""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from srpo_jax.run import processes
from srpo_jax.structs import Params, TrainState

FORMAT = 1  # raised when the layout of a step changes
FOLDER = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, or does not fit the run that asks for it."""


class _KeepBest(policies.PreservationPolicy):
    """Orbax policy: keep the step with the best metric, of those that were given one.

    Orbax's own best-of-N wants a metric at every step.
    """

    def __init__(self):
        self._ranks: dict[int, float] = {}

    def note(self, step: int, metric: float | None) -> None:
        if metric is not None:
            self._ranks[step] = metric

    def step(self) -> int | None:
        """The best step; the newer of two equals."""
        return max(self._ranks, key=lambda s: (self._ranks[s], s), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [info.step == self.step() for info in checkpoints]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` gives back."""

    step: int
    state: TrainState
    host: dict[str, Any]  # what this process passed as ``host`` to `save`
    arrays: dict[str, np.ndarray]  # what this process passed as ``arrays``
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: written in the background, renamed into place when complete.

    Kept are the newest ``keep``, the best by the metric given to `save`, and every step that is a
    multiple of ``keep_every`` (0: none).
    """

    def __init__(self, workdir: str | Path, *, keep: int = 2, keep_every: int = 0):
        if keep < 1:
            raise CheckpointError(f"keep={keep} must be >= 1")
        self.folder = Path(workdir).resolve() / FOLDER
        self._best = _KeepBest()
        kept = [policies.LatestN(keep), self._best]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            ),
        )
        for step in self._manager.all_steps():
            self._best.note(step, read_meta(self.folder / str(step)).get("metric"))

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric so far, or None where none was given one."""
        return self._best.step()

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        config: dict[str, Any],
        host: dict[str, Any] | None = None,
        arrays: dict[str, np.ndarray] | None = None,
        metric: float | None = None,
        meta: dict[str, Any] | None = None,
    ) -> bool:
        """Start writing one step; returns once the device buffers may be donated.

        Args:
            step: number of the step; a step that is there already is left alone.
            config: the run's config as plain JSON values.
            host: JSON values and bytes that belong to THIS process (collective: all call).
            arrays: numpy arrays that belong to this process.
            metric: rank of this step for keeping the best, None where it was not evaluated.
            meta: further JSON values, the same on every process.

        Returns:
            False where the step had been written before.
        """
        if step in self._manager.all_steps():
            return False
        record = {
            **(meta or {}),
            "format": FORMAT,
            "step": int(step),
            "processes": jax.process_count(),
            "metric": None if metric is None else float(metric),
            "config": config,
        }
        self._best.note(step, record["metric"])
        items = ocp.args.Composite(
            params=ocp.args.StandardSave({**state.params, **state.frozen}),
            optimizer=ocp.args.StandardSave(_optimizer_item(state)),
            host=ocp.args.StandardSave(_host_item(pack_host(host or {}, arrays or {}))),
            meta=ocp.args.JsonSave(record),
        )
        return self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState) -> Restored:
        """Read the newest step into the shapes and shardings of ``like``.

        Args:
            like: train state of arrays or of ShapeDtypeStruct with shardings.

        Raises:
            CheckpointError: no step, other shapes, or another number of processes.
        """
        self.wait()
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"{self.folder}: no complete checkpoint")
        path = self.folder / str(step)
        meta = read_meta(path)
        if meta["processes"] != jax.process_count():
            raise CheckpointError(
                f"{path} was written by {meta['processes']} processes, this run has "
                f"{jax.process_count()}: the data position of each process is kept, so resume "
                "with the same number, or start a new run with --config.init_from"
            )
        params = {**like.params, **like.frozen}
        _check_shapes(path, _read_metadata(path, "params"), params)
        optimizer = _optimizer_item(like)
        _check_shapes(path, _read_metadata(path, "optimizer"), optimizer)
        got = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract(params)),
                optimizer=ocp.args.StandardRestore(abstract(optimizer)),
                host=ocp.args.StandardRestore(_abstract_host(path)),
            ),
        )
        params, optimizer = own_buffers(got["params"]), own_buffers(got["optimizer"])
        state = TrainState(
            params={k: params[k] for k in like.params},
            frozen={k: params[k] for k in like.frozen},
            **optimizer,
        )
        host, arrays = unpack_host(_own_bytes(got["host"]))
        return Restored(step=step, state=state, host=host, arrays=arrays, meta=meta)

    def wait(self) -> None:
        """Block until what was saved is complete on disk; raises what writing it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then release the manager's threads."""
        self.wait()
        self._manager.close()


# --- parameters alone ------------------------------------------------------------------------


def load_params(
    path: str | Path,
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
        CheckpointError: no checkpoint there, or its names or shapes are not those wanted.
    """
    folder = find_params(path)
    stored = _read_metadata(folder, "params")
    _check_shapes(folder, stored, dict(shapes))
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=shardings[name])
        for name, leaf in stored.items()
    }
    items = ocp.args.Composite(params=ocp.args.StandardRestore(target))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return own_buffers(reader.restore(folder, args=items).params)


def find_params(path: str | Path) -> Path:
    """The directory that holds ``params``: ``path`` itself, or the newest step of a run there.

    Raises:
        CheckpointError: neither is there.
    """
    path = Path(path).resolve()
    if (path / "params").is_dir():
        return path
    folder = path if path.name == FOLDER else path / FOLDER
    steps = [p for p in folder.glob("*") if p.name.isdigit() and (p / "params").is_dir()]
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint here; expected a parameter checkpoint, a step directory, or a "
            f"run's --workdir with a {FOLDER} folder"
        )
    return max(steps, key=lambda p: int(p.name))


def read_meta(path: str | Path) -> dict[str, Any]:
    """The JSON beside the parameters (config and so on) of any of `load_params`'s paths."""
    folder = find_params(path)
    file = folder / "meta" / "metadata"
    try:
        meta = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {meta.get('format')}, this program reads {FORMAT}"
        )
    return meta


# --- host state as bytes ---------------------------------------------------------------------


def pack_host(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """JSON values (bytes allowed) and arrays as the bytes of one .npz file."""
    text = json.dumps(values, default=_bytes_to_json)
    parts: dict[str, Any] = {f"array/{n}": np.asarray(value) for n, value in arrays.items()}
    out = io.BytesIO()
    np.savez_compressed(out, json=np.frombuffer(text.encode(), np.uint8), **parts)
    return out.getvalue()


def unpack_host(packed: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `pack_host`."""
    with np.load(io.BytesIO(packed), allow_pickle=False) as parts:
        values = json.loads(parts["json"].tobytes().decode(), object_hook=_bytes_from_json)
        arrays = {n.removeprefix("array/"): parts[n] for n in parts.files if n != "json"}
    return values, arrays


def _bytes_to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    raise TypeError(f"host state holds a {type(value).__name__}, which JSON cannot hold")


def _bytes_from_json(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["__bytes__"]) if value.keys() == {"__bytes__"} else value


def _host_item(own: bytes) -> dict[str, np.ndarray]:
    """Every process's bytes as one padded array, which the first process then writes."""
    parts = processes.gather_bytes(own)
    rows = np.zeros((len(parts), max(map(len, parts))), np.uint8)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = np.frombuffer(part, np.uint8)
    return {"sizes": np.array([len(part) for part in parts]), "bytes": rows}


def _own_bytes(gathered: dict[str, np.ndarray]) -> bytes:
    index = jax.process_index()
    return np.asarray(gathered["bytes"])[index, : int(gathered["sizes"][index])].tobytes()


def _abstract_host(path: Path) -> dict[str, np.ndarray]:
    stored = _read_metadata(path, "host")
    return {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in stored.items()}


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


def _read_metadata(folder: Path, item: str) -> Any:
    """Tree of array metadata (shape, dtype) of one stored item."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / item)).tree


def _check_shapes(path: Path, stored: Any, wanted: Any) -> None:
    """One error that lists every array that is missing, superfluous or of another shape."""
    old, new = (
        {
            # Orbax stores tuples with names as dicts: their simple paths are the same.
            jax.tree_util.keystr(k, simple=True, separator="."): tuple(leaf.shape)
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
