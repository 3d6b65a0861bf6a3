"""Masks for others: the rows of an output as files that other programs read.

What is written depends on nothing but the rows that are chosen, so an export that was killed is repeated by the same
command and its files replace each other. A marker in the destination says which rows an export is of, from before its
first file on: none is begun among files that are not an export's own. Where one replaces another, only names are
removed that the other's format writes, and until they all are gone the marker is one that no export goes on from.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
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
OWN = {  # names that each format writes
    "png": re.compile(r"masks/.+\.png|masks\.csv|labels\.json"),
    "coco": re.compile(r"instances\.json"),
    "huggingface": re.compile(
        r"data/train-\d{5,}-of-\d{5,}\.parquet|left_out/train-\d{5,}-of-\d{5,}\.csv|id2label\.json|README\.md"
    ),
}


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
    check_apart(output, destination)
    with workspace() as space:
        selection = select(space.tables, output, Wanted(settings.run_id, settings.where, settings.limit))
        mark = {"version": VERSION, "format": settings.format, "output": output.url, "rows": selection.digest}
        if found := prepare(destination, mark, settings.overwrite):
            return Exported(found["images"], Counter(found["left_out"]), was_there=True)
        done = write(selection, selection.label_set(), destination, space.folder, progress)
        put_mark(destination, mark | {"images": done.images, "left_out": done.left_out, "is_finished": True})
    return done


def check_apart(output: Store, destination: Store) -> None:
    """Raise `ConfigurationError` where one is in the other, as an export would be taken for rows, or rows for one."""
    if place(destination).startswith(place(output)):
        raise ConfigurationError(f"{destination.url}: is in the output itself; give a place beside it")
    if place(output).startswith(place(destination)):
        raise ConfigurationError(f"{destination.url}: the output is in it; give a place beside the output")


def place(store: Store) -> str:
    """Where a store is, with a `/` at its end; on this machine where its symbolic links lead to."""
    where = f"file://{os.path.realpath(store.root)}" if store.is_local else store.uri("")
    return f"{where.rstrip('/')}/"


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
                f"{destination.url}: has an export of other rows, of another format, or half replaced; give another "
                f"place, or --overwrite to replace it"
            )
    destination.check_writable()
    if found and overwrite:
        clear(destination, found["format"], mark["format"])
    put_mark(destination, mark)
    return None


def clear(destination: Store, old: str, new: str) -> None:
    """Remove the files of an export in the format `old`, for one in the format `new`.

    Raises `ConfigurationError` where that would write over a file of somebody else, or one cannot be removed.
    """
    if theirs := next((name for name in own(destination, new) if not OWN[old].fullmatch(name)), None):
        raise ConfigurationError(
            f"{destination.url}: {theirs} is not of the export that is replaced, and would be lost; move it, or give "
            f"another place"
        )
    put_mark(destination, {"version": VERSION, "format": old, "is_being_replaced": True})  # by whom, it does not say
    for _ in ahead(destination.delete, own(destination, old)):
        pass
    if left := next(own(destination, old), None):
        raise ConfigurationError(f"{destination.url}: {left} cannot be removed; give another place")


def own(destination: Store, kind: str) -> Iterator[str]:
    """The names in a destination that exports of a format write."""
    return (name for name, entry in destination.listing() if entry and OWN[kind].fullmatch(name))


def read_mark(destination: Store) -> dict[str, Any] | None:
    """The marker of an export; None where there is none, or none of a format that is known."""
    try:
        found = json.loads(destination.read(MARKER))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") in tuple(OWN) else None


def put_mark(destination: Store, mark: dict[str, Any]) -> None:
    destination.put(MARKER, json.dumps(mark, indent=2).encode())
