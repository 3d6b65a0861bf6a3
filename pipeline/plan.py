"""The plan: which images this run does, in which order and in which shards.

A shard is the unit of work, of retry and of output: images of one bucket (one network input size), so that every
batch but its last is full and nothing is padded. A plan is Parquet files with a row group a shard, of which a worker
reads just its own. They are made out of core: DuckDB sorts by bucket and URI, and what it gives is cut into shards as
it comes, so that a hundred million images need no more memory than a few row groups. The same images and settings give
the same files, byte for byte.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.policy import ONE_LOOK, Looks, Policy
from pipeline.tables import make_room

SHARD_IMAGES = (64, 1024)  # the least and the most by default; multiples of all usual batches
SHARDS_WANTED = 100  # in a small run, so that all workers have work and progress is seen
SHARD_PIXELS = 1 << 30  # of all its images together, as a worker holds their masks until the shard is put: tens of MB
SHARD_INPUT = 1 << 29  # pixels that the network sees: a few minutes of B0 on two cores
BLOCK = 16  # images that are never parted, so that batches are full
SHARDS_BEHIND = 64  # that wait to be written, while the next are sorted and cut
PART_SHARDS = 100  # in one file, which a worker reads whole: 10 MB at most
DECODING = 16  # pixels decoded in the time in which the network does one of its input, roughly
MASK_BYTES_PER_PIXEL = 0.015  # of a PNG mask, as `make demo` measures and prints
BATCH_ROWS = 200_000  # from DuckDB at once

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False, metadata={"unit": "byte"}),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32(), metadata={"unit": "pixel"}),
        pa.field("height", pa.int32(), metadata={"unit": "pixel"}),
        pa.field("error", pa.string(), metadata={"note": "why there is nothing to fetch"}),
        pa.field("file", pa.string(), metadata={"note": "URI of the tar or Parquet file that it lies in"}),
        pa.field("position", pa.int64(), metadata={"note": "of its first byte in a tar, its row in a Parquet file"}),
    ]
)
KEY = ["uri", "etag"]
PARQUET: dict[str, Any] = {
    "compression": {name: "zstd" if name in KEY else "none" for name in SCHEMA.names},
    "use_dictionary": ["format", "file"],
    "write_page_checksum": True,
    "write_statistics": False,
}
MEASURES = ["bucket_h", "bucket_w", "places", "windows", "work", "mask_pixels"]  # of an image; see `shape_table`
ROWS = pa.schema([*((name, pa.int64()) for name in MEASURES), *SCHEMA])
SHAPES = "SELECT DISTINCT coalesce(width, 0) AS width, coalesce(height, 0) AS height FROM images"
# an image whose header could not be read may be read all the same; one that is not in its file, or a file that is no
# file of images to its end, may not
ORDERED = """
    SELECT bucket_h, bucket_w, places, windows, work, mask_pixels, uri, etag, bytes, format,
           nullif(i.width, 0) AS width, nullif(i.height, 0) AS height,
           CASE WHEN position IS NULL AND (file IS NOT NULL OR format IN ('tar', 'parquet')) THEN error END AS error,
           file, position
    FROM images i JOIN shapes s ON coalesce(i.width, 0) = s.width AND coalesce(i.height, 0) = s.height
    ORDER BY bucket_h, bucket_w, uri, etag, position
"""


@dataclass(frozen=True)
class Origin:
    """What a plan was made from; a run is resumed only with the same."""

    input: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    policy: str
    model_version: str
    retries: str = ""  # the run whose failures it does again


@dataclass(frozen=True)
class PlannedImage:
    """One image of a shard, as the index knows it."""

    uri: str
    etag: str
    bytes: int
    format: str | None
    width: int | None
    height: int | None
    error: str | None = None
    file: str | None = None
    position: int | None = None


@dataclass(frozen=True)
class PlannedShard:
    """One row group of a plan."""

    bucket: str | None  # network input, "height x width"; None: sizes not known
    images: int
    windows: int  # network inputs that they make, at one look: one each, but for large ones under the policy native
    work: int  # pixels of the network's input, and what decoding takes beside it
    mask_pixels: int


@dataclass(frozen=True)
class Plan:
    """A plan in local files, `PART_SHARDS` row groups in each but the last."""

    parts: list[Path]
    shards: list[PlannedShard]
    changes: dict[str, int] = field(default_factory=dict)  # why its images are to do: how many are new, changed, ...

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)

    def digest(self) -> str:
        """Of the bytes of all parts."""
        found = hashlib.sha256()
        for part in self.parts:
            with part.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()


def make_plan(
    tables: duckdb.DuckDBPyConnection,
    folder: Path,
    policy: Policy,
    shard_images: int | None,
    max_pixels: int,
    looks: Looks = ONE_LOOK,
) -> Plan:
    """Plan the images in the table `images` (the index's columns), with its files in `folder`.

    A shard has up to `shard_images`, fewer where they are large: an image takes one of so many places, or more by its
    pixels and those of its looks. One of more than `max_pixels` has no mask.
    """
    total = tables.table("images").count("*").fetchall()[0][0]
    make_room(tables, total)
    size = shard_images or shard_size(total)
    shapes = tables.sql(SHAPES).to_arrow_table()
    tables.register("shapes", shape_table(shapes, policy, size, max_pixels, looks))
    ordered = tables.sql(ORDERED).to_arrow_reader(BATCH_ROWS)
    parts: list[Path] = []
    shards: list[PlannedShard] = []
    found = cut(ordered, math.gcd(BLOCK, size))
    while group := list(islice(found, 1)):
        parts.append(folder / f"part-{len(parts):05d}.parquet")
        with pq.ParquetWriter(parts[-1], SCHEMA, **PARQUET) as writer, ThreadPoolExecutor(1) as behind:
            writing: list[Future[None]] = []
            for shard in chain(group, islice(found, PART_SHARDS - 1)):
                shards.append(describe(shard))
                writing.append(behind.submit(writer.write_table, shard.select(SCHEMA.names)))
                if len(writing) > SHARDS_BEHIND:
                    writing.pop(0).result()
            for one in writing:
                one.result()
    return Plan(parts, shards)


def shard_size(images: int) -> int:
    """How many images a shard of so many in all has by default."""
    least, most = SHARD_IMAGES
    return min(max(least, math.ceil(images / SHARDS_WANTED / least) * least), most)


def shape_table(shapes: pa.Table, policy: Policy, size: int, max_pixels: int, looks: Looks) -> pa.Table:
    """What an image of each shape (width and height, 0 where they are not known) means to the plan."""
    heights, widths = (shapes[side].to_numpy().astype(np.int64) for side in ("height", "width"))
    known = (heights > 0) & (widths > 0)
    sides = np.where(known, heights, 1), np.where(known, widths, 1)
    bucket_h, bucket_w = (np.where(known, side, 0) for side in policy.sizes(*sides))
    pixels = np.where(heights * widths <= max_pixels, heights * widths, 0)  # that will be decoded
    windows = np.where(pixels > 0, policy.windows(*sides), 1)
    inputs = np.rint(np.where(pixels > 0, windows * bucket_h * bucket_w, 0) * looks.work).astype(np.int64)
    places = np.maximum(pixels, inputs * (SHARD_PIXELS // SHARD_INPUT))
    columns = {
        "bucket_h": bucket_h,
        "bucket_w": bucket_w,
        "places": places.clip(-(-SHARD_PIXELS // size), SHARD_PIXELS),  # of the SHARD_PIXELS that a shard has
        "windows": windows,
        "work": inputs + pixels // DECODING,
        "mask_pixels": pixels,
    }
    return pa.table({"width": shapes["width"], "height": shapes["height"], **columns})


def cut(ordered: pa.RecordBatchReader, block: int) -> Iterator[pa.Table]:
    """Rows in order, a table for each shard. `block` images are not parted; a row that is there twice counts once."""
    cutter = Cutter(block)
    pending: list[pa.Table] = []
    for batch in ordered:
        rows = cutter.once(pa.Table.from_batches([batch]).cast(ROWS))
        edges = [0, *np.flatnonzero(cutter.begins(rows)).tolist(), len(rows)]
        for number, (start, stop) in enumerate(pairwise(edges)):
            if number and pending:
                yield pa.concat_tables(pending)
                pending = []
            if stop > start:
                pending.append(rows.slice(start, stop - start))
    if pending:
        yield pa.concat_tables(pending)


@dataclass
class Cutter:
    """Where shards begin in a stream of rows that comes in batches; what is counted goes on from one to the next."""

    block: int
    last: tuple[str, str] = ("", "")  # uri and etag
    bucket: int = -1
    shard: int = -1  # in its bucket
    rows: int = 0
    taken: int = 0  # places of all rows
    bucket_row: int = 0  # the first of the bucket
    bucket_taken: int = 0  # what was taken before it
    block_taken: int = 0  # and before the block

    def once(self, rows: pa.Table) -> pa.Table:
        """The rows without those that repeat the one before, as when two runs have indexed the same."""
        keys = rows.select(KEY)
        before = pa.concat_tables([pa.table([self.last[:1], self.last[1:]], schema=keys.schema), keys])
        self.last = before["uri"][-1].as_py(), before["etag"][-1].as_py()
        is_new = pc.or_(*(pc.not_equal(rows[name], before[name].slice(0, len(rows))) for name in KEY))
        return rows if pc.all(is_new).as_py() else rows.filter(is_new)

    def begins(self, rows: pa.Table) -> np.ndarray:
        """For each row, bool, whether it is the first of a shard."""
        if not len(rows):
            return np.zeros(0, bool)
        bucket = rows["bucket_h"].to_numpy() << 16 | rows["bucket_w"].to_numpy()
        places = rows["places"].to_numpy()
        row = self.rows + np.arange(len(rows))
        taken = self.taken + np.cumsum(places) - places
        is_first = bucket != np.r_[self.bucket, bucket[:-1]]
        bucket_row = latest(row, is_first, self.bucket_row)
        bucket_taken = latest(taken, is_first, self.bucket_taken)
        starts = is_first | ((row - bucket_row) % self.block == 0) | (places > SHARD_PIXELS // BLOCK)
        block_taken = latest(taken, starts, self.block_taken)
        shard = (block_taken - bucket_taken) // SHARD_PIXELS
        begins = is_first | (shard != np.r_[self.shard, shard[:-1]])
        self.bucket, self.shard, self.block_taken = int(bucket[-1]), int(shard[-1]), int(block_taken[-1])
        self.bucket_row, self.bucket_taken = int(bucket_row[-1]), int(bucket_taken[-1])
        self.rows, self.taken = int(row[-1]) + 1, int(taken[-1] + places[-1])
        return begins


def latest(values: np.ndarray, where: np.ndarray, before: int) -> np.ndarray:
    """Of growing values, at each place the last one that is marked; `before` where there is none yet."""
    return np.maximum.accumulate(np.where(where, values, before))


def describe(shard: pa.Table) -> PlannedShard:
    height, width = shard["bucket_h"][0].as_py(), shard["bucket_w"][0].as_py()
    sums = (int(shard[name].to_numpy().sum()) for name in ("windows", "work", "mask_pixels"))
    return PlannedShard(f"{height}x{width}" if height else None, len(shard), *sums)


def planned_images(shard: pa.Table) -> list[PlannedImage]:
    """The rows of one shard of a plan."""
    return [PlannedImage(**row) for row in shard.to_pylist()]


def most_work_first(shards: Sequence[int], work: Sequence[int]) -> list[int]:
    """Shards in the order in which they are to be done, so that no long one is left to run alone at the end; those of
    about the same work stay in the plan's order, which keeps the shapes that a worker sees together.
    """
    return sorted(shards, key=lambda shard: (-work[shard].bit_length(), shard))


@dataclass(frozen=True)
class Bucket:
    """One line of a plan's summary."""

    name: str
    images: int
    windows: int  # network inputs that they make
    shards: int
    batch: int  # of them in a full batch
    batches: int
    mask_bytes: int  # estimated

    @property
    def fill(self) -> float:
        """Network inputs by places in batches, 0 to 1."""
        return self.windows / (self.batches * self.batch)


def batch_size(height: int, width: int, batch_pixels: int) -> int:
    """How many images of a network input size go into one batch."""
    return max(1, batch_pixels // (height * width))


def summarise(shards: Sequence[PlannedShard], batch_pixels: int, looks: Looks = ONE_LOOK) -> list[Bucket]:
    """A plan's buckets, largest first."""
    members: dict[str | None, list[PlannedShard]] = {}
    for shard in shards:
        members.setdefault(shard.bucket, []).append(shard)
    buckets = []
    for name, found in members.items():
        batch = batch_size(*looks.largest(*bucket_size(name)), batch_pixels) if name else 1
        batches = sum(-(-shard.windows // batch) for shard in found)
        mask_bytes = round(MASK_BYTES_PER_PIXEL * sum(shard.mask_pixels for shard in found))
        images, windows = sum(shard.images for shard in found), sum(shard.windows for shard in found)
        buckets.append(Bucket(name or "unknown", images, windows, len(found), batch, batches, mask_bytes))
    return sorted(buckets, key=lambda bucket: (-bucket.images, bucket.name))


def bucket_size(name: str) -> tuple[int, int]:
    """(height, width) of a bucket called "512x704"."""
    height, _, width = name.partition("x")
    return int(height), int(width)
