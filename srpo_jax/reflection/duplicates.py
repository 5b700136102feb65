"""Which items are the same puzzle, and which stand in an evaluation file: questions and pictures.

Synthetic puzzles share one layout and differ in a digit or a colour, which common perceptual hashes
do not see: of the 499,500 pairs of PuzzleVQA's 1,000 images (283 pairs are equal to the pixel), a
16 x 16 difference hash calls 2,421 different pairs equal at a distance of 6 bits. The hash here is
a small picture instead, and two are as far apart as their most different cell, so that one changed
place counts as much as a change everywhere. (A 3 for a 5 in small print may still go unseen.)
Measured at MAX_DISTANCE, on 1,000 images each:

                 different pairs      copies not recognised, as
                 called equal         JPEG q=80    70 % of the size    both
    PuzzleVQA    12 of 499,217            0                0             0
    MATH-Vision   0 of 499,499            0               13            27
"""

import itertools
import re
import unicodedata
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from srpo_jax.data.images import to_rgb

MAX_DISTANCE = 2  # between the hashes of one image: 2 steps of 4 grey levels
FAR = 64  # the distance of images that differ in shape: more than any difference of cells

_GRID, _COLOUR, _COARSE = 32, 8, 8  # cells a side: brightness, colour, means for the index
_STEP_BITS = 6  # of brightness and colour: steps of 4 levels
_FINE_BYTES = (_GRID**2 + 2 * _COLOUR**2) * _STEP_BITS // 8
_HEAD_BYTES = 1 + _COARSE**2  # shape, coarse brightness in levels
_SHAPE_STEPS = 16  # a doubling of width / height
_COARSE_TOLERANCE = 3  # levels that a coarse mean of one image moves by; measured: 3
_BUCKET, _BUCKET_TOLERANCE = 8, 2  # levels: size of a bucket, and how far a quarter's mean moves
_FEW = 16  # so many items of one question are compared one by one

Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Print:
    """What an item is recognised by: its normalised question (with choices) and image hashes."""

    question: str
    images: tuple[int, ...] = ()


# ------------------------------------------------------------------------------------ questions

_IMAGE_MARK = re.compile(r"<image\s?\d{0,3}>|<\|(?:image_pad|vision_start|vision_end)\|>")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d\d\d(?!\d))")
_NO_NUMBER = re.compile(r"(?<!\d)\.|\.(?!\d)|-(?!\s?\d)")  # full stops and hyphens; not 1.5, -3
_OPERATOR = re.compile(r" ?([-+*/%=<>^|]) ?")


class _Letters(dict):
    """For str.translate: letters, digits and signs stay, the rest becomes a space."""

    def __missing__(self, code: int) -> str:
        char = "-" if chr(code) in "−–—" else chr(code)
        stays = char in ".-*/%" or unicodedata.category(char)[0] in "LMNS"
        self[code] = char if stays and char != "$" else " "  # "$" marks formulas
        return self[code]


_LETTERS = _Letters()


def normalise_question(text: str) -> str:
    """The question without what copies change: case, white space, punctuation, <image> marks.

    The signs of arithmetic, decimal points and minus signs stay: "3 - 1" and "3 + 1" differ.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _THOUSANDS.sub("", _IMAGE_MARK.sub(" ", text)).translate(_LETTERS)
    return _OPERATOR.sub(r"\1", " ".join(_NO_NUMBER.sub(" ", text).split()))


# --------------------------------------------------------------------------------------- images


def image_hash(image: Image.Image) -> int:
    """A 7,432-bit picture of an image; ``distance`` compares two. About 0.6 ms at 640 x 640.

    32 x 32 cells of brightness and 8 x 8 of colour in 64 steps, the shape, and means for ``Index``.
    Transparency goes over white; EXIF orientation must have been applied (``load_image`` does).
    """
    image = to_rgb(image)
    small = image.resize((_GRID, _GRID), Image.Resampling.BILINEAR, reducing_gap=3.0)
    bands = small.convert("YCbCr").split()
    grey = np.asarray(bands[0])
    colour = [np.asarray(b.resize((_COLOUR, _COLOUR), Image.Resampling.BOX)) for b in bands[1:]]
    fine = np.concatenate([part.ravel() for part in (grey, *colour)])
    side = _GRID // _COARSE
    coarse = grey.reshape(_COARSE, side, _COARSE, side).mean((1, 3)).astype(np.uint8)
    shape = 128 + _SHAPE_STEPS * np.log2(image.width / image.height)
    head = bytes([int(np.clip(round(shape), 0, 255))]) + coarse.tobytes()
    return int.from_bytes(head + _pack(fine >> 8 - _STEP_BITS), "big")


def _cells(images: list[int]) -> np.ndarray:
    """Hashes -> their cells, int8 [image, brightness then colour]."""
    mask = (1 << 8 * _FINE_BYTES) - 1
    data = b"".join((image & mask).to_bytes(_FINE_BYTES, "big") for image in images)
    a, b, c = np.frombuffer(data, np.uint8).reshape(len(images), 3, -1).swapaxes(0, 1)
    parts = (a >> 2, (a & 3) << 4 | b >> 4, (b & 15) << 2 | c >> 6, c & 63)
    return np.concatenate(parts, axis=1).view(np.int8)


def _pack(cells: np.ndarray) -> bytes:
    """Cells of six bits, four of them in three bytes; ``_cells`` reads them."""
    a, b, c, d = cells.astype(np.uint8).reshape(4, -1)
    return np.concatenate([a << 2 | b >> 4, b << 4 | c >> 2, c << 6 | d]).tobytes()


def _head(image: int) -> bytes:
    return (image >> 8 * _FINE_BYTES).to_bytes(_HEAD_BYTES, "big")


def distances(image: int, others: list[int]) -> np.ndarray:
    """The distance of one hash to each of others, int [other]; see ``distance``."""
    if not others:
        return np.zeros(0, int)
    cells = _cells([image, *others])
    apart = np.abs(cells[1:] - cells[0])
    grey, colour = apart[:, : _GRID**2].max(1), apart[:, _GRID**2 :].max(1)
    coloured = np.abs(cells[:, _GRID**2 :] - 32).max(1) > 1
    both = coloured[0] & coloured[1:]  # a copy in grey has lost its colour
    out = np.where(both, np.maximum(grey, colour), grey).astype(int)
    shape = _head(image)[0]
    same_shape = np.array([abs(_head(other)[0] - shape) <= 2 for other in others])
    return np.where(same_shape, out, FAR)


def distance(a: int, b: int) -> int:
    """How far apart two image hashes are: steps (of 4 levels) between their worst cells, 0 .. 63.

    FAR where width / height differ by more than about 10 %. Colour counts unless one is grey.
    """
    return int(distances(a, [b])[0])


def fingerprint(
    question: str, choices: Iterable[str] = (), images: Iterable[Image.Image] = ()
) -> Print:
    """The ``Print`` of an item; the order of the choices does not matter, that of images does."""
    options = sorted(normalise_question(str(choice)) for choice in choices or ())
    text = " | ".join([normalise_question(question), *options])
    return Print(text, tuple(image_hash(image) for image in images))


# ---------------------------------------------------------------------------------------- index


class _Images:
    """Image hashes by the mean brightness of their quarters, then by 64 means, then in full.

    A copy moves each mean by little, so that nothing within MAX_DISTANCE is far from its bucket:
    only the buckets around it are looked into, about three of them.
    """

    def __init__(self):
        self._hashes: list[int] = []
        self._coarse = np.zeros((1024, _COARSE**2), np.uint8)
        self._buckets: dict[tuple[int, ...], array] = {}

    def add(self, image: int) -> int:
        """The place of a new hash: 0, 1, 2, ..."""
        place, means = len(self._hashes), _head(image)[1:]
        if place == len(self._coarse):
            self._coarse = np.concatenate([self._coarse, np.zeros_like(self._coarse)])
        self._coarse[place] = np.frombuffer(means, np.uint8)
        self._hashes.append(image)
        key = tuple(quarter // _BUCKET for quarter in _quarters(means))
        self._buckets.setdefault(key, array("i")).append(place)
        return place

    def find(self, image: int) -> list[int]:
        """The places of all hashes within MAX_DISTANCE, in the order they were added."""
        means = _head(image)[1:]
        ends = (-_BUCKET_TOLERANCE, _BUCKET_TOLERANCE)
        steps = [{max(0, q + end) // _BUCKET for end in ends} for q in _quarters(means)]
        keys = itertools.product(*steps)
        found = [self._buckets[key] for key in keys if key in self._buckets]
        if not found:
            return []
        places = np.concatenate([np.array(bucket) for bucket in found])
        coarse, own = self._coarse[places], np.frombuffer(means, np.uint8)
        apart = np.maximum(coarse, own) - np.minimum(coarse, own)  # in bytes: no overflow
        near = sorted(places[(apart <= _COARSE_TOLERANCE).all(1)].tolist())
        out = []
        for start in range(0, len(near), 256):
            batch = near[start : start + 256]
            close = distances(image, [self._hashes[i] for i in batch]) <= MAX_DISTANCE
            out += [i for i, yes in zip(batch, close, strict=True) if yes]
        return out


def _quarters(means: bytes) -> list[int]:
    """The mean brightness of the four quarters, in levels, from the coarse means."""
    half = _COARSE // 2
    cells = np.frombuffer(means, np.uint8).reshape(2, half, 2, half)
    return (cells.sum((1, 3)) // half**2).ravel().tolist()


class Index(Generic[Key]):
    """Prints by question and by image; ``find`` looks at few of them."""

    def __init__(self) -> None:
        self._entries: list[tuple[Key, Print]] = []
        self._questions: dict[str, list[int]] = {}
        self._images = _Images()
        self._owners = array("i")  # of the images, by place: the entry

    def add(self, key: Key, item: Print) -> None:
        """File a print under a key."""
        entry = len(self._entries)
        self._entries.append((key, item))
        self._questions.setdefault(item.question, []).append(entry)
        for image in item.images:
            self._images.add(image)
            self._owners.append(entry)

    def find(self, item: Print) -> list[tuple[Key, str]]:
        """(key, kind) of every print filed that resembles ``item``, each once, first filed first.

        ``same``: question with choices, and every image. ``image``: an image alone.
        """
        found = dict.fromkeys(self._with_image(item.images), "image")
        found |= dict.fromkeys(self._same(item), "same")
        return [(self._entries[entry][0], kind) for entry, kind in sorted(found.items())]

    def copies(self, item: Print) -> Iterator[Key]:
        """The keys of ``same`` alone."""
        return (self._entries[entry][0] for entry in self._same(item))

    def _same(self, item: Print) -> Iterator[int]:
        entries = self._questions.get(item.question, [])
        if item.images and len(entries) > _FEW:  # many puzzles ask one question: the image decides
            entries = self._with_image(item.images[:1])
        for entry in entries:
            other = self._entries[entry][1]
            if other.question != item.question or len(other.images) != len(item.images):
                continue
            pairs = zip(item.images, other.images, strict=True)
            if all(a == b or distance(a, b) <= MAX_DISTANCE for a, b in pairs):
                yield entry

    def _with_image(self, images: Iterable[int]) -> list[int]:
        """The entries that hold one of the images."""
        places = {place for image in set(images) for place in self._images.find(image)}
        return sorted({self._owners[place] for place in places})


# -------------------------------------------------------------------------------------- uses


def duplicates(prints: Iterable[tuple[Key, Print]]) -> dict[Key, Key]:
    """The key of every later copy -> the key of the first: same question, choices and images."""
    index: Index[Key] = Index()
    out: dict[Key, Key] = {}
    for key, item in prints:
        for first in index.copies(item):
            out[key] = first
            break
        else:
            index.add(key, item)
    return out


def contamination(
    prints: Iterable[tuple[Key, Print]], evaluation: Mapping[str, list[tuple[Row, Print]]]
) -> list[dict[str, Any]]:
    """Every item that stands in an evaluation file: {"key", "file", "row", "kind"}.

    ``evaluation``: file -> (row id, print) of its rows. ``kind`` as in ``Index.find``.
    """
    index: Index[tuple[str, Row]] = Index()
    for file, rows in evaluation.items():
        for row, item in rows:
            index.add((file, row), item)
    return [
        {"key": key, "file": file, "row": row, "kind": kind}
        for key, item in prints
        for (file, row), kind in index.find(item)
    ]
