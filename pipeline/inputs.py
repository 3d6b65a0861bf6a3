"""What INPUT may be, and how each kind becomes the table `listing`: every object that may be, or hold, an image.

    a folder, bucket or prefix     all below it that is an image by name, or a tar or Parquet file
    a glob                         s3://bucket/2026-*/**/*.jpg; a folder that it names counts with all below it
    a tar or Parquet file          the images in it
    a manifest                     CSV, JSON Lines or Parquet with a column of URIs (etag and size are used where given)
    an S3 Inventory                its manifest.json

The listing goes into a table on disk page by page, as a collection has more objects than a machine has memory for.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import islice

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from pipeline import manifests
from pipeline.attempts import ERRORS, reason
from pipeline.config import ConfigurationError, IndexSettings
from pipeline.containers import extension, image_column, is_image_name, is_utf8, kind_of
from pipeline.filesystems import public_url
from pipeline.reader import ObjectFile, Reader
from pipeline.storage import Entry, Store

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), metadata={"note": "null: a manifest does not say"}),
        pa.field("bytes", pa.int64(), metadata={"note": "null: a manifest does not say"}),
        pa.field("kind", pa.string(), nullable=False, metadata={"note": "image, tar or parquet"}),
        pa.field("root", pa.int32(), nullable=False, metadata={"note": "characters of the URI before its name"}),
    ]
)
ONCE = """  -- where a listing and a manifest differ, the listing is right
    CREATE OR REPLACE TABLE listing AS
    SELECT DISTINCT ON (uri) * FROM listing ORDER BY uri, root DESC, etag
"""
OWN = ("index", "runs", "segments", "deletions", "returns", "evaluations")  # folders of an output
PAGE = 10_000  # entries between two words to whoever waits


def list_inputs(
    tables: duckdb.DuckDBPyConnection, settings: IndexSettings, output: Store, listed: Callable[[int], None]
) -> Counter[str]:
    """Fill the table `listing` (SCHEMA) from every input; how many entries were skipped, by why.

    `listed` hears how many objects there are so far. Raises `ConfigurationError` for an input that cannot be listed or
    read, and when nothing is left.
    """
    skipped: Counter[str] = Counter()
    reader, count = Reader(settings), 0
    tables.register("page", SCHEMA.empty_table())
    tables.execute("CREATE TABLE listing AS FROM page")
    for url in settings.input:
        for page in pages(url, settings, output, reader, skipped):
            tables.register("page", page)
            tables.execute("INSERT INTO listing FROM page")
            count += len(page)
            listed(count)
    if not count:
        raise ConfigurationError(nothing_found(settings, skipped))
    if len(settings.input) > 1 or tables.execute("SELECT bool_or(root = 0) FROM listing").fetchall()[0][0]:
        tables.execute(ONCE)
        skipped["listed twice"] = count - tables.table("listing").count("*").fetchall()[0][0]
    return +skipped


def nothing_found(settings: IndexSettings, skipped: Counter[str]) -> str:
    return f"{', '.join(map(public_url, settings.input))}: no images found{summary(skipped)}; see --include"


def pages(
    url: str, settings: IndexSettings, output: Store, reader: Reader, skipped: Counter[str]
) -> Iterator[pa.Table]:
    """The objects of one input, as tables of SCHEMA."""
    name = url.lower()
    try:
        if name.endswith(manifests.INVENTORY):
            yield from named(manifests.named_by_inventory(url, reader), settings, skipped)
        elif name.endswith(manifests.SUFFIXES) or (name.endswith(".parquet") and not has_images(url, settings, reader)):
            folder = Store(url.rpartition("/")[0] or "/", settings).uri("")
            yield from named(manifests.named_by_table(url, reader, folder, settings.uri_column), settings, skipped)
        else:
            yield from walk(url, settings, output, skipped)
    except (*ERRORS, pa.ArrowException, ValueError) as error:
        raise ConfigurationError(f"{public_url(url)}: cannot be read: {reason(error)}") from None


def has_images(url: str, settings: IndexSettings, reader: Reader) -> bool:
    """Whether a URL that ends in .parquet leads to images, and not to a table of their URIs."""
    return (
        is_glob(url)
        or os.path.isdir(url)
        or bool(image_column(pq.read_schema(ObjectFile(reader, url)), settings.image_column))
    )


def walk(url: str, settings: IndexSettings, output: Store | None, skipped: Counter[str]) -> Iterator[pa.Table]:
    """What lies below a prefix, or matches a glob, but for what an output there has of its own."""
    root, beginning, matches = root_of(url), "", None
    if is_glob(url):
        beginning = re.split(r"[*?\[]", url, maxsplit=1)[0].rpartition("/")[2]
        matches = re.compile(glob_translate(url[len(root.rstrip("/")) + 1 :])).match
    store = Store(root, settings)
    before = len(store.uri("").rstrip("/")) + 1
    found = select(store.listing(beginning), matches, settings, output, skipped)
    while page := list(islice(found, PAGE)):
        yield pa.table(
            {
                "uri": [entry.uri for entry, _ in page],
                "etag": [entry.etag for entry, _ in page],
                "bytes": [entry.bytes for entry, _ in page],
                "kind": [kind for _, kind in page],
                "root": pa.repeat(before, len(page)),
            },
            schema=SCHEMA,
        )


def root_of(url: str) -> str:
    """What names below a URL are relative to: itself, or the folder before the first wildcard."""
    return (re.split(r"[*?\[]", url, maxsplit=1)[0].rpartition("/")[0] or "/") if is_glob(url) else url


def is_glob(url: str) -> bool:
    """Whether a URL has wildcards, and is no local file or folder of that very name."""
    return bool(re.search(r"[*?\[]", url)) and not os.path.exists(url.removeprefix("file://"))


def select(
    listing: Iterator[tuple[str, Entry | None]],
    matches: Callable[[str], object] | None,
    settings: IndexSettings,
    output: Store | None,
    skipped: Counter[str],
) -> Iterator[tuple[Entry, str]]:
    """The entries that are images or hold some, by name, and their kinds; the others are counted in `skipped`."""
    root = output.uri("").rstrip("/") if output else ""  # an output inside its own collection is not a part of it
    own = tuple(f"{root}/{folder}/" for folder in OWN) if output else ()
    for name, entry in listing:
        if matches and not any(map(matches, [name, *parents(name)])):
            continue
        if entry is None:
            skipped.update(["not a file"] * is_image_name(name.rstrip("/")))
        elif not entry.uri.startswith(own):
            kind = kind_of(name) or "image"
            why = why_not(name, kind, settings) or ("" if is_utf8(entry.uri) else "a name that is not UTF-8")
            if not why and kind == "image" and not settings.include and not is_image_name(name):
                why = extension(name)
            if why:
                skipped[why] += 1
            else:
                yield entry, kind


def why_not(name: str, kind: str, settings: IndexSettings) -> str:
    """Why the patterns leave a name out, or nothing; those that include are for the images in a file, not for it."""
    if any(fnmatchcase(name, pattern) for pattern in settings.exclude):
        return "excluded"
    if kind == "image" and settings.include and not any(fnmatchcase(name, one) for one in settings.include):
        return "not included"
    return ""


def parents(name: str) -> Iterator[str]:
    """The folders that a name lies in, nearest first."""
    while name := name.rpartition("/")[0]:
        yield name


def named(rows: Iterator[pa.Table], settings: IndexSettings, skipped: Counter[str]) -> Iterator[pa.Table]:
    """What a manifest names, all of it unless patterns choose, which match the whole URI."""
    for every in rows:
        table = every.filter(pc.is_valid(every["uri"]))
        skipped.update(["no URI in a manifest"] * (len(every) - len(table)))
        kinds = pa.array([kind_of(uri) or "image" for uri in table["uri"].to_pylist()], pa.string())
        page = table.append_column("kind", kinds).append_column("root", pa.repeat(pa.scalar(0, pa.int32()), len(table)))
        if settings.include or settings.exclude:
            verdicts = [why_not(row["uri"], row["kind"], settings) for row in page.select(["uri", "kind"]).to_pylist()]
            skipped.update(filter(None, verdicts))
            page = page.filter(pa.array([not verdict for verdict in verdicts]))
        yield page.select(SCHEMA.names)


def summary(skipped: Counter[str]) -> str:
    """What was skipped, for a message: " (skipped 3: .txt 2, no extension 1)"."""
    if not skipped:
        return ""
    shown = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))[:6]
    kinds = [f"{kind} {count:,}" for kind, count in shown]
    others = skipped.total() - sum(count for _, count in shown)
    kinds += [f"others {others:,}"] if others else []
    return f" (skipped {skipped.total():,}: {', '.join(kinds)})"
