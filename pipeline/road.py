"""The road inside a worker: images of many shards in, what became of each of them out.

    fetch ──▶ decode and resize ──▶ batch ──▶ network ──▶ encode

Every stage has threads of its own and a bounded queue in front, and none knows where a shard ends: while the last
images of one are encoded, the first of the next are fetched. A batch is what the plan says, consecutive images of one
shard, whatever comes in first, so that what a mask is cannot depend on timing.

What is held is bounded by bytes, since images differ a thousandfold in size. An image is let in when there is room for
the most that it will need, which the plan knows; once decoded it gives most of that back, and the rest when its mask is
encoded. So, above what the process has when the network is loaded, a worker holds no more than

    memory                      the gate's limit, or the largest image alone
    + lanes x activations       of the batches that the network works on
    + shards' rows              encoded masks of the shards under way, and their Parquet files
    + one image                 whose size the plan does not know: such images are decoded one at a time

which `Road.bound` computes.
"""

import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from model.labels import LabelSet
from model.predictor import Predictor
from model.segmentation import Segmentation
from pipeline.config import SegmentSettings
from pipeline.decode import DecodeError, decode, resize
from pipeline.masks import encode_mask
from pipeline.plan import PlannedImage, batch_size
from pipeline.policy import parse_policy
from pipeline.schema import Outcome
from pipeline.stages import Clock, Gate, Stage
from pipeline.storage import CREDENTIALS, ERRORS, Store, error_code, reason

FETCH_ATTEMPTS = 3
REQUESTS = (8, 128)  # in flight: at first, and as many as the latency of the store may make of them
SUITED_EVERY = 64  # images
SPARE = 2  # times the requests that are wanted at the mean latency
DECODED = 16  # bytes a pixel while an image is decoded: Pillow's own 4, and what they are copied through
DEEP = {"tiff": 40, "png": 40}  # the same for formats whose samples may have 16 or 32 bits
SCALED = 3  # bytes a pixel of the network's input
MASKED = 3  # bytes a pixel, and a byte of its class id, of a mask that is made and encoded
CHANGED = Outcome("changed", "the object is another one than was indexed; run again")
FAILED = Outcome("failed")  # of an image whose shard has failed, and is never put
SIDES = ("height", "width")


@dataclass(eq=False)
class Shard:
    """The images of one shard on their way."""

    images: Sequence[PlannedImage]
    clock: Clock = field(default_factory=Clock)
    error: BaseException | None = None  # what fails all of it
    fetched: bool = False  # whether any object could be read
    failure: BaseException | None = None  # the store's, of an object that could not
    results: queue.SimpleQueue[tuple[int, Outcome]] = field(default_factory=queue.SimpleQueue)

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """What became of each image, by its number in the shard, as it becomes known."""
        for _ in self.images:
            result = self.results.get()
            if self.error:
                raise self.error
            yield result


@dataclass(frozen=True)
class Load:
    """Bytes that one image takes: at most, while it is decoded, and from then on until its mask is encoded."""

    decoding: int
    waiting: int

    @staticmethod
    def of(image: PlannedImage, size: tuple[int, int] | None, settings: SegmentSettings, classes: int) -> "Load":
        """What the plan says; nothing of an image that will not be decoded, or whose size is not known."""
        pixels = (image.width or 0) * (image.height or 0)
        if not size or pixels > settings.max_pixels:
            return Load(image.bytes, 0)
        scaled = SCALED * size[0] * size[1]
        decoding = image.bytes + DEEP.get(image.format or "", DECODED) * pixels + scaled
        return Load(decoding, scaled + MASKED * (1 if classes <= 256 else 2) * pixels)


@dataclass(eq=False)
class Item:
    """One image on its way; what a stage is done with is dropped."""

    job: Shard
    number: int
    image: PlannedImage
    batch: "Batch"
    load: "Load"
    data: bytes | None = None  # encoded
    pixels: np.ndarray | None = None  # uint8 (H, W, 3) at the bucket's size
    found: Segmentation | None = None
    outcome: Outcome | None = None


@dataclass(eq=False)
class Batch:
    """Consecutive images of a shard that the network sees together."""

    job: Shard
    items: list[Item] = field(default_factory=list)
    arrived: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_complete(self) -> bool:
        """Count one more image as decoded; whether it was the last."""
        with self.lock:
            self.arrived += 1
            return self.arrived == len(self.items)


class Road:
    """The stages and their threads, which live as long as the worker."""

    def __init__(
        self,
        source: Store,
        predictor: Predictor,
        labels: LabelSet,
        settings: SegmentSettings,
        threads: int,
        memory: int,
    ):
        """`threads` each decode, encode and, on a CPU, run the network; `memory` in bytes is the gate's limit."""
        self.source, self.predictor, self.labels, self.settings = source, predictor, labels, settings
        self.policy = parse_policy(settings.policy)
        self.batch_pixels = settings.batch_pixels or predictor.batch_pixels
        self.gate = Gate(memory)
        self.unplanned = threading.Lock()
        self.largest_load, self.largest_batch, self.has_unplanned = 0, 0, False  # so far
        self.shards: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        requests = settings.requests or REQUESTS[0]
        pool = max(2, threads)
        self.encoding = Stage("encode", pool, 4 * pool, self.encode, self.arrived, None, single_threaded)
        self.inference = Stage(
            *("infer", predictor.lanes, settings.prefetch, self.infer, lambda batch: batch.items, self.encoding),
            lambda: torch.set_num_threads(predictor.lane_threads),
        )
        self.decoding = Stage("decode", pool, pool, self.decode, self.decoded, self.inference, single_threaded)
        self.fetching = Stage("fetch", requests, 1, self.fetch, lambda item: [item], self.decoding)
        self.feeder = threading.Thread(target=self.feed, name="feed", daemon=True)
        self.feeder.start()

    def send(self, images: Sequence[PlannedImage]) -> Shard:
        """Put the images of a shard on their way, behind those that are on it."""
        shard = Shard(images)
        self.shards.put(shard)
        return shard

    def bound(self) -> int:
        """The most bytes that all of this may hold at once, for the images that have come so far; rows apart."""
        unplanned = self.settings.max_pixels * max(DEEP.values()) if self.has_unplanned else 0
        activations = self.predictor.lanes * self.predictor.activations(self.largest_batch)
        return max(self.gate.limit, self.largest_load) + activations + unplanned

    def close(self) -> None:
        """End the threads once everything has arrived."""
        self.shards.put(None)
        self.feeder.join()
        for stage in (self.fetching, self.decoding, self.inference, self.encoding):
            stage.close()

    def feed(self) -> None:
        """Let in image after image, shard after shard, as there is room."""
        while shard := self.shards.get():
            for batch in self.batches(shard):
                for item in batch.items:
                    self.largest_load = max(self.largest_load, item.load.decoding)
                    self.gate.admit(item.load.decoding)
                    self.fetching.put(item)
                    if item.number % SUITED_EVERY == SUITED_EVERY - 1:
                        self.suit(shard.clock)

    def suit(self, clock: Clock) -> None:
        """Have as many requests in flight as the store's latency wants, so that fetching does not bound the rest."""
        pool = {stage.name: len(stage.threads) for stage in (self.decoding, self.inference, self.encoding)}
        done = clock.count["encode"]
        if self.settings.requests or not done:
            return
        pace = max(clock.seconds[stage, "busy"] / threads for stage, threads in pool.items()) / done
        latency = clock.seconds["fetch", "busy"] / clock.count["fetch"]
        self.fetching.grow(min(math.ceil(SPARE * latency / pace), REQUESTS[1]))

    def batches(self, shard: Shard) -> Iterator[Batch]:
        """The images of a shard in order, as many in a batch as are good for the device and fit into the memory."""
        batch, held, largest, before = Batch(shard), 0, 0, None
        for number, (image, size) in enumerate(zip(shard.images, self.input_sizes(shard.images), strict=True)):
            load = Load.of(image, size, self.settings, len(self.labels))
            full = self.predictor.full_batch(batch_size(*size, self.batch_pixels)) if size else 1
            largest = max(largest, load.decoding)
            no_room = held + load.waiting + largest > self.gate.limit
            if batch.items and (len(batch.items) >= full or size != before or no_room):
                yield batch
                batch, held, largest = Batch(shard), 0, load.decoding
            batch.items.append(Item(shard, number, image, batch, load))
            self.largest_batch = max(self.largest_batch, math.prod(size or (0,)) * len(batch.items))
            self.has_unplanned |= not size
            held, before = held + load.waiting, size
        yield batch

    def input_sizes(self, images: Sequence[PlannedImage]) -> list[tuple[int, int] | None]:
        """Network input (height, width) of each image; None where the plan does not know its size."""
        known = [bool(image.height and image.width) for image in images]
        sizes = self.policy.sizes(*(np.array([getattr(image, side) or 1 for image in images]) for side in SIDES))
        pairs = zip(*(side.tolist() for side in sizes), strict=True)
        return [pair if is_known else None for pair, is_known in zip(pairs, known, strict=True)]

    def fetch(self, item: Item) -> None:
        """The object's bytes, or why there are none."""
        image, limit = item.image, self.settings.max_pixels
        if (image.width or 0) * (image.height or 0) > limit:
            item.outcome = Outcome("too_large", f"{image.width}x{image.height} is over --max-pixels {limit:,}")
            return
        try:
            item.data = self.read(image.uri)
        except FileNotFoundError:
            item.outcome = Outcome("missing", "the object is gone since it was indexed")
        except ERRORS as error:
            if error_code(error) in CREDENTIALS:
                raise
            item.job.failure = error
            item.outcome = Outcome("failed", reason(error))
        else:
            item.job.fetched = True
            if len(item.data) != image.bytes or not self.source.is_unchanged(image.uri, image.etag):
                item.data, item.outcome = None, CHANGED

    def read(self, uri: str) -> bytes:
        """The object's bytes; a store that fails is asked again."""
        for attempt in range(FETCH_ATTEMPTS - 1):
            try:
                return self.source.fetch(uri)
            except (FileNotFoundError, PermissionError):
                raise
            except ERRORS:
                time.sleep(2**attempt)
        return self.source.fetch(uri)

    def decode(self, item: Item) -> None:
        """Bytes to pixels at the size that the network wants."""
        if item.data is None:
            return
        planned = (item.image.width or 0) * (item.image.height or 0)
        try:
            if planned:
                pixels = decode(item.data, planned)
            else:
                with self.unplanned:
                    pixels = decode(item.data, self.settings.max_pixels)
        except DecodeError as error:
            grown = planned and error.status == "too_large"  # the header is not the one that was indexed
            item.outcome = CHANGED if grown else Outcome(error.status, str(error))
            return
        finally:
            item.data = None
        height, width = pixels.shape[:2]
        bucket_h, bucket_w = self.policy.size(height, width)
        item.pixels = resize(pixels, bucket_h, bucket_w)
        item.outcome = Outcome("ok", width=width, height=height, bucket=f"{bucket_h}x{bucket_w}")

    def decoded(self, item: Item) -> list[Batch]:
        """Make room for the next image; the batch, if this was the last that it waited for."""
        self.gate.give_back(item.load.decoding - item.load.waiting)
        return [item.batch] if item.batch.is_complete() else []

    def infer(self, batch: Batch) -> None:
        """Run the network over what has pixels. Almost always that has one size; each has its turn."""
        for shape in {item.pixels.shape for item in batch.items if item.pixels is not None}:
            items = [item for item in batch.items if item.pixels is not None and item.pixels.shape == shape]
            pixels = np.stack([item.pixels for item in items if item.pixels is not None])
            sizes = [(item.outcome.height or 0, item.outcome.width or 0) for item in items if item.outcome]
            is_ready, started = self.predictor.is_ready_for(pixels.shape), time.perf_counter()
            for item, found in zip(items, self.predictor(pixels, sizes), strict=True):
                item.pixels, item.found = None, found
            if not is_ready:  # a part of the stage's time that is worth knowing
                batch.job.clock.add("compile", "busy", time.perf_counter() - started)

    def encode(self, item: Item) -> None:
        """The mask as PNG."""
        if item.found and item.outcome:
            mask, segmentation = encode_mask(item.found.mask, self.labels), replace(item.found, mask=np.empty(0))
            item.outcome, item.found = replace(item.outcome, mask=mask, segmentation=segmentation), None

    def arrived(self, item: Item) -> list[Item]:
        """Hand the outcome to whoever waits for it."""
        self.gate.give_back(item.load.waiting)
        item.job.results.put((item.number, item.outcome or FAILED))
        return []


def single_threaded() -> None:
    """Have PyTorch compute in the calling thread alone: there are as many of these as there are CPUs."""
    torch.set_num_threads(1)
