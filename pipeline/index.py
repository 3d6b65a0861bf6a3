"""The index: every image that was ever seen, with its size and format, read from headers alone.

An update lists the collection and reads only what it does not know: the same object with the same etag is never opened
again. What is new goes into one more part, `index/part-<n>.parquet`. A tar or Parquet file with images has a row of
its own beside theirs, so that it is known even where it holds none.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ConfigurationError, IndexSettings
from pipeline.containers import ContainerError, kind_of, members
from pipeline.decode import DecodeError, read_header
from pipeline.inputs import is_image_name, is_utf8, list_inputs
from pipeline.reader import HEAD, ChangedError, ObjectFile, Reader
from pipeline.storage import ERRORS, Store, reason
from pipeline.tables import stored

REQUESTS = 32  # in flight in each process, where nothing else is said
CHUNK = 2_048  # objects between two progress reports
FILES_CHUNK = 16  # of tar and Parquet files
SPREAD = 100_000  # objects to open, from which on all machines of a cluster share the work
PART_IMAGES = 100_000  # in one part of the index, roughly

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False, metadata={"unit": "byte"}),
        pa.field("format", pa.string(), metadata={"note": "tar, parquet: a file of images, none itself"}),
        pa.field("width", pa.int32(), metadata={"unit": "pixel", "note": "after EXIF orientation"}),
        pa.field("height", pa.int32(), metadata={"unit": "pixel", "note": "after EXIF orientation"}),
        pa.field("error", pa.string(), metadata={"note": "why the header could not be read"}),
        pa.field("file", pa.string(), metadata={"note": "URI of the tar or Parquet file that it lies in"}),
        pa.field("position", pa.int64(), metadata={"note": "of its first byte in a tar, its row in a Parquet file"}),
    ]
)
FILL = """
    CREATE OR REPLACE TABLE listing AS
    SELECT l.uri, coalesce(l.etag, k.etag) AS etag, l.bytes, l.kind, l.root FROM listing l
    LEFT JOIN (SELECT coalesce(file, uri) AS uri, max(etag) AS etag FROM known GROUP BY 1) k ON l.uri = k.uri
"""
UNKNOWN = """
    CREATE TABLE unknown AS SELECT l.uri, l.etag, l.bytes, l.kind FROM listing l
    ANTI JOIN (SELECT coalesce(file, uri) AS uri, etag FROM known) k ON l.uri = k.uri AND l.etag = k.etag
"""
IMAGES = """
    CREATE TABLE images AS
    SELECT coalesce(k.uri, l.uri) AS uri, coalesce(k.etag, l.etag, '') AS etag, coalesce(k.bytes, l.bytes, 0) AS bytes,
           k.format, k.width, k.height, k.error, k.file, k.position
    FROM listing l LEFT JOIN known k ON l.uri = coalesce(k.file, k.uri) AND l.etag = k.etag
    WHERE (l.kind = 'image' OR k.file IS NOT NULL OR k.error IS NOT NULL)
"""
MEMBER_MATCHES = "substr(k.uri, l.root + 1) GLOB ?"

Reading = tuple[pa.Table, Counter[str]]  # rows of SCHEMA, and how many members of files are no images, by why
Spread = Callable[[Callable[[pa.Table], Reading], Iterator[pa.Table]], Iterator[Reading]]


class Progress(Protocol):
    """Whoever watches an update."""

    def listing(self, found: int) -> None:
        """Objects listed so far."""

    def indexing(self, done: int, total: int) -> None:
        """Objects opened, of those to open."""


@dataclass(frozen=True)
class Index:
    """What an update found; the images themselves are in the workspace's table `images` (SCHEMA)."""

    images: int
    skipped: Counter[str]  # listed, but no image by name: how many, by why
    opened: int  # objects that were not known


def update_index(
    settings: IndexSettings, output: Store, tables: duckdb.DuckDBPyConnection, progress: Progress, spread: Spread
) -> Index:
    """List the collection, read the headers that are not known yet, and keep them in the output.

    `spread` has many machines read them where there are very many. Raises `ConfigurationError` for a collection that
    cannot be listed or holds no image.
    """
    skipped = list_inputs(tables, settings, output, progress.listing)
    join(FILL, tables, output)
    join(UNKNOWN, tables, output)
    opened = count(tables, "unknown")
    skipped += read_unknown(settings, output, tables, opened, progress, spread if opened >= SPREAD else map)
    join(FILL, tables, output)
    patterns = [*settings.include, *settings.exclude]
    included = " OR ".join([MEMBER_MATCHES] * len(settings.include)) or "true"
    excluded = " OR ".join([MEMBER_MATCHES] * len(settings.exclude)) or "false"
    join(f"{IMAGES} AND (k.file IS NULL OR (({included}) AND NOT ({excluded})))", tables, output, patterns)
    return Index(count(tables, "images"), skipped, opened)


def join(query: str, tables: duckdb.DuckDBPyConnection, output: Store, values: Sequence[str] = ()) -> None:
    """Run a query over the table `known`: every row of the index."""
    if query == FILL and not tables.execute("SELECT count(*) FROM listing WHERE etag IS NULL").fetchall()[0][0]:
        return
    tables.register("known", read_index(output))
    tables.execute(query, values)


def read_index(output: Store) -> pa.RecordBatchReader:
    """Every row of the index."""
    return stored(output, [f"index/{name}" for name in output.names("index") if name.endswith(".parquet")], SCHEMA)


def read_unknown(
    settings: IndexSettings,
    output: Store,
    tables: duckdb.DuckDBPyConnection,
    total: int,
    progress: Progress,
    spread: Spread,
) -> Counter[str]:
    """Open what is in the table `unknown`, and put what its headers say into the index, part by part."""
    skipped: Counter[str] = Counter()
    done, rows = 0, []
    sizes: list[int] = []

    def chunks() -> Iterator[pa.Table]:
        for kinds, size in (("= 'image'", CHUNK), ("!= 'image'", FILES_CHUNK)):
            for batch in tables.sql(f"FROM unknown WHERE kind {kinds}").to_arrow_reader(CHUNK):
                for start in range(0, len(batch), size):
                    sizes.append(len(part := pa.Table.from_batches([batch.slice(start, size)])))
                    yield part

    progress.indexing(0, total)
    try:
        for number, (found, others) in enumerate(spread(Headers(settings), chunks())):
            skipped += others
            rows.append(found)
            done += sizes[number]
            progress.indexing(done, total)
            if sum(map(len, rows)) >= PART_IMAGES:
                add_part(output, rows)
                rows = []
    finally:  # an index that is interrupted keeps what it has read
        add_part(output, rows)
    return skipped


class Headers:
    """Objects to rows of the index, many at once: one small read for an image, a second where that is not enough."""

    def __init__(self, settings: IndexSettings):
        self.settings, self.reader = settings, Reader(settings)

    def __reduce__(self) -> tuple[type["Headers"], tuple[IndexSettings]]:
        return Headers, (self.settings,)  # connections stay where they are

    def __call__(self, objects: pa.Table) -> Reading:
        """Rows of SCHEMA for objects (uri, etag, bytes, kind); none for one that the store did not give, which the
        worker will try again.

        Raises `ConfigurationError` when the store gives nothing at all, which no image can be blamed for.
        """
        with ThreadPoolExecutor(self.settings.requests or REQUESTS) as pool:
            found = list(pool.map(self.open, objects.to_pylist()))
        refused = [one for one in found if isinstance(one, Exception)]
        if refused and len(refused) == len(found):
            raise ConfigurationError(f"{objects['uri'][0]}: cannot be read: {reason(refused[0])}")
        readings = [one for one in found if not isinstance(one, Exception)]
        rows = [row for rows, _ in readings for row in rows]
        return pa.Table.from_pylist(rows, SCHEMA), sum((skipped for _, skipped in readings), Counter())

    def open(self, row: dict[str, Any]) -> tuple[list[dict], Counter[str]] | Exception:
        """The rows of one object, or the store's error."""
        try:
            if row["kind"] == "image":
                return [self.header(row["uri"], row["etag"] or "", row["bytes"])], Counter()
            return self.members(row["uri"], row["etag"] or "", row["bytes"] or 0)
        except (FileNotFoundError, ChangedError):
            return [], Counter()
        except ERRORS as error:
            if row["kind"] != "image":  # of whose images nobody would hear
                raise
            return error

    def header(self, uri: str, etag: str, size: int | None) -> dict[str, Any]:
        """One image."""
        row: dict[str, Any] = {"uri": uri, "etag": etag, "bytes": size}
        if size != 0:
            file = ObjectFile(self.reader, uri, etag)
            row |= {"etag": file.etag, "bytes": file.bytes}
            try:
                if file.bytes:
                    return row | vars(read_header(io.BufferedReader(file, HEAD)))
            except DecodeError as error:
                return row | {"error": str(error)}
        return row | {"error": "the file is empty (0 bytes)"}

    def members(self, uri: str, etag: str, size: int) -> tuple[list[dict], Counter[str]]:
        """The images in a tar or Parquet file, and the file itself."""
        skipped: Counter[str] = Counter()
        etag = etag or ObjectFile(self.reader, uri).etag
        itself: dict[str, Any] = {"uri": uri, "etag": etag, "bytes": size, "format": kind_of(uri)}
        rows = {uri: itself}
        try:
            for member in members(self.reader, uri, etag, self.settings.image_column):
                name = member.uri[len(uri) + 1 :]
                if not is_utf8(name):
                    skipped["a name that is not UTF-8"] += 1
                elif kind_of(uri) == "tar" and not is_image_name(name):
                    skipped[f"{os.path.splitext(name)[1].lower() or 'no extension'} in a tar"] += 1
                else:
                    rows[member.uri] = vars(member) | {"etag": etag, "file": uri}  # of one name the last, as unpacked
        except ContainerError as error:
            itself["error"] = str(error)
        return list(rows.values()), skipped


def add_part(output: Store, tables: list[pa.Table]) -> None:
    """Keep what is known about some images in one more part; another writer's part is never replaced."""
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    if not len(table):
        return
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    number = len(output.names("index"))
    while True:
        try:
            output.put(f"index/part-{number:05d}.parquet", buffer.getvalue().to_pybytes(), only_new=True)
            return
        except FileExistsError:
            number += 1


def count(tables: duckdb.DuckDBPyConnection, table: str) -> int:
    return tables.table(table).count("*").fetchall()[0][0]
