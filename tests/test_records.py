"""Reading records: every format, every kind of image, every kind of bad row."""

import base64
import json
import os
import pickle
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import noise_image, png, write_dots, write_jsonl
from PIL import Image

from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import ColumnError, Columns, to_record
from srpo_jax.data.images import load_image
from srpo_jax.data.records import open_records, write_array_record

GOOD = {"problem": "q", "answer": "1"}


def _one(tmp_path, **fields):
    """The only record of a file that holds GOOD with these fields changed."""
    row = {k: v for k, v in {**GOOD, **fields}.items() if v is not ...}
    return open_records(write_jsonl(tmp_path / "one.jsonl", [row]))[0]


# --- fields ---


def test_both_spellings_give_the_same_record(tmp_path):
    noise_image(56, 56).save(tmp_path / "a.png")
    first = _one(tmp_path, images=["a.png"], id=7, choices=["x", 2], source="geo")
    second = _one(
        tmp_path, problem=..., question="q", image="a.png", id="7", choices=["x", "2"], source="geo"
    )
    assert first == second
    assert (first.id, first.question, first.answer, first.choices) == ("7", "q", "1", ("x", "2"))
    assert first.origin == f"{tmp_path}/one.jsonl:1" and first.source == "geo"
    assert load_image(first.images[0]).size == (56, 56)


def test_numbers_become_text_and_other_fields_are_kept(tmp_path):
    record = _one(tmp_path, answer=57, first_think="t", first_correct=False, level={"a": [1]})
    assert record.answer == "57" and record.id == "one.jsonl:1"
    assert record.extra == {"first_think": "t", "first_correct": False, "level": {"a": [1]}}
    assert _one(tmp_path, answer=-2.5).answer == "-2.5"
    assert _one(tmp_path, answer=["7"]).answer == "7"
    assert _one(tmp_path, answer="  x  ").answer == "x"
    assert _one(tmp_path, images=None, choices=None).images == ()


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"answer": ""}, "empty answer"),
        ({"answer": "  \n"}, "empty answer"),
        ({"answer": None}, "empty answer"),
        ({"answer": ...}, "no answer among ['problem']"),
        ({"answer": float("nan")}, "empty answer"),
        ({"answer": {"a": 1}}, "answer must be text, not dict"),
        ({"answer": True}, "answer must be text, not bool"),
        ({"problem": ...}, "no problem or question among ['answer']"),
        ({"problem": " "}, "empty question"),
        ({"images": [5]}, "an image is neither a path nor bytes"),
        ({"images": [{"bytes": "%%"}]}, "image bytes are not base64"),
        ({"choices": [["a"]]}, "a choice must be text, not list"),
    ],
)
def test_bad_fields_are_named_with_file_and_row(tmp_path, fields, reason):
    with pytest.raises(RecordError) as error:
        _one(tmp_path, **fields)
    assert error.value.reason == reason and error.value.origin == f"{tmp_path}/one.jsonl:1"
    assert str(error.value).count("\n") == 0


def test_answers_may_be_missing_where_nothing_is_graded(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "q"}])
    assert open_records(path, require_answer=False)[0].answer == ""


def test_record_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(RecordError("f:3", "bad", "mend it")))
    assert (error.origin, error.reason, str(error)) == ("f:3", "bad", "f:3: bad; mend it")


# --- JSONL ---


def test_jsonl_counts_real_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [b"\xef\xbb\xbf", b'{"problem":"a","answer":1}\r\n\n  \n{"problem":"\xe4\xb8\xad",']
    lines += [b'"answer":2}\n\r\n{"problem":"c","answer":3}']
    path.write_bytes(b"".join(lines))
    source = open_records(path)
    assert [r.question for r in source] == ["a", "中", "c"]
    assert [r.origin.rsplit(":", 1)[1] for r in source] == ["1", "4", "6"]
    assert source[2].answer == "3"
    with pytest.raises(IndexError):
        source[3]


@pytest.mark.parametrize(
    "line", ["{", '"text"', "[1]", '{"problem": "a", "answer": }', "\x00\x01\x02", "[" * 100_000]
)
def test_broken_json_lines_spoil_only_themselves(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n")
    source = open_records(path)
    assert source[0].answer == source[2].answer == "1"
    with pytest.raises(RecordError, match=r"d.jsonl:2: "):
        source[1]


def test_invalid_utf8_is_a_record_error(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"problem": "\xff", "answer": 1}\n')
    with pytest.raises(RecordError, match="not valid JSON"):
        open_records(tmp_path / "d.jsonl")[0]


# --- files ---


def test_unknown_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl: no such file"):
        open_records(tmp_path / "nothing.jsonl")
    (tmp_path / "d.csv").write_text("a")
    with pytest.raises(ValueError, match="d.csv: records are read from files .jsonl, .parquet"):
        open_records(tmp_path / "d.csv")
    (tmp_path / "d.parquet").write_text("a")
    with pytest.raises(ValueError, match="d.parquet: not a parquet file"):
        open_records(tmp_path / "d.parquet")
    (tmp_path / "d.array_record").write_text("a")
    with pytest.raises(ValueError, match="d.array_record: not an ArrayRecord file"):
        open_records(tmp_path / "d.array_record")
    with pytest.raises(FileNotFoundError, match="data_root"):
        open_records(write_jsonl(tmp_path / "d.jsonl", [GOOD]), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no TFDS data set here"):
        open_records(f"tfds:none:1.0.0@{tmp_path}")


def test_a_pattern_opens_several_files_each_with_its_own_root(tmp_path):
    for part in ("b", "a"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (30, 30) if part == "a" else (40, 40)).save(tmp_path / part / "i.png")
        write_jsonl(tmp_path / part / "d.jsonl", [{**GOOD, "id": part, "image": "i.png"}] * 2)
    source = open_records(tmp_path / "*" / "d.jsonl")
    assert [r.id for r in source] == ["a", "a", "b", "b"]
    assert load_image(source[1].images[0]).size == (30, 30)
    assert load_image(source[2].images[0]).size == (40, 40)
    assert source[3].origin == f"{tmp_path}/b/d.jsonl:2"
    with pytest.raises(ValueError, match="nothing is named between two commas; remove one"):
        open_records(f"{tmp_path}/b/d.jsonl,")


def test_fingerprint_follows_the_data(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD] * 3)
    before = open_records(path).fingerprint
    assert before == open_records(path).fingerprint
    write_jsonl(path, [GOOD] * 4)
    assert open_records(path).fingerprint != before


def test_parquet_rows_with_every_form_of_image(tmp_path):
    data = png(noise_image(56, 28))
    noise_image(28, 56).save(tmp_path / "p.png")
    images = [
        [{"bytes": data, "path": None}, {"bytes": data, "path": "named.png"}],
        [{"bytes": None, "path": "p.png"}],
        [],
        None,
    ]
    table = pa.table(
        {"problem": list("abcd"), "answer": [1, 2, 3, 4], "images": images, "choices": [["x"]] * 4}
    )
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    pq.write_table(pa.table({**{k: [v] for k, v in GOOD.items()}, "image": [data]}),
                   tmp_path / "e.parquet")  # fmt: skip
    source = open_records(tmp_path / "d.parquet")
    assert [len(source[i].images) for i in (3, 0, 2, 1)] == [0, 2, 0, 1]
    assert [load_image(ref).size for ref in source[0].images] == [(56, 28)] * 2
    assert load_image(source[1].images[0]).size == (28, 56)
    assert source[3].origin.endswith("d.parquet:4") and source[3].answer == "4"
    assert load_image(open_records(tmp_path / "e.parquet")[0].images[0]).size == (56, 28)
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_single_precision_numbers_are_read_as_their_shortest_decimals(tmp_path):
    single = pa.array([0.1, 1e-7], pa.float32())
    choices = pa.array([[0.1, 2.5]] * 2, pa.list_(pa.float32()))
    columns = {"problem": ["a", "b"], "answer": single, "choices": choices, "tolerance": single}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    first, second = open_records(tmp_path / "d.parquet")[0], open_records(tmp_path / "d.parquet")[1]
    assert (first.answer, first.choices, first.extra) == ("0.1", ("0.1", "2.5"), {"tolerance": 0.1})
    assert second.answer == "1e-07"


def test_parquet_reads_from_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("srpo_jax.data.readers._ROW_GROUP_CACHE_BYTES", 0)
    table = pa.table({"problem": [f"q{i}" for i in range(60)], "answer": list(range(60))})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    source, wrong = open_records(tmp_path / "d.parquet"), []

    def read(step):
        for k in range(120):
            i = k * step % 60
            if source[i].question != f"q{i}":
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(s,)) for s in (1, 7, 11, 13)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_array_record_round_trip(tmp_path):
    data = png(noise_image(40, 30))
    rows = [
        {**GOOD, "id": str(i), "images": [{"bytes": data, "path": "x"}, data], "first_think": "中"}
        for i in range(5)
    ]
    assert write_array_record(tmp_path / "d.array_record", rows) == 5
    assert os.listdir(tmp_path) == ["d.array_record"]
    source = open_records(tmp_path / "d.array_record")
    assert [source[i].id for i in (4, 0)] == ["4", "0"]
    assert source[2].extra == {"first_think": "中"} and source[2].origin.endswith(":3")
    assert [load_image(ref).size for ref in source[1].images] == [(40, 30)] * 2
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_array_record_with_foreign_bytes_is_a_record_error(tmp_path):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "d.array_record"), "group_size:1")
    for data in (json.dumps(GOOD).encode(), b"\xff\xff\xffnonsense", pickle.dumps(GOOD)):
        writer.write(data)
    writer.close()
    source = open_records(tmp_path / "d.array_record")
    assert source[0].answer == "1"
    for bad in (1, 2):
        with pytest.raises(RecordError, match=f"d.array_record:{bad + 1}: "):
            source[bad]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS data set of five records, built without TensorFlow."""
    import tensorflow_datasets as tfds

    class Dots(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text, image = tfds.features.Text(), tfds.features.Image(encoding_format="png")
            features = {
                "id": text,
                "problem": text,
                "answer": text,
                "images": tfds.features.Sequence(image),
                "choices": tfds.features.Sequence(text),
                "level": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples(2)}

        def _generate_examples(self, count=5):
            for i in range(count):
                yield (
                    i,
                    {
                        "id": f"t{i}",
                        "problem": f"what {i}?",
                        "answer": str(i),
                        "images": [noise_image(30 + i, 20, seed=i)] * (i % 3),
                        "choices": ["only"] if i == 1 else [],
                        "level": i,
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    for file_format in ("array_record", "parquet"):
        data_dir = str(folder / file_format)
        Dots(data_dir=data_dir, file_format=file_format).download_and_prepare()
    return folder


def test_tfds_records_come_with_images_undecoded(tfds_dir):
    source = open_records(f"tfds:dots:1.0.0@{tfds_dir}/array_record")
    records = {r.id: r for r in source}  # TFDS shuffles by a hash
    assert sorted(records) == [f"t{i}" for i in range(5)]
    for i in range(5):
        record = records[f"t{i}"]
        assert (record.question, record.answer) == (f"what {i}?", str(i))
        assert record.extra == {"level": i} and len(record.images) == i % 3
        for ref in record.images:
            assert (np.asarray(load_image(ref)) == np.asarray(noise_image(30 + i, 20, i))).all()
    assert records["t1"].choices == ("only",) and records["t0"].choices == ()
    assert source[0].origin == "tfds:dots:1.0.0[train]:1"
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_tfds_splits_and_formats(tfds_dir):
    assert len(open_records(f"tfds:dots:1.0.0[test]@{tfds_dir}/array_record")) == 2
    assert len(open_records(f"tfds:dots:1.0.0[train[:40%]]@{tfds_dir}/array_record")) == 2
    with pytest.raises(ValueError, match="no split 'dev'"):
        open_records(f"tfds:dots:1.0.0[dev]@{tfds_dir}/array_record")
    # parquet ignores sub-splits without a word, so it is refused.
    with pytest.raises(ValueError, match="file format parquet has no random access"):
        open_records(f"tfds:dots:1.0.0@{tfds_dir}/parquet")


# --- images, and whole files ---


def test_json_images_as_base64_and_bytes():
    data = png(noise_image(10, 12))
    text = base64.b64encode(data).decode()
    for image in ({"bytes": text}, {"bytes": data}, data):
        record = to_record({**GOOD, "image": image}, origin="f:1")
        assert load_image(record.images[0]).size == (10, 12)


def test_real_records_load(shared_data):
    source = open_records(shared_data / "geometry3k_formalgeo_1500" / "data.jsonl")
    assert source[0].answer == "15" and source[0].id == "formalgeo7k-1"
    for index in range(0, len(source), 150):
        assert load_image(source[index].images[0]).mode == "RGB"


def test_reading_ten_thousand_lines_keeps_only_offsets(tmp_path):
    path = write_jsonl(
        tmp_path / "d.jsonl", [{**GOOD, "pad": "x" * 500, "id": i} for i in range(10_000)]
    )
    source = open_records(path)
    assert len(source) == 10_000 and source[9_999].id == "9999"
    assert len(pickle.dumps(source)) < 300_000 < path.stat().st_size / 10


def test_the_demo_folder_of_the_tests_is_good(tmp_path):
    source = open_records(write_dots(tmp_path, 4))
    assert [r.id for r in source] == ["r0", "r1", "r2", "r3"]


# --- several sources, and what they bring ---


def test_several_sources_are_one_behind_the_other(tmp_path):
    for name, count in (("a1", 2), ("a2", 1), ("b", 3), ("c,d", 1)):
        rows = [{**GOOD, "id": f"{name}-{i}"} for i in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    source = open_records(f"{tmp_path}/b.jsonl, {tmp_path}/a*.jsonl")
    assert [r.id for r in source] == ["b-0", "b-1", "b-2", "a1-0", "a1-1", "a2-0"]
    assert source.sizes == (3, 3)  # a pattern is one source
    assert open_records(f"{tmp_path}/c,d.jsonl").sizes == (1,)  # a comma in a file's name
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such file"):
        open_records(f"{tmp_path}/b.jsonl,nowhere.jsonl")
    (tmp_path / "a0.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="a0.jsonl: holds no records"):
        open_records(f"{tmp_path}/b.jsonl,{tmp_path}/a*.jsonl")


def test_a_summary_tells_what_the_first_records_bring(tmp_path):
    rows = [{**GOOD, "id": i, "image": "a.png", "query": "q"} for i in range(6)]
    rows += [{**GOOD, "choices": ["x", "y"]}] * 3 + [{"problem": "no answer"}]
    source = open_records(write_jsonl(tmp_path / "d.jsonl", rows))
    whole = "10 records: 6 with images, 3 with choices, 6 with an id, 1 unusable; not read: query"
    assert str(source.summary()) == whole
    assert str(source.summary(8)) == (
        "10 records, of the first 8: 6 with images, 2 with choices, 6 with an id; not read: query"
    )
    many = open_records(",".join([str(tmp_path / "d.jsonl")] * 20))
    assert str(many.summary(100)).startswith("200 records, of the first 100 of 20 files: 100 with")


def test_a_summary_reads_little_of_large_records_and_of_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr("srpo_jax.data.records._SAMPLE_BYTES", 64_000)
    path = write_jsonl(tmp_path / "d-0.jsonl", [{**GOOD, "pad": "x" * 950}] * 100)
    assert 60 <= open_records(path).summary().looked_at <= 64
    for i in range(1, 30):
        write_jsonl(tmp_path / f"d-{i}.jsonl", [GOOD] * 2)
    write_jsonl(tmp_path / "e.jsonl", [GOOD])
    found = open_records(f"{tmp_path}/d-*.jsonl,{tmp_path}/e.jsonl").summary()
    assert found.files == 9 and found.looked_at < 80


def test_content_that_nobody_reads_is_found_before_the_run(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD, {**GOOD, "img": "a.png"}])
    with pytest.raises(ColumnError, match="d.jsonl:2: no images, but a column 'img'"):
        open_records(path).summary()
    source = open_records(path, columns=Columns(image="img"))
    assert source.summary().images == 1 and source.contents(1).images == 1
    assert pickle.loads(pickle.dumps(source))[1].images == source[1].images
