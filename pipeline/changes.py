"""What has changed in a collection since earlier runs: images that are new, are others now, or have gone.

Earlier runs are known by their plans: an image in one has a row, or will have one when its run goes on. Which images
have gone is kept in the output as one more part of a log, `deletions/part-<n>.parquet`, whose newest word on a URI
counts; rows of what has gone stay where they are. Only an image that a run over the same INPUT has planned can go: of
another collection in the same output a listing says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import duckdb
import pyarrow as pa

from pipeline.commit import Contents, Run, runs
from pipeline.plan import SCHEMA as PLAN_SCHEMA
from pipeline.plan import Origin
from pipeline.seal import write_sealed
from pipeline.storage import Store
from pipeline.tables import stored

FOLDER = "deletions"
NAMED = 3  # of the images that have gone, in a message
PLANNED = pa.schema([PLAN_SCHEMA.field(name) for name in ("uri", "etag", "file")])
DELETIONS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("is_gone", pa.bool_(), nullable=False, metadata={"note": "false: it is there again"}),
        pa.field("noticed", pa.timestamp("us", "UTC"), nullable=False),
    ]
)
EARLIER = "CREATE TABLE earlier (uri VARCHAR, etag VARCHAR, file VARCHAR, same_model BOOLEAN, same_collection BOOLEAN)"
GONE = "CREATE TABLE gone AS SELECT uri FROM deletions GROUP BY uri HAVING max_by(is_gone, noticed)"
# a file that could not be opened is an image in place of those in it, of which nothing is known then
NOTICED = """
    CREATE TABLE noticed AS
    SELECT DISTINCT uri, true AS is_gone FROM earlier
    WHERE same_collection AND uri NOT IN (SELECT uri FROM gone) AND NOT EXISTS (FROM images i WHERE i.uri = earlier.uri)
    AND NOT EXISTS (FROM images i WHERE i.uri = earlier.file)
    AND NOT EXISTS (FROM images i WHERE i.file = earlier.uri)
    UNION ALL SELECT uri, false FROM gone SEMI JOIN images USING (uri)
"""
TODO = """
    CREATE OR REPLACE TABLE images AS
    FROM images i WHERE NOT EXISTS (FROM earlier e WHERE same_model AND e.uri = i.uri AND e.etag = i.etag)
"""
COUNTS = """
    SELECT (SELECT count(*) FROM images), (SELECT count(*) FROM images SEMI JOIN earlier USING (uri)),
           (SELECT count(*) FROM images SEMI JOIN earlier USING (uri, etag)),
           count(*) FILTER (WHERE is_gone), count(*) FILTER (WHERE NOT is_gone) FROM noticed
"""


@dataclass(frozen=True)
class Earlier:
    """A run that was begun, and what it was to do."""

    run: Run
    contents: Contents
    is_finished: bool


@dataclass(frozen=True)
class Changes:
    """How many images there are to do, by why, and which are no longer there."""

    new: int
    changed: int  # known by URI, but with another etag
    other_model: int  # done, but by another model version
    gone: int  # noticed now
    back: int  # had gone, and are there again
    examples: tuple[str, ...]  # of those that have gone

    @property
    def todo(self) -> dict[str, int]:
        return {"new": self.new, "changed": self.changed, "other_model": self.other_model}

    def __str__(self) -> str:
        parts = {"new": self.new, "changed": self.changed, "done by another model": self.other_model}
        parts |= {"gone": self.gone, "there again": self.back}
        found = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
        named = ", ".join(self.examples) + (", ..." if self.gone > len(self.examples) else "")
        return (found or "nothing new") + (f" (gone: {named})" if self.gone else "")


def earlier_runs(output: Store) -> list[Earlier]:
    """Every run of the output that has a plan."""
    found = [(run, run.contents(), run.record() is not None) for run in runs(output)]
    return [Earlier(run, contents, is_finished) for run, contents, is_finished in found if contents]


def leave_out(tables: duckdb.DuckDBPyConnection, output: Store, origin: Origin, earlier: Sequence[Earlier]) -> Changes:
    """Take what an earlier run with the same model version has, or will have, out of the table `images`; say what is
    left, and what has gone. The latter is in the table `noticed`, for `note_deletions`.
    """
    tables.execute(EARLIER)
    for one in earlier:
        before = one.contents.origin
        same_model = before.model_version == origin.model_version
        same_collection = all(
            getattr(before, name) == getattr(origin, name) for name in ("input", "include", "exclude")
        )
        tables.register("planned", stored(output, one.contents.parts, PLANNED))
        tables.execute("INSERT INTO earlier SELECT *, ?, ? FROM planned", [same_model, same_collection])
    names = [f"{FOLDER}/{name}" for name in output.names(FOLDER)]
    tables.register("deletions", stored(output, names, DELETIONS))
    for query in (GONE, NOTICED, TODO):
        tables.execute(query)
    ((todo, known, same, gone, back),) = tables.sql(COUNTS).fetchall()
    tables.execute("DROP TABLE earlier")  # the plan wants its place on the disk
    examples = tables.table("noticed").filter("is_gone").order("uri").limit(NAMED).fetchall()
    return Changes(todo - known, known - same, same, gone, back, tuple(uri for uri, _ in examples))


def note_deletions(tables: duckdb.DuckDBPyConnection, output: Store) -> None:
    """Keep what was noticed, so that it is told once."""
    noticed = tables.sql("FROM noticed ORDER BY uri").to_arrow_table()
    if not len(noticed):
        return
    now = pa.repeat(pa.scalar(datetime.now(UTC), DELETIONS.field("noticed").type), len(noticed))
    data = write_sealed(
        noticed.append_column("noticed", now).cast(DELETIONS), compression="zstd", write_page_checksum=True
    )
    output.put(f"{FOLDER}/part-{len(output.names(FOLDER)):05d}.parquet", data, only_new=True)
