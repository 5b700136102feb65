"""Untrusted image files and bytes -> RGB pictures; every fault becomes a ``RecordError``."""

import io
import os
import stat
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from srpo_jax.data.errors import RecordError, shown

# More pixels than this are refused before anything is decoded (a 2 kB file can claim billions);
# the number is PIL's own warning level.
MAX_IMAGE_PIXELS = 89_478_485
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


def resolve_path(ref: ImageRef) -> str:
    """The real path of a file image; RecordError where it is missing or leaves the data root.

    Symbolic links are followed first, so that neither ``..`` nor a link leads out.
    """
    name = shown(ref.path, 120)
    if not ref.root:
        raise RecordError(ref.origin, f"image path {name}, but no data root", "set data.root")
    if "\0" in ref.path:
        raise RecordError(ref.origin, f"image path {name} holds a zero byte")
    if ref.path.startswith(("http://", "https://")):
        raise RecordError(ref.origin, f"image {name} is a URL", "download it first")
    root = os.path.realpath(ref.root)
    path = os.path.realpath(os.path.join(root, ref.path))
    if os.path.commonpath([root, path]) != root:
        raise RecordError(
            ref.origin,
            f"image path {name} leads out of the data root {ref.root}",
            "move the image there, or set data.root (of a tool: --data_root) to a folder of both",
        )
    try:
        status = os.stat(path)
    except OSError as error:
        raise RecordError(
            ref.origin, f"image {name} cannot be read ({error.strerror})", f"is it in {root}?"
        ) from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
        raise RecordError(ref.origin, f"image {name} is not a regular file")
    if status.st_size > MAX_IMAGE_BYTES:
        raise RecordError(ref.origin, f"image {name} has {status.st_size} bytes", "shrink it")
    return path


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

    RecordError for a path outside the root, a missing, corrupt, truncated or empty file, an
    unknown format, and more than ``max_pixels`` pixels (checked before decoding).
    """
    name = shown(ref.path, 120) if ref.path else "bytes"
    try:
        data = ref.data
        if data is None:
            with open(resolve_path(ref), "rb") as file:
                data = file.read()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
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
