"""A whole run, driven from one process: index, plan, segment, commit. The one file that builds a Ray Dataset.

What happens to an image? `prepare` finds it and puts it into a shard, `segment_shards` has a worker do that shard,
`commit` says that all shards are there.
"""

import contextlib
import platform
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import ray
import ray.exceptions
import torch
from fsspec.utils import get_protocol
from prometheus_client import Metric

from model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, model_version
from model.predictor import EngineError, choose_engine
from pipeline import schema
from pipeline.attempts import agreed, take_retries
from pipeline.changes import earlier_runs, leave_out, note_changes
from pipeline.cluster import (
    FAILED_SHARDS,
    TASK_RETRIES,
    Workers,
    check_network,
    leave_cpus,
    ray_address,
    ray_session,
    size_workers,
    spread,
)
from pipeline.commit import Contents, Run, unfinished
from pipeline.config import ConfigurationError, PlanSettings, SegmentSettings
from pipeline.config_truth import FinetuneSettings
from pipeline.decoders import start_decoders
from pipeline.endpoint import linger
from pipeline.filesystems import is_plain, open_filesystem, public_url, storage_options
from pipeline.index import update_index
from pipeline.inputs import summary
from pipeline.lease import HeldError, Lease
from pipeline.metrics import choose_port, committed, start_hub
from pipeline.plan import Origin, Plan, make_plan, most_work_first
from pipeline.policy import parse_policy
from pipeline.seal import sealed
from pipeline.segment import SHARDS_AHEAD, STOPPED, Job, Segmenter
from pipeline.stopping import Request, StoppedError, until_asked_to_end
from pipeline.storage import Store
from pipeline.submission import submission_id
from pipeline.tables import Workspace, workspace
from pipeline.totals import Totals, add

PLANNING = "leases/planning"
PLANNING_LOOKED_EVERY = 3.0  # seconds
LOOKED_EVERY = 0.5  # seconds
IDLE = 10.0  # seconds with nothing under way, when a run is to stop


class Listener(Protocol):
    """Whoever watches the run: a progress display, a log, a test."""

    def say(self, text: str) -> None:
        """One line about what happens next."""

    def listing(self, found: int) -> None:
        """Objects listed so far."""

    def indexing(self, done: int, total: int) -> None:
        """Objects whose headers are read, of those to read."""

    def segmenting(self, done: int, total: int, failures: int) -> None:
        """Images done, of those planned; how many of them have no mask."""


class IncompleteRunError(Exception):
    """Some shards are not there; the message says why and how to go on."""


@dataclass(frozen=True)
class Result:
    """What `segment` did."""

    record: dict[str, Any] | None  # the run record; None when there was nothing to do
    is_new: bool  # False when the run was complete before
    was_planned: bool  # before: newer images are not in it


def segment(settings: SegmentSettings, listener: Listener, worker: type[Segmenter] = Segmenter) -> Result:
    """Segment a collection, or go on with it. `worker` is for benchmarks that put something else in its place.

    `ConfigurationError`, `CheckpointError` and `HeldError` come before any work, `StoppedError` after what a signal
    leaves time for, `IncompleteRunError` after all that could be done.
    """
    check_network(settings)
    checkpoint = read_checkpoint(settings)
    output = Store(settings.output, settings)
    output.check_writable()
    check_engine(settings, checkpoint)
    version = model_version(checkpoint.digest, settings.mask_settings())
    origin = origin_of(settings, version)

    def new_plan(space: Workspace) -> Plan:
        plan = index_and_plan(settings, output, origin, space, listener)
        note_changes(space.tables, output)
        return plan

    result = do_run(settings, checkpoint, output, origin, new_plan, listener, worker)
    if not result.record:
        listener.say("nothing new: every image has a row from this model version")
    return result


def do_run(
    settings: SegmentSettings,
    checkpoint: Checkpoint,
    output: Store,
    origin: Origin,
    new_plan: Callable[[Workspace], Plan],
    listener: Listener,
    worker: type[Segmenter],
) -> Result:
    """Do the run of this origin, as it was planned, or as `new_plan` says; then its last metrics stay for a while.

    Raises `HeldError` before any work, `StoppedError` and `IncompleteRunError` after all that could be done.
    """
    with lingering(settings, listener) as last, contextlib.ExitStack() as held:
        run = find_run(settings, output, origin, listener)
        was_planned = bool(plan := run.contents())
        if not plan:
            with alone_planning(output, listener) as planning:
                run = find_run(settings, output, origin, listener)  # another driver may have planned it meanwhile
                plan = prepare(run, origin, new_plan, planning)
        if not plan:
            return Result(None, is_new=False, was_planned=False)
        if (record := run.record()) and len(run.done()) == len(plan.images):  # else what was lost is put again
            listener.say(
                f"run {run.id} is complete: {record['images']:,} images as planned, nothing to do "
                "(leave out --run-id for images that came later)"
            )
            return Result(record, is_new=False, was_planned=True)
        lease = held.enter_context(run.lease())
        started = time.time()
        stretch = segment_shards(settings, checkpoint, run, plan, lease, listener, worker, last)
        record = commit(settings, checkpoint, run, plan, started, stretch)
        last.metrics.append(committed(output.url, time.time()))
        return Result(record, True, was_planned)


@dataclass
class LastMetrics:
    """What a run's metrics were when its workers were done, and where they were served."""

    port: int
    metrics: list[Metric] = field(default_factory=list)


@contextlib.contextmanager
def lingering(settings: SegmentSettings, listener: Listener) -> Iterator[LastMetrics]:
    """A block after which a run's last metrics stay for a while, unless it was stopped or had nothing to do."""
    last = LastMetrics(settings.metrics_port)
    try:
        yield last
    except IncompleteRunError:
        linger(settings, last.port, last.metrics, listener)
        raise
    if last.metrics:
        linger(settings, last.port, last.metrics, listener)


def origin_of(settings: PlanSettings, version: str) -> Origin:
    """What a plan with these settings is made from."""
    inputs = tuple(public_url(Store(url, settings).uri("")) for url in settings.input)
    return Origin(inputs, settings.include, settings.exclude, settings.policy, version)


@contextlib.contextmanager
def alone_planning(output: Store, listener: Listener) -> Iterator[Lease]:
    """Be the only driver that plans in this output, once the others have: two would plan the same images."""
    told = False
    while True:
        try:
            lease = Lease(output, PLANNING, "planning in this output").__enter__()
        except HeldError as error:
            if not told:
                listener.say(f"waiting: {error}")
            told = True
            time.sleep(PLANNING_LOOKED_EVERY)
        else:
            break
    with contextlib.closing(lease):
        yield lease


def check_engine(settings: SegmentSettings, checkpoint: Checkpoint) -> None:
    """Raise `ConfigurationError` where the kernels are asked for and this machine, which does the work, has none."""
    if settings.engine == "native" and not ray_address(settings):
        device = torch.device("cuda" if settings.gpus_per_worker else "cpu")
        try:
            choose_engine(settings.engine, device, checkpoint.model.config)
        except EngineError as error:
            raise ConfigurationError(str(error)) from None


def read_checkpoint(settings: PlanSettings | FinetuneSettings, decoder_seed: int | None = None) -> Checkpoint:
    """The network. What comes over plain HTTP may come damaged: it is read until two readings agree, or fail, alike.

    With a `decoder_seed` it may be an encoder alone, as in `load_checkpoint`.
    """

    def read() -> Checkpoint | CheckpointError:
        try:
            # not the file system of others, which does not try again by itself
            options = storage_options(settings.checkpoint, settings) | {"skip_instance_cache": True}
            return load_checkpoint(settings.checkpoint, options, decoder_seed)
        except CheckpointError as error:
            return error

    def told(found: Checkpoint | CheckpointError) -> str:
        return str(found) if isinstance(found, CheckpointError) else found.digest

    found = read()
    is_s3 = get_protocol(settings.checkpoint) in ("s3", "s3a")
    if is_s3 and (isinstance(found, CheckpointError) or is_plain(open_filesystem(settings.checkpoint, settings)[0])):
        found = agreed(read, told)
    if isinstance(found, CheckpointError):
        raise found
    return found


def find_run(settings: SegmentSettings, output: Store, origin: Origin, listener: Listener) -> Run:
    """The run to do: the one asked for, the unfinished one of the same origin, or a new one."""
    if settings.run_id:
        run = Run(output, settings.run_id)
        check_origin(run, origin)
        return run
    if found := unfinished(output, origin):
        listener.say(f"run {found.id} was not finished, so it goes on as planned (newer images: run again after it)")
        return found
    return Run(output, f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}")


def check_origin(run: Run, origin: Origin) -> None:
    """Raise `ConfigurationError` when the run has a plan that was made from something else."""
    contents = run.contents()
    if contents and contents.origin != origin:
        planned = vars(contents.origin).items()
        differing = [f"{key} {value!r}" for key, value in planned if value != getattr(origin, key)]
        raise ConfigurationError(
            f"run {run.id} was planned with {', '.join(differing)}; use the same again, or another --run-id"
        )


def prepare(run: Run, origin: Origin, new_plan: Callable[[Workspace], Plan], planning: Lease) -> Contents | None:
    """What the run is to do: an existing plan as it is, or a new one; None when there is nothing new."""
    if not (contents := run.contents()):
        if run.done():
            raise ConfigurationError(f"run {run.id} is another version's, which can finish it; use another --run-id")
        with workspace() as space:
            plan = new_plan(space)
            if not plan.shards:
                return None
            planning.check()
            run.begin(plan, origin)
        contents = run.contents()
    return contents


def index_and_plan(settings: PlanSettings, output: Store, origin: Origin, space: Workspace, listener: Listener) -> Plan:
    """Bring the index up to date, and plan what no run with this model version has; the plan is in the workspace."""
    listener.say(f"listing {', '.join(map(public_url, settings.input))}")
    index = update_index(settings, output, space.tables, listener, partial(spread, settings))
    earlier = earlier_runs(output)
    changes = leave_out(space.tables, output, origin, earlier)
    listener.say(f"{index.images:,} images{summary(index.skipped)}, {index.opened:,} headers read; {changes}")
    for one in earlier:
        if not one.is_finished and one.contents.origin.model_version == origin.model_version:
            listener.say(f"run {one.run.id} has images of its own and is not finished; finish it with its settings")
    policy = parse_policy(settings.policy)
    plan = make_plan(space.tables, space.folder, policy, settings.shard_images, settings.max_pixels, settings.looks)
    return replace(plan, changes=changes.todo)


@dataclass(frozen=True)
class Stretch:
    """What is known only while the workers are there."""

    shards_before: int  # that an earlier stretch of the run has done
    memory: tuple[int, int] = (0, 0)  # bytes: what the worker closest to its bound had at most, and that bound
    retries: dict[str, int] = field(default_factory=dict)  # how often the store was tried again, by cause


def segment_shards(
    settings: SegmentSettings,
    checkpoint: Checkpoint,
    run: Run,
    plan: Contents,
    lease: Lease,
    listener: Listener,
    worker: type[Segmenter],
    last: LastMetrics,
) -> Stretch:
    """Have the workers do every shard that is not there yet; `last` hears of the metrics.

    Raises `StoppedError`, `IncompleteRunError`.
    """
    images, shards, version = sum(plan.images), len(plan.images), plan.origin.model_version
    done = run.done()
    todo = most_work_first(sorted(set(range(shards)) - set(done)), plan.work)
    if done:
        listener.say(f"{len(done):,} of {shards:,} shards of run {run.id} are there already")
    if not todo:
        return Stretch(len(done))
    with ray_session(settings), until_asked_to_end() as request:
        last.port = choose_port(settings)
        hub = start_hub(settings, run.id, version, plan.images, plan.work, last.port)
        errors: list[str] = []
        with ending_quietly(request), ending(hub, lease, request, settings.grace, listener):
            errors += do_shards(settings, checkpoint, run, version, todo, images, hub, request, listener, worker)
        stretch = Stretch(len(done), ray.get(hub.worker_memory.remote()), ray.get(hub.retries.remote()))
        last.metrics = ray.get(hub.last_words.remote())
    lease.check()
    missing = sorted(set(range(shards)) - set(run.done()))
    if missing and request.number:
        raise StoppedError(
            request.number,
            f"stopped: {shards - len(missing):,} of {shards:,} shards of run {run.id} are done; "
            "run the same command again to go on",
        )
    if missing:
        why = errors[0] if errors else "the worker of a shard died each time it was tried (out of memory?)"
        raise IncompleteRunError(
            f"{len(missing):,} of {shards:,} shards of run {run.id} are not done: {why}; "
            f"run the same command again to do only those"
        )
    return stretch


def do_shards(
    settings: SegmentSettings,
    checkpoint: Checkpoint,
    run: Run,
    version: str,
    todo: list[int],
    images: int,
    hub: Any,
    request: Request,
    listener: Listener,
    worker: type[Segmenter],
) -> list[str]:
    """Have a pool of workers do the shards `todo` of a run of `images`, and another pool those that were lost with
    their workers; what went wrong.

    For some seconds after a node has died Ray still takes its workers for alive, and as they are never busy it has them
    lose shard after shard. A new pool fits what is left of the cluster; there is one more for as long as any gets
    shards done.
    """
    leave_cpus(1 + settings.decoders)
    decoders: tuple[Any, ...] = ()
    while True:
        workers = size_workers(settings, len(todo))
        decoders = decoders or start_decoders(settings, workers.memory)
        job = Job(settings, run.id, version, workers.cpus, workers.gpus, workers.memory, decoders)
        dataset = build_dataset(todo, job, checkpoint, hub, workers, worker)
        listener.say(f"run {run.id} on {workers}; metrics: {ray.get(hub.address.remote())}")
        with watching(hub, images, listener):
            failed, lost = failed_shards(dataset)
        done = set(run.done())
        left = [shard for shard in todo if shard not in done]
        if failed or not left or len(left) == len(todo) or request.number:
            return failed or lost
        todo = left


def build_dataset(
    shards: list[int], job: Job, checkpoint: Checkpoint, hub: Any, workers: Workers, worker: type[Segmenter]
) -> "ray.data.Dataset":
    """The graph: rows that are shards, through a pool of workers, to rows that say how each ended."""
    with warnings.catch_warnings():
        # the only way, in every Ray that is supported, to bound the retries of an actor's task and to have threads
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        planned = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        return planned.map_batches(
            worker,
            fn_constructor_args=(job, ray.put(checkpoint), hub),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=workers.least,
                initial_size=workers.first,
                max_size=workers.most,
                max_tasks_in_flight_per_actor=SHARDS_AHEAD,
                enable_true_multi_threading=True,
            ),
            max_concurrency=SHARDS_AHEAD,
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            max_task_retries=TASK_RETRIES,
        )


def failed_shards(results: "ray.data.Dataset") -> tuple[list[str], list[str]]:
    """Wait for all shards; what went wrong with those that failed, and with those that were lost with their workers."""
    failed: list[str] = []
    lost: list[str] = []
    try:
        for result in results.iter_rows():
            if result["error"] and result["error"] != STOPPED:
                failed.append(result["error"])
            if len(failed) >= FAILED_SHARDS:
                break
    except ray.exceptions.RayError as error:
        lost.append(" ".join(str(error).strip().split("\n")[-1].split())[:300])
    return failed, lost


def commit(
    settings: SegmentSettings, checkpoint: Checkpoint, run: Run, plan: Contents, started: float, stretch: Stretch
) -> dict[str, Any]:
    """Write the run record: every shard is there, and this is what they hold.

    `seconds`, `worker_memory` and `store_retries` are those of the last stretch, since `started`.
    """
    shards = run.done()
    totals: Totals = add(run.totals(shards))
    finished = time.time()
    record = {
        "schema": schema.VERSION,
        "run_id": run.id,
        "submission_id": submission_id(),
        "input": plan.origin.input,
        "checkpoint": public_url(settings.checkpoint),
        "model_version": plan.origin.model_version,
        "retries": plan.origin.retries,
        "changes": plan.changes,
        "settings": settings.mask_settings() | {"batch_pixels": settings.batch_pixels or "by device"},
        "labels": checkpoint.labels.names,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "finished": datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds"),
        "seconds": round(finished - started, 3),
        "shards_done_before": stretch.shards_before,
        "worker_memory": dict(zip(("peak", "bound"), stretch.memory, strict=True)),
        "store_retries": stretch.retries,
        **asdict(totals),
        "busy_shares": {stage: round(share, 4) for stage, share in totals.busy_shares().items()},
        "files": [run.shard_name(shard) for shard in shards],
        "plan_sha256": run.plan_digest(),
        "versions": {"python": platform.python_version()}
        | {name: installed(name) for name in ("swath", "ray", "torch", "pyarrow")},
    }
    record = sealed(record)
    run.commit(record)
    return record


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def ending_quietly(request: Request) -> Iterator[None]:
    """A block whose interruption is no error where the request is over."""
    try:
        yield
    except KeyboardInterrupt:
        if not request.is_over:
            raise


@contextlib.contextmanager
def watching(hub: Any, images: int, listener: Listener) -> Iterator[None]:
    """Tell the listener each second how far the workers are, and once more at the end."""

    def report() -> None:
        hub.retried.remote(take_retries())
        now = ray.get(hub.snapshot.remote())
        listener.segmenting(now.images, images, now.failures)

    with each(1, report):
        yield
    report()


@contextlib.contextmanager
def ending(hub: Any, lease: Lease, request: Request, grace: float, listener: Listener) -> Iterator[None]:
    """Interrupt the block when the lease is lost, or when an end was asked for and it does not end by itself.

    Then workers begin no shard any more, but say so of each; of very many that takes a while, for which nobody waits.
    """
    asked = busy = 0.0

    def look() -> None:
        nonlocal asked, busy
        now = time.monotonic()
        if request.number and not asked:
            asked = busy = now
            listener.say(f"stopping: shards under way have {grace:g} s to end; once more to stop at once")
        if lease.lost or (asked and (now - asked >= grace or now - busy >= IDLE)):
            request.end()
        elif asked:
            ray.get(hub.stop.remote(), timeout=IDLE)  # each time, as a hub that was started anew has not heard of it
            busy = now if ray.get(hub.snapshot.remote(), timeout=IDLE).begun else busy

    with each(LOOKED_EVERY, look):
        yield


@contextlib.contextmanager
def each(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    """Have a thread do `work` every so many seconds."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            with contextlib.suppress(ray.exceptions.RayError):  # the hub is away; the next time, perhaps
                work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
