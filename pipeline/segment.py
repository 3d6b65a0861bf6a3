"""The worker: shards of the plan in, one Parquet object each out.

What happens to the images is the road's affair. Ray hands over a few shards at a time, each in a thread of its own: one
is fed to the road, one is on it, one is being put, so that the network never waits for a shard to end.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from model.checkpoint import Checkpoint
from model.predictor import Predictor
from pipeline.attempts import ERRORS, reason, take_retries
from pipeline.commit import PlanFiles, Run
from pipeline.config import SegmentSettings
from pipeline.containers import Images
from pipeline.decoders import Decoders
from pipeline.metrics import BEAT
from pipeline.plan import PlannedImage
from pipeline.quarantine import DEATHS, Quarantine, Sender, Turns, along
from pipeline.reader import Reader
from pipeline.road import Road, Shard
from pipeline.schema import SUMMARY_KEY, Outcome, encode_shard, row
from pipeline.stages import STATES
from pipeline.storage import Store
from pipeline.totals import Totals, count_reasons

SHARDS_AHEAD = 3  # given to a worker at once: one that is fed, one that drains, one that is put
ROW_BYTES_PER_PIXEL = 0.3  # of a mask as ragged as logits can make it, as PNG, as a row and in its Parquet file
PROBES = 5  # objects that are tried when none of a shard could be read
REPORT_EVERY = 1.0  # seconds between two words to the hub about a shard
LOADS = 4  # a worker that has died so often in a row while it loaded the model is not started again
STOPPED = "stopped"  # what is said of a shard that was not begun, as the run is to end


@dataclass(frozen=True)
class Job:
    """What a worker needs to know about the run; the checkpoint comes separately, once a node."""

    settings: SegmentSettings
    run_id: str
    model_version: str
    threads: int  # that decode, encode and, on a CPU, run the network
    gpus: float  # of a worker; 0 for a CPU
    memory: int  # bytes of images that a worker holds
    decoders: tuple[Any, ...] = ()  # actors that fetch and decode for the workers


class RowsError(Exception):
    """The rows of a shard are not those that the plan says; nothing has been put."""


class Segmenter:
    """A Ray Data UDF: rows {"shard": n} in, the same rows out once their objects are in the output.

    What fails a whole shard (the store is down, the disk is full) comes out as text in the column `error`. Ray calls
    it from `SHARDS_AHEAD` threads.
    """

    def __init__(self, job: Job, checkpoint: "ray.ObjectRef[Checkpoint] | Checkpoint", hub: Any):
        """In a process apart, which is there for its road, Ray is not: the checkpoint itself comes, and no hub."""
        self.worker = self.announce(hub) if hub else ""
        torch.set_num_threads(job.threads)
        settings = job.settings
        loaded: Checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else ray.get(checkpoint)
        self.job, self.hub, self.labels = job, hub, loaded.labels
        self.checkpoint: Any = checkpoint
        self.predictor = self.load(loaded)
        self.run = Run(Store(settings.output, settings), job.run_id)
        self.plan = PlanFiles(self.run)
        self.source = Images(Reader(settings), settings.image_column)
        self.road = Road(
            self.source,
            self.predictor,
            self.labels,
            settings,
            job.threads,
            job.memory,
            self.store_answers,
            Decoders(job.decoders),
        )
        self.turns = Turns()
        self.started = resident_memory("VmHWM")
        self.largest_shard = 0  # pixels
        if hub:
            threading.Thread(target=self.live, name="beat", daemon=True).start()

    def announce(self, hub: Any) -> str:
        """Tell the hub that this worker is about to load, and who it is. Raises where that has killed it before."""
        worker = ray.get_runtime_context().get_actor_id() or ""
        deaths = ray.get(hub.worker_loads.remote(worker))
        if deaths >= LOADS:  # Ray itself would start it for ever
            raise RuntimeError(f"a worker died {deaths} times while it loaded the checkpoint (is there memory for it?)")
        return worker

    def load(self, checkpoint: Checkpoint) -> Predictor:
        """The network on the worker's device."""
        settings, device = self.job.settings, "cuda" if self.job.gpus else "cpu"
        return Predictor(checkpoint, device, settings.engine, settings.precision, min(1, self.job.gpus or 1))

    def live(self) -> None:
        """Have the hub hear of this worker for as long as it lives."""
        while True:
            self.hub.worker_lives.remote(self.worker, device_memory() if self.job.gpus else (0, 0, 0))
            time.sleep(BEAT)

    def __call__(self, batch: pa.Table) -> pa.Table:
        errors = [self.attempt(shard) for shard in batch["shard"].to_pylist()]
        return batch.append_column("error", pa.array(errors, pa.string()))

    def attempt(self, shard: int) -> str | None:
        """Do one shard; why that failed."""
        deaths = ray.get(self.hub.begin.remote(shard))
        if deaths is None:
            return STOPPED
        try:
            self.finish_shard(shard, deaths)
        except Exception as error:  # whatever it is, the other shards go on and the driver says so
            logging.exception("shard %d failed", shard)
            ray.get(self.hub.end.remote(shard))
            return f"{type(error).__name__}: {reason(error)}"
        return None

    def finish_shard(self, shard: int, deaths: int) -> None:
        """Do one shard and put it, unless an earlier attempt already has, and tell the hub."""
        if deaths and shard in self.run.done():  # the worker died when it had put it
            totals, seconds = self.run.shard_totals(shard), 0.0
        elif deaths < DEATHS:
            with self.turns.together():
                totals, seconds = self.do_shard(shard, self.road)
        else:
            logging.warning("shard %d has ended %d workers, and is done apart", shard, deaths)
            with self.turns.alone():
                totals, seconds = self.do_shard(shard, self.quarantine())
        self.tell_retries()
        memory = (resident_memory("VmHWM"), self.bound())
        ray.get(self.hub.finish.remote(shard, totals, seconds, memory))

    def do_shard(self, shard: int, road: Sender) -> tuple[Totals, float]:
        """Send a shard along a road and put what comes of it; its totals, and the seconds of the put."""
        images = self.images(shard)
        sent = road.send(images)
        outcomes = self.collect(shard, sent)
        started = time.perf_counter()
        totals = replace(self.summarise(sent, outcomes), quarantined=int(road is not self.road))
        try:
            self.put(shard, images, outcomes, totals)
        except FileExistsError:  # by a worker that was thought dead
            totals = self.run.shard_totals(shard)
        return totals, time.perf_counter() - started

    def quarantine(self) -> Quarantine:
        """A road in a process apart: the same network and batches, half of the rest, as this process is there too."""
        job = self.job
        torch.cuda.empty_cache()
        settings = job.settings.model_copy(update={"batch_pixels": self.road.batch_pixels})
        half = replace(job, settings=settings, threads=max(1, job.threads // 2), memory=job.memory // 2, decoders=())
        open_road = partial(road_of, type(self), half, ray.get(self.checkpoint))
        return Quarantine(
            ray.cloudpickle.dumps(partial(along, open_road)), self.hub.retried.remote, settings.retry_seconds
        )

    def images(self, shard: int) -> list[PlannedImage]:
        """What the plan says about a shard."""
        images = self.plan.images(shard)
        pixels = sum((image.width or 0) * (image.height or 0) for image in images)
        self.largest_shard = max(self.largest_shard, pixels)
        return images

    def bound(self) -> int:
        """The most bytes that this process may have, for the shards that have come so far."""
        rows = SHARDS_AHEAD * int(ROW_BYTES_PER_PIXEL * self.largest_shard)
        return self.started + self.road.bound() + rows + self.source.bound()

    def collect(self, shard: int, sent: Shard) -> list[Outcome]:
        """The outcomes of a shard's images in order; the hub hears how far it is."""
        outcomes: dict[int, Outcome] = {}
        bad, told = 0, 0.0
        for number, outcome in sent.outcomes():
            outcomes[number] = outcome
            bad += outcome.status != "ok"
            if time.monotonic() - told > REPORT_EVERY:
                told = time.monotonic()
                self.hub.progress.remote(shard, len(outcomes), bad)
                self.tell_retries()
        if sent.failure and not sent.fetched and not self.store_answers():  # one object can be at fault, all cannot
            raise sent.failure
        return [outcomes[number] for number in range(len(sent.images))]

    def tell_retries(self) -> None:
        """Tell the hub how often stores have been asked again, since it last heard of it."""
        if counts := take_retries():
            self.hub.retried.remote(counts)

    def store_answers(self) -> bool:
        """Whether any of a few objects from all over the plan can be read, now."""
        shards = len(self.plan.contents.images)
        with ThreadPoolExecutor(PROBES) as pool:
            return any(pool.map(self.can_read, (shards * part // PROBES for part in range(PROBES))))

    def can_read(self, shard: int) -> bool:
        """Whether the first object of a shard can be read at the first attempt."""
        try:
            image = self.plan.images(shard)[0]
            self.source.reader.piece(image.file or image.uri, 0, 1, "", 0)
        except ERRORS:
            return False
        return True

    def put(self, shard: int, images: list[PlannedImage], outcomes: list[Outcome], totals: Totals) -> None:
        job = self.job
        check_rows(shard, images, self.plan.contents.images[shard])
        rows = [row(*pair, self.labels, job.model_version, job.run_id) for pair in zip(images, outcomes, strict=True)]
        metadata = {b"swath.run_id": job.run_id.encode(), b"swath.labels": "\n".join(self.labels.names).encode()}
        self.run.put_shard(shard, encode_shard(rows, metadata | {SUMMARY_KEY: totals.encode()}))

    def summarise(self, sent: Shard, outcomes: list[Outcome]) -> Totals:
        segmentations = [outcome.segmentation for outcome in outcomes if outcome.segmentation]
        pixels = np.sum([found.pixels for found in segmentations], axis=0, initial=0) + np.zeros(len(self.labels), int)
        sizes: Counter[str] = Counter()
        for image, outcome in zip(sent.images, outcomes, strict=True):
            sizes[outcome.status] += image.bytes
        present = np.sum([found.pixels > 0 for found in segmentations], axis=0, initial=0) + np.zeros_like(pixels)
        busy, starved, blocked = (sent.clock.of(state) for state in STATES)
        return Totals(
            images=len(sent.images),
            statuses=dict(Counter(outcome.status for outcome in outcomes)),
            engines={str(self.predictor): len(segmentations)},
            input_bytes=sizes.total(),
            status_bytes=dict(sizes),
            output_bytes=sum(len(outcome.mask or b"") for outcome in outcomes),
            pixels=int(pixels.sum()),
            batches=len(sent.batches),
            batch_inputs=sum(inputs for inputs, _ in sent.fills),
            batch_places=sum(places for _, places in sent.fills),
            out_of_memory=len(sent.misfits),
            halvings=len(sent.halved),
            stage_seconds=busy,
            starved_seconds=starved,
            blocked_seconds=blocked,
            class_pixels={name: int(n) for name, n in zip(self.labels.names, pixels, strict=True) if n},
            class_images={name: int(n) for name, n in zip(self.labels.names, present, strict=True) if n},
            reasons=count_reasons((one.status, one.error) for one in outcomes if one.status != "ok"),
        )


def check_rows(shard: int, images: Sequence[PlannedImage], planned: int) -> None:
    """Raise `RowsError` unless these images, of a row each, are as many as planned and no two of them the same."""
    different = len({(image.uri, image.etag) for image in images})
    if not different == len(images) == planned:
        raise RowsError(
            f"shard {shard} is planned with {planned:,} images and has {len(images):,}, {different:,} different ones"
        )


def road_of(worker: type[Segmenter], job: Job, checkpoint: Checkpoint) -> Road:
    """The road of a worker that has nothing else to do."""
    return worker(job, checkpoint, None).road


def device_memory() -> tuple[int, int, int]:
    """Bytes of the GPU's memory: in use, by whomever; the most that has been, as far as this process knows; all."""
    free, size = torch.cuda.mem_get_info()
    others = size - free - torch.cuda.memory_reserved()
    return size - free, others + torch.cuda.max_memory_reserved(), size


def resident_memory(kind: str) -> int:
    """Bytes that this process has in memory, now ("VmRSS") or at most so far ("VmHWM"); 0 where Linux does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(kind))
    except OSError:
        return 0
