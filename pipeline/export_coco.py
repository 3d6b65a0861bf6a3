"""One JSON file in COCO's format of instances: for each image and class one annotation, a compressed run-length mask.

As in COCO-Stuff, all pixels of a class in an image are one annotation, `iscrowd` 0, which readers take for a mask and
train on. Ids count from 1, as several readers take 0 for nothing: a category is the class id and 1 (`class_id` is the
value in masks), an image its place among the URIs in order, an annotation follows from both; so the same rows have the
same ids. The file is written piece by piece and put whole.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as run_lengths

from model.labels import LabelSet
from pipeline.export import Exported, Progress
from pipeline.masks import decode_mask
from pipeline.names import plain_name
from pipeline.selection import Selection
from pipeline.storage import Store

NAME = "instances.json"


def write_coco(
    selection: Selection, labels: LabelSet, destination: Store, folder: Path, progress: Progress
) -> Exported:
    """Put the file. The images and the annotations come together, and lie in it one behind the other."""
    images, annotations = folder / "images", folder / "annotations"
    with images.open("w", encoding="ascii") as of_images, annotations.open("w", encoding="ascii") as of_annotations:
        between = {of_images: "", of_annotations: ""}
        for done, chosen in enumerate(selection.rows(["uri", "width", "height", "mask", "classes"]), 1):
            row, number = chosen.values, chosen.place.number
            present = sorted(found["class_id"] for found in row["classes"])
            described = {
                "id": number,
                "file_name": plain_name(row["uri"], selection.root),
                "width": row["width"],
                "height": row["height"],
                "coco_url": row["uri"],
            }
            for file, found in (
                (of_images, iter([described])),
                (of_annotations, annotated(decode_mask(row["mask"]), present, number, len(labels))),
            ):
                for one in found:
                    file.write(between[file] + json.dumps(one, separators=(",", ":")))
                    between[file] = ",\n"
            progress.exporting(done, selection.images)
    whole = folder / NAME
    with whole.open("w", encoding="ascii") as file:
        about = {"description": f"masks by Swath, of model {', '.join(selection.models)}", "version": "1.0"}
        file.write(f'{{"info": {json.dumps(about)},\n"licenses": [],\n')
        file.write(f'"categories": {json.dumps(categories(labels))},\n')
        for name, source in (("images", images), ("annotations", annotations)):
            file.write(f'"{name}": [\n')
            with source.open(encoding="ascii") as pieces:
                shutil.copyfileobj(pieces, file)
            source.unlink()
            file.write("]}\n" if name == "annotations" else "],\n")
    destination.put_file(NAME, whole)
    return Exported(selection.images)


def annotated(mask: np.ndarray, present: list[int], image: int, classes: int) -> Iterator[dict[str, Any]]:
    """The annotations of an image's mask (H, W): one for each class that is present in it."""
    columns = np.asfortranarray(mask)  # run lengths go down them
    for class_id in present:
        runs = run_lengths.encode((columns == class_id).view(np.uint8))
        yield {
            "id": (image - 1) * classes + class_id + 1,
            "image_id": image,
            "category_id": class_id + 1,
            "segmentation": {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")},
            "area": int(run_lengths.area(runs)),
            "bbox": run_lengths.toBbox(runs).tolist(),  # left, top, width, height in pixels
            "iscrowd": 0,
        }


def categories(labels: LabelSet) -> list[dict[str, Any]]:
    """The classes; `color` and `isthing` are COCO's own for panoptic ones."""
    pairs = zip(labels.names, labels.palette, strict=True)
    return [
        {
            "id": class_id + 1,
            "name": name,
            "supercategory": name,
            "class_id": class_id,
            "color": list(colour),
            "isthing": 0,
        }
        for class_id, (name, colour) in enumerate(pairs)
    ]
