"""Bytes become upright RGB pixels, or an error with a status; nothing else."""

import contextlib
import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.decode import DecodeError, decode, read_header, resize

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind):
    data = encoded(Image.fromarray(PIXELS), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode(data, LIMIT).pixels, PIXELS)
    header = read_header(io.BytesIO(data))
    assert (header.format, header.width, header.height) == (kind.lower(), 53, 37)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation):
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), "PNG", exif=exif)
    upright = turns[orientation](PIXELS)
    assert np.array_equal(decode(data, LIMIT).pixels, upright)
    jpeg = encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)
    header = read_header(io.BytesIO(jpeg))
    assert (header.height, header.width) == upright.shape[:2] == decode(jpeg, LIMIT).pixels.shape[:2]


def test_a_broken_exif_tag_loses_no_image():
    """The resolution is a text here; the orientation beside it still counts."""
    entries = struct.pack("<HHHII", 2, 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"odd\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + bytes(4)
    jpeg = encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)
    header = read_header(io.BytesIO(jpeg))
    assert (header.height, header.width) == decode(jpeg, LIMIT).pixels.shape[:2] == (53, 37)


def test_16_bit_samples_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(encoded(Image.fromarray(ramp), kind), LIMIT).pixels[..., 0], ramp >> 8)


def test_transparent_pixels_lie_on_white_and_grey_becomes_rgb():
    rgba = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 0, np.uint8)])
    assert (decode(encoded(Image.fromarray(rgba), "PNG"), LIMIT).pixels == 255).all()
    grey = Image.fromarray(PIXELS[..., 0])
    assert np.array_equal(decode(encoded(grey, "PNG"), LIMIT).pixels, np.repeat(PIXELS[..., :1], 3, axis=2))


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data, LIMIT).pixels == 10).all()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "unreadable"),
        (b"This is no picture.", "unreadable"),
        (b"\x00\x00\x00\x20ftypheic" + bytes(40), "unsupported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable"),  # Pillow would start Ghostscript
        (encoded(Image.fromarray(PIXELS), "JPEG")[:700], "unreadable"),
        (encoded(Image.new("1", (40_000, 40_000)), "PNG"), "too_large"),
    ],
    ids=["empty", "text", "heic", "postscript", "truncated", "bomb"],
)
def test_what_cannot_be_used_says_why_in_one_line(data, status):
    with pytest.raises(DecodeError) as caught:
        decode(data, LIMIT)
    assert caught.value.status == status
    assert str(caught.value)
    assert "\n" not in str(caught.value)


SAMPLES = [encoded(Image.fromarray(PIXELS), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=4))), st.integers(0, 3000))
def test_damaged_bytes_are_pixels_or_an_error_and_nothing_else(data, patches, cut):
    damaged = bytearray(data[: len(data) - cut % len(data)])
    for position, patch in patches:
        damaged[position % (len(damaged) + 1) : position % (len(damaged) + 1) + len(patch)] = patch
    for work in (lambda: decode(bytes(damaged), LIMIT), lambda: read_header(io.BytesIO(damaged))):
        with contextlib.suppress(DecodeError):
            work()


def test_resizing_is_antialiased_as_the_reference_processors_resize():
    reference = np.asarray(Image.fromarray(PIXELS).resize((19, 11), Image.Resampling.BILINEAR), dtype=int)
    found = resize(PIXELS, 11, 19)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - reference).max() <= 1
    assert resize(PIXELS, 37, 53) is PIXELS


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"quality": 30}),
        ("RGB", {"quality": 95, "subsampling": 0}),
        ("RGB", {"subsampling": 1, "progressive": True}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_a_jpeg_has_the_pixels_that_pillow_finds(mode, options):
    data = encoded(Image.fromarray(PIXELS).convert(mode), "JPEG", **options)
    assert np.array_equal(decode(data, LIMIT).pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_jpeg_that_the_fast_decoder_refuses_is_pillows_to_judge():
    whole = encoded(Image.fromarray(PIXELS), "JPEG")
    scan = whole.index(b"\xff\xda")
    odd = whole[:scan] + b"\0\0\0" + whole[scan:]  # what stands between two markers is skipped, with a warning
    assert np.array_equal(decode(odd, LIMIT).pixels, decode(whole, LIMIT).pixels)
