"""An evaluation in the output: its name, its files, and what they say.

All is put when the comparison is done; `evaluation.json` last, and an older one is removed first, so that what has one
is whole. Who is killed repeats the command.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from model.scores import OVERALL, Scores
from pipeline.compare import IMAGES, NAMES, Comparison, defined
from pipeline.config import ConfigurationError
from pipeline.config_truth import EvaluateSettings
from pipeline.confusion import draw_confusion
from pipeline.filesystems import public_url
from pipeline.schema import field
from pipeline.seal import sealed, write_sealed
from pipeline.selection import Selection
from pipeline.storage import Store
from pipeline.views import EVALUATIONS_FOLDER

VERSION = 1
PART_ROWS = 10_000  # in one file, in memory until then; one of many classes has 10 kB
DIGEST = 8  # characters of what is compared, in a name
PIXELS = [
    field("evaluation", pa.string(), "name of the evaluation", nullable=False),
    field("class_id", pa.int32(), "place among the classes that are evaluated", nullable=False),
    field("name", pa.string(), "label", nullable=False),
    field("truth_pixels", pa.int64(), "that the truth has", "pixel", nullable=False),
    field("mask_pixels", pa.int64(), "that masks have", "pixel", nullable=False),
    field("pixels", pa.int64(), "that both have", "pixel", nullable=False),
    field("images", pa.int64(), "where truth or mask has it", nullable=False),
]
WAYS = {"pooled": "over all pixels", "averaged": "mean over the images where it is defined"}
CLASSES = pa.schema(
    PIXELS + [field(f"{way}_{name}", pa.float64(), note, "1") for way, note in WAYS.items() for name in NAMES.values()]
)


def default_name(settings: EvaluateSettings, selection: Selection, comparison: Comparison) -> str:
    """A name that follows from what is compared."""
    return f"{settings.run_id or 'current'}-{digest(settings, selection, comparison)[:DIGEST]}"


def digest(settings: EvaluateSettings, selection: Selection, comparison: Comparison) -> str:
    """SHA-256 of the rows, of where the truth is, and of all rules."""
    how = [settings.rename, settings.truth_image_column, settings.truth_mask_column]
    what = [selection.digest, settings.truth, how, comparison.names, comparison.classes, repr(comparison.rules)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@dataclass(frozen=True)
class Folder:
    """Where an evaluation is."""

    output: Store
    name: str

    @property
    def url(self) -> str:
        return f"{self.output.url.rstrip('/')}/{EVALUATIONS_FOLDER}/{self.name}"

    def path(self, name: str) -> str:
        return f"{EVALUATIONS_FOLDER}/{self.name}/{name}"

    def prepare(self, settings: EvaluateSettings, selection: Selection, comparison: Comparison) -> None:
        """Raise `ConfigurationError` where something else has this name, or nothing can be put."""
        try:
            found = json.loads(self.output.read(self.path("evaluation.json")))
            is_other = found.get("digest") != digest(settings, selection, comparison)
        except (FileNotFoundError, NotADirectoryError):
            is_other = False
        except (ValueError, AttributeError):
            is_other = True
        if is_other and not settings.overwrite:
            raise ConfigurationError(
                f"{self.url}: is an evaluation of other masks or by other rules; give another --name, or --overwrite"
            )
        self.output.check_writable()

    def put(self, record: dict[str, Any], scores: Scores, names: tuple[str, ...], parts: list[Path]) -> None:
        """Put all files in place of what is there."""
        self.output.delete(self.path("evaluation.json"))
        wanted = [f"part-{number:05d}.parquet" for number in range(len(parts))]
        for name, part in zip(wanted, parts, strict=True):
            self.output.put_file(self.path(f"images/{name}"), part)
        for name in set(self.output.names(self.path("images"))) - set(wanted):
            self.output.delete(self.path(f"images/{name}"))
        rows = [{"evaluation": self.name, **row} for row in class_rows(scores, names)]
        table = pa.Table.from_pylist(rows, CLASSES)
        self.output.put(self.path("classes.parquet"), write_sealed(table, compression="zstd", write_page_checksum=True))
        self.output.put(self.path("confusion.png"), draw_confusion(scores.confusion, names))
        self.output.put(self.path("evaluation.json"), json.dumps(sealed(record), indent=1).encode())


class Parts:
    """Rows on their way into files, of which no more is in memory than one file's."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.waiting: list[pa.Table] = []
        self.paths: list[Path] = []

    def add(self, rows: pa.Table) -> None:
        """Add rows (IMAGES); files are cut by their number alone."""
        self.waiting.append(rows)
        while (count := sum(map(len, self.waiting))) >= PART_ROWS:
            every = pa.concat_tables(self.waiting)
            self.write(every.slice(0, PART_ROWS))
            self.waiting = [every.slice(PART_ROWS)] if count > PART_ROWS else []

    def write(self, rows: pa.Table) -> None:
        path = self.folder / f"part-{len(self.paths):05d}.parquet"
        path.write_bytes(write_sealed(rows.combine_chunks(), compression="zstd", write_page_checksum=True))
        self.paths.append(path)

    def written(self) -> list[Path]:
        """All files, the last with what was still waiting."""
        if self.waiting:
            self.write(pa.concat_tables([IMAGES.empty_table(), *self.waiting]))
            self.waiting = []
        return self.paths


def described(
    settings: EvaluateSettings, selection: Selection, comparison: Comparison, scores: Scores
) -> dict[str, Any]:
    """All numbers and how they came about, but for what was left out, as JSON has them."""
    names = comparison.names
    both = {"pooled": scores.pooled(), "averaged": scores.averaged()}
    return {
        "version": VERSION,
        "evaluation": comparison.evaluation,
        "digest": digest(settings, selection, comparison),
        "output": selection.output.url,
        "truth": public_url(settings.truth),
        "runs": sorted(selection.records),
        "model_versions": selection.models,
        "settings": {
            "run_id": settings.run_id,
            "where": settings.where,
            "rename": list(settings.rename),
            "truth_map": settings.truth_map,
            "ignore_id": list(settings.ignore_id),
            "reduce_labels": settings.reduce_labels,
            "truth_image_column": settings.truth_image_column,
            "truth_mask_column": settings.truth_mask_column,
            "class": list(settings.classes),
            "mask_map": settings.mask_map,
        },
        "images": {
            "masks": selection.images,
            "compared": scores.images,
            "compared_ignored_everywhere": scores.ignored,
        },
        "pixels": int(scores.confusion.sum()),
        **{way: {name: defined(getattr(metrics, name)) for name in OVERALL} for way, metrics in both.items()},
        "classes": list(class_rows(scores, names)),
        "confusion": scores.confusion[:, :-1].tolist(),
        "confusion_with_no_class": scores.confusion[:, -1].tolist(),
    }


def class_rows(scores: Scores, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A row for each class (CLASSES, but for the evaluation's name)."""
    both = {"pooled": scores.pooled(), "averaged": scores.averaged()}
    truth, mask = scores.confusion.sum(1), scores.confusion.sum(0)
    for one, name in enumerate(names):
        row = {
            "class_id": one,
            "name": name,
            "truth_pixels": int(truth[one]),
            "mask_pixels": int(mask[one]),
            "pixels": int(scores.confusion[one, one]),
            "images": int(scores.counts[list(NAMES).index("class_iou"), one]),
        }
        for way, metrics in both.items():
            row |= {f"{way}_{ours}": defined(getattr(metrics, theirs)[one]) for theirs, ours in NAMES.items()}
        yield row
