"""Bytes to pixels. Whatever the bytes are, the result is an RGB image or a `DecodeError` that becomes a row.

The number of pixels is checked in the header, before memory is spent on them, and what pixels go through on their way
to RGB they do some rows at a time. Pillow is the breadth. Where others are better they do the work: libjpeg-turbo for
JPEG, libpng for transparent colours of PNG, tifffile for deep samples. Colour profiles are ignored, as the networks
were trained: samples are taken for sRGB.
"""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import imagecodecs
import numpy as np
import simplejpeg
import torch
from PIL import ImageFile
from torch.nn import functional as F

from pipeline import tiff
from pipeline.header import (
    SUFFIXES,
    TURNED,
    DecodeError,
    Header,
    one_line,
    open_image,
    orientation,
    upright,
    webp_header,
)
from pipeline.pillow import Image
from pipeline.samples import BACKGROUND, bands, limits, over_background, to_bytes

__all__ = ["SUFFIXES", "DecodeError", "Decoded", "Header", "decode", "read_header", "resize"]

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # what makes pixels (H, W, 3) of each orientation upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
DCT_FACTORS = (8, 4, 2)  # by which libjpeg-turbo can shrink while it decodes, and fast
LOST = re.compile("premature end|bad huffman|bad arithmetic|found marker", re.IGNORECASE)  # libjpeg's words for it
LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0xd9")  # the end of the image: decoding lost its way
J2K_SIZE = b"\xff\x4f\xff\x51"  # how a JPEG 2000 codestream begins
GREEDY = ("JPEG2000", "AVIF", "HEIF")  # whose decoders take all the memory before they miss any data
BELIEVABLE = 10_000  # samples in a byte of these; a photograph has 10
ALWAYS_BELIEVED = 50_000_000  # samples, which may all be alike, and cost some hundred MB


@dataclass(frozen=True)
class Decoded:
    """An upright image. `pixels` is uint8 (h, w, 3) RGB; `height` and `width` are the image's own, in pixels.

    The pixels are that many too, but where fewer are enough and JPEG's scaled decoding gives them.
    """

    pixels: np.ndarray
    height: int
    width: int


def decode(
    data: bytes,
    max_pixels: int,
    admit: Callable[[int, int], tuple[int, int] | None] = lambda height, width: None,
    allow_truncated: bool = False,
) -> Decoded:
    """The image in `data`. Raises `DecodeError`.

    `admit` is called with the upright height and width in the header, before memory is spent on the pixels, and says
    which upright (height, width) is enough, or None for all pixels. Damaged data is an error; with `allow_truncated`
    it gives what can be read of it, the rest grey or black.

    Samples of more than 8 bits are scaled (`samples.py`), transparency is laid over white, an animation gives its
    first frame, a TIFF file its first page.
    """
    if not data:
        raise DecodeError("unreadable", "the file is empty (0 bytes)")
    ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated  # Pillow's only switch; all threads of a worker want the same
    header = read_header(io.BytesIO(data))
    width, height = header.width, header.height
    if width * height > max_pixels:
        raise DecodeError(
            "too_large", f"{width}x{height} is {width * height:,} pixels, over --max-pixels {max_pixels:,}"
        )
    enough = admit(height, width)
    try:
        pixels = read_pixels(data, header, enough, allow_truncated)
        if turn := TURNS.get(header.orientation):
            pixels = np.ascontiguousarray(turn(pixels))
    except DecodeError:
        raise
    except Exception as error:  # Pillow documents no set of errors for damaged data, and raises almost all
        raise DecodeError("unreadable", f"the {header.format} data is damaged: {one_line(error)}") from None
    is_scaled = enough and header.format in ("jpeg", "mpo")
    if pixels.shape[:2] != (height, width) and not is_scaled:
        found = "x".join(map(str, pixels.shape[1::-1]))
        raise DecodeError("unreadable", f"the header says {width}x{height} pixels, and there are {found}")
    return Decoded(pixels, height, width)


def read_header(file: BinaryIO) -> Header:
    """The header of an encoded image, without decoding it; as much of `file` is read as that needs.

    Raises `DecodeError`; a `file` that is only the beginning of an image may be reported as unreadable.
    """
    try:
        file.seek(0)
        beginning = file.read(30)
        if beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP":
            return webp_header(file, beginning)
        if beginning.startswith(tiff.SIGNATURES):
            return tiff.read_header(file)
        image = open_image(file)
        turn = 1 if image.format == "HEIF" else orientation(image.info.get("exif"))  # libheif turns by itself
        return upright((image.format or "").lower(), *image.size, turn)
    except DecodeError:
        raise
    except Exception as error:  # whatever the bytes are
        raise DecodeError("unreadable", f"the header is damaged: {one_line(error)}") from None


def read_pixels(data: bytes, header: Header, enough: tuple[int, int] | None, allow_truncated: bool) -> np.ndarray:
    """The pixels as they are stored, not turned yet, uint8 (H, W, 3)."""
    file = io.BytesIO(data)
    if header.format == "tiff":
        if not allow_truncated:
            tiff.check_whole(data)
        plain = tiff.open_plain(file)
        return from_pillow(plain) if plain else tiff.decode_page(data)
    if header.format in ("jpeg", "mpo"):
        pixels = read_jpeg(data, header, enough, allow_truncated)
        if pixels is not None:
            return pixels
    image = open_image(file)
    if image.format in GREEDY and math.prod(image.size) * 3 > max(ALWAYS_BELIEVED, BELIEVABLE * len(data)):
        raise ValueError(f"{len(data):,} bytes cannot be {header.width}x{header.height} pixels")
    if image.format == "JPEG2000":
        return read_jpeg2000(data, image)
    if image.format == "PNG" and image.mode != "P" and "transparency" in image.info:
        try:  # one colour is transparent, which libpng compares before it scales the samples, and Pillow after
            return from_samples(imagecodecs.png_decode(data))
        except imagecodecs.PngError:
            if not allow_truncated:
                raise
    return from_pillow(image)


def read_jpeg(data: bytes, header: Header, enough: tuple[int, int] | None, allow_truncated: bool) -> np.ndarray | None:
    """The same pixels as Pillow's, uint8 (H, W, 3), in half its time or less, as nothing is copied and other threads
    go on; fewer where fewer are enough. None for what Pillow is to judge: oddities without a loss, or
    `allow_truncated`. Raises ValueError where samples are lost, which Pillow does not always notice.
    """
    smallest = {} if enough is None else scaled_size(header, *enough)
    try:
        if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
            return without_ink(simplejpeg.decode_jpeg(data, "CMYK", **smallest))
        return simplejpeg.decode_jpeg(data, "RGB", **smallest)
    except ValueError as error:
        if not allow_truncated and is_loss(str(error), data):
            raise
        return None


def scaled_size(header: Header, height: int, width: int) -> dict[str, int]:
    """simplejpeg's arguments for the fewest pixels that are still enough, upright; none where that is all of them."""
    for factor in DCT_FACTORS:
        if header.height // factor >= height and header.width // factor >= width:
            least_h, least_w = -(-header.height // factor), -(-header.width // factor)
            if header.orientation in TURNED:
                least_h, least_w = least_w, least_h
            return {"min_height": least_h, "min_width": least_w}
    return {}


def is_loss(complaint: str, data: bytes) -> bool:
    """Whether libjpeg's complaint, the first that it had, means that samples are wrong or missing."""
    if left_over := LEFT_OVER.search(complaint):
        return bytes(int(left_over[1])) + b"\xff\xd9" not in data  # some cameras put zeros before the end
    return bool(LOST.search(complaint))


def without_ink(samples: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) of a JPEG's CMYK (H, W, 4), changed in place.

    Samples say how little ink there is, which is Adobe's convention. Files without Adobe's marker might mean the
    opposite, but all that is about reads them so: Pillow, Chrome's Skia, Firefox.
    """
    np.subtract(255, samples, out=samples)
    pixels = np.empty((*samples.shape[:2], 3), np.uint8)
    for rows in bands(*samples.shape[:2]):
        pixels[rows] = Image.fromarray(samples[rows], "CMYK").convert("RGB")
    return pixels


def read_jpeg2000(data: bytes, image: ImageFile.ImageFile) -> np.ndarray:
    """uint8 (H, W, 3)."""
    depth = data[data.index(J2K_SIZE) + 42] & 0x7F  # bits of the first sample, less one (ISO 15444-1, A.5.1)
    if depth < 8 or image.mode == "I;16":
        return from_pillow(image)
    return from_samples(imagecodecs.jpeg2k_decode(data), depth + 1)  # here Pillow makes the brightest samples black


def from_samples(samples: np.ndarray, bits: int | None = None) -> np.ndarray:
    """RGB (H, W, 3) of grey or colour, with alpha if there are 2 or 4 samples (H, W, S), each of so many bits."""
    has_alpha, bits = samples.shape[2] % 2 == 0, bits or 8 * samples.itemsize
    pixels, low_high = np.empty((*samples.shape[:2], 3), np.uint8), limits(samples)
    for rows in bands(*samples.shape[:2]):
        band = to_bytes(samples[rows], bits, low_high)
        pixels[rows] = over_background(band[..., :-1], band[..., -1]) if has_alpha else band
    return pixels


def from_pillow(image: ImageFile.ImageFile) -> np.ndarray:
    """uint8 RGB (H, W, 3) of any image that Pillow decodes."""
    covered = image.tile[0].extents if image.format == "GIF" else None  # the first frame's part of the canvas
    image.load()
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    for rows in bands(height, width):
        pixels[rows] = to_rgb(image.crop((0, rows.start, width, rows.stop)))
    if covered and covered != (0, 0, width, height):
        left, top, right, bottom = covered
        pixels[:top], pixels[bottom:], pixels[:, :left], pixels[:, right:] = (BACKGROUND,) * 4
    return pixels


def to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of any mode."""
    if image.mode.startswith("I;16"):
        grey = to_bytes(np.asarray(image), 16, (0.0, 1.0))
        return np.broadcast_to(grey[..., None], (*grey.shape, 3))
    if image.has_transparency_data:
        layer = np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))
        return over_background(layer[..., :3], layer[..., 3])
    return np.asarray(image.convert("RGB"))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (height, width, 3): antialiased bilinear, as the reference image processors."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last in memory
    scaled = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return scaled[0].permute(1, 2, 0).contiguous().numpy()
