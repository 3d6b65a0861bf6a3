"""The plan: which images this run does, in which order and in which shards.

A shard is the unit of work, of retry and of output: images of one bucket (one network input size), so that every
batch but its last is full and nothing is padded. The plan is one Parquet file with a row group a shard; it is
written once, and a worker reads just its own group.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.policy import Policy

SHARD_IMAGES = (16, 512)  # the least and the most by default
SHARD_PIXELS = 1 << 30  # of all its images together, as a worker holds their masks until the shard is put
SHARDS_WANTED = 32  # in a small run, so that all workers have work and progress is seen
MASK_BYTES_PER_PIXEL = 0.015  # of a PNG mask, as `make demo` measures and prints

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("bucket", pa.string(), metadata={"note": "network input, height x width; null: size not known"}),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False, metadata={"unit": "byte"}),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32(), metadata={"unit": "pixel"}),
        pa.field("height", pa.int32(), metadata={"unit": "pixel"}),
    ]
)
ORIGIN_KEY = b"swath.origin"


@dataclass(frozen=True)
class Origin:
    """What a plan was made from; a run is resumed only with the same."""

    input: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    policy: str
    model_version: str


@dataclass(frozen=True)
class PlannedImage:
    """One image of a shard, as the index knows it."""

    uri: str
    etag: str
    bytes: int
    format: str | None
    width: int | None
    height: int | None


def make_plan(images: pa.Table, policy: Policy, shard_images: int | None) -> pa.Table:
    """Images (the index's columns) as a plan (SCHEMA), sorted by bucket and URI; the same images, the same plan.

    A shard has up to `shard_images`, fewer where they are large: an image takes one of so many places, or as many as
    its pixels are of `SHARD_PIXELS`.
    """
    size = shard_images or int(np.clip(-(-len(images) // SHARDS_WANTED), *SHARD_IMAGES))
    heights = images["height"].fill_null(0).to_numpy()
    widths = images["width"].fill_null(0).to_numpy()
    known = (heights > 0) & (widths > 0)
    bucket_h, bucket_w = policy.sizes(np.where(known, heights, 1), np.where(known, widths, 1))
    bucket_h, bucket_w = np.where(known, bucket_h, 0), np.where(known, bucket_w, 0)
    uris = np.argsort(pc.rank(images["uri"], tiebreaker="first").to_numpy())
    order = uris[np.lexsort((bucket_w[uris], bucket_h[uris]))]
    bucket_h, bucket_w = bucket_h[order], bucket_w[order]
    is_first = np.r_[True, (np.diff(bucket_h) != 0) | (np.diff(bucket_w) != 0)][: len(order)]
    pixels = np.where(known, heights.astype(np.int64) * widths, 0)[order]
    places = np.clip(pixels, -(-SHARD_PIXELS // size), SHARD_PIXELS)  # of the SHARD_PIXELS that a shard has
    taken = np.cumsum(places) - places
    starts = np.flatnonzero(is_first)
    taken -= np.repeat(taken[starts], np.diff(np.r_[starts, len(order)]))  # counted anew in each bucket
    number = taken // SHARD_PIXELS
    shards = np.cumsum(is_first | np.r_[True, np.diff(number) != 0][: len(order)]) - 1
    names = [f"{h}x{w}" if h else None for h, w in zip(bucket_h.tolist(), bucket_w.tolist(), strict=True)]
    columns = {"shard": pa.array(shards, pa.int32()), "bucket": pa.array(names, pa.string())}
    ordered = images.take(pa.array(order))
    return pa.table(columns | {name: ordered[name] for name in SCHEMA.names[2:]}, schema=SCHEMA)


def without(images: pa.Table, done: pa.Table) -> pa.Table:
    """The images whose (uri, etag) is not in `done`."""
    return images.join(done.select(["uri", "etag"]), ["uri", "etag"], join_type="left anti")


def encode_plan(plan: pa.Table, origin: Origin) -> bytes:
    """The plan as a Parquet file with one row group a shard."""
    buffer = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata({ORIGIN_KEY: json.dumps(asdict(origin)).encode()})
    with pq.ParquetWriter(buffer, schema, compression="zstd", write_page_checksum=True) as writer:
        for start, stop in shard_slices(plan):
            writer.write_table(plan.slice(start, stop - start).cast(schema))
    return buffer.getvalue().to_pybytes()


def read_origin(file: pq.ParquetFile) -> Origin:
    found = json.loads(file.schema_arrow.metadata[ORIGIN_KEY])
    return Origin(**found | {key: tuple(found[key]) for key in ("include", "exclude")})


def planned_images(shard: pa.Table) -> list[PlannedImage]:
    """The rows of one shard of a plan."""
    names = ["uri", "etag", "bytes", "format", "width", "height"]
    return [PlannedImage(**row) for row in shard.select(names).to_pylist()]


def shard_slices(plan: pa.Table) -> Iterator[tuple[int, int]]:
    """First and behind-last row of each shard."""
    shards = plan["shard"].to_numpy()
    edges = np.r_[np.flatnonzero(np.r_[True, np.diff(shards) != 0][: len(shards)]), len(shards)].tolist()
    return pairwise(edges)


@dataclass(frozen=True)
class Bucket:
    """One line of a plan's summary."""

    name: str
    images: int
    shards: int
    batch: int  # images in a full batch
    fill: float  # images by places in batches, 0 to 1
    mask_bytes: int  # estimated


def batch_size(height: int, width: int, batch_pixels: int) -> int:
    """How many images of a network input size go into one batch."""
    return max(1, batch_pixels // (height * width))


def summarise(plan: pa.Table, batch_pixels: int, max_pixels: int) -> list[Bucket]:
    """The plan's buckets, largest first; an image of more than `max_pixels` will have no mask."""
    pixels = pc.multiply(plan["width"].cast(pa.int64()), plan["height"].cast(pa.int64()))
    shards = plan.append_column("pixels", pc.if_else(pc.less_equal(pixels, max_pixels), pixels, 0))
    shards = shards.group_by(["bucket", "shard"]).aggregate([("uri", "count"), ("pixels", "sum")])
    buckets: dict[str | None, list[tuple[int, int]]] = {}
    for row in shards.to_pylist():
        buckets.setdefault(row["bucket"], []).append((row["uri_count"], row["pixels_sum"] or 0))
    found = []
    for name, members in buckets.items():
        images = sum(count for count, _ in members)
        batch = batch_size(*bucket_size(name), batch_pixels) if name else 1
        places = sum(-(-count // batch) * batch for count, _ in members)
        mask_bytes = round(MASK_BYTES_PER_PIXEL * sum(pixels for _, pixels in members))
        found.append(Bucket(name or "unknown", images, len(members), batch, images / places, mask_bytes))
    return sorted(found, key=lambda bucket: (-bucket.images, bucket.name))


def bucket_size(name: str) -> tuple[int, int]:
    """(height, width) of a bucket called "512x704"."""
    height, _, width = name.partition("x")
    return int(height), int(width)
