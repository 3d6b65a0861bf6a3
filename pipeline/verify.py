"""The proof of an output: nothing lost, nothing twice, nothing damaged.

Every file is read and compared with what was put after it: shards with their own seals, their plan, their masks and the
run record; plans with the digest in their names; records with their seals; runs with each other and with the index.
Larger outputs are proven by all machines of a cluster, and what is compared over all rows lies in DuckDB, on the disk.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipeline import changes, index, schema
from pipeline.attempts import reason
from pipeline.commit import DIGEST, Contents, Run, runs
from pipeline.config import ConfigurationError, VerifySettings
from pipeline.plan import PART_SHARDS
from pipeline.proof import FINDINGS, KEYS, SUMMED, Facts, Findings, Proof, Shards
from pipeline.seal import SealError, check_parquet, check_record
from pipeline.status import how_to_go_on
from pipeline.storage import Store
from pipeline.tables import make_room, workspace
from pipeline.totals import Totals, add

SPREAD = 20_000  # images from which on all machines of a cluster share the work
CHUNK = 2_048  # images that one of them gets at once
MOST = 1 << 31  # images in a shard that can be believed
SCHEMA = """
    CREATE TABLE runs (run VARCHAR, version VARCHAR, retries VARCHAR, is_finished BOOLEAN);
    CREATE TABLE rows (run VARCHAR, uri VARCHAR, etag VARCHAR, is_ok BOOLEAN);
    CREATE TABLE indexed (uri VARCHAR, etag VARCHAR, object VARCHAR, is_image BOOLEAN, part INTEGER);
    CREATE TABLE returned (run VARCHAR, uri VARCHAR)
"""
LOGS = {
    changes.GONE_FOLDER: ("deletion parts", changes.DELETIONS),
    changes.BACK_FOLDER: ("return parts", changes.RETURNS),
}
INDEXED = """
    INSERT INTO indexed SELECT uri, etag, coalesce(file, uri),
        file IS NOT NULL OR format IS NULL OR format NOT IN ('tar', 'parquet') OR error IS NOT NULL, ? FROM page
"""
TWICE = """
    SELECT uri, concat(count(*), ' rows of model ', version, ' for this image, in ', min(run), ' and ', max(run))
    FROM rows JOIN runs USING (run) GROUP BY uri, etag, version, CASE WHEN retries = '' THEN '' ELSE run END
    HAVING count(*) > 1
"""
# what a run did again must have failed in the run that it says
AGAIN = """
    SELECT r.uri, concat('done again by run ', r.run, ', but it has not failed in run ', retries)
    FROM rows r JOIN runs USING (run) ANTI JOIN (SELECT run AS retries, uri, etag FROM rows WHERE is_ok IS NOT TRUE) o
    ON runs.retries = o.retries AND r.uri = o.uri AND r.etag = o.etag WHERE runs.retries != ''
"""
RETURNED = """
    SELECT DISTINCT uri, concat('has returned to its row in run ', run, ', where there is none')
    FROM returned ANTI JOIN rows USING (run, uri)
"""
# of an object that the index has in several versions, the one that was seen last counts
LOST = """
    SELECT i.uri, 'indexed, but has no row in a finished run: swath segment does it, unless it was left out or is gone'
    FROM (SELECT DISTINCT uri, etag FROM indexed JOIN
          (SELECT object, max(part) AS part FROM indexed GROUP BY 1) USING (object, part) WHERE is_image) i
    ANTI JOIN (SELECT uri, etag FROM rows JOIN runs USING (run) WHERE is_finished) r USING (uri, etag)
"""
MASKS = """
    SELECT uri, concat(count(*), ' masks of model ', version, ' for this image, in ', min(run), ' and ', max(run))
    FROM rows JOIN runs USING (run) WHERE is_ok GROUP BY uri, etag, version
    HAVING count(*) > 1 AND count(DISTINCT retries) > 1 AND bool_and(retries != '')
"""
RULES = (TWICE, AGAIN, MASKS, RETURNED, LOST)

Work = Callable[[list[tuple[str, int]]], list[Proof]]
Spread = Callable[[Work, Iterator[list[tuple[str, int]]]], Iterator[list[Proof]]]


class Progress(Protocol):
    """Whoever watches."""

    def verifying(self, done: int, total: int) -> None:
        """Images whose shards are read, of all that are to be."""


@dataclass(frozen=True)
class Report:
    """What was read, by kind, and what is wrong with it."""

    checked: dict[str, int]
    findings: Findings


def verify(settings: VerifySettings, progress: Progress, spread: Spread) -> Report:
    """Read the whole output and prove it. `spread` has many machines do it where it is large.

    What is damaged is a finding. Raises `ConfigurationError` where there is no output, or it may not be listed.
    """
    output = Store(settings.output, settings)
    found, parts = runs(output), [name for name in output.names("index") if name.endswith(".parquet")]
    if not found and not parts:
        raise ConfigurationError(f"{output.url}: neither runs nor an index are here; give the OUTPUT of swath segment")
    report = Report(defaultdict(int), Findings())
    with workspace() as space:
        space.tables.execute(SCHEMA)
        logs = {folder: changes.log_parts(output, folder) for folder in LOGS}
        for folder, names in {"index": [f"index/{name}" for name in parts], **logs}.items():
            for name in sorted({f"{folder}/part-{number:05d}.parquet" for number in range(len(names))} - set(names)):
                report.findings.add(name, "is not there, but later ones are")
        if found and not parts:
            report.findings.add("index", "is not there, but runs were planned from it: swath index makes it again")
        for number, name in enumerate(parts):
            read_index_part(output, f"index/{name}", number, space.tables, report)
        for folder, names in logs.items():
            for name in names:
                read_log_part(output, name, folder, space.tables, report)
        known = {run.id: facts for run in found if (facts := check_run(run, report))}
        shards = check_folders(output, known, report.findings)
        prove_shards(settings, known, shards, space.tables, progress, spread, report)
        compare(space.tables, known, report.findings)
    return report


def read_index_part(output: Store, name: str, number: int, tables: duckdb.DuckDBPyConnection, report: Report) -> None:
    """Check a part of the index, and add its images to the table `indexed`."""
    report.checked["index parts"] += 1
    page = read_part(output, name, index.SCHEMA, report.findings)
    if page is None:
        return
    report.checked["indexed images"] += len(page)
    make_room(tables, report.checked["indexed images"])
    tables.register("page", page)
    tables.execute(INDEXED, [number])


def read_log_part(output: Store, name: str, folder: str, tables: duckdb.DuckDBPyConnection, report: Report) -> None:
    """Check a part of a log of changes; which runs have the rows of what has returned is in the table `returned`."""
    kind, columns = LOGS[folder]
    report.checked[kind] += 1
    page = read_part(output, name, columns, report.findings)
    if page is not None and folder == changes.BACK_FOLDER:
        tables.register("page", page)
        tables.execute("INSERT INTO returned SELECT run_id, uri FROM page")


def read_part(output: Store, name: str, columns: pa.Schema, findings: Findings) -> pa.Table | None:
    """The table of an object; None where something is wrong with it."""
    try:
        data = output.read(name)
        check_parquet(data)
        page = pq.read_table(pa.BufferReader(data))
        page.validate(full=True)
    except SealError as error:
        findings.add(name, str(error))
        return None
    except Exception as error:  # whatever a file of that name may hold
        findings.add(name, unreadable(error))
        return None
    if not page.schema.equals(columns):
        findings.add(name, f"its columns are not those of the {name.partition('/')[0]}")
        return None
    return page


def unreadable(error: Exception) -> str:
    return f"cannot be read ({type(error).__name__}: {reason(error)})"


def check_run(run: Run, report: Report) -> Facts | None:
    """Check the plan of a run and the record that ends it; None where nothing is planned, or nobody knows what."""
    findings = report.findings
    names = run.store.names(f"runs/{run.id}")
    is_finished = "run.json" in names
    if "plan.json" not in names:  # of a driver that was stopped before it had a plan there is nothing to do
        if is_finished or run.store.names(run.folder):
            findings.add(run.plan_name, "is not there")
        return None
    report.checked["runs"] += 1
    contents = read_plan(run, findings)
    record = read_record(run, findings) if is_finished else None
    if not contents:
        return None
    if not is_finished:
        findings.add(f"run {run.id}", f"is not finished; to go on: {how_to_go_on(run, contents)}")
    return Facts(
        id=run.id,
        model_version=contents.origin.model_version,
        retries=contents.origin.retries,
        is_finished=is_finished,
        images=contents.images,
        plan_is_whole=check_plan(run, contents, report),
        labels=check_record_alone(run, contents, record, findings) if record else None,
    )


def read_plan(run: Run, findings: Findings) -> Contents | None:
    """What `plan.json` says, if that is of the right kind."""
    try:
        contents = TypeAdapter(Contents).validate_json(run.store.read(run.plan_name), strict=True)
    except Exception as error:  # whatever a file of that name may hold
        findings.add(run.plan_name, unreadable(error))
        return None
    is_counted = all(0 < images < MOST for images in contents.images)
    if not contents.images or len(contents.work) != len(contents.images) or not is_counted:
        findings.add(run.plan_name, "its counts are not those of shards")
        return None
    return contents


def check_plan(run: Run, contents: Contents, report: Report) -> bool:
    """Whether the plan's files have the digest that is in their names."""
    report.checked["plan files"] += len(contents.parts)
    found = hashlib.sha256()
    count = -(-len(contents.images) // PART_SHARDS)
    names = [f"runs/{run.id}/plan-{{}}-{number:05d}.parquet" for number in range(count)]
    digest = contents.parts[0].rpartition("-")[0].rpartition("-")[2] if contents.parts else ""
    if contents.parts != [name.format(digest) for name in names]:
        report.findings.add(run.plan_name, "its files are not those of a plan of this run")
        return False
    for name in contents.parts:
        try:
            found.update(hashlib.sha256(run.store.read(name)).digest())
        except Exception as error:
            report.findings.add(name, unreadable(error))
            return False
    if found.hexdigest()[:DIGEST] != digest:
        report.findings.add(run.plan_name, "its files do not have the digest that is in their names")
        return False
    return True


def read_record(run: Run, findings: Findings) -> dict[str, Any] | None:
    """The run record, if it is what was sealed."""
    try:
        record = json.loads(run.store.read(run.record_name))
        if not isinstance(record, dict):
            raise SealError("is no record")
        check_record(record)
    except SealError as error:
        findings.add(run.record_name, str(error))
        return None
    except Exception as error:  # whatever a file of that name may hold
        findings.add(run.record_name, unreadable(error))
        return None
    return record


def check_record_alone(
    run: Run, contents: Contents, record: dict[str, Any], findings: Findings
) -> tuple[str, ...] | None:
    """Compare the record with the plan; its labels."""
    origin, settings, labels = contents.origin, record.get("settings"), record.get("labels")
    expected = {
        "schema": schema.VERSION,
        "run_id": run.id,
        "input": list(origin.input),
        "model_version": origin.model_version,
        "retries": origin.retries,
        "images": sum(contents.images),
        "files": [run.shard_name(shard) for shard in range(len(contents.images))],
        "plan_sha256": run.plan_digest(),
    }
    for name, value in expected.items():
        if record.get(name) != value:
            findings.add(run.record_name, f"its {name} is not that of the plan")
    if not isinstance(settings, dict) or settings.get("policy") != origin.policy:
        findings.add(run.record_name, "its policy is not that of the plan")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        findings.add(run.record_name, "its labels are no names")
        return None
    return tuple(labels)


def check_folders(output: Store, known: dict[str, Facts], findings: Findings) -> dict[str, list[int]]:
    """The shards of each run that are there. What is missing, or is there besides, is a finding.

    Hidden files are left alone, as readers leave them: a process that was killed leaves what it was writing.
    """
    there = {}
    for name in output.names("segments"):
        if name.startswith("run=") and name.removeprefix("run=") in known:
            continue
        if not name.startswith("."):
            findings.add(f"segments/{name}", "belongs to no run whose plan can be read")
    for run in (Run(output, run_id) for run_id in known):
        facts = known[run.id]
        expected = {run.shard_name(shard).rpartition("/")[2]: shard for shard in range(len(facts.images))}
        names = set(output.names(run.folder))
        for name in sorted(names - set(expected)):
            if not name.startswith("."):
                findings.add(f"{run.folder}/{name}", "is no shard of the plan")
        if facts.is_finished:
            for name in sorted(set(expected) - names):
                findings.add(
                    f"{run.folder}/{name}",
                    f"is not there, but the run is finished: swath segment does it with --run-id {run.id}",
                )
        there[run.id] = [shard for name, shard in expected.items() if name in names]
    return there


def prove_shards(
    settings: VerifySettings,
    known: dict[str, Facts],
    shards: dict[str, list[int]],
    tables: duckdb.DuckDBPyConnection,
    progress: Progress,
    spread: Spread,
    report: Report,
) -> None:
    """Prove every shard, keep its rows' keys in the table `rows`, and compare what runs have with their records."""
    total = sum(known[run].images[shard] for run in shards for shard in shards[run])
    make_room(tables, total + report.checked["indexed images"])
    is_large = total >= SPREAD or settings.ray_address is not None
    chunks = in_chunks(known, shards, CHUNK if is_large else 1)
    sums: dict[str, Totals] = {run: Totals() for run in known if len(shards[run]) == len(known[run].images)}
    done = 0
    for proofs in (spread if is_large else here)(Shards(settings, known), chunks):
        for proof in proofs:
            done += proof.images
            report.findings.take(proof.findings)
            report.checked["shards"] += 1
            if not proof.totals:
                sums.pop(proof.run, None)
                continue
            report.checked["rows"] += proof.totals.images
            report.checked["masks"] += proof.totals.statuses.get("ok", 0)
            report.checked["mask pixels"] += proof.totals.pixels
            if proof.run in sums:
                sums[proof.run] = add([sums[proof.run], proof.totals])
        tables.register("page", pa.concat_tables([KEYS.empty_table(), *(proof.keys for proof in proofs)]))
        tables.execute("INSERT INTO rows FROM page")
        progress.verifying(done, total)
    output = Store(settings.output, settings)
    for run_id, totals in sums.items():
        if known[run_id].labels is not None:
            compare_record(Run(output, run_id), totals, report.findings)


def in_chunks(known: dict[str, Facts], shards: dict[str, list[int]], size: int) -> Iterator[list[tuple[str, int]]]:
    """(run, shard) of every shard, in groups of about `size` images."""
    chunk: list[tuple[str, int]] = []
    images = 0
    for run, there in shards.items():
        for shard in there:
            chunk.append((run, shard))
            images += known[run].images[shard]
            if images >= size:
                yield chunk
                chunk, images = [], 0
    if chunk:
        yield chunk


def here(work: Work, chunks: Iterator[list[tuple[str, int]]]) -> Iterator[list[Proof]]:
    """Without Ray, whose start takes longer than a small output."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(work, chunks)


def compare_record(run: Run, totals: Totals, findings: Findings) -> None:
    """Compare a record, whose seal is whole, with the sum of its shards."""
    record, found = run.record() or {}, asdict(totals)
    for part in SUMMED:
        told, value = record.get(part), found[part]
        if part == "reasons":  # which of them are told apart depends on the order of the sum
            told, value = by_status(told), by_status(value)
        if told != value:
            findings.add(run.record_name, f"its {part} are not the sum of its shards: {told}, not {value}")


def by_status(reasons: Any) -> dict[str, int] | None:
    if not isinstance(reasons, dict) or not all(isinstance(images, int) for images in reasons.values()):
        return None
    found = Counter[str]()
    for words, images in reasons.items():
        found[words.partition(":")[0]] += images
    return dict(found)


def compare(tables: duckdb.DuckDBPyConnection, known: dict[str, Facts], findings: Findings) -> None:
    """What is true of all rows together: each image of the index has one, and none has two."""
    for facts in known.values():
        values = [facts.id, facts.model_version, facts.retries, facts.is_finished]
        tables.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", values)
    open_runs = [facts for facts in known.values() if not facts.is_finished]  # which will do what seems lost
    for rule in RULES[:-1] if open_runs else RULES:
        tables.execute(f"CREATE OR REPLACE TABLE broken AS SELECT * FROM ({rule}) AS t(uri, what)")  # noqa: S608
        count = index.count(tables, "broken")
        for uri, what in tables.execute(f"FROM broken ORDER BY uri LIMIT {FINDINGS}").fetchall():
            findings.add(uri, what)
            count -= 1
        findings.count += count
