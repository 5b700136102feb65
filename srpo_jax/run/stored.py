"""What lies in a checkpoint's folder: which steps, their JSON, their arrays, and whether all of it
is what was written.
"""

import contextlib
import json
import zlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from srpo_jax.data.files import AnyPath, absolute
from srpo_jax.run import checksums, processes

FORMAT = 1  # raised when the layout of a step changes
FOLDER = "checkpoints"
META = "meta/metadata"  # where Orbax puts the JSON of a step

Meta = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, or does not fit the run that asks for it."""


class DamageError(CheckpointError):
    """A step does not hold what was saved; the message says what, and in which file."""


def find_params(path: AnyPath) -> epath.Path:
    """The directory that holds ``params``: ``path`` itself, or the newest step of a run there.

    Raises:
        CheckpointError: neither is there.
    """
    path = absolute(path)
    if (path / "params").is_dir():
        return path
    folder = path if path.name == FOLDER else path / FOLDER
    steps = [step for step in steps_in(folder) if (folder / str(step) / "params").is_dir()]
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint here; expected a parameter checkpoint, a step directory, or a "
            f"run's --workdir with a {FOLDER} folder"
        )
    return folder / str(max(steps))


def read_meta(path: AnyPath) -> Meta:
    """The JSON beside the parameters (config and so on) of any of `find_params`'s paths.

    DamageError where it cannot be read, or is not what was written.
    """
    folder = find_params(path)
    file = folder / META
    try:
        meta = json.loads(file.read_text())
        seal = meta.pop("seal", None)
    except (OSError, ValueError, AttributeError) as error:
        raise DamageError(f"{file}: {in_short(error)}") from error
    if "format" not in meta or seal not in (None, sealed(meta)["seal"]):
        raise DamageError(f"{file}: its text is not the one that was written")
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {meta['format']}, this program reads {FORMAT}"
        )
    if folder.name.isdigit() and meta.get("step", int(folder.name)) != int(folder.name):
        raise DamageError(f"{file}: is of step {meta['step']}")
    return meta


def sealed(meta: Meta) -> Meta:
    """The values with a checksum of their text, as they are written."""
    text = json.dumps(meta, sort_keys=True)
    return json.loads(text) | {"seal": zlib.crc32(text.encode())}


def steps_in(folder: epath.Path) -> list[int]:
    """Numbers of the complete steps in a run's folder, in no order; an empty folder is none."""
    if not folder.is_dir():
        return []
    return [
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path) and any(path.iterdir())
    ]


# --- arrays ----------------------------------------------------------------------------------


def read_items(folder: epath.Path, targets: dict[str, Any], problem: str = "") -> dict[str, Any]:
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
            problem = f"{folder / name}: {in_short(error)}"
            break
    found = [text for text in processes.gather(problem) if text]
    if found:
        raise DamageError(found[0])
    return got


def check_sums(
    folder: epath.Path, meta: Meta, items: dict[str, Any], more: dict[str, int] | None = None
) -> None:
    """DamageError unless the arrays are those that were saved (older steps do not tell)."""
    if "checksums" not in meta:
        return
    wrong = checksums.changed(meta["checksums"], checksums.checksums(items) | (more or {}))
    if wrong:
        rest = f" and {len(wrong) - 1} more are" if len(wrong) > 1 else " is"
        raise DamageError(f"{folder}: {wrong[0]}{rest} not what was saved (checksum)")


def read_metadata(folder: epath.Path, item: str) -> Any:
    """Tree of array metadata (shape, dtype) of one stored item."""
    try:
        return ocp.PyTreeCheckpointHandler().metadata(folder / item).tree
    except Exception as error:  # files missing, no JSON, damaged: each has an exception of its own
        raise DamageError(f"{folder / item}: {in_short(error)}") from error


def check_shapes(path: epath.Path, stored: Any, wanted: Any) -> None:
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


def in_short(error: BaseException) -> str:
    """What an error began with, in short: Orbax and TensorStore add pages. Its end says most."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join((str(error) or type(error).__name__).split())
    text = text.partition(" [source locations=")[0].partition(" [tensorstore_spec=")[0]
    return text if len(text) <= 320 else f"{text[:60]}... {text[-250:]}"
