"""Plan an index of many million synthetic rows: time, peak memory, how full batches are, how many buckets.

  python -m jobs.bench.plan --images 10000000
  python -m jobs.bench.plan --images 100000000

The rows are as a large collection has them: keys of 60 characters under a thousand prefixes, sizes of which a few
cameras and web formats make most and crops of every size the rest. What is timed is what `swath segment` does between
the listing and the first shard: join the listing with the index, take out what earlier runs have (`--done`, a share),
sort, cut, write the plan. The index is put first, and is not part of the time. Its peer is the least that any plan
must do, in the same run: DuckDB reading the same columns of the index once. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from pipeline.changes import earlier_runs, leave_out
from pipeline.commit import Run
from pipeline.config import StorageSettings
from pipeline.index import IMAGES, join
from pipeline.plan import Origin, make_plan, planned_images, summarise
from pipeline.policy import parse_policy
from pipeline.storage import Store
from pipeline.tables import make_room, workspace

PART = 5_000_000  # rows of the index that are made at once
ORIGIN = Origin((), (), (), "", "v")
BATCHES = (1, 16, 64)  # images of 512x512
COMMON = "[[640, 480], [4032, 3024], [3024, 4032], [500, 375], [375, 500], [640, 427], [1024, 768], [1920, 1080]]"
ROWS = f"""
    WITH drawn AS (
        SELECT r, (hash(r) >> 1)::BIGINT AS a, (hash(r + 1000000007) >> 1)::BIGINT AS b FROM range(?, ?) t(r)
    ),
    shaped AS (
        SELECT *, {COMMON}[1 + (b >> 20) % 8] AS usual,
               200 + (a >> 32) % 1000 AS side,
               exp(0.9 * ((b >> 8) % 1000 / 1000 + (b >> 40) % 1000 / 1000 - 1)) AS aspect
        FROM drawn
    )
    SELECT 's3://bucket/photos/' || lpad((a % 1000)::VARCHAR, 4, '0') || '/' || md5(r::VARCHAR) || '.jpg' AS uri,
           md5(b::VARCHAR) AS etag, (20000 + a % 3000000)::BIGINT AS bytes, 'jpeg' AS format,
           CASE WHEN a % 10 < 7 THEN usual[1] ELSE side END::INTEGER AS width,
           CASE WHEN a % 10 < 7 THEN usual[2] ELSE ceil(side * aspect) END::INTEGER AS height,
           NULL::VARCHAR AS error, NULL::VARCHAR AS file, NULL::BIGINT AS position
    FROM shaped
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--done", type=float, default=0.0, metavar="SHARE", help="of the images, in an earlier run")
    parser.add_argument("--policy", default="short=512")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swath-bench-") as folder:
        output = Store(folder, StorageSettings())
        parts = make_index(Path(folder), options.images)
        baseline = read_once(parts)
        forget_peak()
        if options.done:
            earlier_run(output, options.images, options.done, options.policy)
        seconds, plan = {}, None
        with workspace() as space:
            tables = space.tables
            tables.execute(f"CREATE TABLE listing AS SELECT uri, etag, bytes, 'image' AS kind, 19 AS root FROM {parts}")
            make_room(tables, options.images)
            forget_peak()
            started = time.perf_counter()
            join(IMAGES, tables, output)
            tables.execute("DROP TABLE listing")
            seconds["join"] = time.perf_counter() - started
            leave_out(tables, output, ORIGIN, earlier_runs(output))
            seconds["leave out"] = time.perf_counter() - started - seconds["join"]
            plan = make_plan(tables, space.folder, parse_policy(options.policy), None, 10**8)
            seconds["sort, cut, write"] = time.perf_counter() - started - sum(seconds.values())
            size = sum(part.stat().st_size for part in plan.parts)
            sample = len(planned_images(pq.ParquetFile(plan.parts[-1]).read_row_group(0)))
        assert sample
        assert plan.images == options.images - int(options.images * options.done), plan.images
    total, peak = sum(seconds.values()), peak_memory()
    buckets = {batch: summarise(plan.shards, batch * 512 * 512) for batch in BATCHES}
    fill = {n: plan.images / sum(one.batches * one.batch for one in found) for n, found in buckets.items()}
    print(f"{plan.images:,} images of an index of {options.images:,}: {total:.0f} s, {peak / 2**30:.2f} GiB at most")
    print("  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(f"{total / baseline:.1f} times what DuckDB takes to read the index once ({baseline:.1f} s)")
    print(
        f"{len(plan.shards):,} shards in {len(plan.parts):,} files ({size / plan.images:.0f} bytes an image), ", end=""
    )
    print(f"{len(buckets[1])} buckets; batches full to " + ", ".join(f"{fill[n]:.3f} (of {n})" for n in BATCHES))
    result = {"images": plan.images, "seconds": round(total, 1), "peak_bytes": peak, "fill": fill}
    print(json.dumps(result | {"buckets": len(buckets[1]), "shards": len(plan.shards), "times_read": total / baseline}))


def make_index(folder: Path, images: int) -> str:
    """Write the index's parts; DuckDB's name of all of them."""
    (folder / "index").mkdir()
    with duckdb.connect() as tables:
        for number, start in enumerate(range(0, images, PART)):
            part = folder / f"index/part-{number:05d}.parquet"
            copy = f"COPY ({ROWS}) TO '{part}' (FORMAT parquet, COMPRESSION zstd)"
            tables.execute(copy, [start, min(start + PART, images)])
    return f"'{folder}/index/*.parquet'"


def read_once(parts: str) -> float:
    """Seconds to read the columns that a plan has."""
    started = time.perf_counter()
    with duckdb.connect() as tables:
        tables.execute(f"SELECT max(uri), max(etag), sum(bytes), sum(width), sum(height) FROM {parts}").fetchall()
    return time.perf_counter() - started


def earlier_run(output: Store, images: int, share: float, policy: str) -> None:
    """A run of the first images."""
    with workspace() as space:
        space.tables.execute(f"CREATE TABLE images AS {ROWS}", [0, int(images * share)])
        plan = make_plan(space.tables, space.folder, parse_policy(policy), None, 10**8)
        Run(output, "earlier").begin(plan, ORIGIN)


def forget_peak() -> None:
    """Have the peak of memory count from here."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes that this process had at most."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
