"""Benchmarks as they are published: parquet with image bytes, JSON with an image folder."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.load import load, scoring_row
from srpo_jax.data.errors import RecordError
from srpo_jax.data.images import load_image
from srpo_jax.data.prompts import plain_messages
from tests.benchmark_helpers import PARITY, write_rows


def png(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 10), "red").save(buffer, "PNG")
    return buffer.getvalue()


def picture(width: int) -> dict:
    return {"bytes": png(width), "path": f"{width}.png"}


PUBLISHED = {
    "mathvista": {
        "pid": "7", "question": "How many?", "image": "images/7.jpg", "decoded_image": picture(11),
        "choices": ["cat", "dog"], "answer": "dog", "question_type": "multi_choice",
        "answer_type": "text", "precision": None, "unit": None,
        "query": "Hint: Please answer.\nQuestion: How many?\nChoices:\n(A) cat\n(B) dog",
        "metadata": {"task": "geometry problem solving", "skills": ["algebraic reasoning"]},
    },
    "mathvision": {
        "id": "3", "question": "Which?\n<image1>", "options": ["1", "2"], "answer": "B",
        "level": 2, "subject": "algebra", "image": "images/3.jpg", "decoded_image": picture(12),
    },
    "mathverse": {
        "sample_index": "5", "problem_version": "Text Lite", "question": "Find x.\nChoices:\nA:1",
        "query_cot": "Reason.\nFind x.\nChoices:\nA:1", "image": picture(13), "answer": "A",
        "question_type": "multi-choice", "metadata": {"subject": "Plane", "subfield": "Angle"},
    },
    "mmmu_pro": {
        "id": "test_Music_1", "question": "Is <image 2> like <image 1>?", "answer": "J",
        "options": str(list("0123456789")), "subject": "Music", "image_1": picture(14),
        "image_2": picture(15),
    },
    "mmmu": {
        "id": "validation_Art_1", "question": "<image 1> Which?", "answer": "B",
        "options": "['<image 2>', 'none']", "question_type": "multiple-choice",
        "image_1": picture(16), "image_2": picture(17),
    },
    "emma": {
        "pid": "math_1", "question": "What is <image_1>?", "options": ["a", "b"], "answer": "A",
        "subject": "Math", "category": "2D", "type": "Multiple Choice", "image_1": picture(18),
    },
    "olympiadbench": {
        "id": "1606", "question": "Find it, <image_1>.", "final_answer": ["2,3"], "error": "0.1",
        "answer_type": "Numerical", "subfield": "Geometry", "image_1": picture(19),
    },
    "wemath": {
        "ID": "9", "key": "2steps_1", "question": "Which?", "option": "A. 1; B. 2",
        "answer": "A", "image_path": picture(20),
    },
    "mmk12": {"id": "1", "question": "Find x.", "answer": "4", "subject": "math",
              "image": picture(21)},
}  # fmt: skip


def parquet(tmp_path, rows, name="test.parquet"):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_row_of_every_benchmark_can_be_asked_and_scored(tmp_path, name):
    benchmark = load(name, parquet(tmp_path, [PUBLISHED[name]]), counts=())
    record = benchmark[0]
    assert load_image(record.images[0]).height == 10
    content = plain_messages(record.question, record.images, record.choices)[-1]["content"]
    assert sum(part["type"] == "image" for part in content) == len(record.images)
    row = scoring_row(record, rf"\boxed{{{record.answer}}}")
    assert json.loads(json.dumps(row)) == row
    if name != "mmk12":
        assert BENCHMARKS[name].groups(row)


def test_official_fields_reach_the_official_rule(tmp_path):
    rows = {name: load(name, parquet(tmp_path, [PUBLISHED[name]]), counts=())[0]
            for name in ("mathvista", "mathvision", "mmmu_pro", "mmmu", "emma")}  # fmt: skip
    responses = {
        "mathvista": "dog", "mathvision": r"\boxed{2}", "mmmu_pro": "Answer: J", "mmmu": "(B)",
        "emma": "A: because",
    }  # fmt: skip
    for name, record in rows.items():
        scored = scoring.score(name, [scoring_row(record, responses[name])], "official_rule")
        assert scored[0]["correct"], name


def test_images_stand_in_the_order_of_their_tags(tmp_path):
    record = load("mmmu_pro", parquet(tmp_path, [PUBLISHED["mmmu_pro"]]), counts=())[0]
    assert record.question == "Is <image> like <image>?"
    assert [load_image(image).width for image in record.images] == [15, 14]


def test_an_image_that_an_option_names_stands_at_the_option(tmp_path):
    record = load("mmmu", parquet(tmp_path, [PUBLISHED["mmmu"]]), counts=())[0]
    assert (record.question, record.choices) == ("<image> Which?", ("<image 2>", "none"))
    shown = plain_messages(record.question, record.images, record.choices)[-1]["content"]
    kinds = [part.get("text", "IMAGE") for part in shown]
    assert kinds == ["IMAGE", " Which?\nChoices:\n(A) ", "IMAGE", "\n(B) none"]
    assert [load_image(image).width for image in record.images] == [16, 17]


def test_options_are_shown_once(tmp_path):
    record = load("mathvista", parquet(tmp_path, [PUBLISHED["mathvista"]]), counts=())[0]
    text = str(plain_messages(record.question, record.images, record.choices)[-1]["content"])
    assert text.count("(B) dog") == 1
    wemath = load("wemath", parquet(tmp_path, [PUBLISHED["wemath"]]), counts=())[0]
    assert wemath.question == "Which?\nA. 1; B. 2"
    assert wemath.id == "9_2steps_1"


def test_vision_rows_of_mmmu_pro_have_a_question_in_their_image(tmp_path):
    row = {"id": "v_1", "image": picture(22), "options": "['a', 'b']", "answer": "A",
           "subject": "Music"}  # fmt: skip
    record = load("mmmu_pro", parquet(tmp_path, [row]), counts=())[0]
    assert "the image shows" in record.question
    assert load_image(record.images[0]).width == 22


def test_a_folder_of_parquet_files_is_one_benchmark(tmp_path):
    for i in range(2):
        rows = [PUBLISHED["mathvision"] | {"id": f"{i}{j}"} for j in range(3)]
        parquet(tmp_path, rows, f"test-0000{i}.parquet")
    benchmark = load("mathvision", tmp_path, counts=())
    assert [record.id for record in benchmark] == ["00", "01", "02", "10", "11", "12"]


@pytest.mark.parametrize("form", ["list", "by id", "lines"])
def test_the_repositorys_json_finds_its_images(tmp_path, form):
    row = {k: v for k, v in PUBLISHED["mathvista"].items() if k != "decoded_image"}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7.jpg").write_bytes(png(30))
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / ("testmini.jsonl" if form == "lines" else "testmini.json")
    if form == "lines":
        write_rows(path, [row])
    else:
        bare = {k: v for k, v in row.items() if k != "pid"}
        path.write_text(json.dumps([row] if form == "list" else {"7": bare}))
    record = load("mathvista", path, counts=())[0]
    assert record.id == "7"
    assert load_image(record.images[0]).width == 30


def test_a_missing_field_is_named(tmp_path):
    row = {k: v for k, v in PUBLISHED["mathvista"].items() if k != "answer_type"}
    with pytest.raises(ValueError, match="no field 'answer_type', which mathvista has"):
        load("mathvista", parquet(tmp_path, [row]), counts=())
    row = {k: v for k, v in PUBLISHED["mathvision"].items() if k != "options"}
    with pytest.raises(ValueError, match="no field 'options' or 'choices'"):
        load("mathvision", parquet(tmp_path, [row]), counts=())


def test_the_number_of_rows_is_checked_unless_told_otherwise(tmp_path):
    path = parquet(tmp_path, [PUBLISHED["mathvision"]] * 304)
    assert len(load("mathvision", path)) == 304
    with pytest.raises(ValueError, match=r"304 rows, but mathvista has 1000 \(testmini\)"):
        load("mathvista", path)
    with pytest.raises(ValueError, match="304 rows"):
        load("mathvision", path, counts=(3040,))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("x.json", "{", "not JSON"), ("x.json", "[1]", "JSON objects"), ("x.csv", "a", "expected"),
     ("x.parquet", "no", "not a parquet file")],
)  # fmt: skip
def test_files_of_another_kind_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load("mathvision", tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        load("mathvision", tmp_path / "nowhere.json")


def test_a_row_that_cannot_be_asked_says_where_it_stands(tmp_path):
    row = PUBLISHED["mathvision"] | {"answer": None}
    benchmark = load("mathvision", parquet(tmp_path, [row, row | {"answer": "A"}]), counts=())
    with pytest.raises(RecordError, match="test.parquet:1: empty answer"):
        benchmark[0]
    assert benchmark[1].answer == "A"


def test_a_subset_of_mathvision_loads_with_its_images():
    path = PARITY.parent / "mathvision_1000" / "data.jsonl"
    if not path.is_file():
        pytest.skip(f"no data: {path} is not there")
    benchmark = load("mathvision", path, counts=(1000,))
    assert len(benchmark) == 1000
    assert all(record.question.count("<image>") in (0, len(record.images)) for record in benchmark)
    assert load_image(benchmark[0].images[0]).size == (640, 157)


def test_an_image_that_nothing_names_comes_after_the_question(tmp_path):
    row = PUBLISHED["mmmu"] | {"options": "['<image 3>', 'none']"}
    record = load("mmmu", parquet(tmp_path, [row]), counts=())[0]
    assert record.question == "<image> Which?\nimage 2: <image>"
    assert record.choices == ("image 3", "none")
    assert [load_image(image).width for image in record.images] == [16, 17]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_separators_of_unicode_end_no_line_of_a_file(tmp_path, separator):
    row = PUBLISHED["mathvista"] | {"query": f"How{separator}many?"}
    row = {k: v for k, v in row.items() if k != "decoded_image"}
    path = tmp_path / "test.jsonl"
    path.write_bytes("\ufeff".encode() + json.dumps(row, ensure_ascii=False).encode() + b"\n")
    assert load("mathvista", path, counts=())[0].question == f"How{separator}many?"
