"""Metrics of a run: one hub actor counts, one Prometheus endpoint serves it.

Workers come and go; the hub stays where it is, so there is one target to scrape. A shard is counted when its object is
put, and once: a worker that repeats a shard reports it again under the same number, and the hub knows it. A hub that is
killed begins again with what the output holds. So the totals of a finished run equal its rows. No label grows with the
data.

It is also who knows that a worker has died: it hears when a shard is begun, and when it has ended.
"""

import collections
import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import prometheus_client
import ray
from prometheus_client import CollectorRegistry, Counter, Gauge

from pipeline.config import SegmentSettings
from pipeline.schema import STATUSES
from pipeline.stages import STATES
from pipeline.storage import Store
from pipeline.totals import Totals

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
        self.input_bytes = Counter("swath_input_bytes", "Bytes of the encoded images.", registry=registry)
        self.mask_bytes = Counter("swath_mask_bytes", "Bytes of the PNG masks.", registry=registry)
        self.pixels = Counter("swath_mask_pixels", "Pixels of the masks.", registry=registry)
        self.batches = Counter("swath_batches", "Batches that the network has run.", registry=registry)
        self.halvings = Counter(
            "swath_batch_halvings", "Batches that were too large for the device's memory.", registry=registry
        )
        self.stages = Counter(
            "swath_stage_seconds",
            "Time of a stage's threads: busy, starved of input or blocked by the next stage.",
            ["stage", "state"],
            registry=registry,
        )
        self.shards = Counter("swath_shards", "Shards put.", registry=registry)
        self.quarantined = Counter(
            "swath_quarantined_shards",
            "Of these, shards that were done apart, as workers had died with them.",
            registry=registry,
        )
        self.retries = Counter(
            "swath_retries", "Requests to a store that were made again, by cause.", ["cause"], registry=registry
        )
        self.planned_images = Gauge("swath_planned_images", "Images in the plan of this run.", registry=registry)
        self.planned_shards = Gauge("swath_planned_shards", "Shards in the plan of this run.", registry=registry)
        self.underway = Gauge("swath_images_underway", "Images done in shards that are not put yet.", registry=registry)
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
        self.started = Gauge(
            "swath_run_start_time_seconds", "When the driver began with the shards.", registry=registry
        )
        self.run = Gauge("swath_run_info", "Always 1.", ["run_id", "model_version"], registry=registry)
        for status in STATUSES:
            self.images.labels(status)

    def count(self, totals: Totals) -> None:
        for status, images in totals.statuses.items():
            self.images.labels(status).inc(images)
        self.input_bytes.inc(totals.input_bytes)
        self.mask_bytes.inc(totals.output_bytes)
        self.pixels.inc(totals.pixels)
        self.batches.inc(totals.batches)
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
        self, settings: SegmentSettings, run_id: str, version: str, images: int, shards: int, port: int, started: float
    ):
        """So many `images` and `shards` are planned; the run began at `started`, in seconds since 1970."""
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.metrics.run.labels(run_id, version).set(1)
        self.metrics.started.set(started)
        self.metrics.planned_images.set(images)
        self.metrics.planned_shards.set(shards)
        self.metrics.workers.set_function(self.workers)
        self.finished: dict[int, tuple[int, int]] = {}  # shard: images, failures
        self.working: dict[int, tuple[int, int]] = {}
        self.begun: dict[int, int] = {}  # shard: how often, since it last ended
        self.loading: dict[str, int] = {}  # worker: how often it has begun to load, since it last was ready
        self.heard: dict[str, float] = {}  # worker: when
        self.asked_again: collections.Counter[str] = collections.Counter()
        self.is_stopping = False
        self.memory = (0, 0)
        # not above, as Ray keeps the class of an actor beyond the end of Python, of which DuckDB would complain
        from pipeline.commit import Run  # noqa: PLC0415

        run = Run(Store(settings.output, settings), run_id)
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

    def worker_lives(self, worker: str) -> None:
        """A worker has loaded the model, and is to be heard of each `BEAT` seconds."""
        self.loading.pop(worker, None)
        self.heard[worker] = time.monotonic()

    def workers(self) -> int:
        """How many have been heard of lately."""
        return sum(time.monotonic() - heard < LATELY for heard in list(self.heard.values()))

    def begin(self, shard: int) -> int | None:
        """A worker is about to do a shard: how many have died with it so far, or None when no more is to be begun."""
        deaths = self.begun.pop(shard, 0)
        if self.is_stopping:
            return None
        self.begun[shard] = deaths + 1
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
        self.end(shard)
        self.memory = max(self.memory, memory, key=lambda pair: pair[0] / max(1, pair[1]))
        self.metrics.memory.set(self.memory[0])
        self.metrics.memory_bound.set(self.memory[1])
        if shard not in self.finished:
            self.finished[shard] = (totals.images, failures(totals.statuses))
            self.metrics.count(totals)
            self.metrics.stages.labels("put", "busy").inc(put_seconds)

    def work(self, shard: int, counts: tuple[int, int] | None) -> None:
        """So many images and failures are underway in a shard; None when it is not."""
        if counts:
            self.working[shard] = counts
        else:
            self.working.pop(shard, None)
        self.metrics.underway.set(sum(done for done, _ in self.working.values()))

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

    def snapshot(self) -> Snapshot:
        counts = [*self.finished.values(), *self.working.values()]
        images, bad = sum(done for done, _ in counts), sum(bad for _, bad in counts)
        return Snapshot(images, bad, len(self.finished), len(self.begun))


def failures(statuses: Mapping[str, int]) -> int:
    """Images without a mask."""
    return sum(images for status, images in statuses.items() if status != "ok")


def choose_port(settings: SegmentSettings) -> int:
    """The port of the settings, or one that is free: a hub that is started again has to come back where it was."""
    with socket.create_server((settings.metrics_host, settings.metrics_port)) as server:
        return server.getsockname()[1]


def start_hub(settings: SegmentSettings, run_id: str, version: str, images: int, shards: int, port: int) -> Any:
    """The hub on the driver's own node, as often as its process dies; `address` says when it is ready."""
    here = ray.get_runtime_context().get_node_id()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    actor = ray.remote(Hub).options(
        num_cpus=0, scheduling_strategy=strategy, max_restarts=-1, max_task_retries=-1
    )  # what is said to it while it is away is said again
    return actor.remote(settings, run_id, version, images, shards, port, time.time())
