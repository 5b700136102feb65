"""Where a run's numbers and samples go besides its folder: TensorBoard, W&B, MLflow."""

import contextlib
import dataclasses
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from PIL.Image import Image

from srpo_jax.data.files import on_bucket, write_text
from srpo_jax.data.images import ImageRef, load_image, to_rgb
from srpo_jax.run.processes import say
from srpo_jax.run.resume import flat_config
from srpo_jax.run.sections import LogSettings
from srpo_jax.run.stored import in_short
from srpo_jax.structs import RunError

EXAMPLES = 4  # of a step or an evaluation
THUMBNAIL = 256  # pixels of the longer side
_PARAMS = 100  # that MLflow takes at a time
_PARAM_LETTERS = 500  # of one of them, in every version of its server
_METRICS = 1000  # that MLflow takes at a time


@dataclasses.dataclass(frozen=True)
class Example:
    """What a model was asked and said."""

    question: str
    gold: Any
    response: str
    image: ImageRef | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.question}\n\ngold: {self.gold}\n\n{self.response}"

    def picture(self) -> Image | None:
        """The image, small; None where there is none or it cannot be read, which ends no run."""
        with contextlib.suppress(OSError, ValueError):
            if self.image is not None:
                small = to_rgb(load_image(self.image))
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                return small
        return None


class Tracker(Protocol):
    """A place for numbers and samples; on the first process."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step, by ``split/name``."""
        ...

    def samples(self, step: int, name: str, examples: Sequence[Example]) -> None:
        """A few samples, as text and images."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_trackers(log: LogSettings, folder: epath.Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that the configuration asks for; none on other processes than the first.

    RunError where one is not installed, or cannot be reached.
    """
    if jax.process_index():
        return []
    found: list[Tracker] = [TensorBoard(folder)] if log.tensorboard else []
    if log.wandb_project:
        found.append(Wandb(log.wandb_project, folder, config))
    if log.mlflow_experiment:
        found.append(Mlflow(log.mlflow_experiment, folder, config))
    return found


class TensorBoard:
    """``tensorboard/`` of the run's folder."""

    def __init__(self, folder: epath.Path):
        from tensorboardX import SummaryWriter  # noqa: PLC0415  (a second to import)

        self._board = SummaryWriter(str(folder / "tensorboard"), flush_secs=30)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def samples(self, step: int, name: str, examples: Sequence[Example]) -> None:
        for number, one in enumerate(examples):
            # Markdown: four spaces, so that the model's text stays text.
            quoted = "\n".join(f"    {line}" for line in one.text.splitlines())
            self._board.add_text(f"{name}/{number}", quoted, step)
            if picture := one.picture():
                pixels = np.asarray(picture)
                self._board.add_image(f"{name}/{number}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class Wandb:
    """The W&B run of this folder: its id is kept there, so that a resumed run goes on with it."""

    def __init__(self, project: str, folder: epath.Path, config: Mapping[str, Any]):
        with _installed("wandb", f"log.wandb_project={project}"):
            # Optional, only where asked for, so the type checker does not find it.
            import wandb  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        self._wandb, kept = wandb, folder / "wandb_id"
        known = kept.read_text().strip() if kept.exists() else os.environ.get("WANDB_RUN_ID")
        name = known or uuid.uuid4().hex[:12]
        local = None if on_bucket(folder) else str(folder)
        self._run = wandb.init(
            project=project, dir=local, config=dict(config), id=name, resume="allow"
        )
        write_text(kept, f"{name}\n")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, name: str, examples: Sequence[Example]) -> None:
        rows = []
        for one in examples:
            picture = one.picture()
            image = self._wandb.Image(picture) if picture else None
            rows.append([step, one.question, str(one.gold), one.response, image])
        columns = ["step", "question", "gold", "response", "image"]
        self._run.log({f"samples/{name}": self._wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """The MLflow run of this folder: its id is kept there, so that a resumed run goes on with it.

    A server that is away later on costs its rows, and a word, but not the run.
    """

    def __init__(self, experiment: str, folder: epath.Path, config: Mapping[str, Any]):
        key = f"log.mlflow_experiment={experiment}"
        with _installed("mlflow-skinny", key):
            import mlflow  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
            from mlflow import entities  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        self._entities, self._told = entities, False
        kept = folder / "mlflow_run_id"
        try:
            self._client = mlflow.MlflowClient()
            if kept.exists():
                self._id = kept.read_text().strip()
                self._client.update_run(self._id, status="RUNNING")
            else:
                found = self._client.get_experiment_by_name(experiment)
                place = found.experiment_id if found else self._client.create_experiment(experiment)
                run = self._client.create_run(place, run_name=folder.name)
                self._id = run.info.run_id
                write_text(kept, f"{self._id}\n")
            self._keep_config(config)
        except Exception as error:  # MLflow's own, requests', the store's
            where, anew = mlflow.get_tracking_uri(), ""
            if kept.exists():
                anew = f", or remove {kept} to begin a new MLflow run"
            raise RunError(
                f"{key}: MLflow at {where} says: {in_short(error)}; set MLFLOW_TRACKING_URI to a "
                f"server's address{anew}"
            ) from error

    def _keep_config(self, config: Mapping[str, Any]) -> None:
        """Keys of the configuration as params; one that is there cannot be changed, and stays."""
        known = self._client.get_run(self._id).data.params
        flat = {_name(key): str(value) for key, value in flat_config(dict(config)).items()}
        params = [
            self._entities.Param(key, value[:_PARAM_LETTERS])
            for key, value in flat.items()
            if key not in known
        ]
        for part in _parts(params, _PARAMS):
            self._client.log_batch(self._id, params=part)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        rows = [self._entities.Metric(_name(k), float(x), now, step) for k, x in values.items()]
        for part in _parts(rows, _METRICS):
            self._try(self._client.log_batch, self._id, metrics=part)

    def samples(self, step: int, name: str, examples: Sequence[Example]) -> None:
        for number, one in enumerate(examples):
            file = f"samples/{name}/{step:06d}-{number}"
            self._try(self._client.log_text, self._id, one.text, f"{file}.txt")
            if picture := one.picture():
                self._try(self._client.log_image, self._id, picture, f"{file}.png")

    def close(self) -> None:
        self._try(self._client.set_terminated, self._id)

    def _try(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:  # as above
            if not self._told:
                say(f"MLflow: {in_short(error)}; what it misses stands in metrics.jsonl", "mlflow")
            self._told = True


@contextlib.contextmanager
def _installed(package: str, key: str) -> Iterator[None]:
    """RunError with the command that installs a package that is not there."""
    try:
        yield
    except ImportError as error:
        raise RunError(f"{key} needs {package.partition('-')[0]}: pip install {package}") from error


def _name(name: str) -> str:
    """A name that MLflow takes: acc@1 is acc_at_1."""
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))
