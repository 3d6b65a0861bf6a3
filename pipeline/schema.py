"""The segments table: one row an image, whatever became of it. Units are in the fields' own metadata."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from model.labels import LabelSet
from model.segmentation import Segmentation
from pipeline.plan import PlannedImage
from pipeline.seal import write_sealed

VERSION = 1
STATUSES = ("ok", "missing", "changed", "unreadable", "unsupported", "too_large", "failed")
SUMMARY_KEY = b"swath.summary"


def field(name: str, kind: pa.DataType, note: str, unit: str | None = None, nullable: bool = True) -> pa.Field:
    metadata = {"note": note} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


CLASS = pa.struct(
    [
        field("class_id", pa.int32(), "value of its pixels in the mask", nullable=False),
        field("name", pa.string(), "label", nullable=False),
        field("pixels", pa.int64(), "pixels of the mask", "pixel", nullable=False),
        field("fraction", pa.float64(), "pixels / (width * height)", "1", nullable=False),
        field("confidence", pa.float32(), "mean over the logits it wins; null where it wins none", "1"),
    ]
)

SEGMENTS = pa.schema(
    [
        field("uri", pa.string(), "where the image lies; FILE#KEY in a tar or Parquet file", nullable=False),
        field("etag", pa.string(), "the object's version when it was indexed", nullable=False),
        field("bytes", pa.int64(), "size of the encoded image", "byte", nullable=False),
        field("format", pa.string(), "encoding, by content"),
        field("width", pa.int32(), "after EXIF orientation", "pixel"),
        field("height", pa.int32(), "after EXIF orientation", "pixel"),
        field("bucket", pa.string(), "network input, height x width", "pixel"),
        field("status", pa.string(), "one of " + ", ".join(STATUSES), nullable=False),
        field("error", pa.string(), "why there is no mask, one line; null when ok"),
        field("mask", pa.binary(), "PNG, one channel of class ids at width x height"),
        field("classes", pa.list_(CLASS), "classes present in the mask, most pixels first"),
        field("confidence", pa.float32(), "mean greatest softmax probability at logit resolution", "1"),
        field("entropy", pa.float32(), "mean entropy of the softmax at logit resolution", "nat"),
        field("model_version", pa.string(), "hash of weights and of every setting that changes a mask", nullable=False),
        field("run_id", pa.string(), "the run that wrote the row", nullable=False),
    ]
)


@dataclass(frozen=True)
class Outcome:
    """What became of one image; `segmentation` and `mask` are there when `status` is ok."""

    status: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    bucket: str | None = None
    segmentation: Segmentation | None = None
    mask: bytes | None = None


def row(image: PlannedImage, outcome: Outcome, labels: LabelSet, model_version: str, run_id: str) -> dict:
    """One row of SEGMENTS."""
    found = outcome.segmentation
    return {
        "uri": image.uri,
        "etag": image.etag,
        "bytes": image.bytes,
        "format": image.format,
        "width": outcome.width or image.width,
        "height": outcome.height or image.height,
        "bucket": outcome.bucket,
        "status": outcome.status,
        "error": outcome.error,
        "mask": outcome.mask,
        "classes": classes(found, labels) if found else None,
        "confidence": found.confidence if found else None,
        "entropy": found.entropy if found else None,
        "model_version": model_version,
        "run_id": run_id,
    }


def classes(found: Segmentation, labels: LabelSet) -> list[dict]:
    """The classes that a mask has, most pixels first, equal ones by id."""
    total = int(found.pixels.sum())
    present = np.flatnonzero(found.pixels)
    return [
        {
            "class_id": int(class_id),
            "name": labels.names[class_id],
            "pixels": int(found.pixels[class_id]),
            "fraction": int(found.pixels[class_id]) / total,
            "confidence": None if np.isnan(value := found.class_confidence[class_id]) else float(value),
        }
        for class_id in present[np.argsort(-found.pixels[present], kind="stable")]
    ]


def encode_shard(rows: list[dict], metadata: dict[bytes, bytes]) -> bytes:
    """Rows as one Parquet file."""
    return encode_table(pa.Table.from_pylist(rows, SEGMENTS), metadata)


def encode_table(table: pa.Table, metadata: dict[bytes, bytes]) -> bytes:
    """The same of a table: zstd (masks are compressed already), page checksums, statistics, a seal."""
    table = table.replace_schema_metadata({b"swath.schema": str(VERSION).encode(), **metadata})
    compression = {name: "none" if name == "mask" else "zstd" for name in column_paths()}
    return write_sealed(table, compression=compression, write_page_checksum=True, use_dictionary=dictionary_paths())


def column_paths() -> list[str]:
    """The leaf columns of SEGMENTS as Parquet names them."""
    nested = [f"classes.list.element.{inner.name}" for inner in CLASS]
    return [name for name in SEGMENTS.names if name != "classes"] + nested


def dictionary_paths() -> list[str]:
    """The columns whose values repeat."""
    names = ("format", "bucket", "status", "model_version", "run_id")
    return [*names, "classes.list.element.class_id", "classes.list.element.name"]
