"""Data, model directories and exports on a bucket: what is read, and how much of it."""

import filecmp
import json
import pickle
import shutil

import bucket_helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_hf import write_tiny

from srpo_jax.benchmarks import load as benchmarks
from srpo_jax.data import buckets, hf_folder
from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import absolute
from srpo_jax.data.images import ImageRef, load_image
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import open_records
from srpo_jax.model import hf, hf_write, sharding
from srpo_jax.model.config import load_config
from srpo_jax.model.hf_table import HFError
from srpo_jax.model.qwen2_5_vl import abstract_params
from tests.data_helpers import make_hf_dir, noise_image, png, write_dots, write_jsonl
from tools import convert_hf


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """``gs://bucket``; its objects are the files of tmp_path/bucket."""
    return bucket_helpers.mount(monkeypatch, tmp_path)


@pytest.fixture
def requests(monkeypatch):
    """(path, bytes) of each range that is read."""
    found, read = [], buckets.Ranges.at

    def at(self, start, length):
        data = read(self, start, length)
        found.append((self.path, len(data)))
        return data

    monkeypatch.setattr(buckets.Ranges, "at", at)
    return found


# --- records ---------------------------------------------------------------------------------


def test_records_and_their_images_are_read_from_a_bucket(bucket, tmp_path, requests):
    local = write_dots(tmp_path / "bucket" / "data", 6)
    here, there = open_records(local), open_records(f"{bucket}/data/data.jsonl")
    assert len(there) == 6 and there.fingerprint == here.fingerprint
    requests.clear()
    record = pickle.loads(pickle.dumps(there._readers[0])).read(4)
    line = local.read_bytes().splitlines(keepends=True)[4]
    assert record[0]["id"] == "r4" and requests == [(f"{bucket}/data/data.jsonl", len(line))]
    for mine, theirs in zip(here, there, strict=False):
        assert mine.question == theirs.question
        assert load_image(mine.images[0]).tobytes() == load_image(theirs.images[0]).tobytes()
    shutil.copy(local, tmp_path / "bucket" / "data" / "more.jsonl")
    assert len(open_records(f"{bucket}/data/*.jsonl")) == 12
    assert len(open_records(f"{bucket}/data/data.jsonl,{local}", f"{bucket}/data")) == 12


def test_of_a_large_parquet_file_only_the_wanted_row_groups_are_read(bucket, tmp_path, requests):
    noise = np.random.default_rng(0)
    rows = [
        {"problem": f"p{i}", "answer": str(i), "extra": noise.bytes(100_000)} for i in range(32)
    ]
    file = tmp_path / "bucket" / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    records = open_records(f"{bucket}/rows.parquet")
    assert records.fingerprint == open_records(file).fingerprint
    requests.clear()
    assert records[17].question == "p17" and records[18].answer == "18"
    assert 400_000 < sum(size for _, size in requests) < 450_000


def test_image_paths_stay_inside_of_the_data_root(bucket, tmp_path, monkeypatch):
    for name in ("data/in.png", "data/sub/x.png", "secret.png", "database/x.png"):
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(noise_image(56, 56)))
    root = f"{bucket}/data"
    for name in ("in.png", "sub/../in.png", f"{root}/in.png", "sub//x.png"):
        assert load_image(ImageRef("f:1", name, root)).size == (56, 56)
    for name in ("../secret.png", "sub/../../secret.png", f"{bucket}/secret.png", "/etc/passwd",
                 "../database/x.png", "gs://other/data/in.png"):  # fmt: skip
        with pytest.raises(RecordError, match="leads out of the data root gs://bucket/data"):
            load_image(ImageRef("f:1", name, root))
    with pytest.raises(RecordError, match="leads out of the data root"):
        load_image(ImageRef("f:1", f"{root}/in.png", str(tmp_path)))
    with pytest.raises(RecordError, match="'none.png' cannot be read .*is it in gs://bucket/data"):
        load_image(ImageRef("f:1", "none.png", root))
    monkeypatch.setattr("srpo_jax.data.images.MAX_IMAGE_BYTES", 100)
    with pytest.raises(RecordError, match="'in.png' has .* bytes; shrink it"):
        load_image(ImageRef("f:1", "in.png", root))


def test_a_bucket_that_does_not_answer_is_no_fault_of_a_record(bucket, tmp_path, monkeypatch):
    write_dots(tmp_path / "bucket" / "data", 2)
    file = tmp_path / "bucket" / "rows.parquet"
    pq.write_table(pa.table({"problem": ["p"], "answer": ["1"]}), file)
    jsonl, parquet = (
        open_records(f"{bucket}/data/data.jsonl"),
        open_records(f"{bucket}/rows.parquet"),
    )
    image = jsonl[0].images[0]

    class HttpError(Exception):
        """As of gcsfs: no OSError."""

    def fail(*_, **__):
        raise HttpError("503\nService Unavailable")

    objects = type(jsonl._readers[0]._read.__self__._objects)
    monkeypatch.setattr(objects, "cat_file", fail)
    for read in (lambda: jsonl[1], lambda: parquet[0], lambda: load_image(image)):
        with pytest.raises(
            buckets.BucketError, match="gs://.*HttpError: 503 Service.*same command"
        ):
            read()


def test_a_bucket_that_cannot_be_reached_is_told_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(buckets, "LIBRARIES", ("no_such_library",))
    readers = (open_records, load_config, Processor, absolute, lambda path: hf.open_hf(path, None))
    for read in readers:
        with pytest.raises(RuntimeError, match="^gs://b/x: .*pip install gcsfs$"):
            read("gs://b/x")
    with pytest.raises(RuntimeError, match="s3://b/x: of buckets only gs:// is supported; mount"):
        open_records("s3://b/x")


def test_array_records_on_a_bucket_are_refused(bucket, tmp_path):
    (tmp_path / "bucket" / "x.array_record").write_bytes(b"x")
    for path in (f"{bucket}/x.array_record", f"tfds:dots:1.0.0@{bucket}/tfds"):
        with pytest.raises(ValueError, match="read from disks only: copy it .gcloud storage cp"):
            open_records(path)


def test_a_benchmark_is_read_from_a_bucket(bucket, tmp_path):
    folder = tmp_path / "bucket" / "bench"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.png").write_bytes(png(noise_image(56, 56)))
    row = {"id": "1", "question": "<image1> how many?", "options": [], "answer": "3", "level": 1,
           "image": "images/1.png", "subject": "counting", "solution": None}  # fmt: skip
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "test.jsonl", [row])
    problems = benchmarks.load("mathvision", f"{bucket}/bench/data/test.jsonl", counts=())
    assert load_image(problems[0].images[0]).size == (56, 56)


# --- model directories -----------------------------------------------------------------------


def test_weights_come_from_a_bucket_as_from_a_disk(bucket, tmp_path, requests):
    local, path = tmp_path / "bucket" / "hf", f"{bucket}/hf"
    cfg = write_tiny(local, "bfloat16", max_shard_bytes=50_000)
    assert load_config(path) == load_config(local)
    for shape in ((1, 8, 1), (1, 4, 2), (2, 2, 2)):
        mesh = sharding.make_mesh(*shape)
        specs = sharding.param_specs(abstract_params(cfg), mesh)
        here = hf.load_params(local, cfg, shardings=specs)
        requests.clear()
        there = hf.load_params(path, cfg, shardings=specs)
        for name, wanted in here.items():
            assert np.array_equal(np.asarray(wanted), np.asarray(there[name])), name
        # However many devices share a tensor: its bytes are fetched once (and the headers).
        total = sum(p.nbytes for p in here.values())
        assert total <= sum(n for _, n in requests) < total + 2 * 20_000
    leaf = hf.open_hf(path, cfg)["text/embed/embedding"]
    requests.clear()
    rows = leaf[(slice(8, 16), slice(0, leaf.shape[1]))]
    assert [size for _, size in requests] == [rows.nbytes]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:-10], "does not lie inside of the file"),
        (lambda data: data[:4], "a header of"),
        (lambda data: b"\xff" * 8 + data[8:], "a header of"),
        (lambda data: data[:8] + b"x" + data[9:], "is not readable as safetensors"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_damaged_file_on_a_bucket_is_named(bucket, tmp_path, spoil, reason):
    cfg = write_tiny(tmp_path / "bucket" / "hf")
    file = tmp_path / "bucket" / "hf" / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(HFError, match=f"gs://bucket/hf/model.safetensors.*{reason}"):
        hf.open_hf(f"{bucket}/hf", cfg)


def test_tokenizer_and_processor_come_from_a_bucket_without_the_weights(bucket, tmp_path, requests):
    local = make_hf_dir(tmp_path / "bucket" / "hf")
    (local / "model.safetensors").write_bytes(bytes(1_000_000))
    here, there = Processor(local), Processor(f"{bucket}/hf")
    assert here.tokenizer.get_vocab() == there.tokenizer.get_vocab()
    assert here.chat_template == there.chat_template and here.eos_ids == there.eos_ids
    assert not any(path.endswith(".safetensors") for path, _ in requests)
    assert not list(hf_folder.small_files(buckets.located(f"{bucket}/hf")).glob("*.safetensors"))
    with pytest.raises(FileNotFoundError, match="'gs://bucket/none': no such directory; give a"):
        Processor(f"{bucket}/none")
    (local / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="gs://bucket/hf: no tokenizer.json or vocab.json"):
        Processor(f"{bucket}/hf")


# --- exports ---------------------------------------------------------------------------------


def test_there_and_back_over_a_bucket_is_the_identity(bucket, tmp_path):
    local = tmp_path / "bucket" / "hf"
    write_tiny(local, "bfloat16", max_shard_bytes=50_000)
    convert_hf.import_hf(f"{bucket}/hf", f"{bucket}/ckpt", progress=lambda *_: None)
    convert_hf.export_hf(f"{bucket}/ckpt", f"{bucket}/back", f"{bucket}/hf", max_shard_bytes=50_000)
    names = sorted(path.name for path in local.iterdir())
    assert len(names) > 5
    assert sorted(path.name for path in (tmp_path / "bucket" / "back").iterdir()) == names
    assert filecmp.cmpfiles(local, tmp_path / "bucket" / "back", names, False)[0] == names
    with pytest.raises(HFError, match="gs://bucket/back: exists and is not an empty directory"):
        convert_hf.export_hf(f"{bucket}/ckpt", f"{bucket}/back", f"{bucket}/hf")


def test_an_export_to_a_bucket_takes_the_room_of_one_file_and_ends_with_config_json(
    bucket, tmp_path, monkeypatch
):
    cfg = write_tiny(tmp_path / "hf")
    params, sent = hf.open_hf(tmp_path / "hf", cfg), []
    send = hf.send

    def watched(file, path):
        on_disk = [p.name for p in file.parent.iterdir() if p.suffix == ".safetensors"]
        assert len(on_disk) <= 1
        sent.append(file.name)
        send(file, path)

    monkeypatch.setattr(hf, "send", watched)
    hf.save_hf(params, cfg, f"{bucket}/out", tmp_path / "hf", max_shard_bytes=50_000)
    assert len([name for name in sent if name.endswith(".safetensors")]) > 3
    assert sent[-1] == "config.json" and hf_write.INDEX_FILE in sent
    assert not (tmp_path / "bucket" / "out" / hf.BEGUN).exists()


def test_an_export_that_fails_leaves_nothing_and_one_that_was_killed_is_replaced(
    bucket, tmp_path, monkeypatch
):
    cfg, out = write_tiny(tmp_path / "hf"), tmp_path / "bucket" / "out"
    params = hf.open_hf(tmp_path / "hf", cfg)
    with monkeypatch.context() as broken:
        broken.setattr(hf_write, "copy_reference", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hf.save_hf(params, cfg, f"{bucket}/out", tmp_path / "hf", max_shard_bytes=50_000)
    assert not out.exists()
    out.mkdir()
    for name in (hf.BEGUN, "model-00001-of-00999.safetensors"):
        (out / name).write_text("of a killed export")
    hf.save_hf(params, cfg, f"{bucket}/out", tmp_path / "hf")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "hf").iterdir()
    )
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2_5_vl"
