"""Metrics of a run: one hub actor counts, one Prometheus endpoint serves it.

Workers come and go; the hub stays where it is, so there is one target to scrape. A shard is counted when its object is
put, and once: a worker that repeats a shard reports it again under the same number, and the hub knows it. A hub that is
killed begins again with what the output holds. So the totals of a finished run equal its rows. No label grows with the
data, and every series is there from the start, as Prometheus takes the first value of a counter for no increase.

What Ray knows by itself (CPUs, memory and GPUs of nodes) is in Ray's own metrics.

It is also who knows that a worker has died: it hears when a shard is begun, and when it has ended.
"""

import collections
import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import prometheus_client
import ray
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric

from pipeline.attempts import CAUSES
from pipeline.config import MetricsSettings, SegmentSettings
from pipeline.endpoint import timestamp
from pipeline.pace import Pace
from pipeline.schema import STATUSES
from pipeline.stages import STATES
from pipeline.storage import Store
from pipeline.totals import STAGES, Totals

LAST_COMMIT = "swath_last_commit_timestamp_seconds", "When the run of this output that finished last was committed."
NIGHTLY = "swath_nightly_success_timestamp_seconds", "When swath nightly last left nothing to do in this output."
LATELY = 30.0  # seconds within which a worker that lives has been heard of
BEAT = 5.0  # seconds between two words of a worker


@dataclass(frozen=True)
class Snapshot:
    """What a progress display needs: images with a row or at least an outcome, and how many of them are not ok."""

    images: int
    failures: int
    shards: int  # put
    begun: int  # shards that a worker has begun, and that have not ended since


class Metrics:
    """The metrics themselves; the names are the project's interface to Prometheus."""

    def __init__(self, registry: CollectorRegistry):
        self.images = Counter(
            "swath_images", "Images with a row, by what became of them.", ["status"], registry=registry
        )
        self.input_bytes = Counter(
            "swath_input_bytes", "Bytes of these images, encoded.", ["status"], registry=registry
        )
        self.mask_bytes = Counter("swath_mask_bytes", "Bytes of the PNG masks.", registry=registry)
        self.pixels = Counter("swath_mask_pixels", "Pixels of the masks.", registry=registry)
        self.batches = Counter("swath_batches", "Batches that the network has run.", registry=registry)
        self.batch_inputs = Counter(
            "swath_batch_inputs", "Images, or windows of large ones, in these batches.", registry=registry
        )
        self.batch_places = Counter(
            "swath_batch_places", "Images or windows with which these batches would have been full.", registry=registry
        )
        self.out_of_memory = Counter(
            "swath_out_of_memory",
            "Times that a batch did not fit the device's memory, whatever was done about it.",
            registry=registry,
        )
        self.halvings = Counter(
            "swath_batch_halvings",
            "Of these, times that the batch was halved; others were an image alone, tried again or failed.",
            registry=registry,
        )
        self.stages = Counter(
            "swath_stage_seconds",
            "Time of a stage's threads: busy, starved of input or blocked by the next stage; of put and compile, busy.",
            ["stage", "state"],
            registry=registry,
        )
        self.shards = Counter("swath_shards", "Shards put.", registry=registry)
        self.quarantined = Counter(
            "swath_quarantined_shards",
            "Of these, shards that were done apart, as workers had died with them.",
            registry=registry,
        )
        self.repeated = Counter(
            "swath_repeated_shards", "Shards begun again, as the worker that had them died.", registry=registry
        )
        self.retries = Counter(
            "swath_retries", "Requests to a store that were made again, by cause.", ["cause"], registry=registry
        )
        self.planned_images = Gauge("swath_planned_images", "Images in the plan of this run.", registry=registry)
        self.planned_shards = Gauge("swath_planned_shards", "Shards in the plan of this run.", registry=registry)
        self.underway = Gauge("swath_images_underway", "Images done in shards that are not put yet.", registry=registry)
        self.shards_underway = Gauge(
            "swath_shards_underway", "Shards that workers have begun and not put yet.", registry=registry
        )
        self.remaining = Gauge(
            "swath_remaining_seconds",
            "Time until all is done, by the work left at the pace of the last five minutes; NaN while there is none.",
            registry=registry,
        )
        self.workers = Gauge("swath_workers", "Workers that have loaded the model and live.", registry=registry)
        self.memory = Gauge(
            "swath_worker_memory_peak_bytes",
            "The most that a worker had resident, of the one closest to its bound.",
            registry=registry,
        )
        self.memory_bound = Gauge(
            "swath_worker_memory_bound_bytes",
            "The most that this worker may have, by its own formula.",
            registry=registry,
        )
        self.device_used = Gauge(
            "swath_device_memory_used_bytes",
            "Memory in use of the GPU that has the least to spare; 0 on CPUs.",
            registry=registry,
        )
        self.device_peak = Gauge(
            "swath_device_memory_peak_bytes", "The most that was in use of that GPU's memory.", registry=registry
        )
        self.device_size = Gauge("swath_device_memory_size_bytes", "All of that GPU's memory.", registry=registry)
        self.started = Gauge(
            "swath_run_start_time_seconds", "When the driver began with the shards.", registry=registry
        )
        self.last_commit = Gauge(*LAST_COMMIT, ["output"], registry=registry)
        self.run = Gauge("swath_run_info", "Always 1.", ["run_id", "model_version", "output"], registry=registry)
        for status in STATUSES:
            self.images.labels(status)
            self.input_bytes.labels(status)
        for cause in CAUSES:
            self.retries.labels(cause)
        for stage in STAGES:
            for state in STATES:
                self.stages.labels(stage, state)
        for stage in ("put", "compile"):
            self.stages.labels(stage, "busy")

    def count(self, totals: Totals) -> None:
        for status, images in totals.statuses.items():
            self.images.labels(status).inc(images)
        for status, size in totals.status_bytes.items():
            self.input_bytes.labels(status).inc(size)
        self.mask_bytes.inc(totals.output_bytes)
        self.pixels.inc(totals.pixels)
        self.batches.inc(totals.batches)
        self.batch_inputs.inc(totals.batch_inputs)
        self.batch_places.inc(totals.batch_places)
        self.out_of_memory.inc(totals.out_of_memory)
        self.halvings.inc(totals.halvings)
        seconds_by_state = (totals.stage_seconds, totals.starved_seconds, totals.blocked_seconds)
        for state, seconds_by_stage in zip(STATES, seconds_by_state, strict=True):
            for stage, seconds in seconds_by_stage.items():
                self.stages.labels(stage, state).inc(seconds)
        self.shards.inc()
        self.quarantined.inc(totals.quarantined)


class Hub:
    """The actor behind the endpoint. It holds no CPU, and lives as long as the driver holds its handle.

    One that is killed is started again by Ray with the same arguments. What it had heard of shards under way is lost:
    they are taken to be begun for the first time.
    """

    def __init__(
        self,
        settings: SegmentSettings,
        run_id: str,
        version: str,
        images: Sequence[int],
        work: Sequence[int],
        port: int,
        started: float,
    ):
        """Of each shard so many `images` and so much `work` are planned; the run began at `started`, in seconds since
        1970.
        """
        prometheus_client.disable_created_metrics()  # else each counter has a series more, of when it was made
        store = Store(settings.output, settings)
        self.output = store.url
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.metrics.run.labels(run_id, version, self.output).set(1)
        self.metrics.started.set(started)
        self.metrics.planned_images.set(sum(images))
        self.metrics.planned_shards.set(len(images))
        self.metrics.workers.set_function(self.workers)
        self.metrics.shards_underway.set_function(lambda: len(self.begun))
        self.metrics.remaining.set_function(self.remaining)
        self.images, self.work_of = images, work
        self.work_done, self.all_work, self.pace = 0.0, sum(work), Pace()  # work of shards put
        self.finished: dict[int, tuple[int, int]] = {}  # shard: images, failures
        self.working: dict[int, tuple[int, int]] = {}
        self.begun: dict[int, int] = {}  # shard: how often, since it last ended
        self.loading: dict[str, int] = {}  # worker: how often it has begun to load, since it last was ready
        self.heard: dict[str, float] = {}  # worker: when
        self.asked_again: collections.Counter[str] = collections.Counter()
        self.is_stopping = False
        self.devices: dict[str, tuple[int, int, int]] = {}  # worker: bytes of its device in use, at most, and in all
        self.memory = (0, 0)
        # not above, as Ray keeps the class of an actor beyond the end of Python, of which DuckDB would complain
        from pipeline.commit import Run, last_commit  # noqa: PLC0415

        def look_back() -> None:
            if seconds := last_commit(store):
                self.metrics.last_commit.labels(self.output).set(seconds)

        threading.Thread(target=look_back, daemon=True).start()  # of very many runs it takes a while
        run = Run(store, run_id)
        done = run.done()
        try:
            for shard, totals in zip(done, run.totals(done), strict=True):
                self.finish(shard, totals)
        except Exception:  # a hub that cannot count is better than none, and the driver will say what is wrong
            logging.exception("the shards that are there cannot be read")
        self.endpoint = self.serve(settings.metrics_host, port)

    def serve(self, host: str, port: int) -> str:
        """Serve the metrics; where, for a person. A run that cannot be watched goes on all the same."""
        try:
            prometheus_client.start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:  # somebody else has the port by now
            logging.exception("metrics cannot be served")
            return f"not served ({error.strerror})"
        return f"http://{host}:{port}/metrics"

    def address(self) -> str:
        """The endpoint's URL, once the hub is ready."""
        return self.endpoint

    def worker_loads(self, worker: str) -> int:
        """A worker is about to load the model; how often it has died of that in a row."""
        deaths = self.loading.get(worker, 0)
        self.loading[worker] = deaths + 1
        return deaths

    def worker_lives(self, worker: str, device: tuple[int, int, int] = (0, 0, 0)) -> None:
        """A worker has loaded the model, and is to be heard of each `BEAT` seconds; `device`: bytes of its memory that
        are in use, were at most, and are there.
        """
        self.loading.pop(worker, None)
        self.heard[worker], self.devices[worker] = time.monotonic(), device
        live = [one for name, one in self.devices.items() if time.monotonic() - self.heard[name] < LATELY]
        used, peak, size = max(live, key=lambda one: one[0] / max(1, one[2]), default=(0, 0, 0))
        self.metrics.device_used.set(used)
        self.metrics.device_peak.set(peak)
        self.metrics.device_size.set(size)

    def workers(self) -> int:
        """How many have been heard of lately."""
        return sum(time.monotonic() - heard < LATELY for heard in list(self.heard.values()))

    def begin(self, shard: int) -> int | None:
        """A worker is about to do a shard: how many have died with it so far, or None when no more is to be begun."""
        deaths = self.begun.pop(shard, 0)
        if self.is_stopping:
            return None
        self.begun[shard] = deaths + 1
        self.metrics.repeated.inc(bool(deaths))
        if not self.pace.points:
            self.pace.note(time.monotonic(), self.work_done)
        return deaths

    def progress(self, shard: int, images: int, failures: int) -> None:
        """`images` of a shard have an outcome by now, `failures` of them not ok."""
        if shard not in self.finished:
            self.begun.setdefault(shard, 1)  # an earlier hub knew
            self.work(shard, (images, failures))

    def end(self, shard: int) -> None:
        """A shard has failed, and its worker lives."""
        self.begun.pop(shard, None)
        self.work(shard, None)

    def finish(self, shard: int, totals: Totals, put_seconds: float = 0, memory: tuple[int, int] = (0, 0)) -> None:
        """A shard is put, which took so long, by a worker with this peak and bound; said again, it changes nothing."""
        self.memory = max(self.memory, memory, key=lambda pair: pair[0] / max(1, pair[1]))
        self.metrics.memory.set(self.memory[0])
        self.metrics.memory_bound.set(self.memory[1])
        if shard not in self.finished:
            self.finished[shard] = (totals.images, failures(totals.statuses))
            self.work_done += self.work_of[shard]
            self.metrics.count(totals)
            self.metrics.stages.labels("put", "busy").inc(put_seconds)
        self.end(shard)

    def work(self, shard: int, counts: tuple[int, int] | None) -> None:
        """So many images and failures are underway in a shard; None when it is not."""
        if counts:
            self.working[shard] = counts
        else:
            self.working.pop(shard, None)
        self.metrics.underway.set(sum(done for done, _ in self.working.values()))
        if self.pace.points:
            self.pace.note(time.monotonic(), self.work_so_far())

    def work_so_far(self) -> float:
        """What is done, of shards under way in proportion to their images."""
        return self.work_done + sum(
            self.work_of[shard] * done / max(1, self.images[shard]) for shard, (done, _) in list(self.working.items())
        )

    def remaining(self) -> float:
        """Seconds until all is done, as `Pace.seconds_for` says."""
        return self.pace.seconds_for(self.all_work - self.work_so_far(), time.monotonic())

    def retried(self, counts: dict[str, int]) -> None:
        """So many more requests were made again, by cause."""
        self.asked_again.update(counts)
        for cause, count in counts.items():
            self.metrics.retries.labels(cause).inc(count)

    def retries(self) -> dict[str, int]:
        """Requests that were made again, by cause, as far as this hub has heard."""
        return dict(self.asked_again)

    def stop(self) -> None:
        """Have no shard begun from now on. A hub that is started again has to be told again."""
        self.is_stopping = True

    def worker_memory(self) -> tuple[int, int]:
        """(peak, bound) in bytes of the worker that came closest to its bound."""
        return self.memory

    def last_words(self) -> list[Metric]:
        """All metrics but the last commit's, when the workers are done."""
        self.heard.clear()
        self.devices.clear()
        return [metric for metric in self.registry.collect() if metric.name != LAST_COMMIT[0]]

    def snapshot(self) -> Snapshot:
        counts = [*self.finished.values(), *self.working.values()]
        images, bad = sum(done for done, _ in counts), sum(bad for _, bad in counts)
        return Snapshot(images, bad, len(self.finished), len(self.begun))


def failures(statuses: Mapping[str, int]) -> int:
    """Images without a mask."""
    return sum(images for status, images in statuses.items() if status != "ok")


def committed(output: str, seconds: float) -> Metric:
    """The metric of the last commit, as of the one that has just been."""
    return timestamp(*LAST_COMMIT, output, seconds)


def nightly_done(output: str, seconds: float) -> Metric:
    """The metric of a night that has left nothing to do."""
    return timestamp(*NIGHTLY, output, seconds)


def choose_port(settings: MetricsSettings) -> int:
    """The port of the settings, or one that is free: a hub that is started again has to come back where it was."""
    with socket.create_server((settings.metrics_host, settings.metrics_port)) as server:
        return server.getsockname()[1]


def start_hub(
    settings: SegmentSettings, run_id: str, version: str, images: Sequence[int], work: Sequence[int], port: int
) -> Any:
    """The hub on the driver's own node, as often as its process dies; `address` says when it is ready."""
    here = ray.get_runtime_context().get_node_id()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    actor = ray.remote(Hub).options(
        num_cpus=0, scheduling_strategy=strategy, max_restarts=-1, max_task_retries=-1
    )  # what is said to it while it is away is said again
    return actor.remote(settings, run_id, version, images, work, port, time.time())
