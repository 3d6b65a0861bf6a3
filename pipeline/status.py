"""How far a run is, from what is in the object store alone: no Ray, no driver, no worker is asked."""

import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline import seal
from pipeline.attempts import reason
from pipeline.commit import Contents, Run
from pipeline.config import ConfigurationError
from pipeline.filesystems import public_url
from pipeline.lease import holder
from pipeline.seal import SealError, check_record
from pipeline.totals import Totals, add

READERS = 16  # footers that are read at once


@dataclass(frozen=True)
class Status:
    """What a run has done, and what is left."""

    run_id: str
    url: str
    model_version: str
    images: int  # planned
    images_done: int  # in shards that are there
    shards: int
    shards_done: int
    damaged: dict[str, str]  # shards that are there and cannot be read: why
    totals: Totals  # of the others
    finished: str | None  # when the record was put, by the driver's clock
    seconds: float | None  # that the last stretch of the run took
    driver: str | None  # who is at work on it, in words
    go_on: str | None  # the command that does the rest

    @property
    def is_complete(self) -> bool:
        return self.finished is not None and self.shards_done == self.shards and not self.damaged


def read_status(run: Run, counting: Callable[[int, int], None]) -> Status:
    """The status of a run. `counting` hears of the images whose shards are read, and of all that are there.

    Raises `ConfigurationError` where there is no plan yet, or none that can be read.
    """
    try:
        contents, record = run.contents(), run.record() or {}
        damaged = damaged_record(run, record)
        if not contents:
            raise ConfigurationError(f"{run.url}: nothing is planned yet; this is known when its plan is put")
        finished, seconds = record.get("finished"), record.get("seconds")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {reason(error)}"
        raise ConfigurationError(f"{run.url}: plan.json or run.json is damaged ({why}); see swath verify") from None
    done = [shard for shard in run.done() if shard < len(contents.images)]
    images_done = sum(contents.images[shard] for shard in done)
    found: list[Totals] = []
    read = 0
    with ThreadPoolExecutor(READERS) as pool:
        for shard, totals in zip(done, pool.map(lambda shard: totals_of(run, shard), done), strict=True):
            if isinstance(totals, Totals):
                found.append(totals)
            else:
                damaged[run.shard_name(shard)] = f"{type(totals).__name__}: {reason(totals)}"
            read += contents.images[shard]
            counting(read, images_done)
    return Status(
        run_id=run.id,
        url=run.url,
        model_version=contents.origin.model_version,
        images=sum(contents.images),
        images_done=images_done,
        shards=len(contents.images),
        shards_done=len(done),
        damaged=damaged,
        totals=add(found),
        finished=finished,
        seconds=seconds,
        driver=driver(run),
        go_on=None if finished else how_to_go_on(run, contents),
    )


def damaged_record(run: Run, record: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a sealed record, by the file's name."""
    try:
        if seal.NAME in record:
            check_record(record)
            if record.get("plan_sha256") != run.plan_digest():
                return {run.plan_name: "it is not the plan that the run was finished with"}
    except SealError as error:
        return {run.record_name: str(error)}
    return {}


def totals_of(run: Run, shard: int) -> Totals | Exception:
    """What a shard holds, or what is wrong with its file, which is for its line to say."""
    try:
        return run.shard_totals(shard)
    except Exception as error:
        return error


def driver(run: Run) -> str | None:
    """Who is at work on the run, in words; None where nobody is, as far as is known."""
    found = holder(run.store, run.lease_name)
    return str(found) if found else None


def how_to_go_on(run: Run, contents: Contents) -> str:
    """The command that does what a run has left, without what may be secret in a URL, as it is shown and kept.

    Of the model's settings a plan knows only the version.
    """
    origin = contents.origin
    if origin.retries:
        return f"swath retry {shlex.quote(run.url.removesuffix(run.id) + origin.retries)}"
    options: list[Any] = [*map(public_url, origin.input), run.store.url, "--run-id", run.id, "--policy", origin.policy]
    for name in ("include", "exclude"):
        for pattern in getattr(origin, name):
            options += [f"--{name}", pattern]
    return f"swath segment {shlex.join(options)} --checkpoint ... (with the other options that it was begun with)"
