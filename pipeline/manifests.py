"""Files that name images: a table with a column of URIs (CSV, JSON Lines, Parquet), or an S3 Inventory.

They are read batch by batch, as one may name more images than a machine has memory for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from posixpath import normpath
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.config import ConfigurationError
from pipeline.reader import ObjectFile, Reader

SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")  # and .parquet without images
INVENTORY = "/manifest.json"
BATCH = 50_000  # rows
AHEAD = 8 << 20  # bytes that are read at once
SCHEMA = pa.schema({"uri": pa.string(), "etag": pa.string(), "bytes": pa.int64()})  # null where it is not said
COLUMNS = {  # what each may be called, in this order
    "uri": ("uri", "url", "path", "file", "file_name", "image", "image_url"),
    "etag": ("etag", "e_tag"),
    "bytes": ("bytes", "size"),
}
DOTS = r"/\.\.?(/|$)"
CREDENTIALS = r"(?i)^(https?|s?ftp)://[^/]*@|^[^/]*://[^/]*:[^/]*@|[?&](x-amz-signature|x-goog-signature|sig|token)="


def named_by_table(url: str, reader: Reader, folder: str, uri_column: str | None) -> Iterator[pa.Table]:
    """The objects that a table names, as tables of SCHEMA; a URI without a protocol is relative to `folder`.

    Raises `ConfigurationError` where there is no such column, or a URI holds a password or a signature.
    """
    names = column_names(url, reader)
    columns = {ours: next((name for name in known if name in names), None) for ours, known in COLUMNS.items()}
    columns["uri"] = uri_column or columns["uri"]
    if columns["uri"] not in names:
        raise ConfigurationError(f"{url}: which column has the URIs? It has {', '.join(names)}; see --uri-column")
    for rows in read(url, reader, {name: ours for ours, name in columns.items() if name}):
        uris = absolute_uris(url, rows["uri"], folder)
        etags = pc.utf8_trim(rows["etag"], '"')  # as S3 itself writes them
        yield rows.set_column(0, "uri", uris).set_column(1, "etag", etags)


def absolute_uris(url: str, uris: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """What a table at `url` names, as URIs, relative to `folder` where there is no protocol. Raises
    `ConfigurationError`.
    """
    if pc.any(pc.match_substring_regex(uris, CREDENTIALS)).as_py():
        raise ConfigurationError(
            f"{url}: credentials in a URI (a password, a signature) would be in every row; leave them out"
        )
    relative = without_dots(pc.binary_join_element_wise(f"{folder.rstrip('/')}/", uris, ""))
    uris = pc.if_else(pc.starts_with(uris, "/"), pc.binary_join_element_wise("file://", uris, ""), uris)
    return pc.if_else(pc.match_substring(uris, "://"), uris, relative)


def without_dots(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """URIs without `.` and `..`, which a listing has never; `..` leads no further up than to the store."""
    if not pc.any(pc.match_substring_regex(uris, DOTS)).as_py():
        return uris
    parts = (uri and uri.partition("://") for uri in uris.to_pylist())
    return pa.chunked_array([[found and f"{found[0]}://{resolved(found[2])}" for found in parts]], pa.string())


def resolved(path: str) -> str:
    """A path whose first part, a bucket, or nothing in that of a file, stays."""
    store, _, rest = path.partition("/")
    return f"{store}{normpath(f'/{rest}')}"


def named_by_inventory(url: str, reader: Reader) -> Iterator[pa.Table]:
    """The objects that an S3 Inventory lists, as tables of SCHEMA (Amazon S3 User Guide, "Inventory manifest").

    Raises `ConfigurationError` for a format or fields that cannot be used.
    """
    try:
        about = json.loads(ObjectFile(reader, url).read())
        kind, parts = about["fileFormat"].lower(), [file["key"] for file in about["files"]]
        source = about["destinationBucket"].rpartition(":")[2]
        fields = [name.strip() for name in about["fileSchema"].split(",")] if kind == "csv" else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{url}: not the manifest of an S3 Inventory ({error!r})") from None
    if kind not in ("csv", "parquet"):
        raise ConfigurationError(f"{url}: an inventory as {kind}; have S3 write it as Parquet or CSV")
    for part in parts:
        uri = f"s3://{source}/{part}"
        names = {name.lower().replace("_", ""): name for name in fields or column_names(uri, reader)}
        if not {"bucket", "key", "size"} <= names.keys():
            raise ConfigurationError(
                f"{url}: the inventory needs the fields Bucket, Key and Size; it has {list(names)}"
            )
        wanted = {"bucket": "bucket", "key": "uri", "size": "bytes", "etag": "etag"}
        wanted |= {"islatest": "islatest", "isdeletemarker": "isdeletemarker"}
        for every in read(uri, reader, {names[name]: ours for name, ours in wanted.items() if name in names}, fields):
            rows = every
            if "islatest" in every.column_names:
                rows = rows.filter(is_true(rows["islatest"], otherwise=True))
            if "isdeletemarker" in every.column_names:
                rows = rows.filter(pc.invert(is_true(rows["isdeletemarker"], otherwise=False)))
            keys = rows["uri"]
            if kind == "csv":  # whose keys are written as in a URL
                keys = pa.chunked_array([pa.array([unquote_plus(key) for key in keys.to_pylist()], pa.string())])
            uris = pc.binary_join_element_wise("s3://", pc.binary_join_element_wise(rows["bucket"], keys, "/"), "")
            etags = pc.utf8_trim(rows["etag"], '"')
            listed = pa.table({"uri": uris, "etag": etags, "bytes": rows["bytes"]}, schema=SCHEMA)
            yield listed.filter(pc.invert(pc.ends_with(listed["uri"], "/")))  # folders, as consoles make them


def is_true(flags: pa.ChunkedArray, otherwise: bool) -> pa.ChunkedArray:
    """Flags, however they are written; `otherwise` where there is none."""
    return pc.equal(pc.utf8_lower(flags.cast(pa.string())), "true").fill_null(otherwise)


def column_names(url: str, reader: Reader) -> list[str]:
    """The columns of a table that has its own names."""
    if url.lower().endswith(".parquet"):
        return pq.read_schema(ObjectFile(reader, url)).names
    with text(url, reader) as stream:
        if is_csv(url):
            return pyarrow.csv.open_csv(stream).schema.names
        line = stream.read(1 << 20).split(b"\n", 1)[0]
        found = json.loads(line or b"{}")
        return list(found) if isinstance(found, dict) else []


def read(
    url: str, reader: Reader, columns: Mapping[str, str], names: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Tables of SCHEMA, and of what else `columns` (their name: ours) asks for, as text.

    `names` are those of a CSV file that has none of its own.
    """
    types = {
        theirs: SCHEMA.field(ours).type if ours in SCHEMA.names else pa.string() for theirs, ours in columns.items()
    }
    for batch in batches(url, reader, types, names):
        found = {columns[name]: batch[name].cast(types[name]) for name in columns}
        missing = {name: pa.nulls(len(batch), SCHEMA.field(name).type) for name in SCHEMA.names if name not in found}
        yield pa.table({name: (found | missing)[name] for name in [*SCHEMA.names, *found]})


def batches(
    url: str, reader: Reader, types: Mapping[str, pa.DataType], names: Sequence[str] | None
) -> Iterator[pa.RecordBatch]:
    """Some columns of a table of any format."""
    if url.lower().endswith(".parquet"):
        yield from pq.ParquetFile(ObjectFile(reader, url, ahead=AHEAD)).iter_batches(BATCH, columns=list(types))
        return
    with text(url, reader) as stream:
        if is_csv(url):
            convert = pyarrow.csv.ConvertOptions(
                column_types=types, include_columns=list(types), null_values=[""], strings_can_be_null=True
            )
            options = pyarrow.csv.ReadOptions(column_names=names, use_threads=False)
            parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
            yield from pyarrow.csv.open_csv(stream, options, parse, convert)
        else:
            parse = pyarrow.json.ParseOptions(pa.schema(list(types.items())), unexpected_field_behavior="ignore")
            yield from pyarrow.json.open_json(stream, parse_options=parse)


def is_csv(url: str) -> bool:
    return url.lower().endswith((".csv", ".csv.gz"))


def text(url: str, reader: Reader) -> pa.NativeFile:
    """A text file, uncompressed."""
    compression = "gzip" if url.lower().endswith(".gz") else None
    return pa.input_stream(ObjectFile(reader, url, ahead=AHEAD), compression=compression)
