"""TIFF, the format that holds anything: Pillow reads samples of up to 8 bits, tifffile deeper ones and odd layouts.

tifffile gives samples as they are stored; `samples.py` says how they become bytes. Pillow would clip some of these, and
read signed bytes, white-is-zero of 16 bits and planes of 16 bits that are stored apart wrongly.
"""

import io
import logging
import math
from typing import BinaryIO

import numpy as np
from PIL.TiffImagePlugin import TiffImageFile
from tifffile import PHOTOMETRIC, TiffFile, TiffPage

from pipeline.header import DecodeError, Header, one_line, upright
from pipeline.samples import bands, limits, over_background, to_bytes

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF
BITS_PER_SAMPLE, SAMPLE_FORMAT, ORIENTATION = 258, 339, 274  # tags
UNSIGNED = 1  # a sample format
COLOURS: dict[int, int] = {  # samples of a pixel that are colour; what comes after them is alpha or of no use
    PHOTOMETRIC.MINISWHITE: 1,
    PHOTOMETRIC.MINISBLACK: 1,
    PHOTOMETRIC.PALETTE: 1,
    PHOTOMETRIC.RGB: 3,
    PHOTOMETRIC.SEPARATED: 4,
}
INVERTED = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.SEPARATED)  # more is darker
PREMULTIPLIED, ALPHA = 1, 2  # kinds of extra samples
MOST_BYTES = 32  # of a pixel: RGBA in doubles
LARGEST_TILE = 1 << 22  # pixels of a tile that may be larger than its image

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of damaged files becomes a row


def read_header(file: BinaryIO) -> Header:
    """The header of a TIFF file's first page; raises `DecodeError`."""
    if image := open_plain(file):
        return upright("tiff", *image.size, 1)
    page = open_page(file)
    turn = page.tags.valueof(ORIENTATION, default=1)
    return upright("tiff", page.imagewidth, page.imagelength, turn if turn in range(1, 9) else 1)


def open_plain(file: BinaryIO) -> TiffImageFile | None:
    """Pillow's view of a page of unsigned samples of up to 8 bits, which it turns upright by itself; else None."""
    try:
        file.seek(0)
        image = TiffImageFile(file)
        bits, kinds = image.tag_v2.get(BITS_PER_SAMPLE, (1,)), image.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))
    except Exception:  # whatever it is, tifffile has the last word
        return None
    image.info.pop("xmp", None)  # where Pillow would look for an orientation if the tag is missing
    return image if max(bits) <= 8 and set(kinds) == {UNSIGNED} else None


def open_page(file: BinaryIO) -> TiffPage:
    """tifffile's view of the first page; raises `DecodeError` for what cannot be read in reasonable memory."""
    try:
        file.seek(0)
        page = TiffFile(file).pages.first
        odd = next((reason for is_odd, reason in oddities(page) if is_odd), None)
    except Exception as error:  # it documents no set of errors for damaged data
        raise DecodeError("unreadable", f"the TIFF header is damaged: {one_line(error)}") from None
    if odd:
        raise DecodeError("unsupported", f"a TIFF file with {odd}")
    return page


def oddities(page: TiffPage) -> list[tuple[bool, str]]:
    """What no decoder here knows, and whether the page is so."""
    pixels = page.imagewidth * page.imagelength
    colours = COLOURS.get(page.photometric, math.inf)
    tile = page.tilewidth * page.tilelength * page.tiledepth if page.is_tiled else 0
    return [
        (colours > page.samplesperpixel, f"photometric interpretation {page.photometric} of {page.samplesperpixel}"),
        (page.imagedepth != 1, f"{page.imagedepth} planes in depth"),
        (page.dtype is None or page.dtype.kind not in "uifb", f"samples of {page.bitspersample} bits"),
        (page.nbytes > MOST_BYTES * pixels, f"{page.samplesperpixel} samples of {page.bitspersample} bits a pixel"),
        (tile > max(pixels, LARGEST_TILE), f"tiles of {tile:,} pixels"),
        (page.photometric == PHOTOMETRIC.PALETTE and page.colormap is None, "no palette"),
    ]


def check_whole(data: bytes) -> None:
    """Raise ValueError if strips or tiles of the first page are missing, which decoders do not notice in every case."""
    page = TiffFile(io.BytesIO(data)).pages.first
    ends = [at + count for at, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if page.is_contiguous:
        ends.append(page.dataoffsets[0] + page.nbytes)
    elif len(ends) < math.prod(page.chunked):
        raise ValueError(f"there are {len(ends):,} strips or tiles of {math.prod(page.chunked):,}")
    if max(ends, default=0) > len(data):
        raise ValueError(f"the pixels should go on to byte {max(ends):,}, and there are {len(data):,}")


def decode_page(data: bytes) -> np.ndarray:
    """The first page by tifffile as it is stored, uint8 (H, W, 3) RGB; what is cut off is black.

    Raises `DecodeError`, and for damaged data almost anything.
    """
    page = open_page(io.BytesIO(data))
    if page.is_contiguous and page.dataoffsets[0] + page.nbytes > len(data):
        stored = cut_off(page, data)
    else:
        stored = page.asarray(squeeze=False, maxworkers=1)  # (planes, 1, H, W, samples): planes or samples are 1
    samples = stored[0, 0] if len(stored) == 1 else stored[:, 0, :, :, 0].transpose(1, 2, 0)
    pixels = np.empty((*samples.shape[:2], 3), np.uint8)
    low_high = limits(samples[..., : COLOURS[page.photometric]])
    for rows in bands(*samples.shape[:2]):
        pixels[rows] = to_rgb(page, samples[rows], low_high)
    return pixels


def cut_off(page: TiffPage, data: bytes) -> np.ndarray:
    """The samples of an uncompressed page whose data ends early, (planes, 1, H, W, samples)."""
    samples = np.zeros(math.prod(page.shaped), page.dtype)
    start, kind = page.dataoffsets[0], samples.dtype.newbyteorder(page.parent.byteorder)
    there = np.frombuffer(data, kind, max(0, len(data) - start) // kind.itemsize, min(start, len(data)))
    samples[: len(there)] = there
    return samples.reshape(page.shaped)


def to_rgb(page: TiffPage, samples: np.ndarray, low_high: tuple[float, float]) -> np.ndarray:
    """uint8 (H, W, 3) of a page's samples (H, W, S)."""
    count, bits = COLOURS[page.photometric], page.bitspersample
    if page.photometric == PHOTOMETRIC.PALETTE and page.colormap is not None:  # (3, colours), uint16
        return (page.colormap[:, samples[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
    colour = to_bytes(samples[..., :count], bits, low_high)
    if page.photometric in INVERTED:
        colour = 255 - colour
    if page.photometric == PHOTOMETRIC.SEPARATED:  # now less ink is more, and black takes from all
        colour = (colour[..., :3].astype(np.uint16) * colour[..., 3:] // 255).astype(np.uint8)
    colour = np.broadcast_to(colour, (*colour.shape[:2], 3))
    extra = page.extrasamples[:1]
    if samples.shape[2] == count or extra not in ((PREMULTIPLIED,), (ALPHA,)):
        return colour
    top = np.iinfo(samples.dtype).max if samples.dtype.kind == "i" else 1.0
    return over_background(colour, to_bytes(samples[..., count], bits, (0.0, top)), extra == (PREMULTIPLIED,))
