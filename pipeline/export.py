"""Masks for others: the rows of an output as files that other programs read.

What is written depends on nothing but the rows that are chosen, so an export that was killed is repeated by the same
command and its files replace each other. A marker in the destination says which rows an export is of, from before its
first file on: nothing is ever written among files that are not an export's own, and none of those is removed.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from model.labels import LabelSet
from pipeline.ahead import ahead
from pipeline.config import ConfigurationError, ExportSettings
from pipeline.selection import Selection, Wanted, select
from pipeline.storage import Store
from pipeline.tables import workspace

MARKER = "swath-export.json"
VERSION = 1  # of the files' names and contents
OURS = ("masks/", "masks.csv", "labels.json", "instances.json", "data/", "left_out/", "id2label.json", "README.md")


class Progress(Protocol):
    """Whoever watches."""

    def exporting(self, done: int, total: int) -> None:
        """Images that are done, of all that are chosen."""


@dataclass(frozen=True)
class Exported:
    """What is in the destination: images, and of those that were chosen how many are left out, by why."""

    images: int
    left_out: Counter[str] = field(default_factory=Counter)
    was_there: bool = False  # already, from before


Write = Callable[[Selection, LabelSet, Store, Path, Progress], Exported]


def export(settings: ExportSettings, write: Write, progress: Progress) -> Exported:
    """Have `write` put the chosen rows of an output into the destination.

    Raises `ConfigurationError` where nothing is chosen, or the destination has something else.
    """
    output, destination = Store(settings.output, settings), Store(settings.dest, settings)
    if f"{destination.uri('').rstrip('/')}/".startswith(f"{output.uri('').rstrip('/')}/"):
        raise ConfigurationError(f"{destination.url}: is in the output itself; give a place beside it")
    with workspace() as space:
        selection = select(space.tables, output, Wanted(settings.run_id, settings.where, settings.limit))
        mark = {"version": VERSION, "format": settings.format, "output": output.url, "rows": selection.digest}
        if found := prepare(destination, mark, settings.overwrite):
            return Exported(found["images"], Counter(found["left_out"]), was_there=True)
        done = write(selection, selection.label_set(), destination, space.folder, progress)
        put_mark(destination, mark | {"images": done.images, "left_out": done.left_out, "is_finished": True})
    return done


def prepare(destination: Store, mark: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Put the marker where that may be; the one of the same export if that is there and finished."""
    there = any(not name.startswith(".") for name in destination.names(""))  # a repository's own are hidden
    found = read_mark(destination) if there else None
    if there and found is None:
        raise ConfigurationError(f"{destination.url}: has files that are no export; give a new or an empty folder")
    is_same = found is not None and {name: found.get(name) for name in mark} == mark
    if found and not overwrite:
        if is_same and found.get("is_finished"):
            return found
        if not is_same:
            raise ConfigurationError(
                f"{destination.url}: has an export of other rows, or another format; give another place, or "
                f"--overwrite to replace it"
            )
    destination.check_writable()
    put_mark(destination, mark)
    if found and overwrite:
        ours = (name for name, entry in destination.listing() if entry and name.startswith(OURS))
        for _ in ahead(destination.delete, ours):
            pass
    return None


def read_mark(destination: Store) -> dict[str, Any] | None:
    """The marker of an export; None where there is none."""
    try:
        found = json.loads(destination.read(MARKER))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def put_mark(destination: Store, mark: dict[str, Any]) -> None:
    destination.put(MARKER, json.dumps(mark, indent=2).encode())
