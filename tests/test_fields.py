"""The fields of a row: foreign columns, what counts as missing, images as people write them."""

import base64
import pickle

import numpy as np
import pytest
from data_helpers import noise_image, png

from srpo_jax.data.errors import RecordError, half_character, shown
from srpo_jax.data.fields import OWN, ColumnError, Columns, contents, missing, to_record
from srpo_jax.data.images import load_image
from srpo_jax.data.prompts import user_message

GOOD = {"problem": "q", "answer": "1"}
NAN = float("nan")
NO_IMAGE = {"bytes": None, "path": None}
PNG = png(noise_image(40, 30))
BASE64 = base64.b64encode(PNG).decode()


def record(columns: Columns = OWN, **fields):
    """A record of GOOD with these fields changed."""
    return to_record({**GOOD, **fields}, origin="d.jsonl:7", root="/data", columns=columns)


def paths(found):
    return [ref.path for ref in found.images]


def shape(found):
    """The user's message of a record: texts, and the name of each image."""
    images = iter(paths(found))
    content = user_message(found.question, found.images, found.choices)["content"]
    if isinstance(content, str):
        return [content]
    return [part["text"] if part["type"] == "text" else next(images) for part in content]


# --- columns ---


@pytest.mark.parametrize(
    ("fields", "mapping"),
    [
        ({"img": "a.png"}, "images=img"),
        ({"image_path": "a.png"}, "images=image_path"),
        ({"Image-Paths": ["a.png"]}, "images=Image-Paths"),
        ({"decoded_image": {"bytes": PNG}}, "images=decoded_image"),
        ({"image_1": "a.png", "image_2": "b.png", "image_10": "c.png"},
         "images=image_1,image_2,image_10"),
        ({"pictures": ["a.png"], "images": [], "image": None}, "images=pictures"),
        ({"options": ["x", "y"]}, "choices=options"),
        ({"options": ["x", "y"], "choices": NAN}, "choices=options"),
        ({"option_a": "x", "option_b": "y"}, "choices=option_a,option_b"),
        ({"videos": ["a.mp4"]}, "images=images"),
        ({"videos": ["a.mp4"], "images": ["a.png"]}, "images=images"),
    ],
)  # fmt: skip
def test_content_in_a_column_that_nobody_reads_is_an_error_with_its_remedy(fields, mapping):
    with pytest.raises(ColumnError, match="d.jsonl:7: ") as error:
        record(**fields)
    assert f"--config.data.columns.{mapping} " in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"img": None, "image_path": "", "videos": [], "options": NAN},
        {"image": "a.png", "image_path": "a.png", "decoded_image": {"bytes": PNG}},
        {"choices": ["x", "y"], "options": ["x", "y"]},
        {"image_size": [1, 2], "imagenet": 1, "optional": True, "level": 3},
    ],
)
def test_columns_that_hold_no_content_of_their_own_are_no_error(fields):
    found = record(**fields)
    assert found.extra.keys() == fields.keys() - {"image", "choices"}


def test_foreign_columns_are_read_by_their_mapping():
    both = Columns(image="img", choices="options", problem="query", answer="gold", id="pid")
    row = {"img": ["a.png"], "options": ["x", "y"], "query": "why?", "gold": 2, "pid": 3}
    found = to_record(row, origin="f:1", root="/data", columns=both)
    assert (found.id, found.question, found.answer) == ("3", "why?", "2")
    assert paths(found) == ["a.png"] and found.choices == ("x", "y")
    # A file with its own names beside it, an evaluation file say, is read as ever.
    assert paths(record(both, images=["b.png"])) == ["b.png"]
    spread = Columns(images="image_1,image_2,image_3", choices="A,B,C")
    found = record(spread, image_1=None, image_2="b.png", image_3="c.png", A="1", B=2, C=NAN)
    assert paths(found) == ["b.png", "c.png"] and found.choices == ("1", "2")


def test_a_fields_own_name_leaves_what_looks_like_it_alone():
    assert record(Columns(images="images"), img="a.png").images == ()
    assert record(Columns(image="image"), videos=["a.mp4"]).images == ()
    assert record(Columns(choices="choices"), options=["x"]).choices == ()
    with pytest.raises(ColumnError, match="'photo'"):
        record(Columns(images="img"), photo="a.png")  # neither img nor images: lost all the same


def test_a_missing_question_or_answer_names_the_column_that_may_hold_it():
    with pytest.raises(RecordError, match="no problem or question among .*columns.problem=query "):
        to_record({"query": "q", "answer": 1}, origin="f:1")
    with pytest.raises(RecordError, match="empty answer; pass --config.data.columns.answer=gold "):
        record(answer=None, gold="5")


def test_mappings_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="images and image mean the same"):
        Columns(images="a", image="b")
    with pytest.raises(ValueError, match="answer=a,b: takes one column"):
        Columns(answer="a,b")
    with pytest.raises(ValueError, match="columns: imgs=a: write FIELD=COLUMN, of id, problem,"):
        Columns.parse(["imgs=a"])
    assert Columns.parse(["images=img", "choices=a,b"]) == Columns(images="img", choices="a,b")


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "a.png", "images": ["b.png"]},
        {"image": "a.png", "images": ["a.png", "b.png"]},
        {"problem": "q", "question": "another"},
    ],
)
def test_two_columns_of_one_meaning_must_not_differ(fields):
    with pytest.raises(RecordError, match="hold different things"):
        record(**fields)


def test_an_empty_column_does_not_hide_the_other():
    for empty in ([], None, NAN, [None], [NO_IMAGE], "", NO_IMAGE):
        assert paths(record(image="a.png", images=empty)) == ["a.png"]
        assert paths(record(image=empty, images=["a.png"])) == ["a.png"]
    assert paths(record(image="a.png", images=["a.png"])) == ["a.png"]
    assert record(problem="", question="why?").question == "why?"


def test_contents_tell_what_a_row_brings():
    row = {**GOOD, "image": "a.png", "image_path": "a.png", "choices": ["x", "y"], "id": NAN}
    found = contents(row, to_record(row, origin="f:1", root="/data"), Columns())
    assert (found.images, found.choices, found.has_id) == (1, 2, False)
    assert found.unread == ("image_path",)
    mapped = Columns(images="image_path")
    read = to_record(row, origin="f:1", root="/data", columns=mapped)
    assert contents(row, read, mapped).unread == ()


# --- missing values ---


@pytest.mark.parametrize("nothing", [None, NAN, np.float32("nan"), np.float64("nan"), "", " \n"])
def test_nothing_means_missing_in_every_field(nothing):
    found = record(id=nothing, source=nothing, images=nothing, image=nothing, choices=nothing)
    assert found == record()
    assert record(images=[nothing, "a.png"]).images[0].path == "a.png"
    for name, reason in (("answer", "empty answer"), ("problem", "empty question")):
        with pytest.raises(RecordError, match=reason):
            record(**{name: nothing})


def test_values_that_say_something_are_not_missing():
    for value in (0, 0.0, False, "0", "nan", ["a"], {"bytes": b"x", "path": None}, b"x", [[]]):
        assert missing(value) == (value == [[]])
    assert missing(np.array([])) and missing({}) and missing(b"")
    assert record(id=0, choices=[0, 0.5]).choices == ("0", "0.5") and record(id=0).id == "0"


# --- choices ---


def test_choices_may_be_the_text_of_a_list():
    for text in ("['1','2']", '["1", "2"]', "[1, 2]", "('1', '2')", ["['1', '2']"]):
        assert record(choices=text).choices == ("1", "2"), text
    assert record(choices="[]").choices == ()
    assert record(choices=["only"]).choices == ("only",)
    assert record(choices=["x", "y", None, NAN]).choices == ("x", "y")  # a padded table
    assert record(images="['a.png', 'b.png']").images[1].path == "b.png"


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ("A. one B. two", "choices are one text, not a list: 'A. one B. two'"),
        ("['1' '2']", "choices are one text, not a list"),  # a printed numpy array
        ("[__import__('os')]", "choices are one text, not a list"),
        (["x", None, "y"], "choice 2 of 3 is empty"),
    ],
)
def test_choices_that_are_no_list_are_refused(choices, reason):
    with pytest.raises(RecordError) as error:
        record(choices=choices)
    assert reason in error.value.reason


# --- where images go ---


def test_numbered_marks_place_their_images():
    two = {"images": ["1.png", "2.png"]}
    assert shape(record(problem="<image1> or <image 2>?", **two)) == ["1.png", " or ", "2.png", "?"]
    found = record(problem="Is <image_2> like <image 1>? <image 2> is red.", **two)
    assert shape(found) == ["Is ", "2.png", " like ", "1.png", "? image 2 is red."]
    assert shape(record(problem="Which?\n<image1>", image="1.png")) == ["Which?\n", "1.png"]
    merged = record(problem="Like <image1> or <image2>?", choices=["<image3>", "no"], image="1.png")
    assert shape(merged) == ["Like ", "1.png", " or image 2?\nChoices:\n(A) image 3\n(B) no"]
    with pytest.raises(RecordError, match=r"a mark for image 3, but 2 images .* write \\<image 3>"):
        record(problem="<image 3>", **two)
    with pytest.raises(RecordError, match="a mark for image 1, but 0 images"):
        record(problem="<image1>")


def test_images_may_be_options():
    three = {"images": ["1.png", "2.png", "3.png"]}
    found = record(
        problem="Which is like <image 1>?",
        choices="['<image 3>', 'none', '<image 2>']",
        answer="<image 2>",
        **three,
    )
    assert shape(found) == [
        "Which is like ", "1.png", "?\nChoices:\n(A) ", "3.png", "\n(B) none\n(C) ", "2.png",
    ]  # fmt: skip
    assert len(set(found.choices)) == 3 and found.answer == found.choices[2]
    # What is written and read again stays as it is.
    again = {"problem": found.question, "choices": list(found.choices), "answer": found.answer}
    again = to_record(again | {"images": paths(found)}, origin="d.jsonl:7", root="/data")
    assert again == found


def test_a_mark_that_is_meant_as_words_is_escaped():
    assert shape(record(problem=r"What does \<image> do in HTML?")) == [
        "What does <image> do in HTML?"
    ]
    found = record(problem=r"Is \<image 1> shown here: <image>", image="a.png")
    assert shape(found) == ["Is <image 1> shown here: ", "a.png"]
    assert shape(record(problem=r"x \\<image>", image="a.png")) == [r"x \\", "a.png"]  # a LaTeX \\
    assert shape(record(choices=[r"\<image>", "b"]))[0].endswith("(A) <image>\n(B) b")


# --- image values ---


def test_data_uris_and_bytes_as_base64_are_images():
    uri = "data:image/png;base64," + BASE64
    for image in (uri, {"bytes": uri}, {"bytes": BASE64}, {"bytes": PNG, "path": "a.png"}):
        assert load_image(record(image=image).images[0]).size == (40, 30)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (BASE64, "an image is base64 text where a path belongs: 'iVBORw0KGgo"),
        ("x" * 5000, "an image is base64 text where a path belongs"),
        ("data:image/png;base64,%%", "image bytes are not base64"),
        ("data:image/png," + BASE64, "is not base64"),
        ({"bytes": "é"}, "image bytes are not base64"),
        (5, "an image is neither a path nor bytes"),
    ],
)
def test_other_texts_are_refused_in_short(image, reason):
    with pytest.raises(RecordError) as error:
        record(image=image)
    assert reason in error.value.reason and len(str(error.value)) < 200


def test_paths_that_look_like_base64_stay_paths():
    for path in ("images/" + "0123456789abcdef" * 4, "a" * 200 + ".png", "Qk1hcHMv"):
        assert paths(record(image=path)) == [path]


# --- text that no file can hold ---


@pytest.mark.parametrize(
    "fields",
    [{"problem": "half \ud83d"}, {"answer": "\udc00"}, {"choices": ["a", "\ud83d"]},
     {"id": "\ud83d"}, {"extra": [{"deep": "\ud83d"}]}, {"\ud83d": 1}],
)  # fmt: skip
def test_half_a_surrogate_pair_anywhere_is_a_bad_record(fields):
    with pytest.raises(RecordError, match=r"d.jsonl:7: half a surrogate pair in '.*\\u") as error:
        record(**fields)
    str(error.value).encode()
    assert half_character({"whole": "\U0001f600 é", "n": [1, b"\xff"]}) is None


def test_shown_values_are_short():
    assert shown("abc") == "'abc'" and shown([1, 2]) == "[1, 2]"
    for value in ("x" * 10**6, b"x" * 10**6, ["x" * 10**6] * 100, {"k": "x" * 10**6}):
        assert len(shown(value)) <= 62 and "..." in shown(value)
    assert len(shown("x" * 100, 30)) == 30
