"""Untrusted image files and bytes -> RGB pictures; every fault becomes a ``RecordError``."""

import io
import math
import os
import posixpath
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from srpo_jax.data.buckets import Ranges, on_bucket, reader
from srpo_jax.data.errors import RecordError, shown

# More pixels than this (5,792 x 5,792) are refused before anything is decoded: a 2 kB file can
# claim billions, and each takes 3 bytes here and several more where it is made smaller.
MAX_IMAGE_PIXELS = 2**25
MAX_IMAGE_BYTES = 256 * 2**20
# Formats of pictures only, as far as this PIL was built with them: no EPS or PDF, which start other
# programs.
Image.init()
FORMATS = [
    name
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
]


def is_image(head: bytes) -> bool:
    """Whether 16 bytes or more are the start of a picture in one of ``FORMATS``."""
    return any(accepts(head) for _, accepts in (Image.OPEN[name] for name in FORMATS) if accepts)


@dataclass(frozen=True)
class ImageRef:
    """An image that is not decoded yet: its bytes, or a path inside ``root``."""

    origin: str  # "file:row" of the record
    path: str = ""  # as the record gives it
    root: str = ""  # the folder that the path must stay in
    data: bytes | None = field(default=None, repr=False)


def image_bytes(ref: ImageRef) -> bytes:
    """The bytes of an image; RecordError where its file is missing or leaves the data root.

    BucketError where a bucket does not answer: that is no fault of the record.
    """
    if ref.data is not None:
        return ref.data
    path, name = _located(ref), shown(ref.path, 120)
    try:
        size, read = _open(path)
        if size is not None and size <= MAX_IMAGE_BYTES:
            return read(0, size)
    except OSError as error:
        reason = f"image {name} cannot be read ({error.strerror or 'no such file'})"
        raise RecordError(ref.origin, reason, f"is it in {ref.root}?") from None
    if size is None:
        raise RecordError(ref.origin, f"image {name} is not a regular file")
    raise RecordError(ref.origin, f"image {name} has {size} bytes", "shrink it")


def _open(path: str) -> tuple[int | None, Callable[[int, int], bytes]]:
    """Bytes of a file (None: it is none, but a pipe, which would block for ever), and a reader."""
    if on_bucket(path):
        file = Ranges(path)
        return file.size, file.at
    status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None, reader(path)


def _located(ref: ImageRef) -> str:
    """The real path of a file image, inside of the data root; RecordError where it is not.

    Symbolic links are followed first, so that neither ``..`` nor a link leads out.
    """
    name = shown(ref.path, 120)
    if not ref.root:
        raise RecordError(ref.origin, f"image path {name}, but no data root", "set data.root")
    if "\0" in ref.path:
        raise RecordError(ref.origin, f"image path {name} holds a zero byte")
    if ref.path.startswith(("http://", "https://")):
        raise RecordError(ref.origin, f"image {name} is a URL", "download it first")
    # On a bucket there are no links; "gs://" stands for the root above all buckets.
    start, real = ("gs://", posixpath.normpath) if on_bucket(ref.root) else ("", os.path.realpath)
    root = real(f"/{ref.root.removeprefix(start)}" if start else ref.root)
    given = ref.path.replace(start, "/", 1) if start else ref.path
    path = real(posixpath.join(root, given))
    if posixpath.commonpath([root, path]) != root or (on_bucket(ref.path) and not start):
        raise RecordError(
            ref.origin,
            f"image path {name} leads out of the data root {ref.root}",
            "move the image there, or set data.root (of a tool: --data_root) to a folder of both",
        )
    return start + path[1:] if start else path


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB as HF's image processor does (5.23): transparency goes over white.

    One difference on purpose: HF clips 16-bit greys at 255, which leaves a white square; here
    their upper 8 bits are kept.
    """
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, np.float64)
        if grey.max(initial=0) > 255:
            grey = grey // 256
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def load_image(ref: ImageRef, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image to RGB, upright by its EXIF tag (as HF's ``load_image`` does).

    A JPEG of more than ``max_pixels`` pixels, but no more than four times as many, is decoded at
    half its width and height. RecordError for a path outside the root, a missing, corrupt,
    truncated or empty file, an unknown format, and more pixels (checked before decoding).
    """
    name, data = shown(ref.path, 120) if ref.path else "bytes", image_bytes(ref)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                image.draft(None, (width // 2, height // 2))  # of JPEGs alone
            if math.prod(image.size) > max_pixels:
                raise RecordError(
                    ref.origin,
                    f"image {name} has {width} x {height} pixels, more than {max_pixels}",
                    "shrink it",
                )
            if not width * height:
                raise RecordError(ref.origin, f"image {name} has no pixels")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except RecordError:
        raise
    # PIL's decoders raise nearly anything on a damaged file (OSError, SyntaxError, struct.error,
    # zlib.error, DecompressionBombError, ...), and one bad file must not end a run.
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, UnidentifiedImageError):  # its own text holds a memory address
            text = f"none of {', '.join(FORMATS)}"
        raise RecordError(
            ref.origin, f"image {name} cannot be decoded ({text})", "replace the image"
        ) from None
