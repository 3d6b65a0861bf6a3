"""Every format, mode, depth and orientation becomes the right pixels; what is damaged becomes an error, and cheaply."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.decode import DecodeError, decode, read_header
from tests.pipeline.gallery import COLOUR, DEEP, SMOOTH, Picture, chunk, encoded, exif, gallery, tiff

LIMIT = 100_000_000  # the default of --max-pixels
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("picture", gallery(), ids=lambda picture: picture.name)
def test_every_format_mode_depth_and_orientation_has_the_right_pixels(picture: Picture):
    found = decode(picture.data, LIMIT)
    size = picture.pixels.shape[:2]
    assert found.pixels.shape == picture.pixels.shape
    assert found.pixels.dtype == np.uint8
    assert np.abs(found.pixels.astype(int) - picture.pixels).max() <= picture.tolerance
    header = read_header(io.BytesIO(picture.data))
    assert (header.format, header.height, header.width) == (picture.format, *size)
    assert (found.height, found.width) == size


class Counting(io.BytesIO):
    """A file that counts what is read of it."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


NOISE = np.random.default_rng(2).integers(0, 256, (700, 700, 3), dtype=np.uint8)
LARGE = {
    **{kind: encoded(NOISE, kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "JPEG2000")},
    "TIFF 16": tiff(NOISE.astype(np.uint16) << 8),
    "WebP": encoded(NOISE, "WEBP", lossless=True),
    "WebP with EXIF": encoded(NOISE, "WEBP", lossless=True, exif=b"Exif\0\0" + exif(6)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_header_is_read_without_the_pixels(kind):
    file = Counting(LARGE[kind])
    header = read_header(file)
    assert (header.height, header.width) == (700, 700)
    assert file.taken < 5_000 < len(LARGE[kind]) / 10


@pytest.mark.parametrize("kind", LARGE)
def test_a_header_of_half_a_file_is_right_or_an_error(kind):
    try:
        header = read_header(io.BytesIO(LARGE[kind][: len(LARGE[kind]) // 2]))
    except DecodeError:
        return
    assert header == read_header(io.BytesIO(LARGE[kind]))


@pytest.mark.parametrize("kind", LARGE)
def test_a_truncated_image_is_an_error_unless_it_is_allowed(kind):
    data = LARGE[kind][: len(LARGE[kind]) // 2]
    with pytest.raises(DecodeError) as caught:
        decode(data, LIMIT)
    assert caught.value.status == "unreadable"
    if kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF 16"):  # others have a directory at the end, or no tolerant decoder
        found, whole = (decode(part, LIMIT, allow_truncated=True).pixels for part in (data, LARGE[kind]))
        assert 0.3 < (found == whole).all(axis=2).mean() < 0.7


def test_a_jpeg_that_lacks_only_its_end_is_an_error_unless_it_is_allowed():
    whole = encoded(SMOOTH, "JPEG")
    for cut in (whole[:-2], whole[:-20] + b"\xff\xd9"):
        with pytest.raises(DecodeError, match="remature end"):
            decode(cut, LIMIT)
    assert np.array_equal(decode(whole[:-2], LIMIT, allow_truncated=True).pixels, decode(whole, LIMIT).pixels)
    padded = whole[:-2] + bytes(9) + whole[-2:]
    assert np.array_equal(decode(padded, LIMIT).pixels, decode(whole, LIMIT).pixels)


@pytest.mark.parametrize("kind", ["grey 8", "RGB 16"])
def test_a_tiff_that_lacks_tiles_is_an_error(kind):
    samples = COLOUR if kind == "grey 8" else DEEP
    data = tiff(samples, tile=(16, 16), compression="deflate")
    lie = data.replace(struct.pack("<HHII", 257, 4, 1, 38), struct.pack("<HHII", 257, 4, 1, 380))
    assert lie != data
    with pytest.raises(DecodeError, match="12 strips or tiles of 96"):
        decode(lie, LIMIT)


def test_a_broken_orientation_counts_for_nothing_and_a_second_exif_segment_neither():
    upright = decode(encoded(SMOOTH, "JPEG"), LIMIT).pixels
    texts = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI4s", 0x0112, 2, 4, b"six\0") + bytes(4)
    endless = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x0112, 4, 1 << 30, 8) + bytes(4)
    for tag in (exif(0), exif(9), exif(65535), texts, endless, b"", b"MM\0*\xff\xff\xff\xff", exif(6)[:12]):
        jpeg = encoded(SMOOTH, "JPEG", exif=b"Exif\0\0" + tag)
        assert np.array_equal(decode(jpeg, LIMIT).pixels, upright)
    twice = encoded(SMOOTH, "JPEG", exif=b"Exif\0\0" + exif(6))
    at = twice.index(b"\xff\xe1")
    other = b"Exif\0\0" + exif(3)
    twice = (
        twice[:at]
        + twice[at : at + 4 + 32]
        + b"\xff\xe1"
        + struct.pack(">H", 2 + len(other))
        + other
        + twice[at + 36 :]
    )
    assert np.array_equal(decode(twice, LIMIT).pixels, np.rot90(upright, -1))


def test_an_orientation_in_xmp_counts_for_nothing():
    note = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = tiff(COLOUR, extratags=[(700, "B", len(note), note, True)])
    assert np.array_equal(decode(data, LIMIT).pixels, COLOUR)
    assert (read_header(io.BytesIO(data)).height, read_header(io.BytesIO(data)).width) == COLOUR.shape[:2]


def test_what_no_decoder_knows_is_unsupported():
    twelve = bytearray(encoded(SMOOTH, "JPEG"))
    twelve[twelve.index(b"\xff\xc0") + 4] = 12
    strange = tiff(COLOUR.astype(np.complex64), photometric="rgb")
    bands = tiff(np.zeros((8, 8, 60), np.uint16), photometric="minisblack", planarconfig="contig")
    for data in (bytes(twelve), strange, bands):
        with pytest.raises(DecodeError) as caught:
            decode(data, LIMIT)
        assert caught.value.status == "unsupported", caught.value


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("enough", "factor"), [(None, 1), ((70, 90), 1), ((60, 80), 2), ((60, 81), 1), ((15, 20), 8), ((1, 21), 4)]
)
def test_scaled_decoding_gives_the_fewest_pixels_that_are_enough(orientation, enough, factor):
    pixels = np.add.outer(np.arange(120), np.arange(160))[..., None].repeat(3, axis=2).astype(np.uint8) // 2
    stored = np.rot90(pixels) if orientation == 6 else pixels
    data = encoded(stored, "JPEG", quality=95, exif=b"Exif\0\0" + exif(orientation))
    found = decode(data, LIMIT, lambda height, width: enough)
    assert (found.height, found.width) == (120, 160)
    assert found.pixels.shape == (120 // factor, 160 // factor, 3)
    means = pixels.reshape(120 // factor, factor, 160 // factor, factor, 3).mean(axis=(1, 3))
    assert np.abs(found.pixels - means).mean() < 3


def bombs() -> dict[str, bytes]:
    """Small files that ask for much memory."""
    zeros = zlib.compress(bytes(200_000_000), 9)
    header = struct.pack(">IIBBBBB", 54, 38, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    end = chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    small = chunk(b"IDAT", zlib.compress(bytes(38 * (1 + 3 * 54)))) + chunk(b"IEND", b"")
    text = b"key\0\1\0\0\0" + zeros
    large = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    gif = bytearray(encoded(COLOUR, "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    strip = tiff(COLOUR, compression="deflate", rowsperstrip=38)
    offset = struct.unpack_from("<I", strip, strip.index(struct.pack("<HHI", 273, 4, 1)) + 8)[0]
    at = strip.index(struct.pack("<HHI", 279, 4, 1)) + 8
    lie = strip[:at] + struct.pack("<I", len(zeros)) + strip[at + 4 : offset] + zeros
    return {
        "PNG with too many rows": start + end,
        "PNG with a long text": start + chunk(b"iTXt", text) + small,
        "PNG with a large profile": start + chunk(b"iCCP", b"odd\0\0" + zeros) + small,
        "PNG with many texts": start + chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(900_000))) * 200 + small,
        "PNG of 3.6 gigapixels": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", large) + end,
        "GIF on a large canvas": bytes(gif),
        "TIFF with a large strip": lie,
        "TIFF of deep samples with a large strip": tiff(DEEP, compression="deflate")[:-4000] + zeros,
    }


GROWTH = """
import faulthandler, json, sys
from pathlib import Path
from pipeline.decode import DecodeError, decode
from pipeline.segment import resident_memory
from tests.pipeline.test_gallery import LIMIT, {files}

results = {{}}
for name, data, allow in {files}():
    faulthandler.dump_traceback_later(30, exit=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_memory("VmRSS")
    try:
        found = "pixels" if decode(data, LIMIT, allow_truncated=allow).pixels.size else "nothing"
    except DecodeError as error:
        found = error.status
    faulthandler.cancel_dump_traceback_later()
    results[name] = found, resident_memory("VmHWM") - before
print(json.dumps(results))
"""


def bombs_to_try() -> list[tuple[str, bytes, bool]]:
    return [(name, data, False) for name, data in bombs().items()]


def mutations() -> list[tuple[str, bytes, bool]]:
    """Of every picture: cut, bits flipped anywhere and in the header, and other sizes in the header."""
    random = np.random.default_rng(3)
    found = []
    for picture in gallery():
        data = picture.data
        allow = bool(random.random() < 0.2)
        found.append((f"{picture.name}, cut", data[: random.integers(1, len(data))], allow))
        for where, end in (("anywhere", len(data)), ("in the header", min(300, len(data)))):
            flipped = bytearray(data)
            for position in random.integers(0, end, random.integers(1, 9)):
                flipped[position] ^= 1 << int(random.integers(8))
            found.append((f"{picture.name}, flipped {where}", bytes(flipped), allow))
        for order in (">H", "<H", ">I", "<I") if random.random() < 0.4 else ():
            lie = data[:800]
            for side in (54, 38):
                lie = lie.replace(struct.pack(order, side), struct.pack(order, 9_999))
            if lie != data[:800]:
                found.append((f"{picture.name}, {order} 9,999 x 9,999", lie + data[800:], False))
    return found


def measure(files: str) -> dict[str, tuple[str, int]]:
    command = [sys.executable, "-W", "ignore", "-c", GROWTH.format(files=files)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_mutated_files_are_pixels_or_an_error_within_a_gigabyte_and_half_a_minute_each():
    results = measure("mutations")
    assert len(results) > 600
    statuses = [status for status, _ in results.values()]
    assert set(statuses) <= {"pixels", "unreadable", "unsupported", "too_large"}
    assert min(statuses.count(status) for status in ("pixels", "unreadable", "unsupported", "too_large")) > 0
    assert {name: bytes for name, (_, bytes) in results.items() if bytes > 1 << 30} == {}


def test_a_decompression_bomb_costs_nothing():
    results = measure("bombs_to_try")
    assert {name: found for name, found in results.items() if found[1] > 100 << 20} == {}
