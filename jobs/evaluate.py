"""Say how good the masks of an output are: compare them with ground truth.

TRUTH is a place with a mask for each image, called as the image is below its own root, with any suffix: for INPUT
/data/val/a/1.jpg and TRUTH /data/masks that is /data/masks/a/1.png. --rename changes names before they are compared. Or
TRUTH is a table that names image and mask. Masks are PNG, TIFF, BMP, GIF or lossless WebP, and are read as they are
meant: grey ones of 1 to 32 bits by value, palette images by their indices, RGB ones by colour: those of --truth-map,
else those of the network's classes. JPEGs are refused, as their ids are not what they were. Ids that no class has are
an error of that mask, until --ignore-id leaves them out, or --truth-map says what every id is.

Every number is told pooled (over all pixels together) and averaged (the mean of the images' own numbers). A class in
neither truth nor mask is left out of means; one that only the mask has is wrong there and counts as 0. Boundary IoU
counts pixels within 2 % of the diagonal of their class's contour (Cheng et al. 2021); areas that are ignored count
nowhere, and where a class meets them is contour. Nothing is resized: images and masks that do not fit, are missing, or
cannot be read are counted, told of by name, and have a row each.

Where the truth has other classes than the network, --class names them, in the order of their ids, and --mask-map says
what the network's classes count as. One that counts as none is wrong wherever the truth has a class.

What comes out is in OUTPUT/evaluations: images/*.parquet, a row an image; classes.parquet; confusion.png;
evaluation.json. The worst images: swath query OUTPUT "SELECT uri, mean_iou FROM evaluations ORDER BY 2 LIMIT 20"

  swath evaluate /data/masks /data/truth
  ADE20K, whose ids begin at 1 and have 0 for what is not labelled:
  swath evaluate s3://bucket/ade s3://bucket/ADE20K/annotations/validation --reduce-labels
  Cityscapes, whose masks have names and ids of their own:
  swath evaluate /data/cs '/data/gtFine/val/*/*_labelIds.png' --rename '_leftImg8bit$=_gtFine_labelIds' \\
      --truth-map 7=road --truth-map 8=sidewalk --truth-map 26=car --truth-map '*=ignore'
  People found by a network of 150 classes, in masks of black and white:
  swath evaluate /data/masks /data/people --class other --class person --mask-map '*=other' \\
      --truth-map '#000000=other' --truth-map '#ffffff=person'
"""

import json
import shlex
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from jobs.display import Display, plain, print_whole
from pipeline.config_truth import EvaluateSettings

if TYPE_CHECKING:
    from pipeline.evaluate import Evaluation

SETTINGS = EvaluateSettings
CLASSES_SHOWN = 200
LOOK: dict[str, Any] = {"box": None, "header_style": "bold", "pad_edge": False}
KINDS = {  # of what was not compared
    "no_truth": "images without a mask of ground truth",
    "no_image": "masks of ground truth without an image",
    "no_mask": "images without a mask in the output",
    "ambiguous": "images whose mask cannot be told",
    "size": "masks of ground truth of another size",
    "unknown": "masks of ground truth with ids or colours of no class",
    "unsupported": "masks of ground truth that have no ids",
    "unreadable": "masks of ground truth that cannot be read",
}
OVERALL = {
    "accuracy": "pixel accuracy",
    "mean_accuracy": "mean class accuracy",
    "mean_iou": "mean IoU",
    "mean_dice": "mean Dice",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "mean_boundary_iou": "mean boundary IoU",
}
WORST = "SELECT uri, mean_iou, error FROM evaluations WHERE evaluation = '{}' ORDER BY 2 LIMIT 20"


def run(settings: EvaluateSettings) -> int:
    from pipeline.cluster import spread
    from pipeline.evaluate import evaluate

    with Display() as display:
        found = evaluate(settings, display, partial(spread, settings))
    if settings.as_json:
        print(json.dumps(found.record))
    else:
        print_evaluation(Console(soft_wrap=True, highlight=False), settings, found)
    return 0


def print_evaluation(console: Console, settings: EvaluateSettings, found: "Evaluation") -> None:
    record = found.record
    images = record["images"]
    for kind, what in KINDS.items():
        if count := found.left_out.counts[kind]:
            named = found.left_out.first[kind]
            console.print(f"{what}: {count:,}")
            for line in named:
                console.print(f"  {plain(line)}")
            if count > len(named):
                console.print(f"  and {count - len(named):,} more: swath query, evaluations with status '{kind}'")
    if found.left_out.counts:
        console.print()
    versions = ", ".join(record["model_versions"])
    console.print(f"compared {images['compared'] + images['compared_ignored_everywhere']:,} images, ", end="")
    console.print(f"{record['pixels']:,} pixels  model {plain(versions)}")
    if images["compared_ignored_everywhere"]:
        console.print(f"         {images['compared_ignored_everywhere']:,} of them ignored everywhere")
    if found.skipped:
        kinds = ", ".join(f"{plain(why)} {count:,}" for why, count in found.skipped.most_common(6))
        console.print(f"skipped  {found.skipped.total():,} files that are no masks: {kinds}")
    console.print()
    console.print(overall_table(record))
    console.print()
    print_whole(class_table(record))
    if (more := len(record["classes"]) - CLASSES_SHOWN) > 0:
        console.print(f"{more:,} classes more are in classes.parquet")
    url, query = escape(found.url), WORST.format(record["evaluation"])
    console.print(f"\nresults  {url}", f"picture  {url}/confusion.png", sep="\n")
    console.print(f"worst    swath query {escape(shlex.quote(settings.output))} {escape(shlex.quote(query))}")


def overall_table(record: dict[str, Any]) -> Table:
    """Every mean, both ways."""
    table = Table("", "pooled over pixels", "averaged over images", **LOOK)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, title in OVERALL.items():
        table.add_row(title, share(record["pooled"][name]), share(record["averaged"][name]))
    return table


def class_table(record: dict[str, Any]) -> Table:
    """Each class: its share of the truth, where it is, and how well it is found; IoUs both ways, the rest pooled."""
    numbers = ("truth", "images", "IoU", "averaged", "boundary", "averaged", "Dice", "accuracy", "precision")
    table = Table(Column("class", no_wrap=True), *(Column(name, justify="right") for name in numbers), **LOOK)
    names = ("pooled_iou", "averaged_iou", "pooled_boundary_iou", "averaged_boundary_iou", "pooled_dice")
    for row in record["classes"][:CLASSES_SHOWN]:
        part = row["truth_pixels"] / max(1, record["pixels"])
        shares = [share(row[name]) for name in (*names, "pooled_accuracy", "pooled_precision")]
        table.add_row(plain(row["name"]), f"{part:.1%}", f"{row['images']:,}", *shares)
    return table


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
