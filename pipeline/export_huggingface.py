"""A folder that `datasets.load_dataset` reads: images and masks in Parquet, a card, and the names of the classes.

    data/train-00000-of-00007.parquet       image, label (the mask), uri, confidence, entropy, model_version, run_id
    left_out/train-00000-of-00007.csv       images that could not be had any more, and why; where there are any
    id2label.json                           the names of the class ids, as transformers configures networks with
    README.md                               the dataset card

Which row is in which file is decided before the first is written, so a repeated export leaves alone what is there.

A reader opens the images with Pillow alone. Where that shows another picture than the network saw, since the format is
not one that every Pillow reads, or the orientation lies in XMP, the image is given as PNG, upright; else as it is.
"""

import contextlib
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.labels import LabelSet
from pipeline.ahead import ahead
from pipeline.export import Exported, Progress
from pipeline.header import ORIENTATION
from pipeline.names import safe_name
from pipeline.originals import ImageError, Originals, header_of
from pipeline.pillow import Image
from pipeline.plan import MASK_BYTES_PER_PIXEL, PlannedImage
from pipeline.selection import Chosen, Selection, read
from pipeline.storage import Store

PART_BYTES = 256 << 20  # of images and masks in one file, about
GROUP_BYTES, GROUP_ROWS = 32 << 20, 100  # of a row group, which is in memory; `datasets` itself writes 100 rows
AS_THEY_ARE = ("jpeg", "mpo", "png", "webp", "gif", "bmp")  # formats that every Pillow and every browser shows
PNG_BYTES = 2  # a pixel of any other
TURNING = (b"xif", b"eXIf", b"EXIF", b"adobe")  # without these no orientation is in a file, neither in EXIF nor in XMP
PARTS = """
    CREATE OR REPLACE TABLE chosen AS
    SELECT * REPLACE (dense_rank() OVER (ORDER BY part) - 1 AS part) FROM (
        SELECT * EXCLUDE (weight)
               REPLACE (floor((sum(weight) OVER (ORDER BY run, shard, row) - weight) / {part_bytes}) AS part)
        FROM (SELECT *, CASE WHEN format IN {formats} THEN bytes ELSE pixels * {png_bytes} END
                        + pixels * {mask_bytes} AS weight FROM chosen))
"""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STATISTICS = {  # columns of the output that come along
    "uri": pa.string(),
    "confidence": pa.float32(),
    "entropy": pa.float32(),
    "model_version": pa.string(),
    "run_id": pa.string(),
}
FEATURES = {name: {"_type": "Image"} for name in ("image", "label")} | {
    name: {"dtype": "float32" if kind == pa.float32() else "string", "_type": "Value"}
    for name, kind in STATISTICS.items()
}
SCHEMA = pa.schema(
    {"image": IMAGE, "label": IMAGE, **STATISTICS},
    {"huggingface": json.dumps({"info": {"features": FEATURES}})},
)
CARD = """\
---
task_categories:
- image-segmentation
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---

# Masks of {images:,} images

Made by Swath with the SegFormer model version {models}.

| column | |
|---|---|
| `image` | the image that the mask is of |
| `label` | its mask, in the size of the upright image: `numpy.array(row["label"])` is the class id of each pixel |
| `uri` | where the image lay |
| `confidence`, `entropy` | means over the image: of the greatest softmax probability, and of the softmax in nats |
| `model_version`, `run_id` | which weights and settings, which run |

{left_out}The classes, which are in `id2label.json` too:

| id | name | colour |
|---:|---|---|
{classes}
"""


@dataclass(frozen=True)
class Row:
    """A row, and its image's bytes or why there are none."""

    chosen: Chosen
    image: PlannedImage
    data: bytes | ImageError = b""


def write_huggingface(
    selection: Selection, labels: LabelSet, destination: Store, folder: Path, progress: Progress
) -> Exported:
    """Put file after file, then what describes them."""
    parts = plan_parts(selection)
    done, left_out = take_up(selection, destination, parts)
    originals = Originals(selection.output, selection.records)
    fetched = ahead(partial(fetch, originals), planned(selection, originals))
    for part, rows in groupby(fetched, lambda row: row.chosen.place.part):
        missing: list[ImageError] = []
        with open_part(folder / "part") as writer:
            group, size = [], 0
            for row in rows:
                done += 1
                progress.exporting(done, selection.images)
                try:
                    group.append(example(row, originals, selection.root))
                except ImageError as error:
                    missing.append(error)
                    continue
                size += sum(len(group[-1][name]["bytes"]) for name in ("image", "label"))
                if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                    group, size = [], 0
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
        name = part_name(part, parts)
        put_left_out(destination, name, missing)
        left_out.update(error.status for error in missing)
        destination.put_file(f"data/{name}.parquet", folder / "part")
    destination.put("id2label.json", json.dumps(dict(enumerate(labels.names)), indent=2).encode())
    destination.put("README.md", card(selection, labels, left_out).encode())
    return Exported(selection.images - left_out.total(), left_out)


def plan_parts(selection: Selection) -> int:
    """Give each row its part, in the table of those that are chosen; how many parts there are."""
    selection.tables.execute(
        PARTS.format(part_bytes=PART_BYTES, formats=AS_THEY_ARE, png_bytes=PNG_BYTES, mask_bytes=MASK_BYTES_PER_PIXEL)
    )
    ((parts,),) = selection.tables.execute("SELECT max(part) + 1 FROM chosen").fetchall()
    return parts


def part_name(part: int, parts: int) -> str:
    return f"train-{part:05d}-of-{parts:05d}"


def take_up(selection: Selection, destination: Store, parts: int) -> tuple[int, Counter[str]]:
    """Choose only what an earlier attempt has not put; how many images it was done with, and left out by status."""
    there = set(destination.names("data"))
    done, left_out = 0, Counter[str]()
    for part in range(parts):
        name = part_name(part, parts)
        if f"{name}.parquet" not in there:
            continue
        ((rows,),) = selection.tables.execute("SELECT count(*) FROM chosen WHERE part = ?", [part]).fetchall()
        selection.tables.execute("DELETE FROM chosen WHERE part = ?", [part])
        done += rows
        with contextlib.suppress(FileNotFoundError):
            listed = io.StringIO(destination.read(f"left_out/{name}.csv").decode(), newline="")
            left_out.update(row["status"] for row in csv.DictReader(listed))
    return done, left_out


def planned(selection: Selection, originals: Originals) -> Iterator[Row]:
    """Every row, with where its image lies."""
    for places in selection.shards():
        images = originals.planned(places[0].run, places[0].shard)
        for chosen in read(selection.output, places, [*STATISTICS, "width", "height", "mask"]):
            yield Row(chosen, images[chosen.place.row])


def fetch(originals: Originals, row: Row) -> Row:
    """The row with its image's bytes."""
    try:
        return replace(row, data=originals.fetch(row.chosen.place.run, row.image))
    except ImageError as error:
        return replace(row, data=error)


def example(row: Row, originals: Originals, root: str) -> dict[str, Any]:
    """A row of `SCHEMA`. Raises `ImageError`."""
    if isinstance(row.data, ImageError):
        raise row.data
    values, data = row.chosen.values, row.data
    uri, height, width = values["uri"], values["height"], values["width"]
    name, run = safe_name(uri, root, "").rpartition("/")[2], row.chosen.place.run
    header = header_of(uri, data, height, width)
    if not (header.format in AS_THEY_ARE and turns_alike(data, header.orientation) and originals.is_whole(run, data)):
        file = io.BytesIO()
        Image.fromarray(originals.decode(run, uri, data, height, width)).save(file, "PNG", compress_level=3)
        data, name = file.getvalue(), f"{name}.png"
    images = {"image": {"bytes": data, "path": name}, "label": {"bytes": values["mask"], "path": f"{name}.mask.png"}}
    return images | {column: values[column] for column in STATISTICS}


def turns_alike(data: bytes, orientation: int) -> bool:
    """Whether Pillow alone would turn an image as it was turned for the network."""
    if not any(sign in data for sign in TURNING):
        return orientation == 1
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ORIENTATION, 1) == orientation
    except Exception:  # broken EXIF, which readers would stumble over too
        return False


def open_part(path: Path) -> pq.ParquetWriter:
    """A file to write to, as `datasets` writes its own: small row groups, with an index of pages."""
    return pq.ParquetWriter(
        path, SCHEMA, compression="zstd", use_dictionary=["model_version", "run_id"], write_page_index=True
    )


def put_left_out(destination: Store, part: str, missing: list[ImageError]) -> None:
    """List what a part lacks, before the part itself is there."""
    name = f"left_out/{part}.csv"
    if not missing:
        destination.delete(name)  # an earlier attempt may have lacked some
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["uri", "status", "why"])
    rows.writerows((error.uri, error.status, error.why) for error in missing)
    destination.put(name, text.getvalue().encode())


def card(selection: Selection, labels: LabelSet, left_out: Counter[str]) -> str:
    """The dataset card; names of classes may be anything."""
    lacking = ", ".join(f"{count:,} {status}" for status, count in sorted(left_out.items()))
    classes = zip(labels.names, labels.palette, strict=True)
    return CARD.format(
        images=selection.images - left_out.total(),
        models=", ".join(selection.models),
        left_out=f"Left out, as `left_out/` lists them: {lacking}.\n\n" if lacking else "",
        classes="\n".join(
            f"| {class_id} | {escaped(name)} | #{bytes(colour).hex()} |"
            for class_id, (name, colour) in enumerate(classes)
        ),
    )


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    return "".join(letter if letter.isalnum() or letter == " " else f"&#{ord(letter)};" for letter in text)
