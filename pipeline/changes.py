"""What has changed in a collection since earlier runs: images that are new, are others now, have gone or have returned.

Earlier runs are known by their plans: an image in one has a row, or will have one when its run goes on. What rows do
not say is kept in the output in two logs, each night one more part, and the newest word on a URI counts. Rows stay
where they are.

    deletions/part-<n>.parquet    images that have gone, or are there again
    returns/part-<n>.parquet      images whose row is an older one again: the run that has it

Only an image that a run over the same INPUT has planned can go: of another collection in the same output a listing says
nothing. An image returns when a version of it that was done before is put back, or a model that was used before: it has
its row, and gets no second one, but a newer row of another version or model would be taken for its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

import duckdb
import pyarrow as pa

from pipeline.commit import Contents, Run, runs
from pipeline.plan import SCHEMA as PLAN_SCHEMA
from pipeline.plan import Origin
from pipeline.seal import write_sealed
from pipeline.storage import Store
from pipeline.tables import stored

NAMED = 3  # of the images that have gone, in a message
BATCH, BATCHES = 100_000, 10  # rows from DuckDB at once, and how often that in one part of a log: 100 MB at most
PLANNED = pa.schema([PLAN_SCHEMA.field(name) for name in ("uri", "etag", "file")])
TIME = pa.timestamp("us", "UTC")
GONE_FOLDER = "deletions"
DELETIONS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("is_gone", pa.bool_(), nullable=False, metadata={"note": "false: it is there again"}),
        pa.field("noticed", TIME, nullable=False),
    ]
)
BACK_FOLDER = "returns"
RETURNS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False, metadata={"note": "whose row is the image's from now on"}),
        pa.field("noticed", TIME, nullable=False),
    ]
)
FINISHED = pa.schema([("run_id", pa.string()), ("finished", TIME), ("place", pa.int32())])
# place: of its run among the finished ones, by time; null: not finished
EARLIER = """
    CREATE TABLE earlier
    (uri VARCHAR, etag VARCHAR, file VARCHAR, same_model BOOLEAN, same_collection BOOLEAN, place INTEGER)
"""
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
# of each URI the run it returned to last, and its place: after the runs that were finished by then; no aggregate of
# texts, and one large join a statement, as DuckDB does not put more than that on the disk
LATEST = "CREATE TABLE latest AS SELECT uri, max(noticed) AS noticed FROM log GROUP BY uri"
BEFORE = """
    CREATE TABLE before AS
    SELECT uri, f.place AS place, (SELECT max(place) FROM finished WHERE finished <= noticed) + 0.5 AS since
    FROM log SEMI JOIN latest USING (uri, noticed) JOIN finished f USING (run_id)
"""
# only what more than one run has can be another row's than the newest: nothing of the largest run alone is held
SEVERAL = "CREATE TABLE several AS SELECT DISTINCT uri FROM earlier WHERE place != {largest}"
ROWS = """
    CREATE TABLE rows AS SELECT uri, etag, same_model, place FROM earlier SEMI JOIN several USING (uri)
    WHERE place IS NOT NULL
"""
CHOICES = """
    CREATE TABLE choices AS
    SELECT r.uri, r.place, r.same_model AND r.etag = i.etag AS is_same FROM rows r JOIN images i ON i.uri = r.uri
"""
RETURNED = """
    CREATE TABLE returned AS
    SELECT uri, run_id FROM (
        SELECT c.uri, max(c.place) FILTER (WHERE is_same) AS place,
            max_by(is_same, coalesce(since, c.place)) AS is_current
        FROM choices c LEFT JOIN before b ON b.uri = c.uri AND b.place = c.place GROUP BY c.uri)
    JOIN finished USING (place) WHERE NOT is_current
"""
TODO = """
    CREATE OR REPLACE TABLE images AS
    FROM images i WHERE NOT EXISTS (FROM earlier e WHERE same_model AND e.uri = i.uri AND e.etag = i.etag)
"""
COUNTS = """
    SELECT (SELECT count(*) FROM images), (SELECT count(*) FROM images SEMI JOIN earlier USING (uri)),
           (SELECT count(*) FROM images SEMI JOIN earlier USING (uri, etag)),
           count(*) FILTER (WHERE is_gone), count(*) FILTER (WHERE NOT is_gone), (SELECT count(*) FROM returned)
    FROM noticed
"""


@dataclass(frozen=True)
class Earlier:
    """A run that was begun, and what it was to do."""

    run: Run
    contents: Contents
    finished: datetime | None

    @property
    def is_finished(self) -> bool:
        return self.finished is not None


@dataclass(frozen=True)
class Changes:
    """How many images there are to do, by why, and of which others something is to be told."""

    new: int
    changed: int  # known by URI, but with another etag
    other_model: int  # done, but by another model version
    gone: int  # noticed now
    back: int  # had gone, and are there again
    returned: int  # done already, but a newer row is another version's or model's
    examples: tuple[str, ...]  # of those that have gone

    @property
    def todo(self) -> dict[str, int]:
        return {"new": self.new, "changed": self.changed, "other_model": self.other_model}

    def __str__(self) -> str:
        parts = {"new": self.new, "changed": self.changed, "done by another model": self.other_model}
        parts |= {"gone": self.gone, "there again": self.back}
        parts |= {"returned to a version that was done before": self.returned}
        found = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
        named = ", ".join(self.examples) + (", ..." if self.gone > len(self.examples) else "")
        return (found or "nothing new") + (f" (gone: {named})" if self.gone else "")


def earlier_runs(output: Store) -> list[Earlier]:
    """Every run of the output that has a plan. Raises `ConfigurationError` where what one has put is damaged."""
    found = [(run, run.contents(), run.finished()) for run in runs(output)]
    return [Earlier(run, contents, finished) for run, contents, finished in found if contents]


def leave_out(tables: duckdb.DuckDBPyConnection, output: Store, origin: Origin, earlier: Sequence[Earlier]) -> Changes:
    """Take what an earlier run with the same model version has, or will have, out of the table `images`; say what is
    left, what has gone, and what has returned. The latter two are in the tables `noticed` and `returned`, for
    `note_changes`.
    """
    finished = sorted((one for one in earlier if one.finished), key=lambda one: (one.finished, one.run.id))
    places = {one.run.id: place for place, one in enumerate(finished, 1)}
    rows = [{"run_id": one.run.id, "finished": one.finished, "place": places[one.run.id]} for one in finished]
    tables.register("finished", pa.Table.from_pylist(rows, FINISHED))
    tables.execute(EARLIER)
    for one in earlier:
        before = one.contents.origin
        same_model = before.model_version == origin.model_version
        same_collection = all(
            getattr(before, name) == getattr(origin, name) for name in ("input", "include", "exclude")
        )
        tables.register("planned", stored(output, one.contents.parts, PLANNED))
        values = [same_model, same_collection, places.get(one.run.id)]
        tables.execute("INSERT INTO earlier SELECT *, ?, ?, ? FROM planned", values)
    tables.register("deletions", stored(output, log_parts(output, GONE_FOLDER), DELETIONS))
    tables.register("returns", stored(output, log_parts(output, BACK_FOLDER), RETURNS))
    tables.execute("CREATE TABLE log AS FROM returns")
    largest = max(finished, key=lambda one: sum(one.contents.images), default=None)
    several = SEVERAL.format(largest=places[largest.run.id] if largest else 0)
    for query in (GONE, NOTICED, LATEST, BEFORE, several, ROWS, CHOICES, RETURNED, TODO):
        tables.execute(query)
    ((todo, known, same, gone, back, returned),) = tables.sql(COUNTS).fetchall()
    tables.execute(
        "DROP TABLE earlier; DROP TABLE before; DROP TABLE several"
    )  # the plan wants their place on the disk
    examples = tables.table("noticed").filter("is_gone").order("uri").limit(NAMED).fetchall()
    return Changes(todo - known, known - same, same, gone, back, returned, tuple(uri for uri, _ in examples))


def note_changes(tables: duckdb.DuckDBPyConnection, output: Store) -> None:
    """Keep what was noticed, so that it is told once."""
    now = datetime.now(UTC)
    for folder, table, schema in ((GONE_FOLDER, "noticed", DELETIONS), (BACK_FOLDER, "returned", RETURNS)):
        batches = tables.sql(f"FROM {table} ORDER BY uri").to_arrow_reader(BATCH)
        while some := list(islice(batches, BATCHES)):
            page = pa.Table.from_batches(some)
            page = page.append_column("noticed", pa.repeat(pa.scalar(now, TIME), len(page))).cast(schema)
            data = write_sealed(page, compression="zstd", write_page_checksum=True)
            output.put(f"{folder}/part-{len(log_parts(output, folder)):05d}.parquet", data, only_new=True)


def log_parts(output: Store, folder: str) -> list[str]:
    """The parts of a log, without what a process that was killed was writing."""
    return [f"{folder}/{name}" for name in output.names(folder) if name.endswith(".parquet")]
