"""Images of records: paths that stay inside, damage, bombs, modes and rotation."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from data_helpers import noise_image, png
from PIL import Image

from srpo_jax.data.errors import RecordError
from srpo_jax.data.images import ImageRef, load_image, to_rgb


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(load_image(ImageRef("f:1", data=data)))


# --- image paths ---


def test_paths_that_leave_the_root_are_refused(tmp_path):
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    noise_image(56, 56).save(tmp_path / "secret.png")
    noise_image(56, 56).save(root / "in.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "in.png")
    (tmp_path / "database").mkdir()
    noise_image(56, 56).save(tmp_path / "database" / "x.png")
    for path in (
        "../secret.png",
        "sub/../../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "folder/secret.png",
        "../database/x.png",  # shares the root's name as a prefix
    ):
        with pytest.raises(RecordError, match="leads out of the data root"):
            load_image(ImageRef("f:1", path, str(root)))
    for path in ("in.png", "inner.png", "sub/../in.png", str(root / "in.png")):
        assert load_image(ImageRef("f:1", path, str(root))).size == (56, 56)
    # A link to the root itself is fine, and a wider root allows what the record asks for.
    (tmp_path / "alias").symlink_to(root)
    assert load_image(ImageRef("f:1", "in.png", str(tmp_path / "alias"))).size == (56, 56)
    assert load_image(ImageRef("f:1", "data/link.png", str(tmp_path))).size == (56, 56)


@pytest.mark.parametrize(
    "path, reason",
    [
        ("none.png", "cannot be read"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("https://example.com/a.png", "is a URL"),
        ("a\0b.png", "zero byte"),
        ("empty.png", "cannot be decoded"),
        ("text.png", "cannot be decoded"),
        ("cut.png", "cannot be decoded"),
        ("postscript.eps", "cannot be decoded"),
    ],
)
def test_unreadable_images_are_record_errors(tmp_path, path, reason):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(png(noise_image(200, 200))[:5000])
    noise_image(20, 20).save(tmp_path / "postscript.eps")
    with pytest.raises(RecordError, match=reason) as error:
        load_image(ImageRef("d.jsonl:4", path, str(tmp_path)))
    assert error.value.origin == "d.jsonl:4" and "\n" not in str(error.value)


def test_the_reason_holds_nothing_that_changes_between_runs():
    with pytest.raises(RecordError) as error:
        _pixels(b"not an image")
    assert "0x" not in error.value.reason and "PNG" in error.value.reason


def test_a_path_without_a_root_is_refused():
    with pytest.raises(RecordError, match="no data root"):
        load_image(ImageRef("f:1", "a.png"))


def test_every_truncation_and_bit_flip_is_survived():
    data = png(noise_image(40, 40))
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(8, len(data), 3):
            broken[place] ^= 1 << int(rng.integers(8))
        try:
            assert _pixels(bytes(broken[: rng.integers(1, len(data))])).shape[-1] == 3
        except RecordError:
            pass


def _png_header(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_500, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_decoding(side):
    with pytest.raises(RecordError, match="more than|DecompressionBomb"):
        _pixels(_png_header(side, side))


def test_the_pixel_limit_is_exact():
    data = png(Image.new("L", (100, 50)))
    assert load_image(ImageRef("f:1", data=data), max_pixels=5000).size == (100, 50)
    with pytest.raises(RecordError, match="100 x 50 pixels, more than 4999"):
        load_image(ImageRef("f:1", data=data), max_pixels=4999)


def test_a_large_jpeg_is_decoded_at_half_its_size_and_other_formats_are_refused():
    held = {}
    for name in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.new("RGB", (200, 100), "red").save(file, name)
        held[name] = ImageRef("f:1", data=file.getvalue())
    assert load_image(held["JPEG"], max_pixels=20_000).size == (200, 100)
    assert load_image(held["JPEG"], max_pixels=5000).size == (100, 50)
    for name, most in (("PNG", 19_999), ("JPEG", 4999)):
        with pytest.raises(RecordError, match=f"pixels, more than {most}"):
            load_image(held[name], max_pixels=most)


# --- image modes ---


def _hf_rgb(image: Image.Image) -> np.ndarray:
    from transformers.image_transforms import convert_to_rgb

    return np.asarray(convert_to_rgb(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "PA", "YCbCr"])
def test_modes_convert_as_in_hf(mode):
    base = noise_image(33, 21)
    image = base.convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(33 * 21, dtype=np.uint8).reshape(21, 33)))
    image = image.convert(mode) if mode in ("LA", "RGBA") else base.convert(mode.rstrip("A"))
    if mode == "PA":
        image = base.convert("P")
        image.info["transparency"] = 3
    buffer = io.BytesIO()
    image.save(buffer, {"CMYK": "JPEG", "YCbCr": "TIFF"}.get(mode, "PNG"))
    decoded = Image.open(io.BytesIO(buffer.getvalue()))
    if "A" in mode and (_hf_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))) == 0).all():
        pytest.skip("this transformers drops transparency; ours follows 5.23")
    assert (_pixels(buffer.getvalue()) == _hf_rgb(decoded)).all()
    assert _pixels(buffer.getvalue()).shape == (21, 33, 3)


def test_transparency_goes_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (_pixels(png(clear)) == 255).all()
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert abs(_pixels(png(half))[0, 0].astype(int) - [255, 127, 127]).max() <= 1


def test_sixteen_bit_greys_keep_their_picture():
    values = np.array([[0, 255, 256, 1000], [30_000, 32_768, 65_279, 65_535]], np.uint16)
    expected = [[0, 0, 1, 3], [117, 128, 254, 255]]
    assert _pixels(png(Image.fromarray(values)))[..., 0].tolist() == expected
    wide = Image.fromarray(values.astype(np.int32))
    assert np.asarray(to_rgb(wide))[..., 1].tolist() == expected
    small = Image.fromarray(np.array([[0, 7], [200, 255]], np.int32))
    assert np.asarray(to_rgb(small))[..., 2].tolist() == [[0, 7], [200, 255]]


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (40, 20), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the camera's left edge is the top
    pixels = _pixels(png(image, exif=exif))
    assert pixels.shape == (40, 20, 3) and pixels[0, 19].tolist() == [255, 255, 255]


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1), (3, 100)])
def test_thin_images_load(size):
    assert load_image(ImageRef("f:1", data=png(noise_image(*size)))).size == size
