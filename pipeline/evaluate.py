"""How good an output is: its masks compared with ground truth, over as many images as there are.

Which image has which mask lies in DuckDB, on the disk. Images are compared a part of a shard at a time, here or on all
machines of a cluster; what they add up to has a constant size, and its sums are exact, so that the result is the same
to the last bit however many machines there were.

    evaluations/<name>/images/part-<n>.parquet    a row an image, or a mask of ground truth that belongs to none
    evaluations/<name>/classes.parquet            a row a class
    evaluations/<name>/confusion.png              which class is taken for which
    evaluations/<name>/evaluation.json            all numbers and how they came about; put last

The name follows from what is compared, so that the same command replaces what an earlier one has left.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from model.scores import Scores
from pipeline.compare import IMAGES, Compared, Comparison, Pair
from pipeline.config import ConfigurationError
from pipeline.config_truth import EvaluateSettings
from pipeline.evaluation import Folder, Parts, default_name, described
from pipeline.filesystems import public_url
from pipeline.meanings import counted_as, evaluated_classes, rules_for
from pipeline.pairs import FILES, name_images, pair, require_some
from pipeline.selection import BATCH_ROWS, Place, Selection, Wanted, one_line, select
from pipeline.storage import Store
from pipeline.tables import workspace

SPREAD = 20_000  # images from which on all machines of a cluster share the work
NAMED = 20  # images or masks of each kind that are told of by name; all are counted, and have a row
OF_IMAGES = ("no_truth", "no_mask", "ambiguous")  # statuses that tell of an image, the others of a mask
ROWS = """
    CREATE OR REPLACE TABLE evaluated AS SELECT uri, etag, run_id, status, error FROM {view} WHERE ({where}
    )
"""
WORK = """
    CREATE OR REPLACE TABLE work AS
    SELECT c.run, c.shard, c.row, {columns} FROM pairs p JOIN chosen c ON c.uri = p.image
    JOIN (SELECT DISTINCT ON (uri) * FROM masks ORDER BY uri) m ON m.uri = p.mask WHERE p.status = 'paired'
"""
LEFT_OUT = """
    SELECT e.uri, etag, run_id, if(e.status = 'ok', p.status, 'no_mask') AS status,
        if(e.status = 'ok', p.error, concat_ws(': ', e.status, e.error)) AS error, mask AS truth
    FROM evaluated e JOIN pairs p ON p.image = e.uri WHERE e.status <> 'ok' OR p.status <> 'paired'
    UNION ALL SELECT NULL, NULL, NULL, status, error, mask FROM pairs WHERE image IS NULL
    ORDER BY ALL
"""

Work = Callable[[list[Pair]], Compared]
Spread = Callable[[Work, Iterator[list[Pair]]], Iterator[Compared]]


class Progress(Protocol):
    """Whoever watches."""

    def listing(self, found: int) -> None:
        """Masks of ground truth that are found so far."""

    def evaluating(self, done: int, total: int) -> None:
        """Images that are compared, of all that have a mask of ground truth."""


@dataclass
class LeftOut:
    """What was not compared, by status: how much, and the first of it by name, with why."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def take(self, rows: pa.Table) -> None:
        """Add those rows (IMAGES) that were not."""
        for row in rows.filter(pc.not_equal(rows["status"], "ok")).to_pylist():
            self.counts[row["status"]] += 1
            named = self.first.setdefault(row["status"], [])
            if len(named) < NAMED:
                where = row["uri"] if row["status"] in OF_IMAGES else row["truth"]
                named.append(": ".join(filter(None, [where, row["error"]])))


@dataclass(frozen=True)
class Evaluation:
    """What came of it."""

    url: str
    record: dict[str, Any]  # evaluation.json
    left_out: LeftOut
    skipped: Counter[str]  # files in TRUTH that are no masks, by why


def evaluate(settings: EvaluateSettings, progress: Progress, spread: Spread) -> Evaluation:
    """Compare the masks of an output with ground truth, and put the result beside its runs. `spread` has many machines
    do it where there is much.

    Raises `ConfigurationError` where nothing can be compared, before any work if that can be known, and what the store
    raises.
    """
    output = Store(settings.output, settings)
    with workspace() as space:
        selection = select(space.tables, output, Wanted(settings.run_id, settings.where))
        labels = selection.label_set()
        names = evaluated_classes(settings, labels)
        classes, rules = counted_as(settings, labels, names), rules_for(settings, labels, names)
        comparison = Comparison(settings, settings.output, "", names, classes, rules)
        folder = Folder(output, settings.name or default_name(settings, selection, comparison))
        folder.prepare(settings, selection, comparison)
        skipped = find_pairs(space.tables, selection, settings, progress)
        parts, left_out = Parts(space.folder), LeftOut()
        work = Comparison(settings, settings.output, folder.name, names, classes, rules)
        scores = compare_all(space.tables, work, parts, left_out, progress, spread)
        if not scores.images + scores.ignored:
            raise ConfigurationError(nothing_compared(settings, left_out))
        add_left_out(space.tables, folder.name, parts, left_out)
        record = described(settings, selection, work, scores)
        record |= {"left_out": dict(left_out.counts), "first_left_out": left_out.first, "skipped": dict(skipped)}
        folder.put(record, scores, names, parts.written())
    return Evaluation(folder.url, record, left_out, skipped)


def find_pairs(
    tables: duckdb.DuckDBPyConnection, selection: Selection, settings: EvaluateSettings, progress: Progress
) -> Counter[str]:
    """Fill the tables `evaluated`, all rows of the output that are asked for, and `work`, those that can be compared;
    what in TRUTH is no mask, by why. Raises `ConfigurationError` where there is nothing to compare.
    """
    view = "current" if settings.run_id is None else "of_run"
    try:
        tables.execute(ROWS.format(view=view, where=settings.where or "true"))
    except duckdb.Error as error:  # of rows that have no mask, as the others were asked before
        raise ConfigurationError(f"where {settings.where!r}: {one_line(error)}") from None
    inputs = {url for record in selection.records.values() for url in record["input"]}
    # all images, also where few are asked for: names do not depend on that, nor does which mask is nobody's
    asked = f"SELECT uri, uri IN (SELECT uri FROM evaluated) AS asked FROM {view}"  # noqa: S608
    name_images(tables, asked, sorted(inputs), settings)
    output = Store(settings.output, settings)
    skipped = pair(tables, settings.truth, settings, settings, progress.listing, output)
    require_some(tables, settings.output, settings.truth)
    tables.execute(WORK.format(columns=", ".join(f"m.{name}" for name in FILES.names)))
    return skipped


def compare_all(
    tables: duckdb.DuckDBPyConnection,
    comparison: Comparison,
    parts: Parts,
    left_out: LeftOut,
    progress: Progress,
    spread: Spread,
) -> Scores:
    """The scores of all pairs in the table `work`; their rows go to `parts`."""
    total, done = tables.table("work").count("*").fetchall()[0][0], 0
    is_large = total >= SPREAD or comparison.storage.ray_address is not None
    scores = Scores.empty(len(comparison.names))
    for compared in (spread if is_large else here)(comparison, shards(tables)):
        scores.merge(compared.scores)
        parts.add(compared.rows)
        left_out.take(compared.rows)
        done += len(compared.rows)
        progress.evaluating(done, total)
    return scores


def shards(tables: duckdb.DuckDBPyConnection) -> Iterator[list[Pair]]:
    """The pairs of each shard, in order."""
    found = tables.cursor().sql("FROM work ORDER BY run, shard, row").to_arrow_reader(BATCH_ROWS)
    rows = (row for batch in found for row in batch.to_pylist())
    for _, of_shard in groupby(rows, lambda row: (row["run"], row["shard"])):
        yield [
            Pair(Place(row["run"], row["shard"], row["row"], 0, 0), {name: row[name] for name in FILES.names})
            for row in of_shard
        ]


def here(work: Work, chunks: Iterator[list[Pair]]) -> Iterator[Compared]:
    """Without Ray, whose start takes longer than a small output."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(work, chunks)


def add_left_out(tables: duckdb.DuckDBPyConnection, name: str, parts: Parts, left_out: LeftOut) -> None:
    """Add the rows of what could not even be tried."""
    for batch in tables.sql(LEFT_OUT).to_arrow_reader(BATCH_ROWS):
        given = {column: batch[column] for column in batch.schema.names} | {"evaluation": pa.repeat(name, len(batch))}
        missing = {column.name: pa.nulls(len(batch), column.type) for column in IMAGES}
        rows = pa.table([(missing | given)[column] for column in IMAGES.names], schema=IMAGES)
        parts.add(rows)
        left_out.take(rows)


def nothing_compared(settings: EvaluateSettings, left_out: LeftOut) -> str:
    """Why none of the pairs could be compared: of each kind the first."""
    kinds = [f"{count:,} {status}, such as {left_out.first[status][0]}" for status, count in left_out.counts.items()]
    return f"no mask of {public_url(settings.output)} can be compared with {public_url(settings.truth)}: " + "; ".join(
        kinds
    )
