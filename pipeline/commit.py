"""A run in the output: its plan, its shards, and the record that says all are there.

    runs/<run_id>/plan.parquet                  put once, never changed
    segments/run=<run_id>/shard-<n>.parquet     one whole object each, under a name that the plan determines
    runs/<run_id>/run.json                      the commit, put once when every shard is there

Resuming is listing what is there and doing the rest: a shard is never half there, and never there twice.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import SCHEMA as PLAN_SCHEMA
from pipeline.plan import Origin, encode_plan, read_origin
from pipeline.schema import SUMMARY_KEY
from pipeline.storage import Store
from pipeline.totals import Totals


@dataclass(frozen=True)
class Run:
    """One run in an output."""

    store: Store
    id: str

    @property
    def plan_name(self) -> str:
        return f"runs/{self.id}/plan.parquet"

    @property
    def record_name(self) -> str:
        return f"runs/{self.id}/run.json"

    @property
    def folder(self) -> str:
        return f"segments/run={self.id}"

    def shard_name(self, shard: int) -> str:
        return f"{self.folder}/shard-{shard:06d}.parquet"

    def begin(self, plan: pa.Table, origin: Origin) -> None:
        """Put the plan. Raises FileExistsError when another driver was first."""
        self.store.put(self.plan_name, encode_plan(plan, origin), only_new=True)

    def open_plan(self) -> pq.ParquetFile:
        """The plan, of which a reader takes the row groups it needs. Raises FileNotFoundError."""
        return pq.ParquetFile(self.store.arrow().open_input_file(self.store.path(self.plan_name)))

    def origin(self) -> Origin | None:
        """What the plan was made from, or None while there is none."""
        try:
            return read_origin(self.open_plan())
        except FileNotFoundError:
            return None

    def done(self) -> list[int]:
        """The shards that are there, in order."""
        names = [name for name in self.store.names(self.folder) if name.startswith("shard-")]
        return sorted(int(name.removeprefix("shard-").removesuffix(".parquet")) for name in names)

    def put_shard(self, shard: int, data: bytes) -> None:
        self.store.put(self.shard_name(shard), data)

    def totals(self, shards: list[int]) -> list[Totals]:
        """What each of `shards`, which are all there, holds; read from the files' footers."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.shard_totals, shards))

    def shard_totals(self, shard: int) -> Totals:
        """Raises FileNotFoundError when the shard is not there."""
        source = self.store.arrow().open_input_file(self.store.path(self.shard_name(shard)))
        return Totals(**json.loads(pq.read_metadata(source).metadata[SUMMARY_KEY]))

    def record(self) -> dict[str, Any] | None:
        """The run record, or None while the run is not complete."""
        try:
            return json.loads(self.store.read(self.record_name))
        except FileNotFoundError:
            return None

    def commit(self, record: dict[str, Any]) -> None:
        """Put the run record; when one is there already it stays, as the shards it speaks of are the same."""
        try:
            self.store.put(self.record_name, json.dumps(record, indent=2).encode(), only_new=True)
        except FileExistsError:
            return


def runs(output: Store) -> list[Run]:
    """Every run that was begun, oldest id first."""
    return [Run(output, name) for name in output.names("runs")]


def unfinished(output: Store, origin: Origin) -> Run | None:
    """The run that was begun from the same origin and not completed, if there is one."""
    for run in runs(output):
        if "run.json" not in output.names(f"runs/{run.id}") and run.origin() == origin:
            return run
    return None


def claimed(output: Store, model_version: str) -> tuple[pa.Table, list[Run]]:
    """(uri, etag) of every image in the plan of a run with this model version, and those of the runs not completed.

    Such an image has a row, or will have one when its run goes on: no other run may give it a second.
    """
    columns = pa.schema([PLAN_SCHEMA.field("uri"), PLAN_SCHEMA.field("etag")])
    tables, open_runs = [columns.empty_table()], []
    for run in runs(output):
        origin = run.origin()
        if origin and origin.model_version == model_version:
            tables.append(run.open_plan().read(columns=columns.names).cast(columns))
            if run.record() is None:
                open_runs.append(run)
    return pa.concat_tables(tables), open_runs
