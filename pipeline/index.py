"""The index: every image that was ever seen, with its size and format, read from headers alone.

An update lists the collection and reads only what it does not know: the same URI with the same etag is never opened
again. What is new goes into one more part, `index/part-<n>.parquet`.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from pipeline.config import ConfigurationError, IndexSettings
from pipeline.decode import SUFFIXES, DecodeError, read_header
from pipeline.storage import ERRORS, REQUESTS, Entry, Store, reason

HEAD = 32 << 10  # bytes of the first read: enough for all but images with a large EXIF thumbnail or colour profile
CHUNK = 2_048  # images between two progress reports
PART_CHUNKS = 50  # chunks in one part of the index, about 100,000 images

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False, metadata={"unit": "byte"}),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32(), metadata={"unit": "pixel", "note": "after EXIF orientation"}),
        pa.field("height", pa.int32(), metadata={"unit": "pixel", "note": "after EXIF orientation"}),
        pa.field("error", pa.string(), metadata={"note": "why the header could not be read"}),
    ]
)


@dataclass(frozen=True)
class Index:
    """What the collection holds now."""

    images: pa.Table  # SCHEMA, one row an image, sorted by URI
    skipped: Counter[str]  # listed, but no image by name: how many, by why
    opened: int  # headers that this update had to read


def update_index(settings: IndexSettings, source: Store, output: Store, progress: Callable[[int, int], None]) -> Index:
    """List the collection, read the headers that are not known yet, and keep them in the output.

    `progress` is called with (headers read, headers to read). Raises `ConfigurationError` for a collection that
    cannot be listed or holds no image.
    """
    skipped: Counter[str] = Counter()
    entries = list(select(settings, source, output, skipped))
    if not entries:
        raise ConfigurationError(f"{source.url}: no images found{summary(skipped)}; see --include")
    listed = pa.table(
        {
            "uri": pa.array([entry.uri for entry in entries], pa.string()),
            "etag": pa.array([entry.etag for entry in entries], pa.string()),
            "bytes": pa.array([entry.bytes for entry in entries], pa.int64()),
        }
    )
    known = read_index(output)
    joined = listed.join(known.select(["uri", "etag", "format", "width", "height", "error"]), ["uri", "etag"])
    is_known = pc.or_(pc.is_valid(joined["width"]), pc.is_valid(joined["error"]))
    unknown = joined.filter(pc.invert(is_known)).sort_by("uri")
    parts: list[pa.Table] = []
    try:
        for start in range(0, len(unknown), CHUNK):
            progress(start, len(unknown))
            parts.append(read_headers(source, unknown.slice(start, CHUNK), settings.requests or REQUESTS))
            if start // CHUNK % PART_CHUNKS == PART_CHUNKS - 1:
                add_part(output, parts[-PART_CHUNKS:])
    finally:  # an index that is interrupted keeps what it has read
        add_part(output, parts[len(parts) - len(parts) % PART_CHUNKS :])
    progress(len(unknown), len(unknown))
    images = pa.concat_tables([joined.filter(is_known).select(SCHEMA.names).cast(SCHEMA), *parts])
    return Index(images.sort_by("uri"), skipped, len(unknown))


def read_index(output: Store) -> pa.Table:
    """Every image ever seen, one row for each (uri, etag)."""
    parts = [output.path(f"index/{name}") for name in output.names("index") if name.endswith(".parquet")]
    if not parts:
        return SCHEMA.empty_table()
    table = pyarrow.dataset.dataset(parts, schema=SCHEMA, filesystem=output.arrow(), format="parquet").to_table()
    return (
        table.group_by(["uri", "etag"])
        .aggregate([(name, "max") for name in SCHEMA.names[2:]])
        .rename_columns(SCHEMA.names)
    )


def select(settings: IndexSettings, source: Store, output: Store, skipped: Counter[str]) -> Iterator[Entry]:
    """The entries that are images by name, or by the patterns; the others are counted in `skipped`."""
    root = output.uri("").rstrip("/")  # an output inside its own collection is not a part of it
    own = tuple(f"{root}/{folder}/" for folder in ("index", "runs", "segments"))
    for name, entry in source.listing():
        if entry is None or name.endswith("/"):
            if is_image_name(name.rstrip("/")):
                skipped["not a file"] += 1
        elif entry.uri.startswith(own):
            continue
        elif not is_utf8(entry.uri):
            skipped["a name that is not UTF-8"] += 1
        elif any(fnmatchcase(name, pattern) for pattern in settings.exclude):
            skipped["excluded"] += 1
        elif settings.include and not any(fnmatchcase(name, pattern) for pattern in settings.include):
            skipped["not included"] += 1
        elif not settings.include and not is_image_name(name):
            skipped[os.path.splitext(name)[1].lower() or "no extension"] += 1
        else:
            yield entry


def read_headers(source: Store, unknown: pa.Table, requests: int) -> pa.Table:
    """Rows of SCHEMA for the images in `unknown` (uri, etag, bytes): one small read each, a second where needed.

    Raises `ConfigurationError` when the store gives nothing at all, which no image can be blamed for.
    """
    rows = unknown.select(["uri", "etag", "bytes"]).to_pylist()
    filled = [row for row in rows if row["bytes"]]
    heads = source.heads([row["uri"] for row in filled], HEAD, requests)
    refused = [head for head in heads if isinstance(head, ERRORS) and not isinstance(head, FileNotFoundError)]
    if refused and len(refused) == len(heads):
        raise ConfigurationError(f"{source.url}: cannot be read: {reason(refused[0])}")
    with ThreadPoolExecutor(requests) as pool:
        found = pool.map(lambda row, head: describe(source, row["uri"], row["bytes"], head), filled, heads)
        for row, description in zip(filled, found, strict=True):
            row.update(description)
    for row in rows:
        if not row["bytes"]:
            row["error"] = "the file is empty (0 bytes)"
    return pa.Table.from_pylist(rows, SCHEMA)


def describe(source: Store, uri: str, size: int, head: bytes | BaseException) -> dict[str, str | int]:
    """Format and size of one image from its first bytes, or why there are none.

    Nothing where the store failed: the worker will try again and give the image its row.
    """
    try:
        if isinstance(head, BaseException):
            raise head
        try:
            header = read_header(io.BytesIO(head))
        except DecodeError:
            if len(head) >= size:
                raise
            with source.open(uri) as file:
                header = read_header(file)
    except DecodeError as error:
        return {"error": str(error)}
    except ERRORS:
        return {}
    return {"format": header.format, "width": header.width, "height": header.height}


def add_part(output: Store, tables: list[pa.Table]) -> None:
    """Keep what is known about some images in one more part; another writer's part is never replaced."""
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    table = table.filter(pc.or_(pc.is_valid(table["width"]), pc.is_valid(table["error"])))
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


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def summary(skipped: Counter[str]) -> str:
    """What was skipped, for a message: " (skipped 3: .txt 2, no extension 1)"."""
    if not skipped:
        return ""
    shown = skipped.most_common(6)
    kinds = [f"{kind} {count:,}" for kind, count in shown]
    others = skipped.total() - sum(count for _, count in shown)
    kinds += [f"others {others:,}"] if others else []
    return f" (skipped {skipped.total():,}: {', '.join(kinds)})"
