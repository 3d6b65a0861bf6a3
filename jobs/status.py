"""Show how far a run is, and what it has found so far.

Reads the object store alone, so it works from anywhere, while the run lasts and when its driver is gone. RUN is
OUTPUT/runs/ID, or OUTPUT for the run that was begun last. Exit code 0 when the run is complete, 1 when it is not.

  swath status s3://bucket/masks
  swath status s3://bucket/masks/runs/night-1 --json
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from jobs.display import Display, clock, print_statuses, size
from pipeline.config import StatusSettings

if TYPE_CHECKING:
    from pipeline.status import Status

SETTINGS = StatusSettings
SHARDS_NAMED = 5
RETRIED = ("failed", "missing")


def run(settings: StatusSettings) -> int:
    from pipeline.commit import choose
    from pipeline.status import read_status

    with Display() as display:
        run = choose(settings.run, settings)
        if not settings.run.rstrip("/").endswith(f"/runs/{run.id}"):
            display.say(f"run {run.id}, which was begun last")
        status = read_status(run, display.counting)
    if settings.as_json:
        print(json.dumps(asdict(status) | {"complete": status.is_complete}))
    else:
        print_status(status)
    return 0 if status.is_complete else 1


def print_status(status: "Status") -> None:
    console = Console(soft_wrap=True, highlight=False)
    totals, left = status.totals, status.shards - status.shards_done
    share = status.images_done / max(1, status.images)
    console.print(f"run      {escape(status.url)}  model {escape(status.model_version)}")
    console.print(f"images   {status.images_done:,} of {status.images:,} done, {share:.1%}")
    console.print(f"shards   {status.shards_done:,} of {status.shards:,} done, {left:,} left")
    if totals.halvings or totals.quarantined:
        console.print(f"trouble  {totals.halvings:,} batches halved, {totals.quarantined:,} shards done apart")
    if status.driver:
        console.print(f"driver   {escape(status.driver)}")
    if status.finished:
        console.print(f"finished {escape(status.finished)}, after {clock(status.seconds or 0)}")
    if totals.images:
        console.print(f"read     {size(totals.input_bytes)}, {size(totals.output_bytes)} of masks\n")
        print_statuses(console, totals.statuses, totals.reasons)
    for name, why in list(status.damaged.items())[:SHARDS_NAMED]:
        console.print(f"damaged  {escape(name)}: {escape(why)}")
    if len(status.damaged) > SHARDS_NAMED:
        console.print(f"damaged  {len(status.damaged) - SHARDS_NAMED:,} shards more; see swath verify")
    if status.go_on:
        console.print(f"\nnot finished; to go on:  {escape(status.go_on)}")
    elif status.is_complete and any(totals.statuses.get(name) for name in RETRIED):
        console.print(f"\nfor another try of what is failed or missing:  swath retry {escape(status.url)}")
    elif not status.is_complete:
        console.print("\nfinished, but not all that it has put is there; see swath verify")
