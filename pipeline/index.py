"""The index: every image that was ever seen, with its size and format, read from headers alone.

An update lists the collection and reads only what it does not know: the same object with the same etag is never opened
again. What is new goes into one more part, `index/part-<n>.parquet`. A tar or Parquet file with images has a row of
its own beside theirs, so that it is known even where it holds none.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import duckdb
import pyarrow as pa

from pipeline.attempts import ERRORS, reason
from pipeline.config import ConfigurationError, IndexSettings
from pipeline.containers import ContainerError, NoImagesError, kind_of, members
from pipeline.decode import DecodeError, read_header
from pipeline.inputs import list_inputs, nothing_found, why_not
from pipeline.reader import HEAD, ChangedError, ObjectFile, Reader
from pipeline.seal import write_sealed
from pipeline.storage import Store
from pipeline.tables import make_room, stored

REQUESTS = 32  # in flight in each process, where nothing else is said
CHUNK = 2_048  # objects between two progress reports
FILES_CHUNK = 16  # of tar and Parquet files
FILE_HEAD = 1 << 20  # bytes of such a file that are read at once: many small members, and not much of a large one
FILE_IMAGES = 1_000  # that such a file may hold
SPREAD = 100_000  # images to look at, from which on all machines of a cluster share the work
KINDS = ("= 'image'", "!= 'image'")
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
    CREATE TABLE images AS SELECT k.* FROM known k
    SEMI JOIN listing l ON l.uri = coalesce(k.file, k.uri) AND l.etag = k.etag
    WHERE k.file IS NOT NULL OR k.format IS NULL OR k.format NOT IN ('tar', 'parquet') OR k.error IS NOT NULL
"""
CHOSEN = """
    CREATE OR REPLACE TABLE images AS SELECT i.* FROM images i LEFT JOIN listing l ON i.file = l.uri
    WHERE i.file IS NULL OR is_chosen(substr(i.uri, l.root + 1))
"""
# what could not be opened: a worker tries an image again, a file of images is told of
UNREAD = """
    INSERT INTO images
    SELECT uri, coalesce(etag, ''), coalesce(bytes, 0), CASE WHEN kind != 'image' THEN kind END, NULL, NULL,
           CASE WHEN kind != 'image' THEN 'the file of images is gone, has changed or could not be read' END, NULL, NULL
    FROM unknown ANTI JOIN opened USING (uri)
"""

Reading = tuple[pa.Table, pa.Table, Counter[str]]  # rows of SCHEMA, URIs that were opened, members that are no images
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
    cannot be listed or read, or holds no image.
    """
    skipped = list_inputs(tables, settings, output, progress.listing)
    make_room(tables, count(tables, "listing"))
    has_etags = not tables.execute("SELECT bool_or(etag IS NULL) FROM listing").fetchall()[0][0]
    if not has_etags:  # such an object is taken for the one that is known
        join(FILL, tables, output)
    join(UNKNOWN, tables, output)
    images, files = (tables.table("unknown").filter(f"kind {kinds}").count("*").fetchall()[0][0] for kinds in KINDS)
    is_large = images + FILE_IMAGES * files >= SPREAD
    skipped += read_unknown(settings, output, tables, images + files, progress, spread if is_large else map)
    if not has_etags:
        join(FILL, tables, output)
    join(IMAGES, tables, output)
    if settings.include or settings.exclude:
        tables.create_function("is_chosen", lambda name: not why_not(name, "image", settings), ["VARCHAR"], "BOOLEAN")
        tables.execute(CHOSEN)
    tables.execute(UNREAD)
    tables.execute(
        "DROP TABLE listing; DROP TABLE unknown; DROP TABLE opened"
    )  # the plan wants their place on the disk
    if not (found := count(tables, "images")):
        raise ConfigurationError(nothing_found(settings, skipped))
    return Index(found, skipped, images + files)


def join(query: str, tables: duckdb.DuckDBPyConnection, output: Store) -> None:
    """Run a query over the table `known`: every row of the index."""
    tables.register("known", read_index(output))
    tables.execute(query)


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
    """Open what is in the table `unknown`, and put what its headers say into the index, part by part; what could be
    opened is in the table `opened`.

    Raises `ConfigurationError` when the store gives nothing at all, which no image can be blamed for.
    """
    skipped: Counter[str] = Counter()
    done, rows = 0, []
    is_first = not tables.execute("SELECT 1 FROM listing ANTI JOIN unknown USING (uri) LIMIT 1").fetchall()
    tables.execute("CREATE TABLE opened (uri VARCHAR)")
    progress.indexing(0, total)
    try:
        for found, opened, others in spread(Headers(settings, is_first), chunks(tables)):
            is_first = False
            skipped += others
            rows.append(found)
            tables.register("page", opened)
            tables.execute("INSERT INTO opened SELECT uri FROM page WHERE is_there")
            done += len(opened)
            progress.indexing(done, total)
            if sum(map(len, rows)) >= PART_IMAGES:
                add_part(output, rows)
                rows = []
    finally:  # an index that is interrupted keeps what it has read
        add_part(output, rows)
    return skipped


def chunks(tables: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """The table `unknown` in pieces that are opened together, images first."""
    with tables.cursor() as cursor:  # as the connection has other things to do meanwhile
        for kinds, size in zip(KINDS, (CHUNK, FILES_CHUNK), strict=True):
            for batch in cursor.sql(f"FROM unknown WHERE kind {kinds}").to_arrow_reader(CHUNK):
                for start in range(0, len(batch), size):
                    yield pa.Table.from_batches([batch.slice(start, size)])


class Headers:
    """Objects to rows of the index, many at once: one small read for an image, a second where that is not enough."""

    def __init__(self, settings: IndexSettings, is_first: bool):
        """`is_first` when nothing of the collection is known: a store that then gives nothing cannot be read."""
        self.settings, self.is_first, self.reader = settings, is_first, Reader(settings)

    def __reduce__(self) -> tuple[type["Headers"], tuple[IndexSettings, bool]]:
        return Headers, (self.settings, self.is_first)  # connections stay where they are

    def __call__(self, objects: pa.Table) -> Reading:
        """What objects (uri, etag, bytes, kind) hold; of one that the store did not give there is no row."""
        with ThreadPoolExecutor(self.settings.requests or REQUESTS) as pool:
            found = list(pool.map(self.open, objects.to_pylist()))
        refused = [one for one in found if isinstance(one, Exception)]
        is_gone = (FileNotFoundError, ChangedError)
        if self.is_first and len(refused) == len(found) and not any(isinstance(one, is_gone) for one in refused):
            raise ConfigurationError(f"{objects['uri'][0]}: cannot be read: {reason(refused[0])}")
        readings = [one for one in found if not isinstance(one, Exception)]
        rows = pa.Table.from_pylist([row for rows, _ in readings for row in rows], SCHEMA)
        is_there = pa.array([not isinstance(one, Exception) for one in found])
        skipped = sum((others for _, others in readings), Counter[str]())
        return rows, pa.table({"uri": objects["uri"], "is_there": is_there}), skipped

    def open(self, row: dict[str, Any]) -> tuple[list[dict], Counter[str]] | Exception:
        """The rows of one object, or the store's error."""
        try:
            if row["kind"] == "image":
                return [self.header(row["uri"], row["etag"] or "", row["bytes"])], Counter()
            return self.members(row["uri"], row["etag"] or "")
        except (*ERRORS, ChangedError) as error:
            return error

    def header(self, uri: str, etag: str, size: int | None) -> dict[str, Any]:
        """One image."""
        row: dict[str, Any] = {"uri": uri, "etag": etag, "bytes": size}
        if size != 0 or not etag:
            file = ObjectFile(self.reader, uri, etag)
            row |= {"etag": file.etag, "bytes": file.bytes}
            if file.bytes:
                try:
                    return row | vars(read_header(io.BufferedReader(file, HEAD)))
                except DecodeError as error:
                    if file.failure:
                        raise file.failure from None
                    return row | {"error": str(error)}
        return row | {"error": "the file is empty (0 bytes)"}

    def members(self, uri: str, etag: str) -> tuple[list[dict], Counter[str]]:
        """The images in a tar or Parquet file, and the file itself."""
        skipped: Counter[str] = Counter()
        file = ObjectFile(self.reader, uri, etag, FILE_HEAD, FILE_HEAD)
        itself: dict[str, Any] = {"uri": uri, "etag": file.etag, "bytes": file.bytes, "format": kind_of(uri)}
        rows = {uri: itself}
        try:
            for member in members(file, self.settings.image_column, skipped):
                rows[member.uri] = vars(member) | {"etag": file.etag, "file": uri}  # of one name the last, as unpacked
        except ContainerError as error:
            itself["error"] = str(error)
        except NoImagesError:  # not remembered, as another column may be asked for
            return [], Counter({"a Parquet file without images": 1})
        return list(rows.values()), skipped


def add_part(output: Store, tables: list[pa.Table]) -> None:
    """Keep what is known about some images in one more part; another writer's part is never replaced."""
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    if not len(table):
        return
    data = write_sealed(table, compression="zstd", write_page_checksum=True)
    number = len(output.names("index"))
    while True:
        try:
            output.put(f"index/part-{number:05d}.parquet", data, only_new=True)
            return
        except FileExistsError:
            number += 1


def count(tables: duckdb.DuckDBPyConnection, table: str) -> int:
    return tables.table(table).count("*").fetchall()[0][0]
