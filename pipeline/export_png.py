"""A folder of PNG masks, named as the images are, and a table of which is whose.

    masks/2026/a.jpg.png    the mask of 2026/a.jpg, as it is in the output
    masks.csv               file, uri, etag, width, height, model_version, run_id
    labels.json             id, name and colour of each class

The image's own suffix stays in the name, as there may be an `a.jpg` and an `a.png`.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from model.labels import LabelSet
from pipeline.ahead import ahead
from pipeline.export import Exported, Progress
from pipeline.names import safe_name
from pipeline.selection import Selection
from pipeline.storage import Store

DESCRIBED = ("uri", "etag", "width", "height", "model_version", "run_id")


def write_png(selection: Selection, labels: LabelSet, destination: Store, folder: Path, progress: Progress) -> Exported:
    """Put every mask, then the table and the labels."""

    def masks() -> Iterator[tuple[str, dict]]:
        for chosen in selection.rows([*DESCRIBED, "mask"]):
            yield f"masks/{safe_name(chosen.values['uri'], selection.root, '.png')}", chosen.values

    def put(one: tuple[str, dict]) -> list:
        name, row = one
        destination.put(name, row["mask"])
        return [name, *(row[column] for column in DESCRIBED)]

    table = folder / "masks.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", *DESCRIBED])
        for done, row in enumerate(ahead(put, masks()), 1):
            rows.writerow(row)
            progress.exporting(done, selection.images)
    destination.put_file("masks.csv", table)
    destination.put("labels.json", json.dumps(described(labels), indent=2).encode())
    return Exported(selection.images)


def described(labels: LabelSet) -> list[dict]:
    """Each class's id, which is the value of its pixels, name and colour."""
    pairs = zip(labels.names, labels.palette, strict=True)
    return [{"id": class_id, "name": name, "color": list(colour)} for class_id, (name, colour) in enumerate(pairs)]
