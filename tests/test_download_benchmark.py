"""Benchmarks through the datasets library, from a local folder in place of the hub."""

import io

import pytest
from PIL import Image

from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import Place
from srpo_jax.benchmarks.load import load
from tools import download_benchmark
from tools.download_benchmark import download

datasets = pytest.importorskip("datasets")


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 30), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for MathVision's repository, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [png(shade) for shade in (10, 20, 30)]
    rows = {
        "id": ["1", "2", "3"],
        "question": ["How many?\n<image1>"] * 3,
        "options": [[], ["1", "2"], []],
        "answer": ["4", "B", "7"],
        "image": [f"images/{i}.png" for i in range(3)],
        "decoded_image": [{"bytes": image, "path": None} for image in images],
        "level": [1, 2, 3],
        "subject": ["counting"] * 3,
    }
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("id", "question", "answer", "image")},
            "options": datasets.List(datasets.Value("string")),
            "decoded_image": datasets.Image(),
            "level": datasets.Value("int64"),
            "subject": datasets.Value("string"),
        }
    )
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub/test.parquet")
    return tmp_path / "hub", images


def run(*arguments: str) -> int:
    return download_benchmark.main(download_benchmark.make_parser().parse_args(list(arguments)))


def test_a_download_is_what_load_reads_with_the_published_bytes(hub, tmp_path, capsys):
    repo, images = hub
    out = str(tmp_path / "out")
    assert run("--benchmark", "mathvision", "--repo", str(repo), "--out", out) == 0
    records = load("mathvision", out, counts=())
    assert [record.images[0].data for record in records] == images
    assert [record.answer for record in records] == ["4", "B", "7"]
    assert records[1].choices == ("1", "2")
    assert "3 problems in 1 files" in capsys.readouterr().out


def test_what_is_there_is_kept_and_a_failed_download_leaves_nothing(hub, tmp_path):
    repo, _ = hub
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine exists"):
        download(Place(str(repo), "test"), tmp_path / "mine")
    with pytest.raises(Exception, match="nosuchsplit"):
        download(Place(str(repo), "nosuchsplit"), tmp_path / "new")
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]
    with pytest.raises(ValueError, match="--split=train: mathvision has test, testmini"):
        run("--benchmark", "mathvision", "--split", "train", "--out", str(tmp_path / "new"))


def test_every_benchmark_has_a_place():
    assert all(benchmark.places for benchmark in BENCHMARKS.values())
