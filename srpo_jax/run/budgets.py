"""Do images and records fit the budgets? Looked at before a run, in bounded time."""

import dataclasses
import functools
import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from PIL import Image

from srpo_jax.data.batching import Budgets, Encoded
from srpo_jax.data.encoders import PromptEncoder, SftEncoder
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.images import ImageRef
from srpo_jax.data.loader import too_many
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import RecordSource
from srpo_jax.data.vision_arrays import VisionGeometry
from srpo_jax.run import processes
from srpo_jax.run.sections import RunSettings, SftSettings, TrainSettings
from srpo_jax.structs import BLOCKS, RunError

Encode = Callable[[Record], Encoded]
Check = Callable[[Record], str | None]  # why a record is left out, or None

FIRST = 64  # training records that are looked at
FIRST_SECONDS, ALL_SECONDS = 5.0, 20.0  # for these, and for all of an evaluation file
_PORTION = 16  # records between two looks at the clock
_ROUND = 128  # tokens; what a proposed budget is a multiple of


def training_budgets(settings: TrainSettings) -> Budgets:
    """Of a sequence that is trained on."""
    data = settings.data
    patches = max(data.patch_budgets, default=0)
    if isinstance(settings, SftSettings):
        return Budgets(settings.data.tokens, patches, "data.tokens")
    return Budgets(data.prompt_tokens, patches)


def prompt_budgets(settings: RunSettings) -> Budgets:
    """Of a prompt that is evaluated on."""
    return Budgets(settings.data.prompt_tokens, max(settings.data.patch_budgets, default=0))


# --- images ----------------------------------------------------------------------------------


def largest_image(max_pixels: int, geometry: VisionGeometry) -> tuple[int, int]:
    """(merged tokens, patch slots) that an image may take which is at most twice as long as wide.

    Slots count the padding of windows, for which longer images need more.
    """
    side = geometry.window_blocks
    tokens = max_pixels // (geometry.patch_size * geometry.merge_size) ** 2
    shapes = [(h, min(2 * h, tokens // h)) for h in range(1, int(tokens**0.5) + 1)]
    windows = max((-(-h // side) * -(-w // side) for h, w in shapes), default=1)
    return max(tokens, 1), windows * geometry.window_slots


def check_images(processor: Processor, encode: Encode, budgets: Budgets) -> str:
    """What an image of ``max_pixels`` leaves of the token budget, in words.

    "" for a program's own ``encode``, and where there are no images. RunError where the budgets do
    not hold one image.
    """
    if not isinstance(encode, PromptEncoder | SftEncoder) or not budgets.patches:
        return ""
    file = io.BytesIO()
    Image.new("RGB", (56, 56)).save(file, "PNG")
    image, said = ImageRef("", data=file.getvalue()), {block: "?" for block in BLOCKS}
    blank = encode(Record("", "?", "0", (image,), extra=said))
    template = blank.num_tokens - blank.vision.num_merged
    tokens, slots = largest_image(processor.max_pixels, processor.geometry)
    left = budgets.tokens - template - tokens
    if slots > budgets.patches:
        raise RunError(
            f"data.patch_budgets: {budgets.patches} do not hold one image of max_pixels="
            f"{processor.max_pixels}, which takes up to {slots}: add that, or lower max_pixels"
        )
    if left < 0:
        wanted = -(-(template + tokens + 512) // _ROUND) * _ROUND
        raise RunError(
            f"{budgets.token_key}={budgets.tokens} does not hold one image of max_pixels="
            f"{processor.max_pixels}: the template takes {template}, the image up to {tokens}; set "
            f"--config.{budgets.token_key}={wanted}, or lower max_pixels"
        )
    rest = "question and response" if isinstance(encode, SftEncoder) else "question"
    return (
        f"{budgets.token_key}={budgets.tokens}: {template} for the template, up to {tokens} for an "
        f"image, {left} left for the {rest}"
    )


# --- records ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Look:
    """What one record takes, or why it cannot be used."""

    index: int
    tokens: int = 0
    patches: int = 0
    bad: str = ""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What becomes of a record: encoded, held against the budgets, and checked."""

    encode: Encode
    budgets: Budgets
    check: Check | None = None

    def __call__(self, record: Record) -> Encoded:
        """The encoded record; RecordError where a run would set it aside."""
        if fault := self.budgets.fault_of_text(record):
            raise fault
        encoded = self.encode(record)
        places = int((encoded.vision_src >= 0).sum())
        if places != encoded.vision.num_merged:
            raise RecordError(
                record.origin,
                f"{places} image tokens, but {encoded.vision.num_merged} merged image patches",
                "tokenizer and image processor do not belong together",
            )
        fault = self.budgets.fault(encoded, record.origin)
        reason = self.check(record) if self.check else None
        if fault is None and reason is not None:
            fault = RecordError(record.origin, reason)
        if fault is not None:
            raise fault
        return encoded

    def look(self, source: RecordSource, index: int) -> Look:
        """The record at ``index`` of a source."""
        try:
            encoded = self(source[index])
        except RecordError as error:
            return Look(index, bad=str(error))
        return Look(index, encoded.num_tokens, encoded.num_slots)


def look_at(
    key: str, source: RecordSource, reader: Reader, *, most: int, seconds: float, share: float
) -> str:
    """Look at the first ``most`` records of config ``key``'s file, as far as ``seconds`` allow.

    Each process takes its part (collective). Returns what was found, in words. RunError where none
    can be used, or all were looked at and more are bad than the ``share`` that is allowed. (The
    first ones tell little of the others.)
    """
    own = range(min(len(source), most))[jax.process_index() :: jax.process_count()]
    looks = [dataclasses.asdict(one) for one in _in_time(reader, source, own, seconds)]
    found = [Look(**one) for part in processes.gather(looks) for one in part]
    found.sort(key=lambda one: one.index)
    bad, good = [one for one in found if one.bad], [one for one in found if not one.bad]
    seen = f"{len(bad)} of the first {len(found)} records cannot be used"
    if not good:
        raise RunError(f"{key}: none of the first {len(found)} records can be used; {bad[-1].bad}")
    if len(found) == len(source) and too_many(len(bad), len(found), share):
        raise RunError(
            f"{key}: {seen}, more than data.max_bad_share={share:g} and chance allow; {bad[0].bad}"
        )
    tokens, patches = [one.tokens for one in good], max(one.patches for one in good)
    told = f"{key}: the first {len(found)} of {len(source)} records have {min(tokens)} to "
    told += f"{max(tokens)} tokens, up to {patches} image patches"
    return told + (f"; {seen}: {bad[0].bad}" if bad else "")


def _in_time(
    reader: Reader, source: RecordSource, indices: Sequence[int], seconds: float
) -> list[Look]:
    """As many looks as ``seconds`` allow, at least the first portion."""
    begun, found = time.monotonic(), []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(indices), _PORTION):
            portion = indices[start : start + _PORTION]
            found += pool.map(functools.partial(reader.look, source), portion)
            if time.monotonic() - begun > seconds:
                break
    return found
