"""What goes to TensorBoard, W&B and MLflow: numbers, samples, the configuration, also resumed."""

import contextlib
import sys
import types
from pathlib import Path

import pytest
from etils import epath
from PIL import Image
from tensorboardX import SummaryWriter

from srpo_jax.data.images import ImageRef
from srpo_jax.run import trackers
from srpo_jax.run.metrics import MetricWriter
from srpo_jax.run.sections import LogSettings
from srpo_jax.run.trackers import Example, Mlflow, Wandb
from srpo_jax.structs import RunError


@pytest.fixture
def examples(tmp_path):
    """With an image, with one that is gone, without one."""
    Image.new("RGB", (600, 300)).save(tmp_path / "a.png")
    there, gone = (ImageRef("d:1", name, str(tmp_path)) for name in ("a.png", "gone.png"))
    return [Example("# How many?", "7", "six", image) for image in (there, gone, None)]


def opened(folder, **asked):
    """The trackers that a configuration asks for."""
    plain = {"tensorboard": False, "wandb_project": "", "mlflow_experiment": ""} | asked
    log = LogSettings(console="auto", every=1, keep=10, **plain)
    return trackers.open_trackers(log, epath.Path(folder), {"optim": {"lr": 1.0}})


def test_tensorboard_gets_numbers_and_examples_as_text_and_small_images(
    tmp_path, examples, monkeypatch
):
    found = []
    add = lambda kind: lambda _, name, value, step, **__: found.append((kind, name, value, step))  # noqa: E731
    monkeypatch.setattr(SummaryWriter, "add_text", add("text"))
    monkeypatch.setattr(SummaryWriter, "add_image", add("image"))
    (board,) = opened(tmp_path / "run", tensorboard=True)
    with contextlib.closing(MetricWriter(tmp_path / "run", total_steps=1, trackers=[board])) as out:
        out.write(1, {"loss": 0.5, "mfu": None}, split="train")
        out.show(3, "rollouts", examples)
    texts = [value for kind, _, value, _ in found if kind == "text"]
    assert texts == ["    # How many?\n    \n    gold: 7\n    \n    six"] * 3
    ((_, name, pixels, step),) = (one for one in found if one[0] == "image")
    assert (name, step, pixels.shape) == ("rollouts/0", 3, (128, 256, 3))
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"mfu" not in events.read_bytes()


@pytest.mark.parametrize(
    ("key", "package"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow-skinny")]
)
def test_a_tracker_is_imported_only_when_asked_for(tmp_path, monkeypatch, key, package):
    monkeypatch.setitem(sys.modules, package.partition("-")[0], None)
    assert opened(tmp_path) == []
    with pytest.raises(RunError, match=f"log.{key}=p needs .*: pip install {package}"):
        opened(tmp_path, **{key: "p"})


@pytest.fixture
def wandb(monkeypatch):
    """A W&B that keeps what it is told."""
    told = types.SimpleNamespace(begun=[], logged=[])
    run = types.SimpleNamespace(
        finish=lambda: None, log=lambda row, step: told.logged.append((step, row))
    )
    fake = types.SimpleNamespace(
        init=lambda **kw: told.begun.append(kw) or run,
        Image=lambda picture: picture.size,
        Table=lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data],
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return told


def test_a_resumed_run_goes_on_with_its_wandb_run(tmp_path, wandb, monkeypatch):
    for folder in ("a", "a", "b"):
        Wandb("p", epath.Path(tmp_path / folder), {}).close()
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    Wandb("p", epath.Path(tmp_path / "c"), {}).close()
    names = [one["id"] for one in wandb.begun]
    assert names[0] == names[1] != names[2] and names[3] == "chosen"
    assert {one["resume"] for one in wandb.begun} == {"allow"}


def test_wandb_gets_numbers_and_a_table_of_examples(tmp_path, wandb, examples):
    run = Wandb("p", epath.Path(tmp_path), {})
    run.numbers(2, {"train/loss": 0.5})
    run.samples(2, "eval", examples)
    (_, numbers), (step, table) = wandb.logged
    assert numbers == {"train/loss": 0.5} and step == 2
    rows = table["samples/eval"]
    assert [row["image"] for row in rows] == [(256, 128), None, None]
    assert rows[0] | {"image": 0} == {
        "step": 2, "question": "# How many?", "gold": "7", "response": "six", "image": 0
    }  # fmt: skip


class MlflowServer:
    """As much of an MLflow server as a run asks of its client."""

    def __init__(self):
        self.experiments, self.params, self.metrics, self.files = {}, {}, [], []
        self.status, self.down = {}, False

    def get_experiment_by_name(self, name):
        known = self.experiments.get(name)
        return known and types.SimpleNamespace(experiment_id=known)

    def create_experiment(self, name):
        return self.experiments.setdefault(name, f"e{len(self.experiments)}")

    def create_run(self, place, run_name):
        self.status[name := f"{place}-{run_name}"] = "RUNNING"
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))

    def update_run(self, name, status):
        self.status[name] = status

    def get_run(self, name):
        assert name in self.status
        return types.SimpleNamespace(data=types.SimpleNamespace(params=self.params))

    def log_batch(self, name, metrics=(), params=()):
        if self.down:
            raise ConnectionError("no route\nto host")
        assert len(params) <= 100 and not {key for key, _ in params} & self.params.keys()
        self.metrics += metrics
        self.params |= dict(params)

    def log_text(self, name, text, file):
        self.files.append((file, text))

    def log_image(self, name, picture, file):
        self.files.append((file, picture.size))

    def set_terminated(self, name):
        self.status[name] = "FINISHED"


@pytest.fixture
def server(monkeypatch):
    one = MlflowServer()
    pair = lambda *values: values  # noqa: E731
    entities = types.SimpleNamespace(Param=pair, Metric=pair)
    fake = types.ModuleType("mlflow")
    vars(fake).update(MlflowClient=lambda: one, entities=entities, get_tracking_uri=lambda: "here")
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return one


def test_mlflow_gets_numbers_samples_and_the_configuration(tmp_path, server, examples):
    config = {"optim": {"lr": 1e-6}, "many": {f"k{n}": n for n in range(150)}, "long": "x" * 900}
    run = Mlflow("p", epath.Path(tmp_path / "rl"), config)
    run.numbers(3, {"eval/acc@1": 0.5})
    run.samples(3, "rollouts", examples[:2])
    run.close()
    ((name, value, _, step),) = server.metrics
    assert (name, value, step) == ("eval/acc_at_1", 0.5, 3)
    assert server.params["optim.lr"] == "1e-06" and len(server.params) == 152
    assert len(server.params["long"]) == 500
    text = "# How many?\n\ngold: 7\n\nsix"
    assert server.files == [
        ("samples/rollouts/000003-0.txt", text), ("samples/rollouts/000003-0.png", (256, 128)),
        ("samples/rollouts/000003-1.txt", text),
    ]  # fmt: skip
    assert server.status == {"e0-rl": "FINISHED"}


def test_a_resumed_run_goes_on_with_its_mlflow_run(tmp_path, server):
    Mlflow("p", epath.Path(tmp_path), {"steps": 5}).close()
    again = Mlflow("p", epath.Path(tmp_path), {"steps": 9, "new": 1})
    assert [*server.status.values()] == ["RUNNING"]
    assert server.params == {"steps": "5", "new": "1"}  # what is there cannot be changed
    again.close()
    assert Path(tmp_path / "mlflow_run_id").read_text().strip() in server.status


def test_an_mlflow_server_that_goes_away_ends_no_run(tmp_path, server, capsys):
    run = Mlflow("p", epath.Path(tmp_path), {})
    server.down = True
    for step in (1, 2):
        run.numbers(step, {"train/loss": 0.5})
    told = "MLflow: no route to host; what it misses stands in metrics.jsonl\n"
    assert capsys.readouterr().out == told
    with pytest.raises(RunError, match="MLflow at here says: no route to host; set MLFLOW_TRACK"):
        Mlflow("p", epath.Path(tmp_path), {"steps": 1})


@pytest.mark.slow
def test_a_store_of_mlflow_itself_holds_the_run(tmp_path, monkeypatch, examples):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    for step in (1, 2):
        run = Mlflow("p", epath.Path(tmp_path), {"steps": 9})
        run.numbers(step, {"eval/acc@1": 0.5 * step})
        run.samples(step, "eval", examples)
        run.close()
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert found.data.params == {"steps": "9"} and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "eval/acc_at_1")
    assert [(one.step, one.value) for one in history] == [(1, 0.5), (2, 1.0)]
    names = [file.path for file in client.list_artifacts(found.info.run_id, "samples/eval")]
    assert len(names) == 8 and "samples/eval/000002-0.png" in names
