"""Metrics of a run: one hub actor counts, one Prometheus endpoint serves it.

Workers come and go; the hub does not, so there is one target to scrape. A shard is counted when its object is put,
and once: a worker that repeats a shard reports it again under the same number, and the hub knows it. So the totals
of a finished run equal its rows. No label grows with the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import prometheus_client
import ray
from prometheus_client import CollectorRegistry, Counter, Gauge

from pipeline.schema import STATUSES
from pipeline.stages import STATES
from pipeline.totals import Totals


@dataclass(frozen=True)
class Snapshot:
    """What a progress display needs: images with a row or at least an outcome, and how many of them are not ok."""

    images: int
    failures: int
    shards: int


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
        self.planned_images = Gauge("swath_planned_images", "Images in the plan of this run.", registry=registry)
        self.planned_shards = Gauge("swath_planned_shards", "Shards in the plan of this run.", registry=registry)
        self.underway = Gauge("swath_images_underway", "Images done in shards that are not put yet.", registry=registry)
        self.workers = Gauge("swath_workers", "Workers that have loaded the model.", registry=registry)
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
        self.started = Gauge("swath_run_start_time_seconds", "When this process began the run.", registry=registry)
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


class Hub:
    """The actor behind the endpoint. It holds no CPU, and lives as long as the driver holds its handle."""

    def __init__(self, run_id: str, model_version: str):
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.metrics.run.labels(run_id, model_version).set(1)
        self.metrics.started.set_to_current_time()
        self.finished: dict[int, tuple[int, int]] = {}  # shard: images, failures
        self.working: dict[int, tuple[int, int]] = {}
        self.memory = (0, 0)

    def serve(self, host: str, port: int) -> int:
        """Serve the metrics; the port that it became."""
        server, _ = prometheus_client.start_http_server(port, addr=host, registry=self.registry)
        return server.server_port

    def plan(self, images: int, shards: int) -> None:
        self.metrics.planned_images.set(images)
        self.metrics.planned_shards.set(shards)

    def worker_ready(self) -> None:
        self.metrics.workers.inc()

    def progress(self, shard: int, images: int, failures: int) -> None:
        """`images` of a shard have an outcome by now, `failures` of them not ok."""
        if shard not in self.finished:
            self.working[shard] = (images, failures)
            self.metrics.underway.set(sum(done for done, _ in self.working.values()))

    def finish(self, shard: int, totals: Totals, put_seconds: float = 0, memory: tuple[int, int] = (0, 0)) -> None:
        """A shard is put, which took so long, by a worker with this peak and bound; said again, it changes nothing."""
        self.memory = max(self.memory, memory, key=lambda pair: pair[0] / max(1, pair[1]))
        self.metrics.memory.set(self.memory[0])
        self.metrics.memory_bound.set(self.memory[1])
        if shard not in self.finished:
            self.finished[shard] = (totals.images, failures(totals.statuses))
            self.working.pop(shard, None)
            self.metrics.underway.set(sum(done for done, _ in self.working.values()))
            self.metrics.count(totals)
            self.metrics.stages.labels("put", "busy").inc(put_seconds)

    def worker_memory(self) -> tuple[int, int]:
        """(peak, bound) in bytes of the worker that came closest to its bound."""
        return self.memory

    def snapshot(self) -> Snapshot:
        counts = [*self.finished.values(), *self.working.values()]
        return Snapshot(sum(done for done, _ in counts), sum(bad for _, bad in counts), len(self.finished))


def failures(statuses: Mapping[str, int]) -> int:
    """Images without a mask."""
    return sum(images for status, images in statuses.items() if status != "ok")


def start_hub(run_id: str, model_version: str) -> Any:
    """The hub on the driver's own node."""
    here = ray.get_runtime_context().get_node_id()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    actor = ray.remote(Hub).options(num_cpus=0, scheduling_strategy=strategy)
    return actor.remote(run_id, model_version)
