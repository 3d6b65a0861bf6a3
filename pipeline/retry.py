"""Another try of what failed: a new run over the images of a finished one whose status can change.

It is planned from the old run's plan and rows, not from the collection, and done with the settings that the old run's
record has, so its rows are of the same model version. The old rows stay; which run a run retries is in its plan.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from model.checkpoint import model_version
from pipeline.changes import PLANNED
from pipeline.cluster import check_network
from pipeline.commit import PlanFiles, Run, choose, runs
from pipeline.config import ConfigurationError, RetrySettings, SegmentSettings, WorkerSettings, build
from pipeline.plan import KEY, Plan, make_plan
from pipeline.plan import SCHEMA as PLAN_SCHEMA
from pipeline.policy import parse_policy
from pipeline.run import Listener, Result, check_engine, do_run, read_checkpoint
from pipeline.segment import Segmenter
from pipeline.status import how_to_go_on
from pipeline.tables import Workspace, stored

READERS = 16  # shards that are read at once
PASSING = ("failed", "missing")  # what may be otherwise the next time; an object that has changed is another image


def retry(settings: RetrySettings, listener: Listener) -> Result:
    """Do again what failed in a run, or go on doing so. Raises as `run.segment`."""
    run = choose(settings.run, settings)
    contents, record = run.contents(), run.record()
    if not contents:
        raise ConfigurationError(f"run {run.id} has no plan yet, so there is nothing to do again")
    if not record:
        go_on = how_to_go_on(run, contents)
        raise ConfigurationError(f"run {run.id} is not finished, so nothing is done again yet; finish it: {go_on}")
    check_network(settings)
    job = settings_of(run, record, settings)
    checkpoint = read_checkpoint(job)
    run.store.check_writable()
    check_engine(job, checkpoint)
    version = model_version(checkpoint.digest, job.mask_settings())
    if version != contents.origin.model_version:
        raise ConfigurationError(
            f"{job.checkpoint}: with it the model version is {version}, and that of run {run.id} is "
            f"{contents.origin.model_version}; give the weights that the run had with --checkpoint"
        )
    statuses = (*PASSING, "unreadable") if settings.unreadable else PASSING
    origin = replace(contents.origin, retries=run.id)
    new_plan = partial(plan_again, run, statuses, job, listener)
    result = do_run(job, checkpoint, run.store, origin, new_plan, listener, Segmenter)
    if not result.record:
        listener.say(f"nothing to try again: no image of run {run.id} is left {' or '.join(statuses)}")
    return result


def settings_of(run: Run, record: dict, settings: RetrySettings) -> SegmentSettings:
    """The settings of a finished run, on the machines of now. Raises `ConfigurationError`."""
    try:
        made = dict(record["settings"])
        batch_pixels = made.pop("batch_pixels")
        made |= {"input": record["input"], "output": run.store.url}
        made["checkpoint"] = settings.checkpoint or record["checkpoint"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{run.record_name}: is damaged ({error!r}); see swath verify") from None
    made["batch_pixels"] = batch_pixels if isinstance(batch_pixels, int) else None
    return build(SegmentSettings, made | settings.model_dump(include=set(WorkerSettings.model_fields)))


def plan_again(run: Run, statuses: tuple[str, ...], job: SegmentSettings, listener: Listener, space: Workspace) -> Plan:
    """Plan the images that a run left with one of `statuses`, but those that a retry has made ok since, or will do."""
    tables = space.tables
    tables.register("page", PLAN_SCHEMA.empty_table())
    tables.execute("CREATE TABLE images AS FROM page")
    failed = fill(tables, "images", images_with(run, statuses))
    version = run.contents().origin.model_version  # type: ignore[union-attr]  # it is finished
    tables.execute("CREATE TABLE mended AS SELECT uri, etag FROM images LIMIT 0")
    for other in runs(run.store):
        contents = other.contents()
        if not contents or not contents.origin.retries or contents.origin.model_version != version:
            continue
        if other.record():
            fill(tables, "mended", (found.select(KEY) for found in images_with(other, ("ok",))))
        else:  # it will do them when it goes on
            tables.register("page", stored(other.store, contents.parts, PLANNED))
            tables.execute("INSERT INTO mended SELECT uri, etag FROM page")
    tables.execute("CREATE OR REPLACE TABLE images AS FROM images ANTI JOIN mended USING (uri, etag)")
    left = tables.table("images").count("*").fetchall()[0][0]
    mended = f", {failed - left:,} of which are ok by now, or another retry's" if left < failed else ""
    listener.say(f"{failed:,} images of run {run.id} are {' or '.join(statuses)}{mended}")
    policy = parse_policy(job.policy)
    return make_plan(tables, space.folder, policy, job.shard_images, job.max_pixels, job.looks)


def fill(tables: duckdb.DuckDBPyConnection, name: str, pages: Iterator[pa.Table]) -> int:
    """Add pages to a table; how many rows they have."""
    rows = 0
    for page in pages:
        tables.register("page", page)
        tables.execute(f"INSERT INTO {name} FROM page")
        rows += len(page)
    return rows


def images_with(run: Run, statuses: tuple[str, ...]) -> Iterator[pa.Table]:
    """The planned images of a finished run that have one of `statuses`, shard by shard."""
    plan = PlanFiles(run)

    def of_shard(shard: int) -> pa.Table:
        if not any(run.shard_totals(shard).statuses.get(status) for status in statuses):
            return PLAN_SCHEMA.empty_table()
        rows = run.open_shard(shard).read(["status"])
        images = pa.Table.from_pylist([vars(image) for image in plan.images(shard)], PLAN_SCHEMA)
        return images.filter(pc.is_in(rows["status"], pa.array(statuses)).combine_chunks())  # in the plan's order

    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(of_shard, run.done())
