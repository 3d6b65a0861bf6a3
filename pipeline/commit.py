"""A run in the output: its plan, its shards, and the record that says all are there.

    runs/<run_id>/plan-<digest>-<n>.parquet     the plan, a row group a shard
    runs/<run_id>/plan.json                     which plan it is, put once and never changed
    runs/<run_id>/lease-<n>.json                which driver does it (`lease`)
    segments/run=<run_id>/shard-<n>.parquet     one whole object each, under a name that the plan determines
    runs/<run_id>/run.json                      the commit, put once when every shard is there

Resuming is listing what is there and doing the rest: a shard is never half there, and never there twice. Everything is
sealed, each file by what was put after it or by itself, so that `swath verify` can prove every bit of it.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.attempts import agreed, reason
from pipeline.config import ConfigurationError, StorageSettings
from pipeline.filesystems import is_plain
from pipeline.lease import Lease
from pipeline.plan import PART_SHARDS, Origin, Plan, PlannedImage, planned_images
from pipeline.schema import SUMMARY_KEY
from pipeline.storage import Store
from pipeline.totals import Totals

FOOTERS, CHUNK = 16, 1_000  # that are read at once, and that are held
DIGEST = 16  # characters of a plan's digest that its files' names have
RUNS_NAMED = 5  # where one is not found
SHARD = re.compile(r"shard-(\d{6,})\.parquet")


@dataclass(frozen=True)
class Contents:
    """What `plan.json` says: what the plan was made from, its files, and for each shard its images and work."""

    origin: Origin
    parts: list[str]
    images: list[int]
    work: list[int]
    changes: dict[str, int] = field(default_factory=dict)  # why they were to do: how many new, changed, ...


@dataclass(frozen=True)
class Run:
    """One run in an output."""

    store: Store
    id: str

    @property
    def url(self) -> str:
        return f"{self.store.url.rstrip('/')}/runs/{self.id}"

    @property
    def plan_name(self) -> str:
        return f"runs/{self.id}/plan.json"

    @property
    def record_name(self) -> str:
        return f"runs/{self.id}/run.json"

    @property
    def folder(self) -> str:
        return f"segments/run={self.id}"

    @property
    def lease_name(self) -> str:
        return f"runs/{self.id}/lease"

    def shard_name(self, shard: int) -> str:
        return f"{self.folder}/shard-{shard:06d}.parquet"

    def begin(self, plan: Plan, origin: Origin) -> None:
        """Put the plan. Raises FileExistsError where there is one."""
        digest = plan.digest()[:DIGEST]
        parts = [f"runs/{self.id}/plan-{digest}-{number:05d}.parquet" for number in range(len(plan.parts))]
        for name, part in zip(parts, plan.parts, strict=True):
            self.store.put(name, part.read_bytes())
        images, work = ([getattr(shard, name) for shard in plan.shards] for name in ("images", "work"))
        contents = asdict(Contents(origin, parts, images, work, plan.changes))
        self.store.put(self.plan_name, json.dumps(contents, separators=(",", ":")).encode(), only_new=True)

    def contents(self) -> Contents | None:
        """What the plan holds, or None while there is none. Raises `ConfigurationError` for a damaged one."""
        if (found := self.read(self.plan_name)) is None:
            return None
        try:
            lists = {name: tuple(found["origin"][name]) for name in ("input", "include", "exclude")}
            return Contents(**found | {"origin": Origin(**found["origin"] | lists)})
        except (KeyError, TypeError) as error:
            raise damaged(self.store.uri(self.plan_name), error) from None

    def plan_digest(self) -> str:
        """SHA-256 of `plan.json`, for the record."""
        return hashlib.sha256(self.store.read(self.plan_name)).hexdigest()

    def done(self) -> list[int]:
        """The shards that are there, in order."""
        found = map(SHARD.fullmatch, self.store.names(self.folder))
        return sorted(int(match[1]) for match in found if match)

    def put_shard(self, shard: int, data: bytes) -> None:
        """Raises FileExistsError when another attempt has put it; that one stays."""
        self.store.put(self.shard_name(shard), data, only_new=True)

    def lease(self) -> Lease:
        """What its driver holds."""
        return Lease(self.store, self.lease_name, f"run {self.id}")

    def totals(self, shards: list[int]) -> Iterator[Totals]:
        """What each of `shards`, which are all there, holds; read from the files' footers, some at once."""
        with ThreadPoolExecutor(FOOTERS) as pool:
            for start in range(0, len(shards), CHUNK):
                yield from pool.map(self.shard_totals, shards[start : start + CHUNK])

    def shard_totals(self, shard: int) -> Totals:
        """Raises FileNotFoundError when the shard is not there."""

        def read() -> bytes | Exception:
            try:
                return self.open_shard(shard).metadata.metadata[SUMMARY_KEY]
            except (pa.ArrowException, KeyError) as error:
                return error

        # a part of an object comes without a checksum, and the footer has none of its own
        found = agreed(read, str) if is_plain(self.store.filesystem) else read()
        if isinstance(found, Exception):
            raise OSError(f"{self.shard_name(shard)} is damaged ({reason(found)}); see swath verify")
        return Totals(**json.loads(found))

    def open_shard(self, shard: int) -> pq.ParquetFile:
        """A shard's rows, of which only the columns that are asked for are read. Raises FileNotFoundError."""
        return pq.ParquetFile(self.store.open(self.shard_name(shard)), page_checksum_verification=True)

    def record(self) -> dict[str, Any] | None:
        """The run record, or None while the run is not complete. Raises `ConfigurationError` for a damaged one."""
        return self.read(self.record_name)

    def finished(self) -> datetime | None:
        """When the record was put, by the driver's clock; None while it is not. Raises `ConfigurationError`."""
        if (record := self.record()) is None:
            return None
        try:
            return datetime.fromisoformat(record["finished"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.store.uri(self.record_name), error) from None

    def read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self.store.read(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise damaged(self.store.uri(name), error) from None
        if not isinstance(found, dict):
            raise damaged(self.store.uri(name), TypeError("it holds no object"))
        return found

    def commit(self, record: dict[str, Any]) -> None:
        """Put the run record; when one is there already it stays, as the shards it speaks of are the same."""
        try:
            self.store.put(self.record_name, json.dumps(record, indent=2).encode(), only_new=True)
        except FileExistsError:
            return


def damaged(name: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"{name} is damaged ({type(error).__name__}: {reason(error)}); see swath verify")


class PlanFiles:
    """The images of each shard of a run, whose files are read whole as they are needed. Many threads may use it."""

    def __init__(self, run: Run):
        contents = run.contents()
        assert contents, "a run has a plan before it has workers"
        self.store, self.contents = run.store, contents
        self.opened: tuple[int, pq.ParquetFile] | None = None
        self.lock = threading.Lock()

    def images(self, shard: int) -> list[PlannedImage]:
        """What the plan says about a shard."""
        part, group = divmod(shard, PART_SHARDS)
        with self.lock:
            if not self.opened or self.opened[0] != part:
                source = pa.BufferReader(self.store.read(self.contents.parts[part]))
                self.opened = part, pq.ParquetFile(source, page_checksum_verification=True)
            return planned_images(self.opened[1].read_row_group(group))


def choose(url: str, settings: StorageSettings) -> Run:
    """The run at OUTPUT/runs/ID, or in OUTPUT the one that was begun last. Raises `ConfigurationError`."""
    output = Store(url, settings)
    if found := runs(output):
        return max(found, key=lambda run: (output.changed(run.plan_name), run.id))
    folder, _, run_id = url.rstrip("/").rpartition("/")
    if not folder.endswith("/runs"):
        raise ConfigurationError(f"{output.url}: no run is here; give OUTPUT/runs/ID, or OUTPUT for its newest run")
    found = runs(Store(folder.removesuffix("/runs") or "/", settings))
    for run in found:
        if run.id == run_id:
            return run
    known = ", ".join(run.id for run in found[-RUNS_NAMED:]) or "none"
    more = f" and {len(found) - RUNS_NAMED:,} more" if len(found) > RUNS_NAMED else ""
    raise ConfigurationError(f"{output.url}: no such run; there are: {known}{more}")


def runs(output: Store) -> list[Run]:
    """Every run that was begun, oldest id first."""
    return [Run(output, name) for name in output.names("runs")]


def last_commit(output: Store) -> float:
    """When the run finished last was committed, in seconds since 1970 by the store's clock; 0 where none is."""
    with ThreadPoolExecutor(FOOTERS) as pool:
        return max(pool.map(lambda run: output.changed(run.record_name), runs(output)), default=0.0)


def unfinished(output: Store, origin: Origin) -> Run | None:
    """The run that was begun from the same origin and not completed, if there is one."""
    for run in runs(output):
        if "run.json" not in output.names(f"runs/{run.id}") and (found := run.contents()) and found.origin == origin:
            return run
    return None
