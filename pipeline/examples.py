"""Images with their truth, looked through before anything is learned from them.

A training that meets a damaged image, or a mask of another size, in its third hour has lost three hours; one that
leaves them out in silence is another training than was asked for. So every pair is read once: what can be used is an
example, what cannot is counted, and named with its reason. The same pass counts the pixels of each class, which says
how much a class weighs, and, where nobody says which classes there are, which ids there are.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import duckdb
import numpy as np
import pyarrow as pa

from model.labels import Colour
from pipeline.ahead import ahead
from pipeline.attempts import ERRORS, is_of_one, reason
from pipeline.config import StorageSettings
from pipeline.config_truth import TruthSettings
from pipeline.containers import COLUMNS, ContainerError, NoImagesError
from pipeline.decode import decode
from pipeline.filesystems import public_url
from pipeline.header import DecodeError
from pipeline.masks import palette
from pipeline.pairs import Masks, list_files, pair, require_some
from pipeline.reader import ChangedError, Reader
from pipeline.truth import Rules, TruthError, read_truth

PLACE = ("uri", "etag", "bytes", "file", "position", "column")  # where an image or a mask lies, as `pairs.FILES` has it
EXAMPLE = pa.schema(
    [
        pa.field("name", pa.string(), metadata={"note": "of the image, below the root"}),
        *(
            pa.field(f"{what}_{part}", pa.int64() if part in ("bytes", "position") else pa.string())
            for what in ("image", "mask")
            for part in PLACE
        ),
        pa.field("height", pa.int32(), metadata={"note": "pixels, of both"}),
        pa.field("width", pa.int32()),
    ]
)
ROWS = 1024  # of a table, at once
ROWS_AT_ONCE = 256  # of a mask, while its pixels are counted
LOST = (FileNotFoundError, ChangedError)  # what was listed is not there any more
UNUSABLE = (DecodeError, TruthError, ContainerError, NoImagesError)
IN_ORDER = "SELECT * FROM examples ORDER BY name, image_uri"


class Progress(Protocol):
    """Whoever watches."""

    def checking(self, done: int, total: int, left_out: int) -> None:
        """Pairs that are looked through, of all; how many of them cannot be used."""


@dataclass(frozen=True)
class LeftOut:
    """What cannot be used, and why."""

    uri: str
    status: str
    reason: str


@dataclass(frozen=True)
class Listed:
    """Pairs as they are listed, unread; they are in the table `examples` of a workspace."""

    pairs: int
    digest: str  # SHA-256 of their names, places and versions
    left_out: list[LeftOut]  # images without a mask, masks without an image


@dataclass
class Checked:
    """What can be used, and what the truth of that holds."""

    examples: list[dict[str, Any]] = field(default_factory=list)  # rows of EXAMPLE
    left_out: list[LeftOut] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of each class
    palette: list[Colour] = field(default_factory=list)  # of the first mask that has one


def list_pairs(
    tables: duckdb.DuckDBPyConnection, images: str, masks: str, truth: TruthSettings, storage: StorageSettings
) -> Listed:
    """Fill the table `examples` with the pairs of an image and its mask. Raises `ConfigurationError`."""
    list_files(tables, "pictures", images, storage, COLUMNS)
    tables.execute("CREATE OR REPLACE TABLE images AS SELECT uri, name, true AS asked FROM pictures")
    pair(tables, masks, truth, storage)
    require_some(tables, images, masks)
    places = ", ".join(
        f"{side}.{part} AS {what}_{part}" for side, what in (("i", "image"), ("m", "mask")) for part in PLACE
    )
    tables.execute(
        f"CREATE OR REPLACE TABLE examples AS SELECT i.name, {places} FROM pairs p "  # noqa: S608
        "JOIN pictures i ON i.uri = p.image JOIN masks m ON m.uri = p.mask WHERE p.status = 'paired' "
        "QUALIFY row_number() OVER (PARTITION BY i.uri) = 1"  # a table may name a mask for many images
    )
    digest, pairs = hashlib.sha256(), 0
    for row in rows(tables, IN_ORDER):
        digest.update(json.dumps(list(row.values())).encode())
        pairs += 1
    others = tables.execute(
        "SELECT coalesce(image, mask), status, error FROM pairs WHERE status != 'paired' ORDER BY ALL"
    ).fetchall()
    plain = {"no_truth": "no mask has its name", "no_image": "no image has its name"}
    left_out = [LeftOut(public_url(uri), status, error or plain.get(status, status)) for uri, status, error in others]
    return Listed(pairs, digest.hexdigest(), left_out)


def rows(tables: duckdb.DuckDBPyConnection, query: str) -> Iterator[dict[str, Any]]:
    """The rows of a query, of which few are in memory at once."""
    found = tables.execute(query)
    names = [column[0] for column in found.description or ()]
    while some := found.fetchmany(ROWS):
        yield from (dict(zip(names, values, strict=True)) for values in some)


def check_pairs(
    pairs: Iterable[dict[str, Any]],
    total: int,
    rules: Rules,
    max_pixels: int,
    storage: StorageSettings,
    progress: Progress,
) -> Checked:
    """Read every pair, once and whole. Raises what a store that fails raises."""
    source, found = Masks(Reader(storage)), Checked(pixels=np.zeros(rules.classes, np.int64))
    looked_at = ahead(partial(look_at, source, rules, max_pixels), pairs)
    for done, (row, pixels, colours, why) in enumerate(looked_at, start=1):
        if why:
            found.left_out.append(why)
        else:
            found.examples.append(row)
            found.pixels += pixels
            found.palette = found.palette or colours
        progress.checking(done, total, len(found.left_out))
    return found


def look_at(
    source: Masks, rules: Rules, max_pixels: int, row: dict[str, Any]
) -> tuple[dict[str, Any], np.ndarray, list[Colour], LeftOut | None]:
    """A pair with its size, the pixels of each class in it and its mask's colours; or why it cannot be used."""
    at = row["image_uri"]

    def no(status: str, why: str) -> tuple[dict[str, Any], np.ndarray, list[Colour], LeftOut]:
        return row, np.zeros(0, np.int64), [], LeftOut(public_url(at), status, why)

    try:
        image = decode(source.fetch(place(row, "image")), max_pixels)
        at = row["mask_uri"]
        data = source.fetch(place(row, "mask"))
        truth = read_truth(data, rules, (image.height, image.width))
    except (DecodeError, TruthError) as error:
        return no(error.status, str(error))
    except FileNotFoundError:
        return no("missing", "it was listed and is no longer there")
    except ChangedError:
        return no("changed", "it is another one than was listed")
    except (ContainerError, NoImagesError, *ERRORS) as error:
        if not is_of_one(error):
            raise
        return no("unreadable", reason(error))
    pixels = np.zeros(rules.classes, np.int64)
    for start in range(0, len(truth), ROWS_AT_ONCE):
        part = truth[start : start + ROWS_AT_ONCE]
        found = np.bincount(part[part >= 0])
        pixels[: len(found)] += found
    if not pixels.any():
        return no("ignored", "every pixel of the mask is ignored")
    colours = palette(data) if data.startswith(b"\x89PNG") else []
    return row | {"height": image.height, "width": image.width}, pixels, colours, None


def place(row: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Where the image or the mask of an example lies."""
    return {part: row[f"{what}_{part}"] for part in PLACE}


def shared_out(checked: list[Checked], holdout: float, most: int) -> tuple[list[dict], list[dict]]:
    """The examples to learn from, and at most so many to validate on: of the other side, or a part of the same."""
    examples = checked[0].examples
    if len(checked) > 1:
        return examples, sorted(checked[1].examples, key=lambda one: share(one["name"]))[:most]
    chosen = held_out([one["name"] for one in examples], holdout, most)
    return [one for at, one in enumerate(examples) if at not in chosen], [examples[at] for at in sorted(chosen)]


def share(name: str) -> float:
    """A number from 0 to 1 that a name always has, and that says nothing about it: for choosing a part of many."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64


def held_out(names: list[str], part: float, most: int) -> set[int]:
    """Which of these are for validation: about `part` of them and no more than `most`, by their names, so that none
    changes sides when more come; at least one and not all, as long as there are two.
    """
    if not part or len(names) < 2:
        return set()
    shares = [share(name) for name in names]
    in_order = sorted(range(len(names)), key=lambda at: (shares[at], at))
    count = sum(one < part for one in shares)
    return set(in_order[: min(max(1, count), most, len(names) - 1)])
