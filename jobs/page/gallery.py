"""Pictures for the page: which images to show, and small copies of them and of their masks.

Rows are chosen by their statistics; masks are read of the chosen rows alone. The image is asked for in the version that
was segmented, so that no mask ever lies on another picture; where there is none any more, the mask is shown by itself.
However large an image and its mask are, their copies have a bounded number of bytes.
"""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
from PIL import Image

from model.labels import Colour, colour
from pipeline.attempts import reason
from pipeline.commit import SHARD, Run
from pipeline.masks import PALETTE_COLOURS, decode_mask, palette
from pipeline.originals import ImageError, Originals
from pipeline.plan import PlannedImage
from pipeline.query import root
from pipeline.storage import Store
from pipeline.views import in_pattern

SIDE = 420  # pixels of the longer side of a copy, at most
IMAGE_BYTES, MASK_BYTES = 32_000, 20_000  # of a copy, at most
QUALITIES = (80, 65, 50, 35, 20)  # of WebP, until it fits
NAMED = 6  # classes of one picture
AT_ONCE = 4  # pictures, each of which is held whole
PATIENCE = 10  # seconds for a store that does not give an image, as there are others
GONE = {"missing": "The image is gone", "changed": "The image is another one by now"}
NOT_FINISHED = {"settings": {"image_column": None, "allow_truncated": False}}  # for a record that is not there yet
OTHERS = (128, 128, 128)  # the colour of the rarest classes of a mask with more than a palette holds

Place = tuple[str, str]  # run id and URI of a row

SURE = """
    SELECT max_by(place, (confidence, uri), {images}), min_by(place, (confidence, uri), {images}),
      min_by(place, (md5(uri), run_id), {images})
    FROM (SELECT {{'run_id': run_id, 'uri': uri}} AS place, * FROM current WHERE status = 'ok' AND isfinite(confidence))
"""
MOST = """
    SELECT name, max_by({'run_id': run_id, 'uri': uri}, (fraction, uri)) FROM class_stats
    SEMI JOIN (SELECT unnest(?) AS name) USING (name) GROUP BY name"""
ROWS = """
    SELECT run_id, uri, etag, bytes, width, height, mask, classes, confidence, entropy, filename, file_row_number
    FROM read_parquet('{root}/segments/*/*.parquet', filename = true, file_row_number = true, hive_partitioning = false)
    SEMI JOIN (SELECT unnest($runs) AS run_id, unnest($uris) AS uri) USING (run_id, uri) WHERE uri IN $uris
"""


@dataclass(frozen=True)
class Key:
    """One class of a picture's legend."""

    name: str
    colour: Colour
    fraction: float


@dataclass(frozen=True)
class Picture:
    """One image of the gallery. `image` and `mask` are data URLs, or empty where there is nothing to show."""

    uri: str
    width: int  # of the copies, in pixels
    height: int
    own_width: int  # of the image
    own_height: int
    confidence: float
    entropy: float | None
    run_id: str
    image: str
    mask: str
    trouble: str  # why a part is not shown
    legend: list[Key]
    classes: int  # of the mask, in all


@dataclass(frozen=True)
class Choice:
    """What is to be shown under one heading: places, each with what it is shown for, or nothing."""

    title: str
    note: str
    places: list[tuple[str, Place]]


@dataclass(frozen=True)
class Group:
    """The same, drawn."""

    title: str
    note: str
    pictures: list[tuple[str, Picture]]


def choose(tables: duckdb.DuckDBPyConnection, images: int, classes: Sequence[str]) -> list[Choice]:
    """So many images of each kind, and one of each of `classes`; of the same output the same."""
    ((sure, unsure, some),) = tables.execute(SURE.format(images=images)).fetchall()
    most = dict(tables.execute(MOST, [list(classes)]).fetchall())

    def plain(found: list[dict] | None) -> list[tuple[str, Place]]:
        return [("", (place["run_id"], place["uri"])) for place in found or ()]

    return [
        Choice("Least certain", "The lowest mean confidence: where to look first, what to label next.", plain(unsure)),
        Choice("Most certain", "The highest mean confidence.", plain(sure)),
        Choice("At random", "Drawn by a hash of the name: the same images give the same draw.", plain(some)),
        Choice(
            "Each class at its most",
            "Of the most frequent classes the image that has the largest share of it.",
            [(name, (most[name]["run_id"], most[name]["uri"])) for name in classes if name in most],
        ),
    ]


def gather(chosen: Sequence[Choice], pictures: Mapping[Place, Picture]) -> list[Group]:
    """The pictures under their headings; a heading without any is left out."""
    groups = (
        Group(one.title, one.note, [(what, pictures[place]) for what, place in one.places if place in pictures])
        for one in chosen
    )
    return [group for group in groups if group.pictures]


def read_rows(output: Store, tables: duckdb.DuckDBPyConnection, chosen: Sequence[Choice]) -> list[dict[str, Any]]:
    """The rows that were chosen, each once, with their masks and with the file and row that they lie in."""
    places = sorted({place for one in chosen for _, place in one.places})
    if not places:
        return []
    run_ids, uris = ([place[part] for place in places] for part in (0, 1))
    answer = tables.execute(ROWS.format(root=in_pattern(root(output))), {"runs": run_ids, "uris": uris})
    names = [column[0] for column in answer.description or ()]
    return [dict(zip(names, values, strict=True)) for values in answer.fetchall()]


def draw(output: Store, rows: Sequence[dict[str, Any]], drawn: Callable[[int, int], None]) -> dict[Place, Picture]:
    """The pictures of rows. `drawn` hears how many are ready, and of how many."""
    source = Source(output, {row["run_id"] for row in rows})
    pictures: dict[Place, Picture] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for row, picture in zip(rows, pool.map(lambda row: draw_row(row, source), rows), strict=True):
            pictures[row["run_id"], row["uri"]] = picture
            drawn(len(pictures), len(rows))
    return pictures


def colours(rows: Sequence[dict[str, Any]]) -> dict[str, Colour]:
    """The colour that each class has in the masks of `rows`, by name."""
    found: dict[str, Colour] = {}
    for row in rows:
        colour_of = palette_of(row["mask"])
        for one in row["classes"]:
            found.setdefault(one["name"], colour_of(one["class_id"]))
    return found


def draw_row(row: dict[str, Any], source: "Source") -> Picture:
    """One row as a picture. What cannot be shown is said, and never raised."""
    scale = min(1.0, SIDE / max(row["width"], row["height"]))
    width, height = (max(1, round(row[side] * scale)) for side in ("width", "height"))
    image, mask, trouble = "", "", ""
    colour_of = palette_of(row["mask"])
    try:
        mask = data_url("png", small_mask(row["mask"], colour_of, width, height))
    except Exception as error:  # Pillow documents no set of errors for damaged data
        trouble = f"Its mask cannot be read ({type(error).__name__})."
    try:
        image = data_url("webp", small_image(source.pixels(row, width, height), width, height))
    except ImageError as error:
        trouble = trouble or f"{GONE.get(error.status, 'The image cannot be read')}: the mask alone."
    except Exception as error:  # whatever has become of the store, the plan or the image since
        trouble = trouble or f"The image cannot be read now ({type(error).__name__}: {reason(error)}): the mask alone."
    classes = row["classes"]
    return Picture(
        uri=row["uri"],
        width=width,
        height=height,
        own_width=row["width"],
        own_height=row["height"],
        confidence=row["confidence"],
        entropy=row["entropy"],
        run_id=row["run_id"],
        image=image,
        mask=mask,
        trouble=trouble,
        legend=[Key(one["name"], colour_of(one["class_id"]), one["fraction"]) for one in classes[:NAMED]],
        classes=len(classes),
    )


class Source:
    """The images of an output's rows, in the version that was segmented. Many threads may use one."""

    def __init__(self, output: Store, runs: Iterable[str]):
        settings = output.settings
        impatient = settings.model_copy(update={"retry_seconds": min(settings.retry_seconds, PATIENCE)})
        records = {run: Run(output, run).record() or NOT_FINISHED for run in runs}
        self.originals = Originals(Store(output.uri(""), impatient), records)

    def pixels(self, row: dict[str, Any], width: int, height: int) -> np.ndarray:
        """uint8 (H, W, 3), at least as large as `width` and `height` want, which JPEGs are not much more than.

        Raises `ImageError`, or one of `attempts.ERRORS`.
        """
        run, uri = row["run_id"], row["uri"]
        data = self.originals.fetch(run, self.planned(row))
        return self.originals.decode(run, uri, data, row["height"], row["width"], (height, width))

    def planned(self, row: dict[str, Any]) -> PlannedImage:
        """What the plan says of an image that lies in a file with others: where."""
        shard = SHARD.fullmatch(row["filename"].rpartition("/")[2])
        if "#" in row["uri"] and shard:
            return self.originals.planned(row["run_id"], int(shard[1]))[row["file_row_number"]]
        return PlannedImage(row["uri"], row["etag"], row["bytes"], None, None, None)


def small_image(pixels: np.ndarray, width: int, height: int) -> bytes:
    """WebP of uint8 (H, W, 3), scaled down to `width` x `height`, or less if it would take more than `IMAGE_BYTES`."""
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
    while True:
        for quality in QUALITIES:
            if len(data := encoded(image, "WEBP", quality=quality)) <= IMAGE_BYTES:
                return data
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)))


def small_mask(mask: bytes, colour_of: Callable[[int], Colour], width: int, height: int) -> bytes:
    """PNG with the colours of a mask, scaled down to `width` x `height` or less, in at most `MASK_BYTES`."""
    ids = decode_mask(mask)
    while True:
        found, places = np.unique(nearest(ids, height, width), return_inverse=True)
        image = Image.fromarray(places.reshape(height, width).clip(max=PALETTE_COLOURS - 1).astype(np.uint8), "P")
        used = [colour_of(int(one)) for one in found[: PALETTE_COLOURS - 1]] + [OTHERS] * (
            len(found) >= PALETTE_COLOURS
        )
        image.putpalette([part for one in used for part in one])
        if len(data := encoded(image, "PNG", optimize=True)) <= MASK_BYTES:
            return data
        width, height = max(1, width // 2), max(1, height // 2)


def nearest(ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) to (height, width): of each pixel's part the middle one, as the mean of two classes is none."""
    rows, columns = (((2 * np.arange(n) + 1) * of) // (2 * n) for n, of in zip((height, width), ids.shape, strict=True))
    return ids[np.ix_(rows, columns)]


def palette_of(mask: bytes) -> Callable[[int], Colour]:
    """The colour of each class id in a mask; those that such a label set has by itself where the mask has none."""
    try:
        known = palette(mask)
    except Exception:  # as of `draw_row`, which says so
        known = []
    return lambda class_id: known[class_id] if class_id < len(known) else colour(class_id)


def encoded(image: Image.Image, kind: str, quality: int = 0, optimize: bool = False) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=quality, optimize=optimize)
    return file.getvalue()


def data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
