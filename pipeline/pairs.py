"""Which mask of ground truth belongs to which image: by their names, or by a table that says so.

By name: a mask is called as its image is below the roots of both, with any suffix of its own, without the image's or
with it: masks/2026/a.png or masks/2026/a.jpg.png for images/2026/a.jpg. Before they are compared, images' names may be
changed by regular expressions (RE2). What lies in a tar or Parquet file is called FILE#KEY. Upper and lower case are
not the same, an accented letter is, however it is composed. Where two masks have the name of one image, or two images
that of one mask, none is chosen.

By a table (CSV, JSON Lines, Parquet): a column names the image, by its URI, its place relative to the table, or its
name below the root, and another one the mask.

Both sides lie in DuckDB, on the disk, as there may be millions.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import manifests
from pipeline.ahead import ahead
from pipeline.attempts import ERRORS, reason
from pipeline.config import ConfigurationError, IndexSettings, StorageSettings
from pipeline.config_truth import TruthSettings
from pipeline.containers import ContainerError, Images, image_column, members
from pipeline.decode import SUFFIXES
from pipeline.filesystems import public_url
from pipeline.inputs import is_glob, root_of, summary, walk
from pipeline.names import common_root
from pipeline.plan import PlannedImage
from pipeline.reader import ChangedError, ObjectFile, Reader
from pipeline.storage import Store
from pipeline.tables import make_room
from pipeline.views import sql_text

MASK_COLUMNS = ("mask", "label", "annotation", "segmentation", "seg", "truth", "target", "labels", "annotations")
MASK_NAMES = tuple(
    f"{name}{end}" for end in ("", "_uri", "_url", "_path", "_file", "_file_name") for name in MASK_COLUMNS
)
FILES = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("name", pa.string(), metadata={"note": "below the root; in a manifest its image, as written there"}),
        pa.field("image", pa.string(), metadata={"note": "URI of its image, in a manifest"}),
        pa.field("etag", pa.string(), metadata={"note": "null: a manifest does not say"}),
        pa.field("bytes", pa.int64(), metadata={"note": "null: a manifest does not say"}),
        pa.field("file", pa.string(), metadata={"note": "URI of the tar or Parquet file that it lies in"}),
        pa.field("position", pa.int64(), metadata={"note": "of its first byte in a tar, its row in a Parquet file"}),
        pa.field("column", pa.string(), metadata={"note": "of a Parquet file that it lies in"}),
    ]
)
FILE_HEAD = 1 << 20  # bytes that are read at once of a file with masks in it
SUFFIX = "(?i)\\.({})$".format("|".join(suffix.removeprefix(".") for suffix in SUFFIXES))
STEM = f"regexp_replace(name, {sql_text(SUFFIX)}, '')"
PAIRS = """
    CREATE OR REPLACE TABLE links AS
    SELECT DISTINCT i.uri AS image, m.uri AS mask, asked, {of_mask} AS of_mask FROM
    (SELECT uri, asked, nfc_normalize(unnest({image_keys})) AS key FROM images) i JOIN
    (SELECT uri, nfc_normalize(unnest({mask_keys})) AS key FROM masks) m USING (key);

    CREATE OR REPLACE TABLE pairs AS
    WITH
    of_image AS (SELECT image, count(*) AS masks, min(mask) AS mask, max(mask) AS other FROM links GROUP BY ALL),
    of_mask AS (
        SELECT of_mask, count(*) AS images, min(image) AS image, max(image) AS other FROM links WHERE asked GROUP BY ALL
    )
    SELECT i.uri AS image, CASE WHEN m.masks = 1 THEN m.mask END AS mask,
        CASE WHEN m.masks IS NULL THEN 'no_truth' WHEN m.masks > 1 OR t.images > 1 THEN 'ambiguous' ELSE 'paired' END
        AS status,
        CASE WHEN m.masks > 1 THEN concat(m.masks, ' masks have its name: ', m.mask, ' and ', m.other)
             WHEN t.images > 1 THEN concat(t.images, ' images have the name of this mask: ', t.image, ' and ', t.other)
        END AS error
    FROM images i LEFT JOIN of_image m ON m.image = i.uri
    LEFT JOIN links l ON l.image = i.uri AND m.masks = 1
    LEFT JOIN of_mask t ON t.of_mask = l.of_mask
    WHERE i.asked
    UNION ALL
    SELECT NULL, uri, 'no_image', NULL FROM (SELECT DISTINCT uri FROM masks)
    ANTI JOIN links ON links.mask = uri;
"""


def pair(
    tables: duckdb.DuckDBPyConnection,
    truth: str,
    settings: TruthSettings,
    storage: StorageSettings,
    listed: Callable[[int], None] = lambda found: None,
    output: Store | None = None,
) -> Counter[str]:
    """Fill the tables `masks` (FILES) from `truth` and `pairs` from it and `images` (uri, name, and whether it is asked
    for: what belongs to others is nobody's loss).

    `pairs` has a row for each image that is asked for, and for each mask that belongs to none at all: image, mask,
    status (`paired`, `no_truth`, `no_image`, `ambiguous`) and error. What is no mask by its name is counted, by why;
    `listed` hears of masks that are found. Where `truth` has images and masks, an image is nobody's mask, nor is what
    an `output` has of its own. Raises `ConfigurationError`.
    """
    reader = Reader(storage)
    keys = renamed(tables, settings.rename)
    try:
        is_table = is_manifest(truth, reader, settings.truth_mask_column)
    except (*ERRORS, pa.ArrowException, ValueError) as error:
        raise ConfigurationError(f"{public_url(truth)}: cannot be read: {reason(error)}") from None
    if is_table:
        list_manifest(tables, truth, settings, storage)
        if not tables.table("masks").limit(1).fetchall():
            raise ConfigurationError(f"{public_url(truth)}: names no masks")
        match_by_table(tables)
        return Counter()
    columns = [settings.truth_mask_column] if settings.truth_mask_column else MASK_COLUMNS
    skipped = list_files(tables, "masks", truth, storage, columns, listed, output)
    # but in a row of a Parquet file, where an image and its mask are one URI
    tables.execute('DELETE FROM masks WHERE "column" IS NULL AND uri IN (SELECT uri FROM images)')
    if not tables.table("masks").limit(1).fetchall():
        raise ConfigurationError(f"{public_url(truth)}: has the images themselves, and no masks")
    match_by_name(tables, keys)
    return skipped


def match_by_name(tables: duckdb.DuckDBPyConnection, keys: Sequence[str]) -> None:
    """Fill `pairs` with what has a name in common; `keys` is SQL for each that an image's mask may have."""
    match(tables, image_keys=f"list_distinct([{', '.join(keys)}])", mask_keys=f"[{STEM}]", of_mask="m.uri")


def match_by_table(tables: duckdb.DuckDBPyConnection) -> None:
    """Fill `pairs` with what a table has in one row; a mask may be that of several images."""
    images, masks = "list_distinct([uri, name])", "list_distinct([image, name])"
    match(tables, image_keys=images, mask_keys=masks, of_mask="concat(i.uri, ' ', m.uri)")


def match(tables: duckdb.DuckDBPyConnection, image_keys: str, mask_keys: str, of_mask: str) -> None:
    count = tables.execute("SELECT (SELECT count(*) FROM images) + (SELECT count(*) FROM masks)").fetchall()[0][0]
    make_room(tables, count)
    tables.execute(PAIRS.format(image_keys=image_keys, mask_keys=mask_keys, of_mask=of_mask))


def require_some(tables: duckdb.DuckDBPyConnection, images: str, truth: str) -> None:
    """Raise `ConfigurationError`, with an example of each side, where no image of `images` has a mask in `truth`."""
    if tables.execute("SELECT count(*) FROM pairs WHERE status = 'paired'").fetchall()[0][0]:
        return
    (why,) = tables.execute("SELECT min(error) FROM pairs WHERE status = 'ambiguous'").fetchall()[0]
    ((image,),), ((mask,),) = (
        tables.execute(f"SELECT min(name) FROM {side}").fetchall()  # noqa: S608
        for side in ("images", "masks")
    )
    what = f"each belongs to several: {why}" if why else f"an image is called {image!r}, a mask {mask!r}"
    raise ConfigurationError(
        f"no image of {public_url(images)} has one mask in {public_url(truth)}; {what}; see --rename, or give a table "
        "with a column of images and one of masks"
    )


def renamed(tables: duckdb.DuckDBPyConnection, renames: Sequence[str]) -> list[str]:
    """SQL for what a mask may be called, without its suffix: the image's name with and without its own.

    Raises `ConfigurationError` for what is no regular expression.
    """
    found = [STEM, "name"]
    for rename in renames:
        pattern, to = re.split(r"(?<!\\)=", rename, maxsplit=1) if "=" in rename else (rename, "")
        try:
            tables.execute("SELECT regexp_replace('', ?, ?, 'g')", [pattern, to]).fetchall()
        except duckdb.Error as error:
            why = str(error).splitlines()[0]
            raise ConfigurationError(f"rename: {rename!r} has no regular expression before =: {why}") from None
        found = [f"regexp_replace({one}, {sql_text(pattern)}, {sql_text(to)}, 'g')" for one in found]
    return found


def is_manifest(truth: str, reader: Reader, mask_column: str | None) -> bool:
    """Whether `truth` is a table of URIs, and neither a file with masks in it nor a place with files."""
    if is_glob(truth):
        return False
    if truth.lower().endswith(".parquet") and reader_has_file(reader, truth):
        return (
            masks_in(pq.read_schema(ObjectFile(reader, truth)), [mask_column] if mask_column else MASK_COLUMNS) is None
        )
    return truth.lower().endswith(manifests.SUFFIXES)


def reader_has_file(reader: Reader, url: str) -> bool:
    """Whether it is a file: a folder of Parquet files may end so too."""
    try:
        reader.get(url, 0, 1)
    except (FileNotFoundError, IsADirectoryError):
        return False
    return True


def list_manifest(
    tables: duckdb.DuckDBPyConnection, url: str, settings: TruthSettings, storage: StorageSettings
) -> None:
    """Fill the table `masks` from a table of URIs. Raises `ConfigurationError`."""
    reader = Reader(storage)
    folder = Store(url.rpartition("/")[0] or "/", storage).uri("")
    create(tables, "masks")
    try:
        names = manifests.column_names(url, reader)
        image = settings.truth_image_column or first_of(manifests.COLUMNS["uri"], names)
        mask = settings.truth_mask_column or first_of(MASK_NAMES, names)
        if image not in names or mask not in names or image == mask:
            raise ConfigurationError(
                f"{public_url(url)}: which columns have an image and its mask? It has {', '.join(names)}; "
                "see --truth-image-column and --truth-mask-column"
            )
        for rows in manifests.read(url, reader, {mask: "uri", image: "image"}):
            some = rows.filter(pc.is_valid(rows["uri"]))
            uris, images = (manifests.absolute_uris(url, some[name], folder) for name in ("uri", "image"))
            add(tables, "masks", {"uri": uris, "name": some["image"], "image": images})
    except (*ERRORS, pa.ArrowException, ValueError) as error:
        raise ConfigurationError(f"{public_url(url)}: cannot be read: {reason(error)}") from None


def first_of(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def list_files(
    tables: duckdb.DuckDBPyConnection,
    table: str,
    url: str,
    storage: StorageSettings,
    columns: Sequence[str],
    listed: Callable[[int], None] = lambda found: None,
    output: Store | None = None,
) -> Counter[str]:
    """Fill a table (FILES) with all images, by name, that are at `url`: a folder, bucket or prefix, a glob, a tar or
    Parquet file, in which they are in the first of `columns` that is there. What is none is counted, by why.

    Raises `ConfigurationError` where it cannot be listed, or there is none.
    """
    reader, skipped, count = Reader(storage), Counter[str](), 0
    given = {name: getattr(storage, name) for name in StorageSettings.model_fields}
    listing = IndexSettings(input=(url,), output=url, **given)
    create(tables, table)
    for page in walk(url, listing, output, skipped):
        rows = [row | {"name": below(row["uri"], row["root"])} for row in page.to_pylist()]
        plain = [row for row in rows if row["kind"] == "image"]
        add(tables, table, {name: [row[name] for row in plain] for name in ("uri", "name", "etag", "bytes")})
        count += len(plain)
        files = [row for row in rows if row["kind"] != "image"]
        for some in ahead(lambda row: list_members(row, reader, columns, skipped), files):
            add(tables, table, {name: [row[name] for row in some] for name in FILES.names if name != "image"})
            count += len(some)
        listed(count)
    if not count:
        raise ConfigurationError(f"{public_url(url)}: no images found{summary(skipped)}")
    return skipped


def list_members(
    row: dict[str, Any], reader: Reader, columns: Sequence[str], skipped: Counter[str]
) -> list[dict[str, Any]]:
    """The images in a tar or Parquet file; of one name the last, as it would be unpacked."""
    try:
        file = ObjectFile(reader, row["uri"], row["etag"], FILE_HEAD, FILE_HEAD)
        column = None
        if row["kind"] == "parquet" and not (column := masks_in(pq.read_schema(file), columns)):
            skipped["a Parquet file without images"] += 1
            return []
        found = {
            one.uri: vars(one) | {"name": below(one.uri, row["root"]), "etag": file.etag, "file": row["uri"]}
            for one in members(file, column, skipped)
            if one.position is not None
        }
    except (*ERRORS, ContainerError, ChangedError, pa.ArrowException, ValueError) as error:
        raise ConfigurationError(f"{public_url(row['uri'])}: cannot be read: {reason(error)}") from None
    return [one | {"column": column} for one in found.values()]


def masks_in(schema: pa.Schema, columns: Sequence[str]) -> str | None:
    """The first of `columns` that a Parquet file has with encoded images."""
    return next((name for name in columns if image_column(schema, name)), None)


def below(uri: str, root: int) -> str:
    """A name below a root of so many characters; of the root itself the last part."""
    return uri[root:] or uri.rpartition("/")[2]


def create(tables: duckdb.DuckDBPyConnection, table: str) -> None:
    tables.register("page", FILES.empty_table())
    tables.execute(f"CREATE OR REPLACE TABLE {table} AS FROM page")


def add(tables: duckdb.DuckDBPyConnection, table: str, values: dict[str, Any]) -> None:
    """Add rows to a table (FILES); columns that are not given are null."""
    rows = len(values["uri"])
    page = pa.table({name: values.get(name, pa.nulls(rows, FILES.field(name).type)) for name in FILES.names}, FILES)
    tables.register("page", page)
    tables.execute(f"INSERT INTO {table} FROM page")


def name_images(
    tables: duckdb.DuckDBPyConnection, source: str, inputs: Iterable[str], storage: StorageSettings
) -> None:
    """Fill the table `images` (uri, name, asked) from `source`, a query for the URIs to which `inputs` have led and
    whether each is asked for.

    Their root is the input that they lie in, or what is common to several; where a list has named them, what is common
    to them all.
    """
    tables.execute(f"CREATE OR REPLACE TEMP TABLE named AS {source}")
    named = tables.table("named")
    roots = {Store(root_of(url), storage).uri("").rstrip("/") for url in inputs}
    used = [
        root
        for root in sorted(roots, key=lambda root: f"{root}/")
        if named.aggregate(f"bool_or({is_below(root)})").fetchall()[0][0]
    ]
    if named.filter(f"NOT ({' OR '.join(map(is_below, used)) or 'false'})").limit(1).fetchall():
        first, last = named.aggregate("min(uri), max(uri)").fetchall()[0]
    else:
        first, last = used[0], used[-1]
    root = first if first == last else common_root(f"{first}/", f"{last}/").rstrip("/")
    name = f"if({is_below(root)}, substr(uri, {len(root) + 2}), regexp_extract(uri, '[^/]*$'))"
    tables.execute("DROP TABLE IF EXISTS images")
    named.project(f"uri, {name} AS name, asked").create("images")


def is_below(root: str) -> str:
    """SQL for whether a URI lies below a root, a folder or a file."""
    return f"(starts_with(uri, {sql_text(root)}) AND uri[{len(root) + 1}] IN ('/', '#'))"


class Masks:
    """The bytes of any mask, wherever it lies. Many threads may use one."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.images: dict[str | None, Images] = {}

    def fetch(self, row: Mapping[str, Any]) -> bytes:
        """What a row of `masks` (FILES) leads to. Raises as `Images.fetch`."""
        images = self.images.setdefault(row["column"], Images(self.reader, row["column"]))
        planned = PlannedImage(
            row["uri"], row["etag"] or "", row["bytes"] or 0, None, None, None, None, row["file"], row["position"]
        )
        return images.fetch(planned)
