"""Teach a network the classes of your own images and masks.

MASKS has the mask of each image of IMAGES under its name, or is a table that says which is whose. OUT gets the network
in Hugging Face's layout, which segment and transformers load: that of the step with the best mean IoU on the part of
the pairs that is held out (--holdout, or --val-images and --val-masks). OUT/training has the log, the scores, what was
left out and why, and the state from which the same command goes on when it was stopped or killed.

  swath finetune photos masks model --checkpoint hf://nvidia/segformer-b0-finetuned-ade-512-512
  swath finetune s3://bucket/photos s3://bucket/masks s3://bucket/models/mine --checkpoint s3://bucket/models/b2
  swath finetune photos masks model --checkpoint hf://nvidia/mit-b2 --labels names.txt --class-weights balanced
  swath finetune photos masks model --checkpoint new:b5 --crop 512 --batch 16 --steps 160000
"""

from rich.console import Console
from rich.table import Table

from jobs.display import Display, clock, plain
from pipeline.config_truth import FinetuneSettings

SETTINGS = FinetuneSettings


def run(settings: FinetuneSettings) -> int:
    from pipeline.filesystems import public_url
    from pipeline.finetune import finetune

    with Display() as display:
        taught = finetune(settings, display)
    console, result = Console(soft_wrap=True, highlight=False), taught.result
    best = result["best"]
    if best:
        table = Table("class", "IoU", box=None, header_style="bold", pad_edge=False)
        table.columns[1].justify = "right"
        for name, iou in best["class_iou"].items():
            table.add_row(plain(name), "" if iou is None else f"{iou:.3f}")
        console.print(table)
        console.print()
    early = ", as nothing got better any more" if result["stopped_early"] else ""
    before = "was there already: " if taught.was_there else ""
    console.print(f"{before}{result['steps']:,} steps in {clock(result['seconds'])}{early}")
    if best:
        console.print(
            f"best     step {best['step']:,}: mean IoU {best['mean_iou']:.3f}, accuracy {best['accuracy']:.3f}, on "
            f"{result['validation']:,} images that were not learned from"
        )
    console.print(f"network  {plain(public_url(settings.out))}")
    return 0
