"""The course of a training, as OUT keeps it: what it is, how far it is, and what came of it.

    OUT/config.json, model.safetensors, preprocessor_config.json    the best network so far, in Hugging Face's layout
    OUT/training/course.json            put once: the command, and all that follows from it
    OUT/training/examples.parquet       what is learned from; validation.parquet: what it is validated on
    OUT/training/left_out.csv           what could not be used, and why
    OUT/training/state-<step>.pt        all that the next step depends on; the last two
    OUT/training/log.csv                loss, learning rate and scores, step by step
    OUT/training/result.json            the end: which step is the best, and its scores

Every object is put whole, so a kill at any time leaves the one before or the one after. Of the network only the weights
change while it learns, one object too.
"""

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.augmentation import Augmentation
from model.labels import LabelSet
from model.training import Recipe
from pipeline.config import ConfigurationError
from pipeline.config_truth import FinetuneSettings
from pipeline.examples import LeftOut
from pipeline.storage import Store

VERSION = 1  # of what a course says, and of what a step does
FOLDER = "training"
COURSE, RESULT, LOG = (f"{FOLDER}/{name}" for name in ("course.json", "result.json", "log.csv"))
EXAMPLES, VALIDATION, LEFT_OUT = (
    f"{FOLDER}/{name}" for name in ("examples.parquet", "validation.parquet", "left_out.csv")
)
MODEL = ("model.safetensors", "config.json", "preprocessor_config.json")
KEPT = 2  # states
ELSEWHERE = {  # settings that change nothing in what is learned
    *("images", "masks", "out", "val_images", "val_masks", "checkpoint", "labels"),  # of which the content counts
    *("endpoint_url", "region", "anonymous", "storage_option", "retry_seconds", "ray_address"),
    *("workers", "save_every", "grace", "overwrite"),
}
SCORES = ("mean_iou", "accuracy", "mean_accuracy", "frequency_weighted_iou", "mean_dice", "mean_boundary_iou")
COLUMNS = ("step", "epoch", "loss", "learning_rate", "seconds", *SCORES)


class UnfinishedError(Exception):
    """Workers have failed too often, or the loss is no number; the message says why and what to do."""


@dataclass(frozen=True)
class Course:
    """What a training is. `command` is what was asked for, the rest what follows from it."""

    command: dict[str, Any]  # settings, and digests of what they lead to
    labels: LabelSet
    recipe: Recipe
    augmentation: Augmentation
    class_weights: tuple[float, ...]
    ignore_ids: tuple[int, ...] | None
    precision: str  # of the products: auto, float32 or bfloat16
    val_every: int
    examples: int
    validation: int
    left_out: int

    def data(self) -> bytes:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2).encode()

    def digest(self) -> str:
        return hashlib.sha256(self.data()).hexdigest()


def command_of(settings: FinetuneSettings, digests: Mapping[str, str]) -> dict[str, Any]:
    """What makes one training another than the next."""
    given = {name: value for name, value in settings.model_dump(mode="json").items() if name not in ELSEWHERE}
    return given | dict(digests)


def read_course(out: Store) -> Course | None:
    """The course that was begun in `out`; None where there is none. Raises `ConfigurationError` for a damaged one."""
    try:
        found = json.loads(out.read(COURSE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        found = {}
    try:
        if found.pop("version") != VERSION:
            raise ValueError("another version")
        names, palette = found["labels"]["names"], found["labels"]["palette"]
        how = found["augmentation"]
        pairs = {name: tuple(how[name]) for name in ("scales", "contrast", "saturation")}
        ignored = found["ignore_ids"]
        parts = {
            "labels": LabelSet(tuple(names), tuple(tuple(colour) for colour in palette)),
            "recipe": Recipe(**found["recipe"]),
            "augmentation": Augmentation(**how | pairs),
            "class_weights": tuple(found["class_weights"]),
            "ignore_ids": None if ignored is None else tuple(ignored),
        }
        return Course(**found | parts)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigurationError(
            f"{out.uri(COURSE)}: damaged, or another version's; give another OUT, or --overwrite to begin anew"
        ) from None


def check_same(out: Store, course: Course, command: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError`, with all that differs, where a course is not that of a command."""
    differing = [
        f"{name.replace('_', '-')} was {shown(course.command.get(name))}, is {shown(command.get(name))}"
        for name in {**course.command, **command}
        if course.command.get(name) != command.get(name)
    ]
    if differing:
        raise ConfigurationError(
            f"{out.url} has a training of another command ({'; '.join(differing)}); give the same, another OUT, or "
            "--overwrite to begin anew"
        )


def shown(value: Any) -> str:
    return "not given" if value in (None, [], {}) else str(value)


def begin(out: Store, course: Course, tables: Mapping[str, pa.Table], left_out: list[LeftOut]) -> None:
    """Put what a course is; `course.json` last, which makes it one."""
    for name, table in tables.items():
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        out.put(name, sink.getvalue())
    rows = [("uri", "status", "reason"), *((one.uri, one.status, one.reason) for one in left_out)]
    out.put(LEFT_OUT, as_csv(rows))
    out.put(COURSE, course.data())


def clear(out: Store) -> None:
    """Remove a training, or what is left of one; `course.json` first, so that the rest is none, and the weights before
    what describes them. What else there is in its folders is somebody's own.
    """
    for name in (COURSE, RESULT, LOG, EXAMPLES, VALIDATION, LEFT_OUT, *map(state_name, states(out)), *MODEL):
        out.delete(name)


def read_result(out: Store) -> dict[str, Any] | None:
    """The result of the training in `out`; None while it has none. Raises `ConfigurationError` for a damaged one."""
    try:
        found: dict[str, Any] = json.loads(out.read(RESULT))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise ConfigurationError(f"{out.uri(RESULT)}: damaged; delete it, and run the same command again") from None
    return found


def read_table(out: Store, name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(out.read(name)), page_checksum_verification=True)


def states(out: Store) -> list[int]:
    """The steps of which there is a state, in order."""
    found = (name.removeprefix("state-").removesuffix(".pt") for name in out.names(FOLDER) if name.endswith(".pt"))
    return sorted(int(step) for step in found if step.isdigit())


def state_name(step: int) -> str:
    return f"{FOLDER}/state-{step:07d}.pt"


def put_state(out: Store, step: int, state: Mapping[str, Any]) -> None:
    """Put a state, and remove all but the last ones."""
    sink = io.BytesIO()
    torch.save(state, sink)
    out.put(state_name(step), sink.getvalue())
    for old in states(out)[:-KEPT]:
        out.delete(state_name(old))


def newest_state(out: Store, course: Course) -> dict[str, Any] | None:
    """The newest state of a course that is whole; None where there is none yet.

    Raises `ConfigurationError` where there are some and all are damaged: to begin anew is not what anybody asked for.
    """
    there = states(out)
    for step in reversed(there):
        data = io.BytesIO(out.read(state_name(step)))
        try:
            if zipfile.ZipFile(data).testzip():  # torch.load takes a damaged tensor as it is
                continue
            data.seek(0)
            found = torch.load(data, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception:  # noqa: S112  (torch.load documents no set of errors for damaged files)
            continue
        if found.get("course") == course.digest():
            return found
    if there:
        raise ConfigurationError(
            f"{out.uri(FOLDER)}: no state of this training is whole ({', '.join(map(state_name, there))}); "
            "--overwrite begins anew"
        )
    return None


def as_csv(rows: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def log_csv(rows: list[dict[str, Any]]) -> bytes:
    return as_csv([COLUMNS, *([row.get(name, "") for name in COLUMNS] for row in rows)])
