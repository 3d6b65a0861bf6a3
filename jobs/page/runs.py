"""The runs of an output: what each was, how fast it went and what it cost, and what is not finished."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import duckdb

from pipeline.commit import FOOTERS, Contents, Run, damaged, runs
from pipeline.config import ConfigurationError
from pipeline.status import driver, how_to_go_on
from pipeline.storage import Store

SHOWN = 20  # runs of each kind that are told of one by one, newest first
COURSES = 6  # of these whose course is drawn
SLOTS, SHARDS_A_SLOT = 48, 4  # of a course: at most so many, with so many shards in each on the average
SKEW = 120  # seconds by which the clocks of store and driver may differ
LONGEST = 20  # settings and the like of a record that are shown
BYTES = ("input_bytes", "output_bytes")
NEEDED = (
    "images",
    "statuses",
    "seconds",
    "started",
    "finished",
    "model_version",
    "input_bytes",
    "output_bytes",
    "pixels",
)

SUMS = """
    SELECT sum(images)::BIGINT, sum(seconds), count(*) FILTER (NOT is_whole),
      sum(images) FILTER (is_whole)::BIGINT, sum(seconds) FILTER (is_whole)
    FROM (SELECT *, coalesce(shards_done_before, 0) = 0 AS is_whole FROM runs)"""


@dataclass(frozen=True)
class Course:
    """How a run went: images a second in equal parts of its time, by when the store got its shards."""

    began: float  # seconds since 1970
    seconds: float  # of one part
    rates: list[float]


@dataclass(frozen=True)
class FinishedRun:
    """A run whose record is there. What records of older versions lack is empty."""

    id: str
    record: Mapping[str, Any]
    course: Course | str  # or why there is none

    @property
    def images(self) -> int:
        return self.record["images"]

    @property
    def seconds(self) -> float:
        return self.record["seconds"]

    @property
    def before(self) -> int:
        """Shards that were done when the stretch began of which `seconds` are known."""
        return self.record.get("shards_done_before", 0)

    @property
    def rate(self) -> float | None:
        """Images a second; None where a part of the run has a time of its own, which nothing tells."""
        return None if self.before or not self.seconds else self.images / self.seconds

    @property
    def settings(self) -> list[tuple[str, Any]]:
        """By name; what has nothing to say is left out."""
        found = self.record.get("settings", {}).items()
        return [(name, value) for name, value in found if value is not None and value is not False][:LONGEST]

    @property
    def stages(self) -> list[tuple[str, float, float]]:
        """(name, share of its threads' time at work, seconds of it), busiest first."""
        spent, shares = self.record.get("stage_seconds", {}), self.record.get("busy_shares", {})
        return sorted(((name, share, spent.get(name, 0.0)) for name, share in shares.items()), key=lambda one: -one[1])

    @property
    def facts(self) -> list[tuple[str, Any]]:
        """Other things of the record that are worth a line where they are there."""
        record = self.record
        versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items())
        changes = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in record.get("changes", {}).items() if n)
        engines = ", ".join(f"{name} ({n:,})" for name, n in record.get("engines", {}).items())
        asked = ", ".join(f"{name} {n:,}" for name, n in record.get("store_retries", {}).items() if n)
        found = {
            "Failures of run": record.get("retries"),
            "Why these images": changes,
            "Engine": engines,
            "Store asked again": asked,
            "Batches halved": record.get("halvings") or "",
            "Shards done apart": record.get("quarantined") or "",
            "Ray job": record.get("submission_id"),
            "Versions": versions,
        }
        return [(name, value) for name, value in found.items() if value]


@dataclass(frozen=True)
class UnfinishedRun:
    """A run without a record: how far it is, and how it goes on. None: nothing is planned yet."""

    id: str
    contents: Contents | None
    done: list[int]
    driver: str | None
    go_on: str

    @property
    def images(self) -> int:
        return sum(self.contents.images) if self.contents else 0

    @property
    def images_done(self) -> int:
        planned = self.contents.images if self.contents else []
        return sum(planned[shard] for shard in self.done if shard < len(planned))


@dataclass(frozen=True)
class Runs:
    """All runs; of each kind the newest `SHOWN` one by one. Rates and costs of images are of those runs alone whose
    whole time is known, as of one that was interrupted the record has the time of its last stretch."""

    finished: list[FinishedRun]
    unfinished: list[UnfinishedRun]
    finished_in_all: int
    unfinished_in_all: int
    images: int  # of all finished ones
    seconds: float  # of the same; of those that were interrupted of their last stretch
    interrupted: int  # how many of them were
    whole_images: int  # of the others
    whole_seconds: float


def read_runs(output: Store, tables: duckdb.DuckDBPyConnection) -> Runs:
    """Raises `ConfigurationError` for a plan or record that is damaged."""
    ids = tables.sql("SELECT run_id FROM runs ORDER BY finished DESC, run_id DESC").fetchall()
    ((images, seconds, interrupted, whole_images, whole_seconds),) = tables.sql(SUMS).fetchall()
    done = {run_id for (run_id,) in ids}
    if None in done:
        raise ConfigurationError(f"{output.url}: a run.json in it names no run; see swath verify")
    open_runs = newest_plan_first(output, [run for run in runs(output) if run.id not in done])
    newest = [Run(output, run_id) for (run_id,) in ids[:SHOWN]]
    return Runs(
        finished=[read_finished(run, place < COURSES) for place, run in enumerate(newest)],
        unfinished=[read_unfinished(run) for run in open_runs[:SHOWN]],
        finished_in_all=len(ids),
        unfinished_in_all=len(open_runs),
        images=images or 0,
        seconds=seconds or 0.0,
        interrupted=interrupted,
        whole_images=whole_images or 0,
        whole_seconds=whole_seconds or 0.0,
    )


def newest_plan_first(output: Store, begun: Sequence[Run]) -> list[Run]:
    """By when their plans were put; last those that have none yet."""
    with ThreadPoolExecutor(FOOTERS) as pool:
        planned = pool.map(lambda run: output.changed(run.plan_name), begun)
        found = sorted(zip(planned, begun, strict=True), key=lambda pair: (-pair[0], pair[1].id))
    return [run for _, run in found]


def read_finished(run: Run, is_drawn: bool) -> FinishedRun:
    record = run.record() or {}
    if missing := [name for name in NEEDED if record.get(name) is None]:
        raise damaged(run.store.uri(run.record_name), KeyError(missing[0]))
    return FinishedRun(run.id, record, course(run, record) if is_drawn else "drawn for the newest runs only")


def read_unfinished(run: Run) -> UnfinishedRun:
    contents = run.contents()
    go_on = how_to_go_on(run, contents) if contents else ""
    return UnfinishedRun(run.id, contents, run.done(), driver(run), go_on)


def course(run: Run, record: Mapping[str, Any]) -> Course | str:
    """How a finished run went, or why that is not known."""
    if not (contents := run.contents()):
        return "not known, as its plan is not there"
    times = run.store.times(run.folder)
    put = sorted(
        (times[name], images)
        for shard, images in enumerate(contents.images)
        if (name := run.shard_name(shard).rpartition("/")[2]) in times
    )
    if len(put) < len(contents.images):
        return "not known, as the store does not say when shards were put"
    started, finished = (datetime.fromisoformat(record[name]).timestamp() for name in ("started", "finished"))
    is_resumed = record.get("shards_done_before", 0) > 0
    if put[-1][0] > finished + SKEW or (not is_resumed and put[0][0] < started - SKEW):
        return "not known, as its files have other times than the run, as copies have"
    return slots(put, put[0][0] if is_resumed else started)


def slots(put: Sequence[tuple[float, int]], began: float) -> Course | str:
    """The course from the (time, images) of each shard, in order."""
    count, whole = min(SLOTS, len(put) // SHARDS_A_SLOT), put[-1][0] - began
    if count < 2 or whole <= 0:
        return f"not drawn, as {len(put):,} {'shard is' if len(put) == 1 else 'shards are'} too few"
    images = [0] * count
    for when, number in put:
        images[max(0, min(count - 1, int((when - began) / whole * count)))] += number
    return Course(began, whole / count, [number * count / whole for number in images])


def moment(text: str | float) -> str:
    """An ISO time, or seconds since 1970, in UTC: 25 Nov 2026, 23:05."""
    when = datetime.fromisoformat(text) if isinstance(text, str) else datetime.fromtimestamp(text, UTC)
    return f"{when.astimezone(UTC):%d %b %Y, %H:%M}"
