"""Outputs of any size that no network has made: rows, files and records as a run writes them, with made-up numbers.

For measuring what reads an output. Masks are of a usual size, but their bytes mean nothing, except where `masks` has
one for the size of an image. Of a plan there is only what says how many images each shard has.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.scenes.street import CLASSES
from pipeline.commit import Contents
from pipeline.plan import Origin
from pipeline.schema import CLASS, SEGMENTS, SUMMARY_KEY, encode_table
from pipeline.seal import sealed
from pipeline.totals import Totals, add, count_reasons

SHARD = 1024  # images in one
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
FAILURES = {
    "missing": "the object is gone since it was indexed",
    "unreadable": "image file is truncated",
    "too_large": "20000x14000 is over --max-pixels 100,000,000",
}
EVERY = 200  # images, of which one has no mask
MASK = 1500  # bytes
SETTINGS: dict[str, Any] = {
    "policy": "short=512",
    "max_pixels": 100_000_000,
    "allow_truncated": False,
    "precision": "float32",
}

Masks = Mapping[tuple[int, int], bytes]  # by width and height


def write_output(
    folder: Path,
    images: int,
    runs: int = 1,
    labels: tuple[str, ...] = CLASSES,
    prefix: str = "s3://photos",
    masks: Masks | None = None,
) -> None:
    """Write an output of so many images; each run after the first does the first hundredth of them again."""
    for number in range(runs):
        some = images if not number else max(1, images // 100)
        write_run(folder, f"night-{number + 1}", some, number, labels, prefix, masks or {})


def write_run(
    folder: Path, run_id: str, images: int, number: int, labels: tuple[str, ...], prefix: str, masks: Masks
) -> None:
    rng = np.random.default_rng(number)
    segments, record = folder / f"segments/run={run_id}", folder / f"runs/{run_id}"
    segments.mkdir(parents=True)
    record.mkdir(parents=True)
    totals, files = [], []
    for shard, start in enumerate(range(0, images, SHARD)):
        table = rows(rng, start, min(SHARD, images - start), run_id, f"model-{number + 1}", labels, prefix, masks)
        totals.append(count(table))
        metadata = {b"swath.run_id": run_id.encode(), b"swath.labels": "\n".join(labels).encode()}
        files.append(f"shard-{shard:06d}.parquet")
        (segments / files[-1]).write_bytes(encode_table(table, metadata | {SUMMARY_KEY: totals[-1].encode()}))
    started = BEGAN + timedelta(days=number)
    finished = started + timedelta(seconds=max(1, images / 500))
    for done, name in enumerate(files, 1):  # put one after the other
        put = (started + (finished - started) * done / len(files)).timestamp()
        os.utime(segments / name, (put, put))
    origin = Origin((prefix,), (), (), SETTINGS["policy"], f"model-{number + 1}")
    contents = Contents(origin, [], [one.images for one in totals], [one.pixels for one in totals], {"new": images})
    plan = json.dumps(asdict(contents)).encode()
    (record / "plan.json").write_bytes(plan)
    whole = asdict(add(totals)) | {
        "run_id": run_id,
        "input": [prefix],
        "checkpoint": f"s3://models/model-{number + 1}",
        "model_version": f"model-{number + 1}",
        "retries": "",
        "changes": contents.changes,
        "settings": SETTINGS,
        "shards_done_before": 0,
        "busy_shares": {"fetch": 0.1, "decode": 0.2, "infer": 0.98, "encode": 0.1},
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
        "labels": list(labels),
        "started": started.isoformat(timespec="seconds"),
        "finished": finished.isoformat(timespec="seconds"),
        "seconds": (finished - started).total_seconds(),
        "files": [f"segments/run={run_id}/{name}" for name in files],
    }
    (record / "run.json").write_text(json.dumps(sealed(whole)))


def rows(
    rng: np.random.Generator,
    start: int,
    images: int,
    run_id: str,
    version: str,
    labels: tuple[str, ...],
    prefix: str,
    masks: Masks,
) -> pa.Table:
    """A shard's rows."""
    numbers = np.arange(start, start + images)
    ok = numbers % EVERY != EVERY - 1
    why = np.array(list(FAILURES))[(numbers // EVERY) % len(FAILURES)]
    width, height = rng.choice([640, 800, 1024], images), rng.choice([480, 600, 768], images)
    shares = rng.dirichlet(np.full(len(labels), 0.6), images)
    pixels = np.where(ok[:, None], (shares * (width * height)[:, None]).astype(np.int64), 0)
    order = np.argsort(-pixels, axis=1)
    ordered = np.take_along_axis(pixels, order, 1)
    present = ordered > 0
    class_id, total = order[present], np.repeat(width * height, present.sum(1))
    classes = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(present.sum(1))]), pa.int32()),
        pa.StructArray.from_arrays(
            [
                pa.array(class_id, pa.int32()),
                pa.array(np.array(labels, object)[class_id], pa.string()),
                pa.array(ordered[present], pa.int64()),
                pa.array(ordered[present] / total),
                pa.array(rng.uniform(0.5, 1, len(class_id)).astype(np.float32)),
            ],
            fields=list(CLASS),
        ),
        mask=pa.array(~ok),
    )
    etag, size = numbers.copy(), rng.integers(40_000, 400_000, images)
    twins = np.flatnonzero(numbers % EVERY == 1)  # the same file as the one before
    etag[twins], size[twins] = etag[twins - 1], size[twins - 1]
    noise = rng.bytes(MASK * images)
    sizes = list(zip(width.tolist(), height.tolist(), strict=True))
    drawn = [masks.get(size) or noise[at * MASK : (at + 1) * MASK] for at, size in enumerate(sizes)]
    days = numbers % 365
    uris = [
        f"{prefix}/{BEGAN + timedelta(days=int(day)):%Y/%m/%d}/{at:09d}.jpg"
        for day, at in zip(days, numbers, strict=True)
    ]
    columns = {
        "uri": uris,
        "etag": [f"{one:032x}" for one in etag],
        "bytes": size,
        "format": ["jpeg"] * images,
        "width": pa.array(width, pa.int32(), mask=~ok),
        "height": pa.array(height, pa.int32(), mask=~ok),
        "bucket": pa.array([f"512x{32 * round(512 * w / h / 32)}" for w, h in sizes], mask=~ok),
        "status": np.where(ok, "ok", why),
        "error": pa.array([FAILURES[one] for one in why], mask=ok),
        "mask": [mask if fine else None for mask, fine in zip(drawn, ok, strict=True)],
        "classes": classes,
        "confidence": pa.array(rng.beta(8, 2, images).astype(np.float32), mask=~ok),
        "entropy": pa.array(rng.gamma(2, 0.2, images).astype(np.float32), mask=~ok),
        "model_version": [version] * images,
        "run_id": [run_id] * images,
    }
    return pa.table({name: pa.array(columns[name], SEGMENTS.field(name).type) for name in SEGMENTS.names}, SEGMENTS)


def count(table: pa.Table) -> Totals:
    """What a shard with these rows holds."""
    classes = table["classes"].combine_chunks().flatten()
    by_class = pa.table({"name": classes.field("name"), "pixels": classes.field("pixels")}).group_by("name")
    sums = by_class.aggregate([("pixels", "sum"), ("pixels", "count")]).to_pylist()
    statuses, errors = table["status"].to_pylist(), table["error"].to_pylist()
    sizes = pc.sum(pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64())))
    return Totals(
        images=len(table),
        statuses=dict(Counter(statuses)),
        input_bytes=pc.sum(table["bytes"]).as_py(),
        output_bytes=pc.sum(pc.binary_length(table["mask"])).as_py() or 0,
        pixels=sizes.as_py() or 0,
        class_pixels={one["name"]: one["pixels_sum"] for one in sums},
        class_images={one["name"]: one["pixels_count"] for one in sums},
        reasons=count_reasons(pair for pair in zip(statuses, errors, strict=True) if pair[0] != "ok"),
    )
