"""The worker: one shard of the plan in, one Parquet object out.

Inside, four stages run at once, each over a bounded number of images: fetch and decode in threads, the network in
the worker's own thread, PNG encoding in threads again. What is held is the images between two stages, a few batches
of them, however large the shard. Full-size pixels are the largest thing an image is: only `decoding` images, about
one a CPU, are in that form at once, whatever waits for the network.
"""

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import torch

from model.checkpoint import Checkpoint
from model.predictor import Predictor, Segmentation
from pipeline.commit import Run, Totals
from pipeline.config import SegmentSettings
from pipeline.decode import DecodeError, decode, resize
from pipeline.masks import encode_mask
from pipeline.plan import PlannedImage, batch_size, planned_images
from pipeline.policy import parse_policy
from pipeline.schema import SUMMARY_KEY, Outcome, encode_shard, row
from pipeline.storage import CREDENTIALS, ERRORS, Store, error_code, reason

T = TypeVar("T")
U = TypeVar("U")
FETCH_ATTEMPTS = 3
PROBES = 5  # objects that are tried when none of a shard could be read
REPORT_EVERY = 0.5  # seconds between two words to the hub


@dataclass(frozen=True)
class Job:
    """What a worker needs to know about the run; the checkpoint comes separately, once a node."""

    settings: SegmentSettings
    run_id: str
    model_version: str
    threads: int  # of the network, on a CPU
    gpus: float  # of a worker; 0 for a CPU


@dataclass(frozen=True)
class Loaded:
    """One image on its way: number in its shard, and either pixels at the network's size or an outcome."""

    number: int
    outcome: Outcome
    pixels: np.ndarray | None = None  # uint8 (H, W, 3) at the bucket's size
    failure: BaseException | None = None  # of the store, when it is to blame


@dataclass(frozen=True)
class Running:
    """A batch that a device works on, and how to wait for it."""

    batch: list[Loaded]
    wait: Callable[[], list[Segmentation]]


class Segmenter:
    """A Ray Data UDF: rows {"shard": n} in, the same rows out once their objects are in the output.

    What fails a whole shard (the store is down, the disk is full) comes out as text in the column `error`.
    """

    def __init__(self, job: Job, checkpoint: "ray.ObjectRef[Checkpoint]", hub: Any):
        torch.set_num_threads(job.threads)
        settings = job.settings
        loaded: Checkpoint = ray.get(checkpoint)
        self.job, self.hub, self.labels = job, hub, loaded.labels
        self.policy = parse_policy(settings.policy)
        self.predictor = Predictor(loaded, "cuda" if job.gpus else "cpu", settings.engine, settings.precision)
        self.batch_pixels = settings.batch_pixels or int(self.predictor.batch_pixels * min(1, job.gpus or 1))
        self.source = Store(settings.input, settings)
        self.run = Run(Store(settings.output, settings), job.run_id)
        self.plan = self.run.open_plan()
        self.depth = settings.requests  # images between two stages
        self.loaders = ThreadPoolExecutor(settings.requests, "load")
        self.decoding = threading.BoundedSemaphore(max(2, job.threads))  # so many full-size images at once
        self.encoders = ThreadPoolExecutor(max(2, job.threads), "encode")
        hub.worker_ready.remote()

    def __call__(self, batch: pa.Table) -> pa.Table:
        errors: list[str | None] = []
        for shard in batch["shard"].to_pylist():
            try:
                ray.get(self.hub.finish.remote(shard, self.finish_shard(shard)))
                errors.append(None)
            except Exception as error:  # whatever it is, the other shards go on and the driver says so
                logging.exception("shard %d failed", shard)
                errors.append(f"{type(error).__name__}: {reason(error)}")
        return batch.append_column("error", pa.array(errors, pa.string()))

    def finish_shard(self, shard: int) -> Totals:
        """Do one shard and put it, unless an earlier attempt already has."""
        try:
            return self.run.shard_totals(shard)
        except FileNotFoundError:
            pass
        images = planned_images(self.plan.read_row_group(shard))
        clock = Stopwatch()
        outcomes: dict[int, Outcome] = {}
        bad, told = 0, 0.0
        for number, outcome in self.outcomes(images, clock):
            outcomes[number] = outcome
            bad += outcome.status != "ok"
            if time.monotonic() - told > REPORT_EVERY:
                told = time.monotonic()
                self.hub.progress.remote(shard, len(outcomes), bad)
        ordered = [outcomes[number] for number in range(len(images))]
        totals = replace(
            self.summarise(images, ordered),
            batches=clock.count["infer"] + clock.count["compile"],
            stage_seconds=dict(clock.seconds),
        )
        job = self.job
        rows = [row(*pair, self.labels, job.model_version, job.run_id) for pair in zip(images, ordered, strict=True)]
        metadata = {b"swath.run_id": job.run_id.encode(), b"swath.labels": "\n".join(self.labels.names).encode()}
        self.run.put_shard(shard, encode_shard(rows, metadata | {SUMMARY_KEY: totals.encode()}))
        return totals

    def outcomes(self, images: list[PlannedImage], clock: "Stopwatch") -> Iterator[tuple[int, Outcome]]:
        """What became of each image, by its number, as it becomes known: the four stages, one behind the other."""
        loaded = ahead(self.loaders, lambda item: self.load(*item, clock), enumerate(images), self.depth)
        predicted = self.predict(loaded, clock)
        return ahead(self.encoders, lambda item: self.encode(*item, clock), predicted, self.depth)

    def load(self, number: int, image: PlannedImage, clock: "Stopwatch") -> Loaded:
        """Fetch, check, decode and resize one image."""
        limit = self.job.settings.max_pixels
        try:
            if image.width and image.height and image.width * image.height > limit:
                raise DecodeError("too_large", f"{image.width}x{image.height} is over --max-pixels {limit:,}")
            with clock.time("fetch"):
                data = self.fetch(image.uri)
            if len(data) != image.bytes or not self.source.is_unchanged(image.uri, image.etag):
                raise DecodeError("changed", "the object is another one than was indexed; run again")
            with self.decoding, clock.time("decode"):
                pixels = decode(data, limit)
                height, width = pixels.shape[:2]
                bucket_h, bucket_w = self.policy.size(height, width)
                scaled = resize(pixels, bucket_h, bucket_w)
        except DecodeError as error:
            return Loaded(number, Outcome(error.status, str(error)))
        except FileNotFoundError:
            return Loaded(number, Outcome("missing", "the object is gone since it was indexed"))
        except ERRORS as error:
            if error_code(error) in CREDENTIALS:
                raise
            return Loaded(number, Outcome("failed", reason(error)), failure=error)
        bucket = f"{bucket_h}x{bucket_w}"
        return Loaded(number, Outcome("ok", width=width, height=height, bucket=bucket), scaled)

    def fetch(self, uri: str) -> bytes:
        """The object's bytes; a store that fails is asked again."""
        for attempt in range(FETCH_ATTEMPTS - 1):
            try:
                return self.source.fetch(uri)
            except (FileNotFoundError, PermissionError):
                raise
            except ERRORS:
                time.sleep(2**attempt)
        return self.source.fetch(uri)

    def store_answers(self) -> bool:
        """Whether any of a few objects from all over the plan can be read."""
        groups = self.plan.num_row_groups
        probes = [self.plan.read_row_group(groups * part // PROBES)["uri"][0].as_py() for part in range(PROBES)]
        return any(isinstance(head, bytes) for head in self.source.heads(probes, 1, PROBES))

    def predict(
        self, loaded: Iterable[Loaded], clock: "Stopwatch"
    ) -> Iterator[tuple[int, Outcome, Segmentation | None]]:
        """Run the network over batches of one size; what has no pixels passes through."""
        waiting: dict[tuple[int, int], list[Loaded]] = {}
        running: deque[Running] = deque()
        failure, fetched = None, False
        for item in loaded:
            failure, fetched = item.failure or failure, fetched or item.failure is None
            if item.pixels is None:
                yield item.number, item.outcome, None
                continue
            size = (item.pixels.shape[0], item.pixels.shape[1])
            batch = waiting.setdefault(size, [])
            batch.append(item)
            if len(batch) == self.predictor.full_batch(batch_size(*size, self.batch_pixels)):
                running.append(self.start(waiting.pop(size), clock))
                if len(running) > self.predictor.in_flight:
                    yield from self.collect(running.popleft(), clock)
        for batch in waiting.values():
            running.append(self.start(batch, clock))
            yield from self.collect(running.popleft(), clock)
        for rest in running:
            yield from self.collect(rest, clock)
        if failure and not fetched and not self.store_answers():  # one object can be at fault, all of them cannot
            raise failure

    def start(self, batch: list[Loaded], clock: "Stopwatch") -> Running:
        """Hand a batch to the device."""
        sizes = [(item.outcome.height or 0, item.outcome.width or 0) for item in batch]
        pixels = np.stack([item.pixels for item in batch if item.pixels is not None])
        with clock.time("infer" if self.predictor.is_ready_for(pixels.shape) else "compile"):
            return Running([replace(item, pixels=None) for item in batch], self.predictor.start(pixels, sizes))

    def collect(self, running: Running, clock: "Stopwatch") -> Iterator[tuple[int, Outcome, Segmentation]]:
        """What the device has found in a batch."""
        with clock.time("collect"):
            found = running.wait()
        for item, segmentation in zip(running.batch, found, strict=True):
            yield item.number, item.outcome, segmentation

    def encode(
        self, number: int, outcome: Outcome, found: Segmentation | None, clock: "Stopwatch"
    ) -> tuple[int, Outcome]:
        """The outcome with its mask as PNG."""
        if found is None:
            return number, outcome
        with clock.time("encode"):
            mask = encode_mask(found.mask, self.labels)
        return number, replace(outcome, mask=mask, segmentation=replace(found, mask=np.empty(0)))

    def summarise(self, images: list[PlannedImage], outcomes: list[Outcome]) -> Totals:
        segmentations = [outcome.segmentation for outcome in outcomes if outcome.segmentation]
        pixels = np.sum([found.pixels for found in segmentations], axis=0, initial=0) + np.zeros(len(self.labels), int)
        present = np.sum([found.pixels > 0 for found in segmentations], axis=0, initial=0) + np.zeros_like(pixels)
        return Totals(
            images=len(images),
            statuses=dict(Counter(outcome.status for outcome in outcomes)),
            engines={str(self.predictor): len(segmentations)},
            input_bytes=sum(image.bytes for image in images),
            output_bytes=sum(len(outcome.mask or b"") for outcome in outcomes),
            pixels=int(pixels.sum()),
            class_pixels={name: int(n) for name, n in zip(self.labels.names, pixels, strict=True) if n},
            class_images={name: int(n) for name, n in zip(self.labels.names, present, strict=True) if n},
        )


def ahead(pool: ThreadPoolExecutor, work: Callable[[T], U], items: Iterable[T], depth: int) -> Iterator[U]:
    """`map(work, items)` in order, with up to `depth` items in the pool's hands before they are asked for."""
    running: deque[Future[U]] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) >= depth:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


class Stopwatch:
    """Seconds spent in each stage, and how often, summed over threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seconds: dict[str, float] = defaultdict(float)
        self.count: Counter[str] = Counter()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.seconds[stage] += time.perf_counter() - started
                self.count[stage] += 1
