"""One small file of every format, mode and depth that collections hold, beside the pixels that it means.

Whoever writes a file here is another library than the one that reads it, or the file is made by hand.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

HEIGHT, WIDTH = 38, 54
COLOUR = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
ALPHA = COLOUR[::-1, :, 1]
SMOOTH = np.stack(  # what lossy formats keep
    [np.add.outer(np.arange(HEIGHT) * (3 - c), np.arange(WIDTH) * (c + 1)) for c in range(3)], axis=2
).astype(np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # of what is stored to what is meant (EXIF 2.3, 4.6.4 A)
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@dataclass(frozen=True)
class Picture:
    """A file and its meaning: upright uint8 (H, W, 3), and by how much lossy pixels may differ."""

    name: str
    format: str
    data: bytes
    pixels: np.ndarray
    tolerance: int = 0


@lru_cache
def gallery() -> list[Picture]:
    makers = (jpegs, pngs, palettes, webps, tiffs, deep_tiffs, bmps, gifs, isos, jpeg2000s, orientations)
    return [picture for make in makers for picture in make()]


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What a half transparent image is on white; alpha from 0 to 1."""
    return np.rint(colour * alpha[..., None] + 255.0 * (1 - alpha[..., None])).astype(np.uint8)


def jpegs() -> Iterator[Picture]:
    options: dict[str, dict[str, object]] = {
        "baseline 4:4:4": {"subsampling": 0},
        "baseline 4:2:0": {"subsampling": 2},
        "4:1:1": {"subsampling": "4:1:1"},
        "progressive": {"progressive": True},
        "restart markers": {"restart_marker_blocks": 2},
        "RGB in Adobe's marker": {"keep_rgb": True},
    }
    for name, option in options.items():
        yield Picture(f"JPEG {name}", "jpeg", encoded(SMOOTH, "JPEG", quality=95, **option), SMOOTH, 12)
    smooth_grey = SMOOTH[..., 0]
    yield Picture("JPEG grey", "jpeg", encoded(smooth_grey, "JPEG", quality=95), rgb(smooth_grey), 8)
    inks = np.dstack([255 - SMOOTH, np.full((HEIGHT, WIDTH), 51, np.uint8)])  # 0 is no ink
    printed = np.rint(SMOOTH * 0.8).astype(np.uint8)
    for space in ("CMYK", "YCCK"):  # written as Adobe does, inverted
        data = imagecodecs.jpeg8_encode(255 - inks, level=95, colorspace="CMYK", outcolorspace=space)
        yield Picture(f"JPEG {space}", "jpeg", data, printed, 12)
    at = (data := imagecodecs.jpeg8_encode(255 - inks, level=95, colorspace="CMYK", outcolorspace="CMYK")).index(
        b"\xff\xee"
    )
    bare = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]
    assert b"Adobe" not in bare
    yield Picture("JPEG CMYK without Adobe's marker", "jpeg", bare, printed, 12)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, depth: int, colour: int, chunks: bytes = b"", interlaced: bool = False) -> bytes:
    """A PNG by hand, from the specification; samples (H, W, S) of so many bits."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, right in passes:
        for row in samples[top::down, left::right]:
            bits = (row.reshape(-1, 1) >> np.arange(depth)[::-1]) & 1
            rows += b"\0" + np.packbits(bits.astype(np.uint8)).tobytes()
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, interlaced)
    parts = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def pngs() -> Iterator[Picture]:
    for depth in (1, 2, 4, 8, 16):
        top = 2**depth - 1
        grey = (DEEP[..., :1] & top).astype(np.uint32)
        meant = rgb((grey[..., 0] >> 8 if depth == 16 else grey[..., 0] * 255 // top).astype(np.uint8))
        one = int(grey[0, 0, 0])
        gone = np.where(grey == one, 255, meant).astype(np.uint8)
        for interlaced in (False, True):
            how = f"PNG grey {depth}{' interlaced' if interlaced else ''}"
            yield Picture(how, "png", png(grey, depth, 0, b"", interlaced), meant)
            hidden = chunk(b"tRNS", struct.pack(">H", one))
            yield Picture(f"{how} tRNS", "png", png(grey, depth, 0, hidden, interlaced), gone)
    for depth, samples in ((8, COLOUR), (16, DEEP)):
        meant = (samples >> (depth - 8)).astype(np.uint8)
        other = samples.copy()
        other[1, 1] = other[0, 0] ^ 1  # all but the colour that is transparent
        gone = (other >> (depth - 8)).astype(np.uint8)
        gone[(other == other[0, 0]).all(axis=2)] = 255
        alpha = samples[::-1, :, :1]
        share = (alpha[..., 0] >> (depth - 8)) / 255
        grey_meant, with_alpha = rgb(meant[..., 1]), np.concatenate([samples, alpha], axis=2)
        hidden = chunk(b"tRNS", struct.pack(">HHH", *(int(v) for v in other[0, 0])))
        yield Picture(f"PNG RGB {depth}", "png", png(samples, depth, 2), meant)
        yield Picture(f"PNG RGB {depth} interlaced", "png", png(samples, depth, 2, b"", True), meant)
        yield Picture(f"PNG RGB {depth} tRNS", "png", png(other, depth, 2, hidden), gone)
        yield Picture(
            f"PNG grey alpha {depth}", "png", png(with_alpha[..., [1, 3]], depth, 4), on_white(grey_meant, share), 1
        )
        yield Picture(f"PNG RGBA {depth}", "png", png(with_alpha, depth, 6), on_white(meant, share), 1)
    profile = chunk(b"iCCP", b"odd\0\0" + zlib.compress(b"no profile"))
    yield Picture("PNG with a profile", "png", png(COLOUR, 8, 2, profile), COLOUR)
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    yield Picture("PNG animated", "png", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), COLOUR)
    late = png(COLOUR, 8, 2)[:-12] + chunk(b"eXIf", exif(6)) + chunk(b"IEND", b"")  # its place is before the pixels
    yield Picture("PNG with EXIF after the pixels", "png", late, COLOUR)


def palettes() -> Iterator[Picture]:
    for depth in (1, 2, 4, 8):
        count = 2**depth
        colours, indices = COLOUR.reshape(-1, 3)[:count], (GREY & (count - 1))[..., None]
        plain = chunk(b"PLTE", colours.tobytes())
        partly = np.linspace(0, 255, max(1, count // 2)).astype(np.uint8)
        alpha = np.full(count, 255, np.uint8)
        alpha[: len(partly)] = partly
        meant = colours[indices[..., 0]]
        yield Picture(f"PNG palette {depth}", "png", png(indices, depth, 3, plain), meant)
        yield Picture(f"PNG palette {depth} interlaced", "png", png(indices, depth, 3, plain, True), meant)
        hidden = png(indices, depth, 3, plain + chunk(b"tRNS", partly.tobytes()))
        yield Picture(f"PNG palette {depth} tRNS", "png", hidden, on_white(meant, alpha[indices[..., 0]] / 255), 1)


def webps() -> Iterator[Picture]:
    rgba = np.dstack([COLOUR, np.maximum(ALPHA, 1)])  # of what is invisible the colour may be lost
    meant = on_white(COLOUR, rgba[..., 3] / 255)
    yield Picture("WebP lossless", "webp", imagecodecs.webp_encode(COLOUR, lossless=True), COLOUR)
    yield Picture("WebP lossless alpha", "webp", imagecodecs.webp_encode(rgba, lossless=True), meant, 1)
    yield Picture("WebP lossy", "webp", imagecodecs.webp_encode(SMOOTH, level=95), SMOOTH, 12)
    lossy = np.dstack([SMOOTH, ALPHA])
    yield Picture(
        "WebP lossy alpha", "webp", imagecodecs.webp_encode(lossy, level=95), on_white(SMOOTH, ALPHA / 255), 12
    )
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield Picture("WebP animated", "webp", animated, COLOUR)
    paletted = Image.fromarray(COLOUR // 64 * 64).quantize(8)
    yield Picture("WebP palette", "webp", encoded(paletted, "WEBP", lossless=True), np.asarray(paletted.convert("RGB")))


def tiff(samples: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **({"photometric": "rgb"} | options))  # type: ignore[arg-type]
    return file.getvalue()


def tiffs() -> Iterator[Picture]:
    """Of up to 8 bits, written by tifffile, or by libtiff where Pillow asks it."""
    for compression in (None, "lzw", "deflate", "zstd", "packbits", "lzma"):
        for name, option in {"strips": {"rowsperstrip": 7}, "tiles": {"tile": (16, 32)}}.items():
            data = tiff(COLOUR, compression=compression, **option)
            yield Picture(f"TIFF {compression} {name}", "tiff", data, COLOUR)
    planes = np.moveaxis(COLOUR, 2, 0)
    yield Picture("TIFF planes", "tiff", tiff(planes, planarconfig="separate"), COLOUR)
    yield Picture("TIFF planes LZW", "tiff", tiff(planes, planarconfig="separate", compression="lzw"), COLOUR)
    yield Picture("TIFF predictor", "tiff", tiff(COLOUR, compression="lzw", predictor=True), COLOUR)
    yield Picture("TIFF big-endian", "tiff", tiff(COLOUR, byteorder=">"), COLOUR)
    yield Picture("TIFF BigTIFF", "tiff", tiff(COLOUR, bigtiff=True), COLOUR)
    yield Picture("TIFF two pages", "tiff", tiff(np.stack([COLOUR, 255 - COLOUR])), COLOUR)
    yield Picture("TIFF grey", "tiff", tiff(GREY, photometric="minisblack"), rgb(GREY))
    yield Picture("TIFF white is zero", "tiff", tiff(GREY, photometric="miniswhite"), rgb(255 - GREY))
    bits = GREY > 127
    yield Picture("TIFF bilevel", "tiff", tiff(bits, photometric="minisblack"), rgb(bits * np.uint8(255)))
    for name in ("group3", "group4"):
        fax = encoded(Image.fromarray(bits), "TIFF", compression=name)
        yield Picture(f"TIFF {name}", "tiff", fax, rgb(bits * np.uint8(255)))
    colours = COLOUR.reshape(-1, 3)[:256]
    table = colours.T.astype(np.uint16) * 257
    yield Picture("TIFF palette", "tiff", tiff(GREY, photometric="palette", colormap=table), colours[GREY])
    share = ALPHA / 255
    for kind, colour in (("unassalpha", COLOUR), ("assocalpha", np.rint(COLOUR * share[..., None]))):
        samples = np.dstack([colour.astype(np.uint8), ALPHA])
        yield Picture(f"TIFF {kind}", "tiff", tiff(samples, extrasamples=[kind]), on_white(COLOUR, share), 2)
        grey = samples[..., [0, 3]]
        data = tiff(grey, photometric="minisblack", extrasamples=[kind])
        yield Picture(f"TIFF grey {kind}", "tiff", data, on_white(rgb(GREY), share), 2)
    inks = np.dstack([255 - COLOUR, np.full((HEIGHT, WIDTH), 51, np.uint8)])
    yield Picture("TIFF CMYK", "tiff", tiff(inks, photometric="separated"), np.rint(COLOUR * 0.8).astype(np.uint8), 1)
    yield Picture("TIFF JPEG", "tiff", tiff(SMOOTH, compression="jpeg", compressionargs={"level": 95}), SMOOTH, 12)
    yield Picture("TIFF JPEG 4:2:0", "tiff", encoded(SMOOTH, "TIFF", compression="jpeg", quality=95), SMOOTH, 12)


def deep_tiffs() -> Iterator[Picture]:
    meant = (DEEP >> 8).astype(np.uint8)
    planes = np.moveaxis(DEEP, 2, 0)
    options: dict[str, dict[str, object]] = {
        "strips": {"rowsperstrip": 5},
        "tiles": {"tile": (16, 16)},
        "big-endian": {"byteorder": ">"},
        "LZW predictor": {"compression": "lzw", "predictor": True},
        "ZSTD tiles": {"compression": "zstd", "tile": (32, 16)},
        "BigTIFF": {"bigtiff": True},
    }
    for name, option in options.items():
        yield Picture(f"TIFF RGB 16 {name}", "tiff", tiff(DEEP, **option), meant)
    yield Picture("TIFF RGB 16 planes", "tiff", tiff(planes, planarconfig="separate"), meant)
    tiled = tiff(planes, planarconfig="separate", tile=(16, 16), compression="deflate")
    yield Picture("TIFF RGB 16 planes tiles", "tiff", tiled, meant)
    grey = DEEP[..., 0]
    yield Picture("TIFF grey 16", "tiff", tiff(grey, photometric="minisblack"), rgb(meant[..., 0]))
    yield Picture("TIFF white is zero 16", "tiff", tiff(grey, photometric="miniswhite"), rgb(255 - meant[..., 0]))
    packed = tiff(grey >> 4, photometric="minisblack", bitspersample=12)
    yield Picture("TIFF grey 12", "tiff", packed, rgb(meant[..., 0]))
    wide = DEEP.astype(np.uint32) << 16
    yield Picture("TIFF RGB 32", "tiff", tiff(wide), meant)
    yield Picture("TIFF grey 32", "tiff", tiff(wide[..., 0], photometric="minisblack"), rgb(meant[..., 0]))
    alpha = DEEP[::-1, :, :1]
    share = (alpha[..., 0] >> 8) / 255
    data = tiff(np.concatenate([DEEP, alpha], axis=2), extrasamples=["unassalpha"])
    yield Picture("TIFF RGBA 16", "tiff", data, on_white(meant, share), 1)
    inks = np.dstack([65535 - DEEP, np.full((HEIGHT, WIDTH), 51 * 257, np.uint16)])
    yield Picture("TIFF CMYK 16", "tiff", tiff(inks, photometric="separated"), np.rint(meant * 0.8).astype(np.uint8), 2)
    for kind in (np.float16, np.float32, np.float64):
        unit = (COLOUR / 255).astype(kind)
        yield Picture(f"TIFF RGB {kind.__name__}", "tiff", tiff(unit), COLOUR, 1)
    elevation = SMOOTH[..., 0].astype(np.float32) * 3 - 400
    low, high = elevation[0, 3:].min(), elevation.max()
    stretched = np.rint((elevation - low).clip(0) * (255 / (high - low))).astype(np.uint8)
    elevation[0, :3], stretched[0, :3] = (np.nan, np.inf, -np.inf), (0, 255, 0)
    floats = tiff(elevation, photometric="minisblack", compression="deflate", predictor=True)
    yield Picture("TIFF float beyond 0..1", "tiff", floats, rgb(stretched), 1)
    for kind in (np.int8, np.int16, np.int32):
        bounds = np.iinfo(kind)
        scale = (bounds.max - bounds.min) / 255
        signed = (bounds.min + np.floor(SMOOTH[..., 0] * scale)).astype(kind)
        signed[0, :2] = bounds.min, bounds.max
        expected = SMOOTH[..., 0].copy()
        expected[0, :2] = 0, 255
        yield Picture(f"TIFF {kind.__name__}", "tiff", tiff(signed, photometric="minisblack"), rgb(expected), 1)


def bmps() -> Iterator[Picture]:
    yield Picture("BMP 24", "bmp", encoded(COLOUR, "BMP"), COLOUR)
    yield Picture("BMP 8", "bmp", encoded(GREY, "BMP"), rgb(GREY))
    yield Picture("BMP 1", "bmp", encoded(Image.fromarray(GREY > 127), "BMP"), rgb((GREY > 127) * np.uint8(255)))
    colours = COLOUR.reshape(-1, 3)[:16]
    table = np.pad(colours[:, ::-1], ((0, 0), (0, 1))).tobytes()
    indices = GREY & 15
    rows = ((indices[::-1, ::2] << 4) | indices[::-1, 1::2]).astype(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).tobytes()
    yield Picture("BMP 4", "bmp", bmp(4, 0, table, padded), colours[indices])
    runs = b"".join(b"".join(bytes([1, v]) for v in row) + b"\0\0" for row in GREY[::-1]) + b"\0\1"
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, axis=1) * np.array([1, 1, 1, 0], np.uint8)
    yield Picture("BMP RLE8", "bmp", bmp(8, 1, greys.tobytes(), runs), rgb(GREY))
    runs = b"".join(b"".join(bytes([1, v << 4]) for v in row) + b"\0\0" for row in indices[::-1]) + b"\0\1"
    yield Picture("BMP RLE4", "bmp", bmp(4, 2, table, runs), colours[indices])
    fives = COLOUR >> 3
    words = (fives[..., 0].astype("<u2") << 10) | (fives[..., 1].astype("<u2") << 5) | fives[..., 2]
    yield Picture("BMP 16", "bmp", bmp(16, 0, b"", words[::-1].astype("<u2").tobytes()), np.rint(fives * (255 / 31)), 1)
    quads = np.dstack([COLOUR[..., ::-1], ALPHA])  # the fourth byte has no meaning here
    yield Picture("BMP 32", "bmp", bmp(32, 0, b"", quads[::-1].tobytes()), COLOUR)
    yield Picture("BMP top-down", "bmp", bmp(32, 0, b"", quads.tobytes(), -HEIGHT), COLOUR)


def bmp(bits: int, compression: int, table: bytes, rows: bytes, height: int = HEIGHT) -> bytes:
    """A BMP by hand; rows from the bottom, but of a negative height."""
    start = 54 + len(table)
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, bits, compression, len(rows), 0, 0, len(table) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + table + rows


def gifs() -> Iterator[Picture]:
    paletted = Image.fromarray(COLOUR // 64 * 64).quantize(64)
    meant, indices = np.asarray(paletted.convert("RGB")), np.asarray(paletted)
    yield Picture("GIF", "gif", encoded(paletted, "GIF"), meant)
    gone = np.where((indices == 7)[..., None], 255, meant).astype(np.uint8)
    yield Picture("GIF transparent", "gif", encoded(paletted, "GIF", transparency=7), gone)
    frames = [Image.fromarray(np.full((HEIGHT, WIDTH, 3), value, np.uint8)) for value in (10, 200)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield Picture("GIF animated", "gif", animated, np.asarray(frames[0]))
    small = bytearray(encoded(Image.new("P", (20, 10)), "GIF"))  # black, on a canvas that it does not cover
    small[6:10] = struct.pack("<HH", WIDTH, HEIGHT)
    at = small.index(b"\x2c")
    small[at + 1 : at + 5] = struct.pack("<HH", 30, 20)
    covered = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    covered[20:30, 30:50] = 0
    yield Picture("GIF smaller than its canvas", "gif", bytes(small), covered)


def isos() -> Iterator[Picture]:
    """AVIF and HEIC."""
    rgba, meant = np.dstack([SMOOTH, ALPHA]), on_white(SMOOTH, ALPHA / 255)
    yield Picture("AVIF", "avif", imagecodecs.avif_encode(SMOOTH, level=98), SMOOTH, 12)
    yield Picture(
        "AVIF 10 bits",
        "avif",
        imagecodecs.avif_encode(SMOOTH.astype(np.uint16) * 4, level=98, bitspersample=10),
        SMOOTH,
        12,
    )
    yield Picture("AVIF alpha", "avif", imagecodecs.avif_encode(rgba, level=100), meant, 12)
    frames = [Image.fromarray(SMOOTH), Image.fromarray(255 - SMOOTH)]
    animated = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:], quality=98)
    yield Picture("AVIF animated", "avif", animated, SMOOTH, 12)
    yield Picture("HEIC", "heif", encoded(SMOOTH, "HEIF", quality=98), SMOOTH, 14)
    yield Picture("HEIC alpha", "heif", encoded(Image.fromarray(rgba), "HEIF", quality=98), meant, 14)


def jpeg2000s() -> Iterator[Picture]:
    rgba, meant = np.dstack([COLOUR, ALPHA]), on_white(COLOUR, ALPHA / 255)
    for kind in ("jp2", "j2k"):
        data = imagecodecs.jpeg2k_encode(COLOUR, level=0, codecformat=kind, reversible=True)
        yield Picture(f"JPEG 2000 {kind}", "jpeg2000", data, COLOUR)
    deep = DEEP[..., 0]
    lossless = {"level": 0, "reversible": True, "codecformat": "jp2"}
    yield Picture(
        "JPEG 2000 grey 16", "jpeg2000", imagecodecs.jpeg2k_encode(deep, **lossless), rgb((deep >> 8).astype(np.uint8))
    )
    yield Picture(
        "JPEG 2000 RGB 16", "jpeg2000", imagecodecs.jpeg2k_encode(DEEP, **lossless), (DEEP >> 8).astype(np.uint8)
    )
    yield Picture("JPEG 2000 alpha", "jpeg2000", imagecodecs.jpeg2k_encode(rgba, **lossless), meant, 1)
    tiles = encoded(COLOUR, "JPEG2000", tile_size=(16, 16))
    yield Picture("JPEG 2000 tiles", "jpeg2000", tiles, COLOUR)


def exif(orientation: int) -> bytes:
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)


def orientations() -> Iterator[Picture]:
    for turn, upright in TURNS.items():
        tag = b"Exif\0\0" + exif(turn)
        sharp, smooth = upright(COLOUR), upright(SMOOTH)
        jpeg = encoded(SMOOTH, "JPEG", quality=95, exif=tag)
        yield Picture(f"JPEG orientation {turn}", "jpeg", jpeg, smooth, 12)
        yield Picture(f"PNG orientation {turn}", "png", png(COLOUR, 8, 2, chunk(b"eXIf", exif(turn))), sharp)
        webp = encoded(COLOUR, "WEBP", lossless=True, exif=tag)
        yield Picture(f"WebP orientation {turn}", "webp", webp, sharp)
        tags = [(274, "H", 1, turn, False)]
        yield Picture(f"TIFF orientation {turn}", "tiff", tiff(COLOUR, extratags=tags), sharp)
        packed = tiff(COLOUR, extratags=tags, compression="lzw")
        yield Picture(f"TIFF LZW orientation {turn}", "tiff", packed, sharp)
        tiled = tiff(DEEP, extratags=tags, tile=(16, 16))
        yield Picture(f"TIFF 16 tiles orientation {turn}", "tiff", tiled, upright((DEEP >> 8).astype(np.uint8)))
        avif = encoded(SMOOTH, "AVIF", quality=98, subsampling="4:4:4", exif=exif(turn))  # Pillow writes irot and imir
        yield Picture(f"AVIF orientation {turn}", "avif", avif, smooth, 12)
        heic = encoded(SMOOTH, "HEIF", quality=98, chroma=444, exif=exif(turn))
        yield Picture(f"HEIC orientation {turn}", "heif", heic, smooth, 14)
