"""Masks as PNG files: one channel, the class id of each pixel, and the label set's palette where one fits.

Masks are flat areas, so most rows equal the one above. PNG's filter "up" makes those zeros, and run lengths are then
all the compression that is wanted: a tenth of the time of Pillow's encoder, which takes no filter for palettes, and for
masks of trained networks fewer bytes (`python -m jobs.bench.masks` compares).
"""

import io
import struct
import zlib

import numpy as np
from zlib_ng import zlib_ng

from model.labels import Colour, LabelSet
from pipeline.pillow import Image

PALETTE_COLOURS = 256  # all that a PNG palette holds; more classes make a 16-bit mask without one
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, PALETTE = 0, 3  # colour types (PNG specification, 11.2.1)
UP = 2  # filter type: each byte less the one above (9.2)


def encode_mask(mask: np.ndarray, labels: LabelSet) -> bytes:
    """PNG of class ids (H, W), uint8 with a palette or uint16. Any viewer shows the first one in colour."""
    height, width = mask.shape
    coloured = mask.dtype == np.uint8
    samples = mask if coloured else mask.astype(">u2").view(np.uint8)  # (H, bytes of a row)
    rows = np.empty((height, 1 + samples.shape[1]), np.uint8)
    rows[:, 0] = UP
    rows[0, 1:] = samples[0]
    np.subtract(samples[1:], samples[:-1], out=rows[1:, 1:])
    run_lengths = zlib_ng.compressobj(1, zlib_ng.DEFLATED, zlib_ng.MAX_WBITS, zlib_ng.DEF_MEM_LEVEL, zlib_ng.Z_RLE)
    colours = bytes(part for colour in labels.palette[:PALETTE_COLOURS] for part in colour)
    header = struct.pack(">IIBBBBB", width, height, 8 * mask.itemsize, PALETTE if coloured else GREY, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", run_lengths.compress(rows) + run_lengths.flush())]
    if coloured:
        chunks.insert(1, chunk(b"PLTE", colours))
    return b"".join([SIGNATURE, *chunks, chunk(b"IEND", b"")])


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk: length, kind, data, checksum (5.3)."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decode_mask(png: bytes) -> np.ndarray:
    """Class ids (H, W), uint8 or uint16, as `encode_mask` got them: indices, never colours."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        pixels = np.asarray(image)
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)


def read_palette(png: bytes, classes: int) -> list[Colour] | None:
    """The colour of each class in a mask's palette; None where it has none, as 16 bits have."""
    colours = palette(png)
    return colours if len(colours) == classes else None


def palette(png: bytes) -> list[Colour]:
    """The colours of a mask's palette, as many as it has: none where it has none."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        parts = image.getpalette() or []
    return [(red, green, blue) for red, green, blue in zip(parts[::3], parts[1::3], parts[2::3], strict=True)]


def overlay(image: np.ndarray, mask: np.ndarray, labels: LabelSet, opacity: float = 0.55) -> np.ndarray:
    """uint8 (H, W, 3): the image with each class laid over it in its colour."""
    colours = np.array(labels.palette, dtype=np.float32)[mask]
    return (image * (1 - opacity) + colours * opacity).astype(np.uint8)
