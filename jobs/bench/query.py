"""How fast a large output answers, and what of it is read: `swath query` beside Polars over the same files.

The rows are made up and as many as real ones would be (`outputs`); their masks are of a usual size, and the last column
shows how little of the files a question reads. Each question is put to both in turn, and the least time counts. Polars
has no views: it gets the rows of the one run, where `swath query` finds the newest row of each image first.

  python -m jobs.bench.query
  python -m jobs.bench.query --images 100000 --runs 3
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from jobs.bench.model import processor
from jobs.bench.outputs import write_output
from pipeline.config import StorageSettings
from pipeline.query import ask, bytes_read, connect
from pipeline.storage import Store

TURNS = 5

Frame = pl.LazyFrame


def classes(rows: Frame) -> Frame:
    return rows.select(pl.col("classes")).explode("classes").drop_nulls().unnest("classes")


QUESTIONS: dict[str, tuple[str, Callable[[Frame], Frame]]] = {
    "images by status": (
        "SELECT status, count(*) FROM current GROUP BY status",
        lambda rows: rows.group_by("status").len(),
    ),
    "pixels and images of each class": (
        "SELECT name, sum(pixels), count(*) FROM class_stats GROUP BY name",
        lambda rows: classes(rows).group_by("name").agg(pl.col("pixels").sum(), pl.len()),
    ),
    "images over half a class": (
        "SELECT count(*) FROM class_stats WHERE name = 'road' AND fraction > 0.5",
        lambda rows: classes(rows).filter(pl.col("name") == "road", pl.col("fraction") > 0.5).select(pl.len()),
    ),
    "the hundred least sure": (
        "SELECT uri, confidence FROM current WHERE status = 'ok' ORDER BY confidence LIMIT 100",
        lambda rows: rows.filter(status="ok").select("uri", "confidence").sort("confidence").head(100),
    ),
    "why images failed": (
        "SELECT status, error, count(*) FROM failures GROUP BY ALL",
        lambda rows: rows.filter(pl.col("status") != "ok").group_by("status", "error").len(),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.query", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="further ones do a hundredth again")
    options = parser.parse_args()
    print(f"# Questions to {options.images:,} images in {options.runs} runs\n")
    print(f"{processor('cpu')}. `python -m jobs.bench.query --images {options.images} --runs {options.runs}`\n")
    with tempfile.TemporaryDirectory() as folder:
        write_output(Path(folder), options.images, options.runs)
        total = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        found = {name: measure(folder, *pair) for name, pair in QUESTIONS.items()}
    print("| question | s | Polars, s | ratio | read, MB | of all |\n|---|---|---|---|---|---|")
    for name, one in found.items():
        ratio, share = one["polars_seconds"] / one["seconds"], one["bytes_read"] / total
        print(
            f"| {name} | {one['seconds']:.2f} | {one['polars_seconds']:.2f} | {ratio:.1f} | "
            f"{one['bytes_read'] / 1e6:.1f} | {share:.1%} |"
        )
    print(f"\n{total / 1e9:.2f} GB in all\n")
    print(json.dumps({"hardware": processor("cpu"), "images": options.images, "bytes": total, "questions": found}))


def measure(folder: str, sql: str, peer: Callable[[Frame], Frame]) -> dict[str, Any]:
    """The least seconds of both for one question, and the bytes that ours reads."""
    ours, theirs = [], []
    for _ in range(TURNS):
        began = time.perf_counter()
        with connect(Store(folder, StorageSettings())) as tables:
            answer = ask(tables, sql)
            assert answer is not None
            rows = answer.read_all().num_rows
            ours.append(time.perf_counter() - began)
            read = bytes_read(tables)
        began = time.perf_counter()
        same = peer(pl.scan_parquet(f"{folder}/segments/run=night-1/*.parquet")).collect().height
        theirs.append(time.perf_counter() - began)
        assert rows == same, "both find the same"
    return {"seconds": min(ours), "polars_seconds": min(theirs), "bytes_read": read}


if __name__ == "__main__":
    main()
