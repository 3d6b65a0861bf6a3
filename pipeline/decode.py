"""Bytes to pixels. Whatever the bytes are, the result is an RGB image or a `DecodeError` that becomes a row.

Only formats in `FORMATS` are ever opened: Pillow's other readers can start programs or follow paths. The number of
pixels is checked in the header, before memory is spent on them.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")
SUFFIXES: tuple[str, ...] = (  # all that is an image by name
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx"),
)
ORIENTATION = 0x0112  # the EXIF tag
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # what makes pixels (H, W, 3) of each orientation upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
TURNED = (5, 6, 7, 8)  # those that swap width and height
BACKGROUND = (255, 255, 255)  # behind transparent pixels

Image.init()  # registers all of FORMATS; by itself Pillow begins with fewer
Image.MAX_IMAGE_PIXELS = None  # the limit is a setting of the run, checked here against the header


class DecodeError(Exception):
    """An image that cannot be used: `status` as in the schema, and one line that says why."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Header:
    """What an image's first bytes say; `width` and `height` in pixels, after EXIF orientation."""

    format: str
    width: int
    height: int


def read_header(file: BinaryIO) -> Header:
    """The header of an encoded image, without decoding it; as much of `file` is read as that needs.

    Raises `DecodeError`; a `file` that is only the beginning of an image may be reported as unreadable.
    """
    image = open_image(file)
    width, height = image.size
    if orientation(image) in TURNED:
        width, height = height, width
    return Header((image.format or "").lower(), width, height)


def decode(data: bytes, max_pixels: int, admit: Callable[[int, int], None] = lambda height, width: None) -> np.ndarray:
    """The image in `data`, upright, as uint8 (H, W, 3) RGB. Raises `DecodeError`.

    `admit` is called with the height and width in the header, before memory is spent on the pixels.
    16-bit samples are scaled to 8, transparency is laid over white, an animation gives its first frame, colour
    profiles are ignored.
    """
    if not data:
        raise DecodeError("unreadable", "the file is empty (0 bytes)")
    image = open_image(io.BytesIO(data))
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(
            "too_large", f"{width}x{height} is {width * height:,} pixels, over --max-pixels {max_pixels:,}"
        )
    admit(height, width)
    try:
        pixels = fast_jpeg(image, data)
        if pixels is None:
            pixels = np.array(to_rgb(image))
        turn = TURNS.get(orientation(image))
        return np.ascontiguousarray(turn(pixels)) if turn else pixels
    except Exception as error:  # Pillow documents no set of errors for damaged data, and raises almost all
        raise DecodeError("unreadable", f"the {image.format} data is damaged: {one_line(error)}") from None


def fast_jpeg(image: Image.Image, data: bytes) -> np.ndarray | None:
    """The same pixels as Pillow's, RGB (H, W, 3), in half its time or less, as nothing is copied and other threads go
    on; None for what is not a sound JPEG in grey or RGB, which Pillow then judges.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (height, width, 3): antialiased bilinear, as the reference image processors."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last in memory
    scaled = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return scaled[0].permute(1, 2, 0).contiguous().numpy()


def open_image(file: BinaryIO) -> Image.Image:
    """Pillow's view of an encoded image whose header has been read."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        pass
    except Exception as error:
        raise DecodeError("unreadable", f"the header is damaged: {one_line(error)}") from None
    file.seek(0)
    beginning = file.read(12)
    if beginning[4:8] == b"ftyp":
        brand = beginning[8:12].decode("ascii", "replace")
        raise DecodeError("unsupported", f"an ISO media file of brand {brand!r} (HEIC?), which no decoder here reads")
    raise DecodeError("unreadable", f"not an image in a known format (begins with {beginning!r})")


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or the tag is broken. Never reads past what is read."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # it may follow the pixels, and Pillow would decode them to look
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken tag can raise almost anything, and is no reason to lose the image
        return 1
    return found if found in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode that Pillow decodes to."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        samples = np.asarray(image, dtype=np.float64)
        if image.mode == "I" and samples.min() >= 0 and samples.max() <= 65535:
            return Image.fromarray((samples / 257).astype(np.uint8)).convert("RGB")
        low, high = np.nanmin(samples), np.nanmax(samples)
        scaled = np.nan_to_num((samples - low) * (255 / max(high - low, 1e-12)))
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return image.convert("RGB")


def one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
