"""Masks of an output against masks of ground truth: some images in, their scores and a row for each out.

What is wrong with a mask of ground truth is its image's row, whatever it is. What the store fails to give, or a damaged
output, is no image's fault, and raised.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from model.scores import BY_CLASS, OVERALL, ImageScores, Scores
from pipeline.ahead import ahead
from pipeline.attempts import ERRORS, is_of_one, reason
from pipeline.config import ClusterSettings
from pipeline.containers import ContainerError
from pipeline.masks import decode_mask
from pipeline.pairs import Masks
from pipeline.reader import ChangedError, NoStoreError
from pipeline.schema import field
from pipeline.selection import ROWS, Chosen, Place, read
from pipeline.storage import Store
from pipeline.truth import Rules, TruthError, read_truth

STATUSES = ("ok", "no_truth", "no_image", "no_mask", "ambiguous", "size", "unknown", "unsupported", "unreadable")
SHARES = {
    "accuracy": "pixels that are right",
    "mean_accuracy": "mean over classes in the truth of the share of their pixels that is found",
    "mean_iou": "mean over classes in truth or mask of intersection over union",
    "mean_dice": "the same of twice the intersection over both areas",
    "frequency_weighted_iou": "IoU, weighted with the class's share of the truth",
    "mean_boundary_iou": "mean over classes in truth or mask of the IoU of pixels near their contours",
}
CLASS = pa.struct(
    [
        field("class_id", pa.int32(), "as in the evaluation", nullable=False),
        field("name", pa.string(), "label", nullable=False),
        field("truth_pixels", pa.int64(), "that the truth has", "pixel", nullable=False),
        field("mask_pixels", pa.int64(), "that the mask has", "pixel", nullable=False),
        field("pixels", pa.int64(), "that both have", "pixel", nullable=False),
        field("iou", pa.float64(), "intersection over union", "1"),
        field("dice", pa.float64(), "twice the intersection over both areas", "1"),
        field("accuracy", pa.float64(), "share of truth_pixels that is found; null where there are none", "1"),
        field("precision", pa.float64(), "share of mask_pixels that is right; null where there are none", "1"),
        field("boundary_iou", pa.float64(), "IoU of the pixels near the contours", "1"),
    ]
)
IMAGES = pa.schema(
    [
        field("uri", pa.string(), "the image; null where there is but a mask of ground truth"),
        field("etag", pa.string(), "the image's version"),
        field("run_id", pa.string(), "the run whose mask was compared"),
        field("evaluation", pa.string(), "name of the evaluation", nullable=False),
        field("status", pa.string(), "one of " + ", ".join(STATUSES), nullable=False),
        field("error", pa.string(), "why nothing was compared, one line; null when ok"),
        field("truth", pa.string(), "URI of the mask of ground truth"),
        field("pixels", pa.int64(), "that were compared: those that are not ignored", "pixel"),
        *(field(name, pa.float64(), note, "1") for name, note in SHARES.items()),
        field("classes", pa.list_(CLASS), "classes that truth or mask have, by id"),
    ]
)
NAMES = {name: name.removeprefix("class_") for name in BY_CLASS}  # of the same in rows


@dataclass(frozen=True)
class Pair:
    """A row of the output, and the mask of ground truth of its image: a row of the table `masks` (pairs.FILES)."""

    place: Place
    truth: dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """What became of some images, in order."""

    scores: Scores
    rows: pa.Table  # IMAGES


@dataclass(frozen=True)
class Comparison:
    """Pairs to what becomes of them, wherever Ray puts the work. Many threads may use one."""

    storage: ClusterSettings
    output: str
    evaluation: str
    names: tuple[str, ...]  # of the classes that are evaluated
    classes: tuple[int, ...]  # of each class of the network the one that it counts as; len(names) for none
    rules: Rules

    def __reduce__(self) -> tuple[type["Comparison"], tuple[Any, ...]]:
        return Comparison, tuple(getattr(self, name) for name in self.__dataclass_fields__)  # connections stay here

    @cached_property
    def store(self) -> Store:
        return Store(self.output, self.storage)

    @cached_property
    def masks(self) -> Masks:
        return Masks(self.store.reader)

    @cached_property
    def table(self) -> np.ndarray:
        """The evaluated class of each class of the network."""
        return np.array(self.classes, np.uint8 if len(self.names) < 256 else np.uint16)

    def __call__(self, pairs: list[Pair]) -> Compared:
        """What becomes of pairs that are in order and of one shard. Raises what the store raises."""
        scores, rows, tables = Scores.empty(len(self.names)), list[dict[str, Any]](), [IMAGES.empty_table()]
        chosen = read(self.store, [pair.place for pair in pairs], ["uri", "etag", "run_id", "mask"])
        for one, truth, data in ahead(self.fetch, zip(chosen, (pair.truth for pair in pairs), strict=True)):
            row = {name: one.values[name] for name in ("uri", "etag", "run_id")}
            row |= {"evaluation": self.evaluation, "truth": truth["uri"]}
            try:
                rows.append(row | self.described(self.score(scores, one, data)))
            except TruthError as error:
                rows.append(row | {"status": error.status, "error": str(error)})
            if len(rows) == ROWS:  # which take many times as much memory here as there
                tables.append(pa.Table.from_pylist(rows, IMAGES))
                rows.clear()
        return Compared(scores, pa.concat_tables([*tables, pa.Table.from_pylist(rows, IMAGES)]))

    def fetch(self, pair: tuple[Chosen, dict[str, Any]]) -> tuple[Chosen, dict[str, Any], bytes | TruthError]:
        """A row, its mask of ground truth, and the bytes of that or why there are none."""
        chosen, truth = pair
        try:
            return chosen, truth, self.masks.fetch(truth)
        except (FileNotFoundError, NotADirectoryError):
            error = "the mask of ground truth is not there"
        except ChangedError:
            error = "the mask of ground truth has changed since it was listed"
        except (ContainerError, NoStoreError) as why:
            error = str(why)
        except ERRORS as why:
            if not is_of_one(why):
                raise
            error = reason(why)
        return chosen, truth, TruthError("unreadable", error)

    def score(self, scores: Scores, chosen: Chosen, data: bytes | TruthError) -> ImageScores:
        """Add an image to the scores. Raises `TruthError`."""
        if isinstance(data, TruthError):
            raise data
        try:
            mask = self.table[decode_mask(chosen.values["mask"])]
        except (IndexError, OSError, SyntaxError, ValueError) as error:
            raise OSError(
                f"the mask of {chosen.values['uri']} is damaged ({reason(error)}); see swath verify"
            ) from None
        return scores.add(read_truth(data, self.rules, mask.shape), mask)

    def described(self, found: ImageScores) -> dict[str, Any]:
        """A row's columns of an image that was compared."""
        metrics = found.metrics
        row: dict[str, Any] = {"status": "ok", "pixels": found.pixels}
        row |= {name: defined(getattr(metrics, name)) for name in OVERALL}
        shares = {name: getattr(metrics, theirs) for theirs, name in NAMES.items()}
        row["classes"] = [
            {
                "class_id": one,
                "name": self.names[one],
                "truth_pixels": int(found.truth[one]),
                "mask_pixels": int(found.mask[one]),
                "pixels": int(found.hits[one]),
                **{name: defined(values[one]) for name, values in shares.items()},
            }
            for one in np.flatnonzero(found.truth + found.mask).tolist()
        ]
        return row


def defined(value: float) -> float | None:
    """A number, or None for NaN."""
    return None if np.isnan(value) else float(value)
