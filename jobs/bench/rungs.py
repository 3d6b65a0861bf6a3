"""One rung of the road's ladder, in a process of its own: `python -m jobs.bench.rungs RUNG CASE`, CASE as JSON.

The last line that it prints is JSON: when the first and the last image of its steady stretch were done, and how many
lay between, so that whoever watches the process knows what an image cost once everything had started.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from model.checkpoint import Checkpoint, load_checkpoint
from model.predictor import Predictor
from model.segmentation import Segmentation
from pipeline.config import SegmentSettings
from pipeline.containers import Images
from pipeline.decode import decode, resize
from pipeline.index import update_index
from pipeline.masks import encode_mask
from pipeline.plan import PlannedImage, make_plan, planned_images
from pipeline.policy import parse_policy
from pipeline.reader import Reader
from pipeline.road import Road
from pipeline.run import segment
from pipeline.schema import Outcome, encode_shard, row
from pipeline.segment import Segmenter
from pipeline.storage import Entry, Store
from pipeline.tables import workspace

SHARD = 512  # images
SLEEP, SLEEPERS = 0.080, 32  # seconds a batch, images in one
READY = 64  # images in memory for the model alone
REQUESTS = 16  # in flight in each bare process, where the source is not a disk


@dataclass(frozen=True)
class Case:
    """What a rung works on."""

    source: str
    output: str
    checkpoint: str
    policy: str
    threads: int

    def settings(self, **more: Any) -> SegmentSettings:
        return SegmentSettings(
            input=(self.source,), output=self.output, checkpoint=self.checkpoint, policy=self.policy, **more
        )


@dataclass
class Stretch:
    """The steady stretch of a rung: from when the first images were done until the last ones were."""

    began: float = 0.0
    ended: float = 0.0
    first: int = 0
    images: int = 0
    device_busy: float | None = None

    def done(self, images: int) -> None:
        """So many are done by now."""
        now = time.time()
        if images and not self.first:
            self.began, self.first = now, images
        if images > self.images:
            self.ended, self.images = now, images


@cache
def flat_mask(height: int, width: int) -> Segmentation:
    """Areas as a network finds them: a real mask of the demo's, at any size."""
    from jobs.scenes.street import CLASSES, draw_scene

    mask = draw_scene(0, 640, 480).mask
    rows, columns = (np.arange(size) * mask.shape[axis] // size for axis, size in enumerate((height, width)))
    mask = np.ascontiguousarray(mask[rows][:, columns])
    pixels = np.bincount(mask.ravel(), minlength=len(CLASSES))
    return Segmentation(mask, pixels, np.ones(len(CLASSES), np.float32), 1.0, 0.0)


class NullPredictor:
    """A device that needs no time: masks are ready."""

    lanes, batch_pixels = 2, 512 * 512

    def __call__(self, images: np.ndarray, sizes: Iterable[tuple[int, int]]) -> list[Segmentation]:
        return [flat_mask(*size) for size in sizes]

    def at_scales(
        self, views: Sequence[np.ndarray], bucket: tuple[int, int], sizes: list[tuple[int, int]], flip: bool = False
    ) -> list[Segmentation]:
        return self(views[0], sizes)

    def full_batch(self, images: int) -> int:
        return images

    def is_ready_for(self, shape: tuple[int, ...]) -> bool:
        return True

    def enter_lane(self) -> None:
        pass

    def activations(self, pixels: int, mask_pixels: int, looks: int = 1) -> int:
        return 0

    def __str__(self) -> str:
        return "null"


class SleepingPredictor(NullPredictor):
    """A device that is busy for a while with each batch, one after the other, and needs no CPU for it."""

    def __init__(self, pixels: int, note: Path):
        self.batch_pixels, self.note = SLEEPERS * pixels, note
        self.device, self.seen, self.began = threading.Lock(), 0, 0.0

    def __call__(self, images: np.ndarray, sizes: Iterable[tuple[int, int]]) -> list[Segmentation]:
        with self.device:
            self.began = self.began or time.monotonic()
            time.sleep(SLEEP * len(images) / SLEEPERS)
            self.seen += len(images)
            busy = SLEEP * self.seen / SLEEPERS / (time.monotonic() - self.began)
        self.note.write_text(str(busy))
        return super().__call__(images, sizes)


class NullSegmenter(Segmenter):
    """The worker of a run, but for the network."""

    def load(self, checkpoint: Checkpoint) -> Predictor:
        return NullPredictor()  # type: ignore[return-value]


class SleepingSegmenter(Segmenter):
    """The same with a device that sleeps."""

    def load(self, checkpoint: Checkpoint) -> Predictor:
        height, width = parse_policy(self.job.settings.policy).size(480, 640)
        note = Path(self.job.settings.output) / "device-busy"
        return SleepingPredictor(height * width, note)  # type: ignore[return-value]


def entries(case: Case) -> list[Entry]:
    return [entry for _, entry in Store(case.source, case.settings()).listing() if entry]


def bare(case: Case, last: str) -> Stretch:
    """Plain processes, each with its share of the objects; `last` is what they do with them last."""
    found, stretch = entries(case), Stretch()
    size = max(1, min(SHARD // 8, len(found) // 40))
    chunks = [found[start : start + size] for start in range(0, len(found), size)]
    with get_context("forkserver").Pool(case.threads) as pool:
        for chunk in pool.imap_unordered(BareWork(case, last), chunks):
            stretch.done(stretch.images + chunk)
    return stretch


@dataclass(frozen=True)
class BareWork:
    """What one of the plain processes does with some objects; how many they were."""

    case: Case
    last: str

    def __call__(self, chunk: list[Entry]) -> int:
        store, labels = open_source(self.case)
        if "://" not in self.case.source:
            rows = [self.one(store, labels, entry) for entry in chunk]
        else:
            with ThreadPoolExecutor(REQUESTS) as pool:
                rows = list(pool.map(lambda entry: self.one(store, labels, entry), chunk))
        if self.last == "parquet":
            output = Store(self.case.output, self.case.settings())
            output.put(f"bare/{abs(hash(chunk[0].uri))}.parquet", encode_shard([row for row in rows if row], {}))
        return len(chunk)

    def one(self, store: Reader, labels: Any, entry: Entry) -> dict | None:
        data = store.fetch(entry.uri, entry.etag, entry.bytes)
        if self.last == "fetch":
            return None
        pixels = decode(data, 10**9).pixels
        height, width = pixels.shape[:2]
        resize(pixels, *parse_policy(self.case.policy).size(height, width))
        if self.last == "decode":
            return None
        found = flat_mask(height, width)
        mask = encode_mask(found.mask, labels)
        image = PlannedImage(entry.uri, entry.etag, entry.bytes, "jpeg", width, height)
        return row(image, Outcome("ok", None, width, height, None, found, mask), labels, "-", "-")


@cache
def open_source(case: Case) -> tuple[Reader, Any]:
    torch.set_num_threads(1)
    return Reader(case.settings()), load_checkpoint(case.checkpoint).labels


def shards(case: Case) -> list[list[PlannedImage]]:
    """The collection as a plan has it."""
    settings = case.settings()
    with workspace() as space:
        update_index(settings, Store(case.output, settings), space.tables, Watch(), map)
        plan = make_plan(space.tables, space.folder, parse_policy(case.policy), SHARD, settings.max_pixels)
        files = [pq.ParquetFile(part) for part in plan.parts]
        return [planned_images(file.read_row_group(n)) for file in files for n in range(file.num_row_groups)]


def stages(case: Case) -> Stretch:
    """The worker's stages alone, without Ray and Parquet."""
    store, labels = open_source(case)
    planned, stretch = shards(case), Stretch()
    road = Road(Images(store, None), NullPredictor(), labels, case.settings(), case.threads, 1 << 30)  # type: ignore[arg-type]
    for sent in [road.send(images) for images in planned]:
        for _ in sent.outcomes():
            stretch.done(stretch.images + 1)
    road.close()
    return stretch


class Watch:
    """Listens to a run for its steady stretch."""

    def __init__(self) -> None:
        self.stretch = Stretch()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def listing(self, found: int) -> None:
        pass

    def indexing(self, done: int, total: int) -> None:
        pass

    def segmenting(self, done: int, total: int, failures: int) -> None:
        self.stretch.done(done)


def whole_run(case: Case, worker: type[Segmenter] = Segmenter, **settings: Any) -> Stretch:
    """Everything: index, plan, Ray, worker, Parquet, record."""
    watch = Watch()
    result = segment(case.settings(cpus_per_worker=case.threads, **settings), watch, worker)
    assert result.record
    assert set(result.record["statuses"]) == {"ok"}, result.record["statuses"]
    memory = {kind: f"{size / 2**20:,.0f} MiB" for kind, size in result.record["worker_memory"].items()}
    print("worker memory", memory, "busy", result.record["busy_shares"])
    note = Path(case.output) / "device-busy"
    watch.stretch.device_busy = float(note.read_text()) if note.exists() else result.record["busy_shares"]["infer"]
    return watch.stretch


def ready(case: Case, lanes: int | None = None) -> Stretch:
    """The network alone, on images that lie in memory at its size, to masks at theirs."""
    torch.set_num_threads(case.threads)
    predictor = Predictor(load_checkpoint(case.checkpoint), "cpu")
    lanes = lanes or predictor.lanes
    store, policy = Reader(case.settings()), parse_policy(case.policy)
    everything = [image for shard in shards(case) for image in shard]
    some = everything[:: max(1, len(everything) // READY)]
    sizes = [(image.height or 0, image.width or 0) for image in some]
    pixels = [
        resize(decode(store.fetch(image.uri, image.etag, image.bytes), 10**9).pixels, *policy.size(*size))
        for image, size in zip(some, sizes, strict=True)
    ]
    stretch, lock, todo = Stretch(), threading.Lock(), iter(range(len(everything)))

    def lane() -> None:
        torch.set_num_threads(case.threads // lanes)
        for number in todo:
            predictor(pixels[number % len(some)][None], [sizes[number % len(some)]])
            with lock:
                stretch.done(stretch.images + 1)

    threads = [threading.Thread(target=lane) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stretch


RUNGS: dict[str, Callable[[Case], Stretch]] = {
    "bare: fetch": lambda case: bare(case, "fetch"),
    "bare: + decode": lambda case: bare(case, "decode"),
    "bare: + encode": lambda case: bare(case, "encode"),
    "bare: + Parquet": lambda case: bare(case, "parquet"),
    "stages, null model": stages,
    "whole run, null model": lambda case: whole_run(case, NullSegmenter),
    "whole run, device sleeps": lambda case: whole_run(case, SleepingSegmenter),
    "model alone, one image at a time": lambda case: ready(case, 1),
    "model alone": ready,
    "whole run": whole_run,
}


def main() -> None:
    stretch = RUNGS[sys.argv[1]](Case(**json.loads(sys.argv[2])))
    print(json.dumps(vars(stretch)))


if __name__ == "__main__":
    from jobs.bench.rungs import main as named_main  # by its name Ray's processes find its classes

    named_main()
