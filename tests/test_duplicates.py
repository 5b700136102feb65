"""Copies of puzzles are recognised, different puzzles are not; 100,000 take seconds."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from srpo_jax.reflection import duplicates as dup
from srpo_jax.reflection.duplicates import Index, Print

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


def puzzle(number=3, colour="red", size=(448, 448)):
    """A ring of circles, one of them with a number: what many synthetic puzzles look like."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i in range(6):
        x = size[0] * (0.5 + 0.35 * np.cos(i * np.pi / 3))
        y = size[1] * (0.5 + 0.35 * np.sin(i * np.pi / 3))
        draw.ellipse((x - 45, y - 45, x + 45, y + 45), colour if i == 0 else "skyblue", "black")
        draw.text((x - 12, y - 20), str(number if i == 1 else i), "black", font_size=36)
    return image


def as_jpeg(image):
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return Image.open(io.BytesIO(buffer.getvalue()))


def smaller(image, share=0.7):
    size = [max(1, round(side * share)) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


COPIES = {
    "JPEG": as_jpeg,
    "JPEG in grey": lambda image: as_jpeg(image.convert("L")),
    "70 % of the size": smaller,
    "70 % as JPEG": lambda image: as_jpeg(smaller(image)),
    "palette": lambda image: image.convert("P", palette=Image.Palette.ADAPTIVE),
    "alpha": lambda image: image.convert("RGBA"),
    "CMYK": lambda image: image.convert("CMYK"),
    "grey": lambda image: image.convert("L"),
}


# ------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is  the\nsum?", "what is the sum"),
        ("<image>What is shown?", "What is shown?\n<image>"),
        ("<image1> Which?", "Which <image2>"),
        ("３ ｐｌｕｓ ４", "3 plus 4"),
        ("Add 1,200 to it.", "Add 1200 to it"),
        ("3+4", "3 + 4"),
        ("find $x$", "Find x."),
        ("5 − 3", "5 - 3"),
        ("a three-digit number", "a three digit number"),
        ("求阴影部分的面积。", "求阴影部分的面积"),
    ],
)
def test_wording_apart_two_questions_are_one(one, other):
    assert dup.normalise_question(one) == dup.normalise_question(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 + 4", "3 - 4"),
        ("3 / 4", "3 * 4"),
        ("x = 1.5", "x = 15"),
        ("x = -2", "x = 2"),
        ("x < 2", "x > 2"),
        ("10 %", "10"),
        ("How many dots?", "How many squares?"),
        ("नमक", "नाम क"),
    ],
)
def test_signs_and_words_that_matter_stay(one, other):
    assert dup.normalise_question(one) != dup.normalise_question(other)


def test_the_order_of_choices_does_not_matter_but_their_texts_do():
    first = dup.fingerprint("Which?", ["red", "blue"])
    assert dup.fingerprint("Which?", ["Blue", "red."]) == first
    assert dup.fingerprint("Which?", ["red", "green"]) != first


# --------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_an_image_is_recognised(name):
    image = puzzle()
    assert dup.distance(dup.image_hash(image), dup.image_hash(COPIES[name](image))) <= 2


@pytest.mark.parametrize(
    "other",
    [puzzle(number=8), puzzle(colour="orange"), puzzle(size=(448, 380)), Image.new("RGB", (9, 9))],
    ids=["another number", "another colour", "another shape", "black"],
)
def test_a_similar_puzzle_is_another_image(other):
    assert dup.distance(dup.image_hash(puzzle()), dup.image_hash(other)) > dup.MAX_DISTANCE


def test_transparency_is_white():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert dup.image_hash(clear) == dup.image_hash(Image.new("RGB", (40, 40), "white"))


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000), (31, 33)])
def test_images_of_any_size_have_a_hash(size):
    found = dup.image_hash(Image.new("RGB", size, "grey"))
    assert dup.distance(found, found) == 0


def test_distance_is_symmetric_and_counts_the_worst_cell():
    a, b = dup.image_hash(puzzle()), dup.image_hash(puzzle(colour="orange"))
    assert dup.distance(a, b) == dup.distance(b, a)
    assert dup.distance(a, a) == 0
    white, black = (dup.image_hash(Image.new("L", (8, 8), level)) for level in (255, 0))
    assert dup.distance(white, black) == 63


def real_images(folder):
    if not (DATA / folder).is_dir():
        pytest.skip(f"../shared/data/{folder} is not here")
    with open(DATA / folder / "data.jsonl", encoding="utf-8") as file:
        paths = [DATA / folder / json.loads(line)["image"] for line in file]
    return [Image.open(path).convert("RGB") for path in paths]


# Another PIL may round another way: three more than the docstring's numbers are let through.
@pytest.mark.parametrize(("folder", "false"), [("puzzlevqa_1000", 12), ("mathvision_1000", 0)])
def test_real_images_are_told_apart(folder, false):
    images = real_images(folder)
    hashes = [dup.image_hash(image) for image in images]
    pixels = [image.tobytes() for image in images]
    wrong = 0
    for i in range(len(hashes) - 1):
        near = np.flatnonzero(dup.distances(hashes[i], hashes[i + 1 :]) <= dup.MAX_DISTANCE)
        wrong += sum(pixels[i] != pixels[i + 1 + j] for j in near)
    assert wrong <= false + 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "copy", "missed"),
    [
        ("puzzlevqa_1000", "JPEG", 0),
        ("puzzlevqa_1000", "70 % of the size", 0),
        ("puzzlevqa_1000", "70 % as JPEG", 0),
        ("puzzlevqa_1000", "palette", 0),
        ("puzzlevqa_1000", "grey", 0),
        ("mathvision_1000", "JPEG", 0),
        ("mathvision_1000", "70 % of the size", 13),
        ("mathvision_1000", "70 % as JPEG", 27),
        ("mathvision_1000", "palette", 0),
        ("mathvision_1000", "grey", 0),
    ],
)
def test_copies_of_real_images_are_recognised(folder, copy, missed):
    images = real_images(folder)
    index = Index()
    for i, image in enumerate(images):
        index.add(i, Print("", (dup.image_hash(image),)))
    prints = [Print("", (dup.image_hash(COPIES[copy](image)),)) for image in images]
    assert sum((i, "same") not in index.find(p) for i, p in enumerate(prints)) <= missed + 3


# ---------------------------------------------------------------------------------------- index


def test_the_two_kinds_of_a_find():
    index = Index()
    red, blue = dup.image_hash(puzzle()), dup.image_hash(puzzle(colour="blue"))
    index.add("first", Print("which number is missing in the ring", (red,)))
    index.add("second", Print("which number is missing in the ring", (blue,)))
    index.add("third", Print("another question", (red,)))
    index.add("words", Print("name the capital"))
    found = index.find(Print("which number is missing in the ring", (red,)))
    assert found == [("first", "same"), ("third", "image")]
    assert index.find(Print("another question", (blue,))) == [("second", "image")]
    assert index.find(Print("name the capital", (red,))) == [("first", "image"), ("third", "image")]
    assert index.find(Print("name the capital")) == [("words", "same")]
    assert index.find(Print("something new")) == []


def test_the_same_question_with_other_choices_is_not_the_same_item():
    index = Index()
    index.add(1, dup.fingerprint("What is the capital?", ["Rome", "Bern"]))
    assert index.find(dup.fingerprint("What is the capital?", ["Rome", "Oslo"])) == []


def test_the_index_finds_what_a_full_search_finds():
    rng = np.random.default_rng(0)
    base = [dup.image_hash(puzzle(n, c)) for n in range(1, 8) for c in ("red", "green", "blue")]
    for level in range(20):
        noise = rng.integers(0, 255, (5, 5, 3), np.uint8)
        base += [dup.image_hash(Image.fromarray(noise // 2 + level * 6))]
        base += [dup.image_hash(Image.fromarray(noise // 2 + level * 6 + 2))]
    index = Index()
    for i, image in enumerate(base):
        index.add(i, Print("", (image,)))
    for image in base:
        near = np.flatnonzero(dup.distances(image, base) <= dup.MAX_DISTANCE).tolist()
        assert [key for key, _ in index.find(Print("", (image,)))] == near


def test_duplicates_point_to_the_first_of_their_kind():
    a, b = puzzle(), puzzle(number=8)
    prints = [
        ("a", dup.fingerprint("Which number is missing?", [], [a])),
        ("b", dup.fingerprint("Which number is missing?", [], [b])),
        ("a again", dup.fingerprint("which number is missing", [], [as_jpeg(a)])),
        ("a, asked otherwise", dup.fingerprint("Which colour is missing?", [], [a])),
        ("both", dup.fingerprint("Which number is missing?", [], [a, b])),
        ("both again", dup.fingerprint("Which number is missing?", [], [smaller(a), b])),
        ("both turned", dup.fingerprint("Which number is missing?", [], [b, a])),
        ("a a third time", dup.fingerprint("Which number is missing?", [], [a])),
    ]
    assert dup.duplicates(prints) == {"a again": "a", "both again": "both", "a a third time": "a"}


def test_contamination_names_file_row_and_kind():
    a, b = puzzle(), puzzle(number=8)
    evaluation = {
        "one.jsonl": [(7, dup.fingerprint("Which number is missing?", [], [a]))],
        "two.jsonl": [(3, dup.fingerprint("How many circles are in the ring?", [], [as_jpeg(b)]))],
    }
    prints = [
        ("x", dup.fingerprint("Which number is missing?", [], [a])),
        ("y", dup.fingerprint("Which number is missing?", [], [b])),
        ("z", dup.fingerprint("How many circles are in the ring?", [], [puzzle(5, "blue")])),
    ]
    found = dup.contamination(prints, evaluation)
    assert found == [
        {"key": "x", "file": "one.jsonl", "row": 7, "kind": "same"},
        {"key": "y", "file": "two.jsonl", "row": 3, "kind": "image"},
    ]


def test_one_question_or_one_image_on_everything_stays_fast():
    rng = np.random.default_rng(0)
    others = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(3_000)]
    image = dup.image_hash(puzzle())
    prints = [(i, Print(f"question {i}", (image,))) for i in range(20_000)]
    prints += [(-i, Print("one question", (dup.image_hash(x),))) for i, x in enumerate(others, 1)]
    start = time.process_time()
    assert dup.duplicates(prints) == {}
    assert time.process_time() - start < 20


@pytest.mark.slow
def test_a_hundred_thousand_prints_take_seconds_and_stay_small():
    code = """
import resource, time
import numpy as np
from PIL import Image
from srpo_jax.reflection import duplicates as dup

rng = np.random.default_rng(0)
def prints():
    for i in range(100_000):
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        yield i, dup.Print(f"which number is missing in ring {i % 50}", (dup.image_hash(image),))

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
items = list(prints())
start = time.process_time()
found = dup.duplicates(items)
seconds = time.process_time() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(found), seconds, (after - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, seconds, megabytes = map(float, run.stdout.split())
    assert found == 0
    assert seconds < 60
    assert megabytes < 200
