"""SQL on an output, answered by DuckDB in this process from the Parquet files themselves, with the views of `views`.

Of local files DuckDB maps what it wants; those of an object store are read as everything else here is, with the same
credentials and patience, and never a byte more than DuckDB asks for.
"""

import contextlib
import fnmatch
import itertools
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from glob import has_magic
from typing import Any

import duckdb
import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.config import ConfigurationError
from pipeline.names import printable
from pipeline.reader import ObjectFile, Reader
from pipeline.storage import Store
from pipeline.tables import workspace
from pipeline.views import local_root, run_folders, views_at

PROTOCOL = "swath"  # of an output that is reached through `OutputFiles`
REQUESTS = 32  # in flight to an object store
ROWS = 10_000  # of a batch of an answer
FAILED = (duckdb.IOException, duckdb.OutOfMemoryException, duckdb.InternalException)  # which no other SQL would mend
OF_FILES = ("IO Error", "HTTP Error", "Out of Memory Error", "INTERNAL Error")


class QueryError(ConfigurationError):
    """SQL that DuckDB does not take; the message is DuckDB's, which shows where."""


@dataclass(frozen=True)
class Question:
    """Some SQL, and what it asks in words."""

    title: str
    sql: str


@contextlib.contextmanager
def connect(output: Store) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own with the views of an output. Raises `ConfigurationError` where that has no rows."""
    with workspace() as space:
        space.tables.execute("RESET memory_limit")  # a person's question may have what the machine has
        space.tables.execute("SET enable_profiling = 'no_output'")  # for `bytes_read`
        make_views(space.tables, output)
        yield space.tables


def make_views(tables: duckdb.DuckDBPyConnection, output: Store) -> None:
    """The same in a DuckDB that is there."""
    runs = run_folders(output)
    tables.execute("SET autoinstall_known_extensions = false")  # nothing is loaded from anywhere without being asked
    if not is_plain_path(output):
        tables.register_filesystem(OutputFiles(output))
        tables.execute(f"SET threads = {REQUESTS}")  # which wait most of the time
    tables.execute(views_at(output, root(output), is_one_run=len(runs) == 1))


def root(output: Store) -> str:
    """Where DuckDB reaches the files of an output, once connected."""
    return local_root(output) if is_plain_path(output) else f"{PROTOCOL}://"


def is_plain_path(output: Store) -> bool:
    """Whether DuckDB finds the files by itself, as it does on this machine, but not behind a name with a backslash."""
    return output.is_local and "\\" not in output.root


def ask(tables: duckdb.DuckDBPyConnection, sql: str) -> pa.RecordBatchReader | None:
    """The answer to the last of the statements in `sql`, as it comes; None where that has none.

    Raises `QueryError`, now and while it comes.
    """
    with explained():
        has_rows = gives_rows(sql)
        answer = tables.sql(sql)
    if answer is None or not has_rows:
        return None
    with explained():
        reader = answer.to_arrow_reader(ROWS)
    return pa.RecordBatchReader.from_batches(reader.schema, coming(reader))


def coming(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with explained():
        yield from reader


def gives_rows(sql: str) -> bool:
    """Whether the last statement has an answer. Raises `QueryError` where there is none, or no SQL."""
    with explained():
        statements = duckdb.extract_statements(sql)
    if not statements:
        raise QueryError("this SQL has no statement")
    return bool(statements[-1].expected_result_type != [duckdb.ExpectedResultType.NOTHING])


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """A block in which what DuckDB says of the SQL is a `QueryError`, and what it says of files stays as it is."""
    try:
        yield
    except (duckdb.Error, OSError) as error:  # an OSError of Arrow has DuckDB's words
        said = str(error).strip()
        if isinstance(error, FAILED) or said.startswith(OF_FILES) or "Traceback" in said:
            raise
        raise QueryError(printable(said)) from None


def bytes_read(tables: duckdb.DuckDBPyConnection) -> int:
    """What the statement that ran last has read of files; its answer has to be taken whole before."""
    found = json.loads(tables.get_profiling_information(format="json"))
    return found.get("io", {}).get("total_bytes_read", 0)  # of some, as DESCRIBE, nothing is known


def questions(text: str) -> Iterator[Question]:
    """The paragraphs of an SQL file: lines of comment say what the statement below them asks."""
    for is_blank, group in itertools.groupby(text.splitlines(), lambda line: not line.strip()):
        lines = list(group)
        comment = list(itertools.takewhile(lambda line: line.startswith("--"), lines))
        if not is_blank and len(comment) < len(lines):
            title = " ".join(line.lstrip("- ").strip() for line in comment)
            yield Question(title, "\n".join(lines[len(comment) :]))


class OutputFiles(AbstractFileSystem):
    """The files of an output, for DuckDB to read; paths are names below its root. Many threads may use it."""

    protocol = PROTOCOL
    cachable = False  # by fsspec, which knows nothing of `output`

    def __init__(self, output: Store):
        super().__init__()
        self.output = output
        self.globbed: dict[str, list[str]] = {}  # by pattern
        self.sizes: dict[str, int] = {}
        self.lock = threading.Lock()

    def glob(self, path: str, **_: Any) -> list[str]:
        """What matches a pattern, part for part, as it was when it was first asked for: views on views ask often."""
        if path not in self.globbed:
            found = [""]
            for part in self._strip_protocol(path).strip("/").split("/"):
                found = [f"{folder}/{name}".lstrip("/") for folder in found for name in self.matching(folder, part)]
            self.globbed[path] = [f"{PROTOCOL}://{name}" for name in found]
        return self.globbed[path]

    def matching(self, folder: str, part: str) -> list[str]:
        """The names in a folder that match a part of a pattern."""
        if not has_magic(part):
            return [part]
        return fnmatch.filter(self.output.names(folder), part)

    def open(self, path: str, mode: str = "rb", **_: Any) -> "SharedFile":
        """Raises FileNotFoundError."""
        if mode not in ("rb", "r"):
            raise PermissionError(f"{path}: an output is not written by a query")
        name = self._strip_protocol(path)
        file = SharedFile(self.output.reader, self.output.uri(name))
        with self.lock:
            self.sizes[name] = file.bytes
        return file

    def size(self, path: str) -> int:
        """Of a file that has been opened, in bytes."""
        with self.lock:
            return self.sizes[self._strip_protocol(path)]

    def modified(self, path: str) -> datetime:
        """Always the same, as nothing that is put is ever changed."""
        return datetime(1970, 1, 1, tzinfo=UTC)


class SharedFile(ObjectFile):
    """A file that DuckDB's threads read together: each seeks and then reads, and another may come in between.

    So each has a position of its own; a thread that has not sought goes on where the last reading has ended.
    """

    def __init__(self, reader: Reader, uri: str):
        super().__init__(reader, uri, ahead=0)
        self.sought: dict[int, int] = {}  # position by thread

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.sought[threading.get_ident()] = super().seek(offset, whence)
        return self.position

    def read(self, count: int = -1) -> bytes:
        start = self.sought.pop(threading.get_ident(), None)
        if start is None:
            start = self.position
            self.sought.clear()
        found = self.read_at(start, count)
        self.position = start + len(found)
        return found
