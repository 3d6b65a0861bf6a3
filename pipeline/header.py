"""What an image is, from its first bytes: format, size and orientation, before memory is spent on its pixels.

The content decides, whatever the name or the store says. Only formats in `FORMATS` are ever opened: Pillow's other
readers can start programs or follow paths. Of the bytes no more are read than that needs, since they may have to come
over the network: for AVIF and HEIC all, for the others mostly some hundred.
"""

import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from PIL import AvifImagePlugin, ImageFile, UnidentifiedImageError

from pipeline.pillow import Image

try:
    from pillow_heif import register_heif_opener
except ImportError:  # it is an extra
    HEIF: tuple[str, ...] = ()
else:
    HEIF = ("HEIF",)
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", *HEIF)
SUFFIXES: tuple[str, ...] = (  # all that is an image by name
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx"),
)
SIGNATURES = {  # of what a decoder here might know, and yet refuse
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "BMP": b"BM",
    "JPEG2000": b"\0\0\0\x0cjP  \r\n\x87\n",
}
NOT_KNOWN = re.compile("cannot handle|unsupported|unable to determine", re.IGNORECASE)  # Pillow's words for it
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
MAX_SIDE = 2**31 - 1  # pixels; what no image has, but a damaged header can say
WEBP_EXIF = 0x08  # the flag in a VP8X chunk

Image.init()  # registers all of FORMATS but HEIF; by itself Pillow begins with fewer
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the road has as many threads that decode as there are CPUs


class DecodeError(Exception):
    """An image that cannot be used: `status` as in the schema, and one line that says why."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Header:
    """What an image's header says; `width` and `height` in pixels, after EXIF orientation.

    `orientation` (1 to 8) is what is left to do to the pixels that the format's decoder gives.
    """

    format: str
    width: int
    height: int
    orientation: int = 1


def upright(name: str, width: int, height: int, turn: int) -> Header:
    """The header of an image that is stored with this width and height; raises `DecodeError` if it has no pixels."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise DecodeError("unreadable", f"the header is damaged: {width}x{height} pixels")
    if turn in TURNED:
        width, height = height, width
    return Header(name, width, height, turn)


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """Pillow's view of an encoded image whose header has been read."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        pass
    except Exception as error:  # Pillow documents no set of errors for damaged data, and raises almost all
        raise DecodeError("unreadable", f"the header is damaged: {one_line(error)}") from None
    file.seek(0)
    beginning = file.read(12)
    if beginning[4:8] == b"ftyp":
        brand = beginning[8:12].decode("ascii", "replace")
        remedy = "" if HEIF else "; HEIC needs the extra: pip install swath[heif]"
        raise DecodeError("unsupported", f"an ISO media file of brand {brand!r}, which no decoder here reads{remedy}")
    for name, signature in SIGNATURES.items():
        if beginning.startswith(signature):
            raise refusal(name, file)
    raise DecodeError("unreadable", f"not an image in a known format (begins with {beginning!r})")


def refusal(name: str, file: BinaryIO) -> DecodeError:
    """Why Pillow does not open an image of this format, which only the format's own reader says."""
    try:
        file.seek(0)
        Image.OPEN[name][0](file, "")
    except Exception as error:
        status = "unsupported" if NOT_KNOWN.search(str(error)) else "unreadable"
        return DecodeError(status, f"a {name} file that cannot be opened: {one_line(error)}")
    raise AssertionError("what opens alone opens in Image.open")


def orientation(exif: bytes | None) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or it is broken. What XMP may say does not count."""
    if not exif:
        return 1
    try:
        tags = Image.Exif()
        tags.load(exif)
        return next((turn for turn in range(1, 9) if turn == tags.get(ORIENTATION)), 1)
    except Exception:  # a broken tag can raise almost anything, and is no reason to lose the image
        return 1


def webp_header(file: BinaryIO, beginning: bytes) -> Header:
    """The canvas of a WebP file and the orientation in its EXIF chunk, without the rest, all of which Pillow would
    read, and spend memory on the canvas (RFC 9649, sections 2.5 to 2.7).
    """
    kind, turn = beginning[12:16], 1
    if kind == b"VP8 " and beginning[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", beginning.ljust(30), 26))
    elif kind == b"VP8L" and beginning[20:21] == b"\x2f":
        sides = int.from_bytes(beginning[21:25], "little")
        width, height = 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    elif kind == b"VP8X":
        width, height = (1 + int.from_bytes(beginning[at : at + 3], "little") for at in (24, 27))
        if beginning[20] & WEBP_EXIF:
            turn = orientation(webp_chunk(file, b"EXIF"))
    else:
        raise DecodeError("unreadable", f"the header is damaged: a WebP file that begins with {kind!r}")
    return upright("webp", width, height, turn)


def webp_chunk(file: BinaryIO, wanted: bytes) -> bytes:
    """What is in the first chunk of this kind."""
    position = 12
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            raise DecodeError(
                "unreadable", f"the file ends before the {wanted.decode()} chunk that its header promises"
            )
        kind, size = struct.unpack("<4sI", head)
        if kind == wanted:
            return file.read(size)
        position += 8 + size + size % 2


def one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
