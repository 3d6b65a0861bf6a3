"""Which rows of an output are wanted, and their values: of each image the newest, or those of one run, with a mask.

SQL on the output's views chooses, and the choice lies in DuckDB, on the disk. Rows are then read where they are, some
of a shard at a time, so memory does not grow with the output.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from model.labels import LabelSet, label_set
from pipeline.attempts import reason
from pipeline.commit import Run, choose, runs
from pipeline.config import ConfigurationError
from pipeline.masks import read_palette
from pipeline.names import common_root, printable
from pipeline.query import make_views, root
from pipeline.storage import Store
from pipeline.views import in_pattern, sql_text

ROWS = 64  # that are in memory at once
BATCH_ROWS = 50_000  # of the choice, from DuckDB at once
# a run's rows by their place: its images have one each, so URI and run are a key
CHOOSE = """
    CREATE OR REPLACE TABLE chosen AS
    SELECT run_id AS run, regexp_extract(filename, 'shard-(\\d+)\\.parquet$', 1)::INTEGER AS shard,
           file_row_number::INTEGER AS row, uri, bytes, format, width::BIGINT * height AS pixels, 0 AS part,
           row_number() OVER (ORDER BY uri) AS number
    FROM read_parquet('{root}/segments/*/*.parquet', filename = true, file_row_number = true)
    SEMI JOIN (SELECT uri, run_id FROM (FROM {view} WHERE status = 'ok')
               WHERE ({where}
               ) ORDER BY uri LIMIT {limit}) wanted USING (uri, run_id)
"""
OF_RUN = "CREATE OR REPLACE VIEW of_run AS FROM segments WHERE run_id = {run}"
SUMMARY = "SELECT count(*), min(uri), max(uri), bit_xor(md5_number(concat_ws(' ', run, shard, row))) FROM chosen"
PLACES = "SELECT run, shard, row, number, part FROM chosen ORDER BY run, shard, row"
ALL = 1 << 62  # rows
NEVER_BEGUN = (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException)  # errors of the SQL itself


@dataclass(frozen=True)
class Wanted:
    """What is asked for: rows of one run instead of the newest of each image; those for which an SQL condition on the
    columns of `current` is true; the first so many by URI.
    """

    run_id: str | None = None
    where: str | None = None
    limit: int | None = None


class Place(NamedTuple):
    """Where a row is, counted from 0; `number` is that of its URI among all that are chosen, from 1."""

    run: str
    shard: int
    row: int
    number: int
    part: int  # of what is made of it, where that is in parts


@dataclass(frozen=True)
class Chosen:
    """A row and its place."""

    place: Place
    values: dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """The rows that were chosen, in the table `chosen` of `tables`."""

    tables: duckdb.DuckDBPyConnection
    output: Store
    images: int
    root: str  # of their URIs
    digest: str  # of their places
    records: dict[str, dict[str, Any]]  # of their runs, by id

    @property
    def labels(self) -> list[str]:
        """The names of the classes, by id."""
        return next(iter(self.records.values()))["labels"]

    @property
    def models(self) -> list[str]:
        """The versions of the models that made the masks."""
        return sorted({record["model_version"] for record in self.records.values()})

    def label_set(self) -> LabelSet:
        """The classes, with the colours that the masks themselves have."""
        first = next(self.rows(["mask"]))
        return label_set(self.labels, read_palette(first.values["mask"], len(self.labels)))

    def shards(self) -> Iterator[list[Place]]:
        """The places of the rows that are chosen of a shard, for each that has any, in order."""
        found = self.tables.cursor().sql(PLACES).to_arrow_reader(BATCH_ROWS)
        some = (batch.slice(start, ROWS) for batch in found for start in range(0, len(batch), ROWS))
        places = (Place(*row) for rows in some for row in zip(*(column.to_pylist() for column in rows), strict=True))
        for _, of_shard in groupby(places, lambda place: place[:2]):
            yield list(of_shard)

    def rows(self, columns: list[str]) -> Iterator[Chosen]:
        """Every row, with these columns, in the order of `shards`. Raises OSError where a shard is damaged."""
        for places in self.shards():
            yield from read(self.output, places, columns)


def read(output: Store, places: list[Place], columns: list[str] | None = None) -> Iterator[Chosen]:
    """The rows at these places, which are in order and of one shard, with all columns or these."""
    run, shard = Run(output, places[0].run), places[0].shard
    with opened(run, shard) as file:
        coming, first = iter(places), 0
        place: Place | None = next(coming)
        for batch in file.iter_batches(ROWS, columns=columns):
            here = []
            while place and place.row < first + len(batch):
                here.append(place)
                place = next(coming, None)
            taken = batch.take(pa.array([one.row - first for one in here], pa.int64())).to_pylist()
            yield from map(Chosen, here, taken)
            first += len(batch)
            if not place:
                break


@contextlib.contextmanager
def opened(run: Run, shard: int) -> Iterator[pq.ParquetFile]:
    """A shard's rows. Raises OSError that says so where it turns out to be damaged, and what the store raises."""
    source = run.store.open(run.shard_name(shard))
    try:
        yield pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        if source.failure:
            raise source.failure from None
        raise OSError(f"{run.shard_name(shard)} is damaged ({reason(error)}); see swath verify") from None


def select(tables: duckdb.DuckDBPyConnection, output: Store, wanted: Wanted) -> Selection:
    """Choose, in an empty workspace. Raises `ConfigurationError` where that leaves nothing, or not one label set."""
    view = "current" if wanted.run_id is None else "of_run"
    try:
        make_views(tables, output)
        if wanted.run_id is not None:
            tables.execute(OF_RUN.format(run=sql_text(wanted.run_id)))
    except duckdb.Error as error:
        raise unreadable(output, error) from None
    records = finished_records(output, wanted.run_id)
    choose_rows(tables, output, view, wanted)
    ((images, first, last, digest),) = tables.execute(SUMMARY).fetchall()
    if not images:
        asked = f" where {wanted.where}" if wanted.where else ""
        raise ConfigurationError(f"{output.url}: no image has a mask{asked}; swath status says what became of them")
    used = sorted(run for (run,) in tables.execute("SELECT DISTINCT run FROM chosen").fetchall())
    for run in used[1:]:
        if records[run]["labels"] != records[used[0]]["labels"]:
            raise ConfigurationError(
                f"{output.url}: runs {used[0]} and {run} have other labels, so their masks mean other things; "
                f"choose one with --run-id"
            )
    kept = {run: records[run] for run in used}
    return Selection(tables, output, images, common_root(first, last), f"{digest % (1 << 128):032x}", kept)


def choose_rows(tables: duckdb.DuckDBPyConnection, output: Store, view: str, wanted: Wanted) -> None:
    """Fill the table `chosen`. Raises `ConfigurationError` for a condition that fails, OSError for what is damaged.

    DuckDB's errors do not tell one from the other, so what can be chosen without the condition is not damaged.
    """
    where = wanted.where or "true"
    limit = ALL if wanted.limit is None else wanted.limit
    try:
        tables.execute(CHOOSE.format(root=in_pattern(root(output)), view=view, where=where, limit=limit))
    except duckdb.Error as error:
        if not wanted.where:
            raise unreadable(output, error) from None
        if not isinstance(error, NEVER_BEGUN):
            choose_rows(tables, output, view, replace(wanted, where=None))
        raise ConfigurationError(f"where {wanted.where!r}: {one_line(error)}") from None


def unreadable(output: Store, error: duckdb.Error) -> OSError:
    return OSError(f"{output.url} cannot be read ({one_line(error)}); see swath verify")


def one_line(error: duckdb.Error) -> str:
    """What DuckDB says first; where it tells of an error in Python, as the store's are, that without where it was."""
    first, *others = printable(str(error).strip()).splitlines()
    if not first.startswith("Traceback"):
        return first
    return next((line for line in others if line and not line[0].isspace()), first)


def finished_records(output: Store, run_id: str | None) -> dict[str, dict[str, Any]]:
    """The records of the runs that rows may come from. Raises `ConfigurationError` where there are none."""
    asked = runs(output) if run_id is None else [choose(f"{output.url.rstrip('/')}/runs/{run_id}", output.settings)]
    records = {run.id: record for run in asked if (record := run.record())}
    if not records:
        which = "no run is finished" if run_id is None else f"run {run_id} is not finished"
        raise ConfigurationError(f"{output.url}: {which}; swath status says how to go on")
    return records
