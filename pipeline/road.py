"""The road inside a worker: images of many shards in, what became of each of them out.

    fetch ──▶ decode and resize ──▶ batch ──▶ network ──▶ encode

Every stage has threads of its own and a bounded queue in front, and none knows where a shard ends: while the last
images of one are encoded, the first of the next are fetched. A batch is what the plan says, consecutive images of one
shard, whatever comes in first, so that what a mask is cannot depend on timing.

What is held is bounded by bytes, since images differ a thousandfold in size. An image is let in when there is room for
all that will wait of it: its encoded bytes, the network's input, its mask. What decoding takes besides is much, and
not for long, so it has a gate of its own. Above what the process has when the network is loaded, there is no more than

    memory                      half of it at each of the two gates, or one image alone that is larger
    + lanes x activations       of the batches that the network works on
    + a few images              whose size the plan does not know, and which are let in without their mask

which `Road.bound` computes, and the rows of the shards under way, which `segment` adds.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from model.labels import LabelSet
from model.predictor import Predictor, use_threads
from model.segmentation import Segmentation
from pipeline import attempts
from pipeline.attempts import ERRORS, cause, is_of_credentials, reason
from pipeline.config import SegmentSettings
from pipeline.containers import ContainerError, Images
from pipeline.decode import DecodeError, decode, resize
from pipeline.masks import encode_mask
from pipeline.plan import PlannedImage, batch_size, bucket_size
from pipeline.policy import Looks, Policy, parse_policy
from pipeline.reader import ChangedError
from pipeline.schema import Outcome
from pipeline.stages import Clock, Gate, Stage

FEWEST_REQUESTS, MOST_REQUESTS = 8, 128  # in flight: at first, and as many as the store's latency may make of them
SUITED_EVERY = 32  # images
SPARE = 2  # times the requests that are wanted at the mean latency
DECODED = 18  # bytes a pixel while an image is decoded: 4 to 12 were measured for JPEG, 7 to 11 for PNG, 16 for WebP
DEEP = {"tiff": 70, "jpeg2000": 28}  # the same where more were: 8 to 16 for most TIFFs, 66 for one strip of doubles; 24
SCALED = 6  # bytes a pixel of the network's input, and of the batch that it is copied into
UNSCALED = 3  # the same of an image whose windows are copied as the network comes to them
MASKED = 3  # bytes a pixel, and a byte of its class id, of a mask that is made and encoded
PAUSES = (1.0, 4.0)  # seconds before an image alone is tried again, when there was no memory for it
ALLOCATION_FAILED = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
)  # PyTorch, CUDA, its libraries
CHANGED = Outcome("changed", "the object is another one than was indexed; run again")
FAILED = Outcome("failed")  # of an image whose shard has failed, and is never put


class AwayError(Exception):
    """The store gives nothing at all, for which no image can be blamed."""


@dataclass(eq=False)
class Shard:
    """The images of one shard on their way."""

    images: Sequence[PlannedImage]
    clock: Clock = field(default_factory=Clock)
    error: BaseException | None = None  # what fails all of it
    fetched: bool = False  # whether any object could be read
    failure: BaseException | None = None  # the store's, of an object that could not
    batches: list[int] = field(default_factory=list)  # images in each that the network has seen
    fills: list[tuple[int, int]] = field(
        default_factory=list
    )  # images or windows in them, and how many would fill them
    halved: list[int] = field(default_factory=list)  # images or windows in each that was too large for its memory
    misfits: list[int] = field(default_factory=list)  # the same of each time that there was not enough memory
    results: queue.SimpleQueue[tuple[int, Outcome]] = field(default_factory=queue.SimpleQueue)

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """What became of each image, by its number in the shard, as it becomes known."""
        for _ in self.images:
            result = self.results.get()
            if self.error:
                raise self.error
            yield result

    def fail(self, error: BaseException) -> None:
        """Have whoever waits for outcomes get this error."""
        self.error = error
        self.results.put((0, FAILED))


@dataclass(frozen=True)
class Load:
    """Bytes that one image takes: from the request until its mask is encoded, and besides while it is decoded."""

    waiting: int
    decoding: int

    @staticmethod
    def of(image: PlannedImage, pixels: int, inputs: int | None, classes: int) -> "Load":
        """Of an image with so many pixels that wait as `inputs` bytes for the network; its bytes alone for None."""
        if inputs is None:
            return Load(image.bytes, 0)
        mask = MASKED * (1 if classes <= 256 else 2) * pixels
        decoding = DEEP.get(image.format or "", DECODED) * pixels
        return Load(image.bytes + inputs + mask, decoding)

    def or_more(self, other: "Load") -> "Load":
        """What is enough for both."""
        return Load(max(self.waiting, other.waiting), max(self.decoding, other.decoding))


@dataclass(eq=False)
class Item:
    """One image on its way; what a stage is done with is dropped."""

    job: Shard
    number: int
    image: PlannedImage
    batch: "Batch"
    load: Load
    data: bytes | None = None  # encoded
    pixels: tuple[np.ndarray, ...] | None = None  # as in `Input`
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


@dataclass(frozen=True)
class Input:
    """An image as the network sees it. `height` and `width` are the image's own, in pixels.

    `pixels` are uint8 (h, w, 3) RGB, one for each scale at its size; or one of the image's own size, for windows.
    """

    pixels: tuple[np.ndarray, ...]
    height: int
    width: int


class Road:
    """The stages and their threads, which live as long as the worker."""

    def __init__(
        self,
        source: Images,
        predictor: Predictor,
        labels: LabelSet,
        settings: SegmentSettings,
        threads: int,
        memory: int,
        answers: Callable[[], bool] = lambda: True,
        ahead: Callable[[PlannedImage], Input | None] = lambda image: None,
    ):
        """`threads` each decode, encode and, on a CPU, run the network; `memory` is in bytes; `answers` says whether
        the store gives anything, when it has failed for long; `ahead` gives what was decoded elsewhere.
        """
        self.answers, self.ahead = answers, ahead
        self.source, self.predictor, self.labels, self.settings = source, predictor, labels, settings
        self.policy, self.looks = parse_policy(settings.policy), settings.looks
        self.batch_pixels = settings.batch_pixels or predictor.batch_pixels
        self.gate, self.decoder = Gate(memory // 2), Gate(memory // 2)
        self.largest, self.largest_unplanned, self.activations = Load(0, 0), 0, 0  # so far, for `bound`
        self.fed, self.retries_seen = 0, attempts.retries.total()
        self.fitting: dict[str, int] = {}  # images, or windows, of a bucket at once, where more did not fit the device
        self.shards: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        pool, requests = max(2, threads), settings.requests or FEWEST_REQUESTS
        enter_lane, lanes = predictor.enter_lane, predictor.lanes
        alone = partial(use_threads, 1)  # as there are as many of these threads as there are CPUs
        self.encoding = Stage("encode", pool, pool, self.encode, self.arrived, None, alone)
        self.inference = Stage("infer", lanes, settings.prefetch, self.infer, self.inferred, self.encoding, enter_lane)
        self.decoding = Stage("decode", pool, pool, self.decode, self.decoded, self.inference, alone)
        self.fetching = Stage("fetch", requests, 1, self.fetch, lambda item: [item], self.decoding)
        self.feeder = threading.Thread(target=self.feed, name="feed", daemon=True)
        self.feeder.start()

    def send(self, images: Sequence[PlannedImage]) -> Shard:
        """Put the images of a shard on their way, behind those that are on it."""
        shard = Shard(images)
        self.shards.put(shard)
        return shard

    def bound(self) -> int:
        """The most bytes that all of this may hold at once, for the images that have come so far."""
        gates = max(self.gate.limit, self.largest.waiting) + max(self.decoder.limit, self.largest.decoding)
        unplanned = self.largest_unplanned * sum(len(stage.threads) + stage.inbox.maxsize for stage in self.behind())
        return gates + self.predictor.lanes * self.activations + unplanned

    def behind(self) -> list[Stage]:
        """The stages where an image has pixels or a mask."""
        return [self.decoding, self.inference, self.encoding]

    def close(self) -> None:
        """End the threads once everything has arrived."""
        self.shards.put(None)
        self.feeder.join()
        for stage in (self.fetching, *self.behind()):
            stage.close()

    def feed(self) -> None:
        """Let in shard after shard."""
        while shard := self.shards.get():
            try:
                self.let_in(shard)
            except Exception as error:  # no image's fault, and nobody else would hear of it
                shard.fail(error)
            del shard

    def let_in(self, shard: Shard) -> None:
        """Let in image after image, as there is room."""
        for batch in self.batches(shard):
            for item in batch.items:
                self.gate.admit(item.load.waiting)
                self.fetching.put(item)
                self.fed += 1
                if self.fed % SUITED_EVERY == 0 and not self.settings.requests:
                    self.suit()

    def suit(self) -> None:
        """Have as many requests in flight as the store's latency wants, so that fetching does not bound the rest."""
        retries = attempts.retries.total()
        held_back, self.retries_seen = retries > self.retries_seen, retries
        latency, encoded = self.fetching.seconds_each(), self.encoding.clock.count["encode"]
        if held_back or not latency or not encoded:  # a store that is asked again has too many requests as it is
            return
        busy = [stage.clock.seconds[stage.name, "busy"] / len(stage.threads) for stage in self.behind()]
        self.fetching.grow(min(math.ceil(SPARE * latency * encoded / max(busy)), MOST_REQUESTS))

    def batches(self, shard: Shard) -> Iterator[Batch]:
        """The images of a shard in order, as many in a batch as are good for the device and fit into the memory."""
        batch, waiting, inputs, before = Batch(shard), 0, 0, None
        for number, (image, size) in enumerate(zip(shard.images, self.input_sizes(shard.images), strict=True)):
            load = self.load(image, image.height or 0, image.width or 0)
            windows = self.policy.windows(image.height or 1, image.width or 1)
            self.largest = self.largest.or_more(load)
            full = self.full_batch(*size) if size else 1
            no_room = waiting + load.waiting > self.gate.limit
            if batch.items and (inputs + windows > full or size != before or no_room):
                yield batch
                batch, waiting, inputs = Batch(shard), 0, 0
            batch.items.append(Item(shard, number, image, batch, load))
            waiting, inputs, before = waiting + load.waiting, inputs + windows, size
        yield batch

    def load(self, image: PlannedImage, height: int, width: int) -> Load:
        """What an image takes if it has this size; its bytes alone if it has none, or one that is not decoded."""
        pixels = height * width
        if not 0 < pixels <= self.settings.max_pixels:
            return Load.of(image, pixels, None, len(self.labels))
        return Load.of(image, pixels, input_bytes(height, width, self.policy, self.looks), len(self.labels))

    def full_batch(self, height: int, width: int) -> int:
        """How many inputs of a bucket's size are good for the device, at the largest look."""
        return self.predictor.full_batch(batch_size(*self.looks.largest(height, width), self.batch_pixels))

    def input_sizes(self, images: Sequence[PlannedImage]) -> list[tuple[int, int] | None]:
        """Network input (height, width) of each image; None where the plan does not know its size."""
        known = [bool(image.height and image.width) for image in images]
        heights, widths = (np.array([getattr(image, side) or 1 for image in images]) for side in ("height", "width"))
        pairs = zip(*(sides.tolist() for sides in self.policy.sizes(heights, widths)), strict=True)
        return [pair if is_known else None for pair, is_known in zip(pairs, known, strict=True)]

    def fetch(self, item: Item) -> None:
        """The object's bytes, or why there are none; or at once what has been made of them elsewhere."""
        image, limit = item.image, self.settings.max_pixels
        if image.error:  # there is nothing to fetch
            item.outcome = Outcome("unreadable", image.error)
            return
        if (image.width or 0) * (image.height or 0) > limit:
            item.outcome = Outcome("too_large", f"{image.width}x{image.height} is over --max-pixels {limit:,}")
            return
        if found := self.ahead(image):
            item.job.fetched = True
            self.take(item, found)
            return
        try:
            item.data = self.read(image)
        except FileNotFoundError:
            item.outcome = Outcome("missing", "the object is gone since it was indexed")
        except ChangedError:
            item.outcome = CHANGED
        except ContainerError as error:
            item.outcome = Outcome("unreadable", str(error))
        except ERRORS as error:
            if is_of_credentials(error):
                raise
            item.job.failure = error
            item.outcome = Outcome("failed", reason(error))
        else:
            item.job.fetched = True

    def read(self, image: PlannedImage) -> bytes:
        """The image's bytes. What a store has failed to give for so long is asked for once more if it gives others.

        Raises `AwayError` if it does not, as `Images.fetch` otherwise.
        """
        try:
            return self.source.fetch(image)
        except ERRORS as error:
            if not cause(error):
                raise
            if not self.answers():
                raise AwayError(reason(error)) from None
        return self.source.fetch(image)

    def decode(self, item: Item) -> None:
        """Bytes to pixels at the size that the network wants."""
        data, item.data = item.data, None
        if data is None:
            return
        try:
            with ExitStack() as room:
                self.take(item, network_input(data, self.policy, self.settings, partial(self.make_room, item, room)))
        except DecodeError as error:
            item.outcome = Outcome(error.status, str(error))

    def take(self, item: Item, image: Input) -> None:
        """Have an image's pixels for the network."""
        height, width = self.policy.size(image.height, image.width)
        item.pixels = image.pixels
        item.outcome = Outcome("ok", width=image.width, height=image.height, bucket=f"{height}x{width}")

    def make_room(self, item: Item, room: ExitStack, height: int, width: int) -> None:
        """Wait until an image of this size can be decoded; one that is larger than planned is charged for it."""
        if height * width > (item.image.height or 0) * (item.image.width or 0):
            load = self.load(item.image, height, width)
            self.gate.overdraw(load.waiting - item.load.waiting)
            item.load, self.largest = load, self.largest.or_more(load)
            self.largest_unplanned = max(self.largest_unplanned, load.waiting)
        room.enter_context(self.decoder.hold(item.load.decoding))

    def decoded(self, item: Item) -> list[Batch]:
        """The batch, if this was the last that it waited for."""
        return [item.batch] if item.batch.is_complete() else []

    def infer(self, batch: Batch) -> None:
        """Run the network over what has pixels. Almost always that has one bucket; each has its turn."""
        segment = self.unscaled if self.policy.native else self.scaled
        for bucket in {item.outcome.bucket for item in batch.items if item.outcome and item.outcome.bucket}:
            items = [item for item in batch.items if item.outcome and item.outcome.bucket == bucket]
            while items:
                items = items[segment(items, bucket) :]

    def scaled(self, items: list[Item], bucket: str) -> int:
        """Have the network see images that have been scaled to its input; with how many of the first it is done."""
        size, looks, some = bucket_size(bucket), self.looks, items[: self.fitting.get(bucket)]
        images, sizes = pixels_and_sizes(some)
        pixels = len(some) * max(math.prod(size), math.prod(looks.largest(*size)))
        held = self.predictor.activations(pixels, sum(map(math.prod, sizes)), looks.count)
        self.activations = max(self.activations, held)

        def network() -> list[Segmentation]:
            views = [np.stack(view) for view in zip(*images, strict=True)]
            return self.predictor.at_scales(views, size, sizes, looks.flip)

        return self.run(some, bucket, len(some), len(some), network)

    def unscaled(self, items: list[Item], bucket: str) -> int:
        """The same of images that it sees through windows of the bucket's size."""
        tiling, looks = self.policy.native, self.looks
        assert tiling
        most = self.fitting.get(bucket)
        some = items[:1] if most == 1 else items  # where not even two windows fit, what else is held matters too
        found, sizes = pixels_and_sizes(some)
        images = [pixels for (pixels,) in found]
        windows = sum(self.policy.windows(*size) for size in sizes)
        batch = min(windows, self.full_batch(*bucket_size(bucket)), most or windows)
        held = self.predictor.activations_through_windows(sizes, tiling, batch, looks.count)
        self.activations = max(self.activations, held)

        def network() -> list[Segmentation]:
            return self.predictor.through_windows(images, tiling, batch, looks.flip)

        return self.run(some, bucket, windows, batch, network)

    def run(
        self, items: list[Item], bucket: str, inputs: int, batch: int, network: Callable[[], list[Segmentation]]
    ) -> int:
        """Have the network see these images, which make so many inputs, in batches; with how many it is done.

        A batch that does not fit into the device's memory is halved, and no later one of the bucket is larger. One
        that cannot be halved is tried a few times, as others may have the memory for the moment, and then has failed.
        """
        job, is_least = items[0].job, batch == len(items) == 1
        shapes = [(batch, *size, 3) for size in self.looks.sizes(*bucket_size(bucket))]
        is_ready, started = all(map(self.predictor.is_ready_for, shapes)), time.perf_counter()
        if found := within_memory(network, PAUSES if is_least else (), lambda: job.misfits.append(batch)):
            for item, segmentation in zip(items, found, strict=True):
                item.pixels, item.found = None, segmentation
            full = self.full_batch(*bucket_size(bucket))
            job.batches.append(len(items))
            job.fills.append((inputs, max(inputs, math.ceil(inputs / batch) * full)))
            if not is_ready:  # a part of the stage's time that is worth knowing
                job.clock.add("compile", "busy", time.perf_counter() - started)
        elif is_least:
            error = f"does not fit the device's memory at {bucket}, even alone; see --policy, or take a larger device"
            items[0].pixels, items[0].outcome = None, replace(items[0].outcome or FAILED, status="failed", error=error)
        else:
            half = self.predictor.full_batch(max(1, (batch + 1) // 2))
            self.fitting[bucket] = min(half, self.fitting.get(bucket, half))
            job.halved.append(batch)
            return 0
        return len(items)

    def inferred(self, batch: Batch) -> list[Item]:
        """Its images, which go on by themselves."""
        items, batch.items = batch.items, []  # they know the batch: together they would never be freed
        return items

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


def network_input(
    data: bytes, policy: Policy, settings: SegmentSettings, make_room: Callable[[int, int], None]
) -> Input:
    """The image in `data` as the network wants it; each scale is made of all its pixels, not of another scale's.

    `make_room` is called with its height and width before they take memory. Raises `DecodeError`.
    """
    looks = settings.looks

    def admit(height: int, width: int) -> tuple[int, int] | None:
        make_room(height, width)
        is_enough = settings.scaled_decoding and not policy.native
        return looks.largest(*policy.size(height, width)) if is_enough else None

    image = decode(data, settings.max_pixels, admit, settings.allow_truncated)
    if policy.native:
        return Input((image.pixels,), image.height, image.width)
    sizes = looks.sizes(*policy.size(image.height, image.width))
    return Input(tuple(resize(image.pixels, *size) for size in sizes), image.height, image.width)


def input_bytes(height: int, width: int, policy: Policy, looks: Looks) -> int:
    """What an image of this size takes as `Input`, and in the batch that it is copied into."""
    if policy.native:
        return UNSCALED * height * width
    return SCALED * sum(map(math.prod, looks.sizes(*policy.size(height, width))))


def pixels_and_sizes(items: list[Item]) -> tuple[list[tuple[np.ndarray, ...]], list[tuple[int, int]]]:
    """The pixels of images, and their own (height, width)."""
    found = [(item.pixels, item.outcome) for item in items]
    images = [pixels for pixels, _ in found if pixels is not None]
    return images, [(outcome.height or 0, outcome.width or 0) for _, outcome in found if outcome]


def within_memory(
    network: Callable[[], list[Segmentation]], pauses: Sequence[float], note: Callable[[], None]
) -> list[Segmentation]:
    """What the network says, asked again after each of `pauses` (seconds); nothing when it never had the memory.

    `note` is called each time that it has not.
    """
    for pause in (*pauses, 0):
        try:
            return network()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            note()
        torch.cuda.empty_cache()  # not above: the error still held what had been computed
        time.sleep(pause)
    return []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of the network says that the device, or the host, has not enough memory."""
    is_named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_named or any(words in str(error) for words in ALLOCATION_FAILED)
