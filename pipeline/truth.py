"""Ground truth: the bytes of a mask file to class ids, by rules; or the reason why that cannot be.

    palette images           by their indices; by their colours where the truth map has colours alone
    grey, 1 to 32 bits       by value, as it is stored
    RGB, RGBA                by colour: those of the truth map, or where it has none the colours of the classes

Nothing is ever converted: a grey of colours, or a colour of an index, would be an id that nobody meant. So what lossy
compression has changed is refused, and what no class is known for is an error that says which and how many pixels.
Transparency is ignored. Of colours and ids a table is made once, in which pixels are then looked up.
"""

import difflib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import ImageFile
from tifffile import COMPRESSION, PHOTOMETRIC

from model.labels import Colour
from model.scores import IGNORED
from pipeline import tiff
from pipeline.config import ConfigurationError
from pipeline.decode import TURNS
from pipeline.header import TURNED, DecodeError, one_line, open_image, orientation

FORMATS = ("PNG", "BMP", "GIF", "WEBP")  # that are without loss, WebP where it says so; and TIFF
LOSSLESS = (
    *(COMPRESSION.NONE, COMPRESSION.CCITTRLE, COMPRESSION.CCITT_T4, COMPRESSION.CCITT_T6, COMPRESSION.LZW),
    *(COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.PACKBITS, COMPRESSION.LZMA, COMPRESSION.ZSTD),
)
NOT_MEANT = 1 | 4  # kinds of TIFF pages: smaller copies, masks of transparency
MODES = ("1", "L", "LA", "P", "PA", "I", "I;16", "I;16B", "I;16L", "RGB", "RGBA")  # Pillow's, of ids or colours
GREY_UNIT = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies samples of 2 and 4 bits
UNKNOWN = -2  # in tables: no class
NAMED = 3  # unknown ids or colours that an error names
OTHERS = "*"
ID = re.compile(r"-?[0-9]{1,18}")
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


class TruthError(Exception):
    """A mask file without ids: `status` is `unreadable`, `unsupported`, `unknown` or `size`, and one line says why."""

    def __init__(self, status: str, why: str):
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Rules:
    """What the ids and colours of mask files mean: pairs of each, an id or 0xRRGGBB, with its class or IGNORED."""

    classes: int
    ids: tuple[tuple[int, int], ...]
    colours: tuple[tuple[int, int], ...]
    twice: tuple[int, ...] = ()  # colours that several classes have, which so mean none
    ignores_others: bool = False  # instead of refusing what is in neither
    is_by_colour: bool = False  # also of palette images


def truth_rules(
    names: Sequence[str],
    palette: Sequence[Colour] = (),
    ignore_ids: Sequence[int] | None = None,
    reduce_labels: bool = False,
    truth_map: Mapping[str, str] | None = None,
) -> Rules:
    """The rules for the classes `names`, which have the colours `palette`.

    `ignore_ids` are ids as they are in files (None: 255, if no class has it). With `reduce_labels` 0 is ignored, and
    the others stand for the class one below. `truth_map` says of ids, of #RRGGBB colours and of all others (*) which
    class they are, by name or id, or `ignore`. Where it says which id is a class, only its ids are known, and likewise
    its colours; where it only ignores some, the others stay what they are. Raises `ConfigurationError`.
    """
    given = truth_map or {}
    of_ids: dict[int, int] = {}
    of_colours: dict[int, int] = {}
    for key, text in given.items():
        meant = class_of(key, text, names)
        if COLOUR.fullmatch(key):
            say(of_colours, int(key[1:], 16), meant, key)
        elif ID.fullmatch(key):
            say(of_ids, int(key), meant, key)
        elif key != OTHERS:
            raise ConfigurationError(
                f"truth_map: {key!r} is no id, no colour (#RRGGBB), and not {OTHERS} for all others"
            )
        elif meant != IGNORED:
            raise ConfigurationError(f"truth_map: {OTHERS} is all other ids and colours, which can only be ignored")
    maps_ids, maps_colours = (any(one != IGNORED for one in some.values()) for some in (of_ids, of_colours))
    if maps_ids and reduce_labels:
        raise ConfigurationError("reduce_labels: a truth_map of ids says what each of them is; leave one of them out")
    for one in ignore_ids or ():
        say(of_ids, one, IGNORED, f"ignore_id {one}")
    ids = {} if maps_ids else {one + reduce_labels: one for one in range(len(names))}
    ids |= ({0: IGNORED} if reduce_labels else {}) | of_ids
    if ignore_ids is None:
        ids.setdefault(255, IGNORED)
    twice = set()
    if not maps_colours:
        codes = [red << 16 | green << 8 | blue for red, green, blue in palette]
        twice = {code for code in codes if codes.count(code) > 1} - set(of_colours)
        of_colours = {code: one for one, code in enumerate(codes) if code not in twice} | of_colours
    return Rules(
        classes=len(names),
        ids=tuple(sorted(ids.items())),
        colours=tuple(sorted(of_colours.items())),
        twice=tuple(sorted(twice)),
        ignores_others=OTHERS in given,
        is_by_colour=maps_colours and not maps_ids,
    )


def say(meanings: dict[int, int], code: int, meant: int, key: str) -> None:
    """Add what an id or a colour means. Raises `ConfigurationError` where it is said to mean something else."""
    if meanings.setdefault(code, meant) != meant:
        raise ConfigurationError(f"{key}: is said to mean different things; say one of them")


def class_of(key: str, text: str, names: Sequence[str]) -> int:
    """The id of the class that is named in a map, or IGNORED. Raises `ConfigurationError`."""
    if text in names:
        return list(names).index(text)
    if text == "ignore":
        return IGNORED
    if ID.fullmatch(text) and 0 <= int(text) < len(names):
        return int(text)
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {len(names):,} classes, such as {names[0]!r}"
    raise ConfigurationError(f"{key}={text}: no class has this name or id; {hint}")


def read_truth(data: bytes, rules: Rules, size: tuple[int, int] | None = None) -> np.ndarray:
    """int32 (H, W): class ids or IGNORED, of a mask file that must have this (height, width).

    An orientation in EXIF is applied, as it is to images. Raises `TruthError`.
    """
    try:
        stored = read_tiff(data, size) if data.startswith(tiff.SIGNATURES) else read_other(data, size)
    except TruthError:
        raise
    except DecodeError as error:
        raise TruthError("unreadable" if error.status == "unreadable" else "unsupported", str(error)) from None
    except Exception as error:  # neither Pillow nor tifffile documents what it raises for damaged data
        raise TruthError("unreadable", f"the data is damaged: {one_line(error)}") from None
    return look_up(stored, rules)


@dataclass(frozen=True)
class Stored:
    """Pixels as a file has them: ids (H, W), or colours uint8 (H, W, 3); with the colours that ids have, (N, 3)."""

    pixels: np.ndarray
    palette: np.ndarray | None = None


def read_other(data: bytes, size: tuple[int, int] | None) -> Stored:
    """What Pillow reads."""
    if not data:
        raise TruthError("unreadable", "the file is empty (0 bytes)")
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    image = open_image(io.BytesIO(data))
    if image.format not in FORMATS or (image.format == "WEBP" and is_lossy_webp(data)):
        raise lossy(str(image.format))
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise TruthError("unsupported", f"an animation of {frames:,} images, any of which might be meant")
    turn = orientation(image.info.get("exif"))
    check_size(image.size, turn, size)
    kind = str(image.tile[0].args) if image.tile and image.format == "PNG" else ""  # how samples are stored
    if ";16" in kind and not image.mode.startswith("I"):
        raise TruthError("unsupported", "several samples of 16 bits a pixel; ids have one, colours 8 bits")
    if image.mode not in MODES:
        raise TruthError("unsupported", f"pixels of the kind {image.mode}, which are neither ids nor colours")
    image.load()
    pixels = np.asarray(image)
    if image.mode == "1":
        pixels = np.minimum(pixels.view(np.uint8), 1)  # Pillow's bits are 0 and 255
    elif image.mode in ("LA", "PA"):
        pixels = pixels[..., 0]
    elif image.mode == "RGBA":
        pixels = pixels[..., :3]
    if kind in GREY_UNIT:
        pixels = pixels // np.uint8(GREY_UNIT[kind])
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if image.mode in ("P", "PA") else None
    return Stored(turned(pixels, turn), palette)


def read_tiff(data: bytes, size: tuple[int, int] | None) -> Stored:
    """What tifffile reads, which gives samples as they are."""
    tiff.check_whole(data)
    page = tiff.open_page(io.BytesIO(data))
    if page.compression not in LOSSLESS:
        raise lossy(f"TIFF file with compression {page.compression}")
    kinds = [int(getattr(one, "subfiletype", 0)) for one in page.parent.pages]
    if (pages := sum(not kind & NOT_MEANT for kind in kinds)) > 1:
        raise TruthError("unsupported", f"{pages:,} pages, any of which might be meant")
    turn = page.tags.valueof(tiff.ORIENTATION, default=1)
    check_size((page.imagewidth, page.imagelength), turn, size)
    colours = tiff.COLOURS[page.photometric]
    if page.samplesperpixel - colours not in (0, len(page.extrasamples)) or page.photometric == PHOTOMETRIC.SEPARATED:
        raise TruthError("unsupported", f"{page.samplesperpixel} samples a pixel, which are neither ids nor colours")
    if page.dtype is None or page.dtype.kind not in "uib" or (colours == 3 and page.dtype != np.uint8):
        raise TruthError("unsupported", f"samples of {page.dtype}; ids are whole numbers, colours have 8 bits")
    stored = page.asarray(squeeze=False, maxworkers=1)  # (planes, 1, H, W, samples): planes or samples are 1
    samples = stored[0, 0] if len(stored) == 1 else stored[:, 0, :, :, 0].transpose(1, 2, 0)
    pixels = samples[..., 0] if colours == 1 else samples[..., :3]
    if page.photometric != PHOTOMETRIC.PALETTE:
        return Stored(turned(pixels, turn))
    return Stored(turned(pixels, turn), (np.asarray(page.colormap) >> 8).astype(np.uint8).T)


def lossy(kind: str) -> TruthError:
    why = f"a {kind}, whose compression may change ids and colours; ground truth must be kept without loss, as in PNG"
    return TruthError("unsupported", why)


def is_lossy_webp(data: bytes) -> bool:
    """Whether a WebP file has any image that is not lossless (RFC 9649, section 2)."""
    position = 12
    while position + 8 <= len(data):
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        if kind in (b"VP8 ", b"ANMF"):
            return kind == b"VP8 "
        position += 8 + length + length % 2
    return False


def check_size(found: tuple[int, int], turn: int, wanted: tuple[int, int] | None) -> None:
    """Raise `TruthError` where a stored (width, height) is not the (height, width) that is wanted."""
    width, height = found if turn not in TURNED else found[::-1]
    if wanted and wanted != (height, width):
        raise TruthError("size", f"it is {width}x{height}, its image {wanted[1]}x{wanted[0]}")


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    return TURNS[turn](pixels) if turn in TURNS else pixels


def look_up(stored: Stored, rules: Rules) -> np.ndarray:
    """The class of each pixel, or IGNORED. Raises `TruthError` where one has none."""
    pixels, shown = stored.pixels, "{}"
    if pixels.ndim == 3:
        pixels, shown = codes(pixels), "#{:06x}"
        found = colour_table(rules)[pixels] + UNKNOWN
    elif stored.palette is not None and rules.is_by_colour:
        table = np.full(max(256, len(stored.palette)), UNKNOWN, np.int32)
        colours = np.zeros(len(table), np.uint32)
        colours[: len(stored.palette)] = codes(stored.palette)
        table[: len(stored.palette)] = colour_table(rules)[codes(stored.palette)] + UNKNOWN
        found = table[pixels]
        pixels, shown = colours[pixels], "#{:06x}"
    else:
        found = classes_of(pixels, rules)
    unknown = found == UNKNOWN
    if unknown.any():
        if not rules.ignores_others:
            raise unknown_error(pixels[unknown], shown, rules)
        found[unknown] = IGNORED
    return found


def codes(colours: np.ndarray) -> np.ndarray:
    """0xRRGGBB of uint8 (..., 3)."""
    found = colours[..., 0].astype(np.uint32)
    for part in (1, 2):
        found <<= 8
        found |= colours[..., part]
    return found


def classes_of(ids: np.ndarray, rules: Rules) -> np.ndarray:
    """int32 (H, W): the class of each id, IGNORED or UNKNOWN."""
    table = id_table(rules)
    if ids.dtype in (bool, np.uint8, np.uint16):
        return table[ids.astype(np.uint8) if ids.dtype == bool else ids]
    is_low = (ids >= 0) & (ids < len(table))
    found = table[np.where(is_low, ids, 0).astype(np.int64)]
    if not is_low.all():
        found[~is_low] = UNKNOWN
        for one, meant in rules.ids:
            if not 0 <= one < len(table):
                found[ids == one] = meant
    return found


@lru_cache(maxsize=4)
def id_table(rules: Rules) -> np.ndarray:
    """int32: the class of each id of up to 16 bits, IGNORED or UNKNOWN."""
    table = np.full(1 << 16, UNKNOWN, np.int32)
    for one, meant in rules.ids:
        if 0 <= one < len(table):
            table[one] = meant
    return table


@lru_cache(maxsize=4)
def colour_table(rules: Rules) -> np.ndarray:
    """int32: the class of each of all colours, less UNKNOWN; memory is only spent where a colour has one."""
    table = np.zeros(1 << 24, np.int32)
    for code, meant in rules.colours:
        table[code] = meant - UNKNOWN
    return table


def unknown_error(values: np.ndarray, shown: str, rules: Rules) -> TruthError:
    """Which ids or colours no class has, and how many pixels have them."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:NAMED]
    named = [f"{shown.format(found[one])} ({counts[one]:,} pixel{'s' * int(counts[one] > 1)})" for one in order]
    others = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    first = found[order[0]]
    is_twice = shown != "{}" and first in rules.twice
    what = ("colours" if shown != "{}" else "ids") + (" of several classes" if is_twice else " of no class")
    remedy = f"--truth-map='{shown.format(first)}=ignore' leaves one out; a map with classes has to name them all"
    return TruthError("unknown", f"{what}: {', '.join(named)}{others}; {remedy}")
