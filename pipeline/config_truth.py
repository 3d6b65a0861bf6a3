"""Settings of the jobs that have ground truth: how good an output is, and teaching a network.

As in config.py each has its default, its meaning and its check here, and nowhere else.
"""

import math
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from pipeline.config import ClusterSettings, OutputArgument, absolute, mapping, option, plain_name, positive, seconds
from pipeline.policy import parse_policy


class TruthSettings(BaseModel):
    """How masks of ground truth are found, and what their pixels mean."""

    rename: tuple[str, ...] = option(
        (),
        "what to change in an image's name to have its mask's, as FROM=TO: a regular expression and what takes its "
        "place ('_leftImg8bit$=_gtFine_labelIds'); names are those below the root, without suffix; repeatable",
        "Ground truth",
        "FROM=TO",
    )
    truth_map: dict[str, str] = option(
        {},
        "what an id or a colour in the masks means, as ID=CLASS or #RRGGBB=CLASS, CLASS being a name, an id or "
        "'ignore'; '*=ignore' ignores all others, which else are an error; where any ID is a class, only those that "
        "are named are known, and likewise colours; repeatable",
        "Ground truth",
        "ID=CLASS",
    )
    ignore_id: tuple[int, ...] = option(
        (),
        "id in the masks whose pixels count nowhere; repeatable (default: 255, unless there is a class of that id)",
        "Ground truth",
        "N",
    )
    reduce_labels: bool = option(
        False, "ids in the masks begin at 1, and 0 is ignored, as ADE20K has it", "Ground truth"
    )
    truth_image_column: str | None = option(
        None,
        "column of a manifest that has the images (default: uri, url, path, file or image)",
        "Ground truth",
        "NAME",
    )
    truth_mask_column: str | None = option(
        None,
        "column of a manifest that has their masks, or of Parquet files with masks in them (default: mask, label, "
        "annotation or the like)",
        "Ground truth",
        "NAME",
    )

    @field_validator("rename", "ignore_id", mode="before")
    @classmethod
    def _some(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, int)) else value

    @field_validator("rename")
    @classmethod
    def _renames(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all("=" in one for one in value):
            raise ValueError("expected FROM=TO")
        return value

    @field_validator("truth_map", mode="before")
    @classmethod
    def _truth_map(cls, value: Any) -> Any:
        return mapping(value)


class EvaluateSettings(OutputArgument, ClusterSettings, TruthSettings):
    """What `swath evaluate` needs."""

    truth: str = Field(
        description="masks of ground truth: a folder, bucket or prefix, a glob ('/data/gtFine/val/*/*_labelIds.png'), "
        "tar or Parquet files, or a table with a column of images and one of masks (CSV, JSON Lines, Parquet)"
    )
    run_id: str | None = option(
        None, "all masks of this run (default: of each image the newest, of all finished runs)", "Evaluation", "ID"
    )
    where: str | None = option(
        None, "only rows for which this SQL is true ('width > 640'; columns as in the output)", "Evaluation", "SQL"
    )
    classes: tuple[str, ...] = Field(
        default=(),
        alias="class",
        description="a class to evaluate, whose ids in the truth are 0, 1, ... in this order; repeatable (default: "
        "the network's classes)",
        json_schema_extra={"group": "Evaluation", "metavar": "NAME"},
    )
    mask_map: dict[str, str] = option(
        {},
        "which class a class of the network counts as, as CLASS=CLASS, names or ids; '*=CLASS' for all that have "
        "none of their own (default: the one of the same name, else none, which is wrong everywhere); repeatable",
        "Evaluation",
        "CLASS=CLASS",
    )
    name: str | None = option(
        None,
        "name of the evaluation, in OUTPUT/evaluations (default: the run and a digest of what is compared, so that the "
        "same command gives the same)",
        "Evaluation",
        "ID",
    )
    overwrite: bool = option(False, "replace an evaluation of that name that is of something else", "Evaluation")
    as_json: bool = Field(
        default=False,
        alias="json",
        description="print one JSON object, for scripts",
        json_schema_extra={"group": "Evaluation", "metavar": None},
    )

    @field_validator("truth")
    @classmethod
    def _truth(cls, value: str) -> str:
        return absolute(value)

    @field_validator("classes", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("mask_map", mode="before")
    @classmethod
    def _mask_map(cls, value: Any) -> Any:
        return mapping(value)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        return value if value is None else plain_name(value)


class FinetuneSettings(TruthSettings, ClusterSettings):
    """What `swath finetune` needs."""

    images: str = Field(description="the images: a folder, bucket or prefix, a glob, a tar or Parquet file")
    masks: str = Field(description="their masks: the same, or a table with a column of images and one of masks")
    out: str = Field(description="where the network goes, in Hugging Face's layout: any fsspec URL")
    checkpoint: str = option(
        ...,
        "the weights to begin with: whatever segment takes, an encoder alone such as those of ImageNet, or new:b0 to "
        "new:b5 for random ones",
        "Model",
        "URL",
    )
    labels: str | None = option(
        None,
        "names of the classes by id: a text file, one a line, or JSON (a list, or id2label); 'checkpoint' for the "
        "checkpoint's own (default: labels.json beside the masks, else the names in --truth-map, else 'class 0' and "
        "so on)",
        "Ground truth",
        "FILE",
    )
    max_pixels: int = option(100_000_000, "an image with more pixels is left out", "Model", "N")
    policy: str = option(
        "short=512",
        "network input size of whole images, as in segment: in validation, and what --scales is relative to",
        "Model",
        "POLICY",
    )
    steps: int | None = option(
        None,
        "how many steps to learn for (default: so many that each image is seen 30 times, from 300 on)",
        "Training",
        "N",
    )
    batch: int = option(8, "crops in a step, of all workers together", "Training", "N")
    crop: int = option(256, "height and width of a crop, in pixels", "Training", "PIXELS")
    learning_rate: float | None = option(
        None,
        "of the encoder, after the warm-up (default: 0.001 for up to 2,000 steps, then 2 by their number, down to the "
        "paper's 0.00006)",
        "Training",
        "RATE",
    )
    decoder_factor: float = option(10, "the decoder's learning rate over the encoder's", "Training", "N")
    warm_up: int | None = option(
        None,
        "steps in which the learning rate grows to its greatest (default: a twentieth, up to 1,500)",
        "Training",
        "N",
    )
    weight_decay: float = option(0.01, "of all weights but those of norms", "Training", "N")
    clip: float = option(1.0, "the greatest norm of all gradients together; 0 for no bound", "Training", "N")
    ema: float = option(
        0.999,
        "how much of the averaged weights, which are what is saved, stays in a step; 0 for no average",
        "Training",
        "N",
    )
    scales: str = option(
        "0.5:1.25",
        "how much smaller or larger than in --policy images are seen (the paper: 0.5:2, with crops as large as images)",
        "Training",
        "MIN:MAX",
    )
    colour: float = option(
        1.0, "how much brightness, contrast, saturation and hue are changed, from 0 to 1", "Training", "N"
    )
    class_weights: tuple[str, ...] = option(
        (),
        "how much classes count: none, balanced (by the inverse root of their share), a file of names and weights, or "
        "NAME=WEIGHT; repeatable, a later one wins (default: none)",
        "Training",
        "NAME=WEIGHT",
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "of the matrix products in a step: bfloat16 where the hardware multiplies it; weights and loss are float32",
        "Training",
        "NAME",
    )
    seed: int = option(0, "of all that is random: the new head, the order of images, the crops", "Training", "N")
    holdout: float = option(
        0.1, "share of the pairs that are for validation, chosen by their names; 0 for none", "Validation", "SHARE"
    )
    val_images: str | None = option(None, "other images for validation, in place of --holdout", "Validation", "URL")
    val_masks: str | None = option(None, "their masks", "Validation", "URL")
    val_every: int | None = option(
        None, "steps from one validation to the next (default: a tenth of all, up to 2,000)", "Validation", "N"
    )
    val_limit: int = option(500, "of the validation images at most so many, always the same", "Validation", "N")
    patience: int | None = option(
        None, "stop after so many validations without a better one (default: never)", "Validation", "N"
    )
    workers: str = option(
        "auto",
        "how many workers share each batch: N, or auto, one a GPU where there are any, else one with all CPUs (with "
        "small crops one a CPU may be faster)",
        "Workers",
        "N",
    )
    save_every: float | None = option(
        None,
        "seconds of training that a kill may lose: so often all that is needed to go on is put into OUT/training "
        "(default: 60, more where to put it takes more than 3)",
        "Run",
        "N",
    )
    grace: float = option(
        25, "seconds that the step under way has to end in when training is stopped by Ctrl-C or SIGTERM", "Run", "N"
    )
    overwrite: bool = option(False, "begin anew, also where OUT has a training of something else", "Run")

    @field_validator("class_weights", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("images", "masks", "out")
    @classmethod
    def _urls(cls, value: str) -> str:
        return absolute(value)

    @field_validator("val_images", "val_masks")
    @classmethod
    def _val_urls(cls, value: str | None) -> str | None:
        return value if value is None else absolute(value)

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        return str(parse_policy(value))

    @field_validator("max_pixels", "steps", "batch", "val_every", "val_limit", "patience")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        return value if value is None else positive(value)

    @field_validator("crop")
    @classmethod
    def _crop(cls, value: int) -> int:
        if value % 32 or not 32 <= value <= 4096:
            raise ValueError("must be a multiple of 32 from 32 to 4096")
        return value

    @field_validator("learning_rate", "decoder_factor")
    @classmethod
    def _rate(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < math.inf:
            raise ValueError("must be more than 0")
        return value

    @field_validator("warm_up", "weight_decay", "clip", "seed")
    @classmethod
    def _not_negative(cls, value: Any) -> Any:
        if value is not None and not 0 <= value < math.inf:
            raise ValueError("must be 0 or more")
        return value

    @field_validator("ema", "holdout")
    @classmethod
    def _below_one(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError("must be from 0 to less than 1")
        return value

    @field_validator("colour")
    @classmethod
    def _to_one(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError("must be from 0 to 1")
        return value

    @field_validator("scales", mode="before")
    @classmethod
    def _scales(cls, value: Any) -> str:
        scale_range(str(value))
        return str(value)

    @field_validator("workers", mode="before")
    @classmethod
    def _workers(cls, value: Any) -> str:
        if str(value) != "auto" and not (str(value).isdigit() and int(value)):
            raise ValueError("expected N or auto")
        return str(value)

    @field_validator("save_every", "grace")
    @classmethod
    def _seconds(cls, value: float | None) -> float | None:
        return value if value is None else seconds(value)


def scale_range(text: str) -> tuple[float, float]:
    """(least, greatest) from "0.5:2"; ValueError for anything else."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high <= 16:
        raise ValueError("expected MIN:MAX, from more than 0 to 16 (0.5:2)")
    return low, high
