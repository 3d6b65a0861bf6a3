"""The road inside a worker: across shards, whatever the order of arrival, within its memory."""

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.bench.rungs import NullPredictor
from model.checkpoint import load_checkpoint
from model.labels import label_set
from model.predictor import Predictor
from model.segmentation import Segmentation
from model.windows import Tiling
from pipeline.config import SegmentSettings
from pipeline.containers import Images
from pipeline.decode import Decoded, decode, resize
from pipeline.masks import decode_mask
from pipeline.plan import PlannedImage
from pipeline.policy import parse_policy
from pipeline.reader import Reader
from pipeline.road import Road, network_input
from pipeline.schema import Outcome
from pipeline.storage import Store
from tests.conftest import NAMES, draw_image

LABELS = label_set(NAMES)


class Brightness(NullPredictor):
    """A device whose mask is one class, from the image's brightness; it remembers its batches."""

    batch_pixels = 4 * 64 * 64

    def __init__(self, delay: float = 0.0):
        self.delay, self.batches, self.lock = delay, [], threading.Lock()

    def __call__(self, images: np.ndarray, sizes: list[tuple[int, int]]) -> list[Segmentation]:
        time.sleep(self.delay)
        with self.lock:
            self.batches.append([image.tobytes() for image in images])
        return [self.found(image, size) for image, size in zip(images, sizes, strict=True)]

    def found(self, image: np.ndarray, size: tuple[int, int]) -> Segmentation:
        mask = np.full(size, int(image.mean()) % len(NAMES), np.uint8)
        return Segmentation(mask, np.bincount(mask.ravel(), minlength=len(NAMES)), np.ones(len(NAMES)), 1.0, 0.0)


class OddImages(Images):
    """Images that take their time, each another."""

    def __init__(self, config: SegmentSettings, delay: float = 0.0, seed: int = 0):
        super().__init__(Reader(config), None)
        self.delay, self.random, self.fetched = delay, random.Random(seed), []

    def fetch(self, image: PlannedImage) -> bytes:
        self.fetched.append(image.uri)
        time.sleep(self.delay * self.random.random() * 2)
        return super().fetch(image)


def config(folder: Path, **options: object) -> SegmentSettings:
    values = {"input": str(folder), "output": str(folder / "out"), "checkpoint": "-", "policy": "short=64", **options}
    return SegmentSettings(**values)


def draw(folder: Path, count: int, width: int = 64, height: int = 64, suffix: str = "png") -> list[PlannedImage]:
    """So many images of a size, as a plan knows them."""
    paths = [draw_image(folder / f"{width}x{height}-{n}.{suffix}", width, height, seed=n) for n in range(count)]
    store = Store(str(folder), config(folder))
    known = {entry.uri: entry for _, entry in store.listing() if entry}
    entries = [known[store.uri(path.name)] for path in paths]
    return [PlannedImage(entry.uri, entry.etag, entry.bytes, suffix, width, height) for entry in entries]


def outcomes(road: Road, images: list[PlannedImage]) -> list[Outcome]:
    found = dict(road.send(images).outcomes())
    return [found[number] for number in range(len(images))]


def test_the_next_shard_is_fetched_while_the_last_one_drains(tmp_path):
    first, second = draw(tmp_path / "a", 12), draw(tmp_path / "b", 12)
    settings = config(tmp_path)
    store, device = OddImages(settings), Brightness(delay=0.05)
    road = Road(store, device, LABELS, settings, 2, 1 << 30)
    shards = [road.send(first), road.send(second)]
    assert len(list(shards[0].outcomes())) == 12
    assert {image.uri for image in second} & set(store.fetched), "nothing was fetched before the first shard was done"
    assert len(list(shards[1].outcomes())) == 12
    road.close()
    assert road.gate.held == 0


def test_what_shares_a_batch_does_not_depend_on_what_comes_first(tmp_path):
    images = draw(tmp_path, 23) + draw(tmp_path, 9, 64, 128)
    settings = config(tmp_path, requests=16)
    seen = []
    for seed in range(4):
        device = Brightness()
        road = Road(OddImages(settings, delay=0.004, seed=seed), device, LABELS, settings, 2, 1 << 30)
        masks = [decode_mask(outcome.mask) for outcome in outcomes(road, images)]
        road.close()
        seen.append(sorted(device.batches))
        assert [mask.shape for mask in masks] == [(image.height, image.width) for image in images]
    assert sorted(map(len, seen[0])) == [1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4]
    assert seen.count(seen[0]) == 4


def test_a_small_memory_makes_small_batches_and_the_same_masks(tmp_path):
    images = draw(tmp_path, 20)
    settings = config(tmp_path)
    results = []
    for memory in (1, 1 << 30):
        device = Brightness()
        road = Road(Images(Reader(settings), None), device, LABELS, settings, 2, memory)
        results.append([outcome.mask for outcome in outcomes(road, images)])
        road.close()
        largest = max(road.load(image, 64, 64).waiting for image in images)
        assert max(map(len, device.batches)) == (1 if memory < 2 * largest else 4)
    assert results[0] == results[1]


def test_bad_images_are_outcomes_and_hold_nothing(tmp_path):
    good = draw(tmp_path, 6)
    broken, gone, grown, unknown = good[1:5]
    path = {image.uri: Path(image.uri.removeprefix("file://")) for image in good}
    path[broken.uri].write_bytes(b"x" * broken.bytes)
    path[gone.uri].unlink()
    draw_image(path[grown.uri], 200, 100)
    settings = config(tmp_path)
    store = Store(str(tmp_path), settings)
    again = {entry.uri: entry for _, entry in store.listing() if entry}
    images = [
        good[0],
        PlannedImage(broken.uri, again[broken.uri].etag, broken.bytes, "png", 64, 64),
        gone,
        PlannedImage(grown.uri, again[grown.uri].etag, again[grown.uri].bytes, "png", 64, 64),  # it is larger
        PlannedImage(unknown.uri, unknown.etag, unknown.bytes, None, None, None),
        PlannedImage("file:///nowhere", "", 1, "png", 20_000, 20_000),
    ]
    road = Road(Images(Reader(settings), None), Brightness(), LABELS, settings, 2, 1 << 30)
    statuses = [outcome.status for outcome in outcomes(road, images)]
    assert statuses == ["ok", "unreadable", "missing", "ok", "ok", "too_large"]
    road.close()
    assert road.gate.held == 0


def test_settings_of_decoding_reach_the_decoder_and_masks_keep_the_images_size(tmp_path):
    whole, cut = draw(tmp_path, 2, 400, 300, "jpg")
    path = Path(cut.uri.removeprefix("file://"))
    path.write_bytes(path.read_bytes()[: cut.bytes // 2])
    entry = next(entry for _, entry in Store(str(tmp_path), config(tmp_path)).listing() if entry.uri == cut.uri)
    images = [whole, PlannedImage(cut.uri, entry.etag, entry.bytes, "jpeg", 400, 300)]
    found = {}
    for options in ({}, {"allow_truncated": True, "scaled_decoding": True}):
        settings, device = config(tmp_path, **options), Brightness()
        road = Road(Images(Reader(settings), None), device, LABELS, settings, 2, 1 << 30)
        found[len(options)] = outcomes(road, images)
        road.close()
    assert [outcome.status for outcome in found[0]] == ["ok", "unreadable"]
    assert [outcome.status for outcome in found[2]] == ["ok", "ok"]
    for outcome in found[2]:
        assert decode_mask(outcome.mask).shape == (outcome.height, outcome.width) == (300, 400)


class SmallDevice(Brightness):
    """A device that says in one of its ways that its memory is full, where a batch is over so many images."""

    batch_pixels = 8 * 64 * 64
    errors = (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 1 TB"))

    def __init__(self, most: int, unfit: np.ndarray | None = None):
        super().__init__()
        self.most, self.unfit, self.full = most, unfit, []

    def __call__(self, images: np.ndarray, sizes: list[tuple[int, int]]) -> list[Segmentation]:
        if len(images) > self.most or any(np.array_equal(image, self.unfit) for image in images):
            self.full.append(len(images))
            raise self.errors[len(self.full) % 3]
        return super().__call__(images, sizes)


@pytest.mark.parametrize("scales", ["1", "0.5,1"])
def test_a_batch_that_does_not_fit_is_halved_and_what_fits_is_remembered(tmp_path, scales):
    images, wide = draw(tmp_path, 40), draw(tmp_path, 4, 128, 64)
    settings = config(tmp_path, scales=scales)
    results = {}
    for most in (3, 8):
        device = SmallDevice(most)
        device.lanes = 1  # else two batches may be too large before either is done
        road = Road(Images(Reader(settings), None), device, LABELS, settings, 2, 1 << 30)
        shard = road.send([*images, *wide])
        results[most] = [outcome.mask for _, outcome in sorted(shard.outcomes(), key=lambda pair: pair[0])]
        assert sum(map(len, device.batches)) == sum(shard.batches) == 44
        if most == 3:
            assert device.full == shard.halved == shard.misfits == [8, 4, 4]  # twice for one bucket, once for the other
            assert road.fitting == {"64x64": 2, "64x128": 2}
        fills = [(2, 8)] * 20 + [(2, 4)] * 2 if most == 3 else [(8, 8)] * 5 + [(4, 4)]
        assert sorted(shard.fills) == sorted(fills), "of what the device is meant to take at once"
        road.close()
    assert results[3] == results[8]


def test_an_image_that_does_not_fit_even_alone_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.road.PAUSES", (0.01, 0.01))
    images = draw(tmp_path, 16)
    unfit = np.array(Image.open(images[5].uri.removeprefix("file://")))
    device, settings = SmallDevice(8, unfit), config(tmp_path)
    device.lanes = 1
    road = Road(Images(Reader(settings), None), device, LABELS, settings, 2, 1 << 30)
    shard = road.send(images)
    found = dict(shard.outcomes())
    road.close()
    assert [number for number, outcome in found.items() if outcome.status != "ok"] == [5]
    assert found[5].status == "failed"
    assert "does not fit the device's memory at 64x64, even alone" in found[5].error
    assert (found[5].width, found[5].height, found[5].mask) == (64, 64, None)
    assert device.full == shard.misfits == [8, 4, 2, 1, 1, 1]
    assert shard.halved == [8, 4, 2]
    assert road.gate.held == 0


def test_windows_that_do_not_fit_are_fewer_at_a_time_and_the_masks_the_same(tmp_path, checkpoint, monkeypatch):
    """A panorama of many windows, images that share a batch, and one that no device is large enough for."""
    monkeypatch.setattr("pipeline.road.PAUSES", (0.01,))
    images = draw(tmp_path, 1, 150, 200) + draw(tmp_path, 5, 64, 50) + draw(tmp_path, 1, 150, 100)
    settings = config(tmp_path, policy="native=64+32", batch_pixels=64 * 64 * 24, flip=True)
    loaded = load_checkpoint(checkpoint)
    predictor = Predictor(loaded, "cpu", precision="float32")
    predictor.lanes = 1
    through_windows, results = predictor.through_windows, {}

    def small(images: list[np.ndarray], tiling: Tiling, batch: int, flip: bool) -> list[Segmentation]:
        if batch > most or (most == 3 and any(image.shape == (100, 150, 3) for image in images)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return through_windows(images, tiling, batch, flip)

    monkeypatch.setattr(predictor, "through_windows", small)
    for most in (3, 24):
        road = Road(Images(Reader(settings), None), predictor, loaded.labels, settings, 2, 1 << 30)
        shard = road.send(images)
        results[most] = [outcome for _, outcome in sorted(shard.outcomes(), key=lambda pair: pair[0])]
        assert shard.halved == ([24, 12, 6, 3, 2] if most == 3 else [])
        assert road.fitting == ({"64x64": 1} if most == 3 else {})
        road.close()
    assert [outcome.status for outcome in results[3]] == ["ok"] * 6 + ["failed"]
    assert [outcome.mask for outcome in results[3][:6]] == [outcome.mask for outcome in results[24][:6]]


def test_a_device_that_fails_fails_the_shard_and_not_the_next(tmp_path):
    class Failing(Brightness):
        def __call__(self, images: np.ndarray, sizes: list[tuple[int, int]]) -> list[Segmentation]:
            if len(images) == 3:
                raise RuntimeError("the device is lost")
            return super().__call__(images, sizes)

    images = draw(tmp_path, 8)
    settings = config(tmp_path)
    road = Road(Images(Reader(settings), None), Failing(), LABELS, settings, 2, 1 << 30)
    bad, good = road.send(images[:7]), road.send(images)
    with pytest.raises(RuntimeError, match="device is lost"):
        list(bad.outcomes())
    assert len(list(good.outcomes())) == 8
    road.close()
    assert road.gate.held == 0


def test_a_slow_store_gets_more_requests_and_a_fast_one_does_not(tmp_path):
    images = draw(tmp_path, 40) * 12
    settings = config(tmp_path)
    grown = []
    for delay in (0.0, 0.1):
        road = Road(OddImages(settings, delay), Brightness(), LABELS, settings, 2, 1 << 30)
        outcomes(road, images)
        grown.append(len(road.fetching.threads))
        road.close()
    assert grown[0] < 32 < grown[1]
    road = Road(OddImages(settings, 0.1), Brightness(), LABELS, config(tmp_path, requests=3), 2, 1 << 30)
    outcomes(road, images[:80])
    assert len(road.fetching.threads) == 3
    road.close()


def test_native_images_keep_their_pixels_and_fill_batches_with_windows(tmp_path, checkpoint):
    images = (
        draw(tmp_path, 5, 64, 50) + draw(tmp_path, 3, 150, 200) + draw(tmp_path, 1, 33, 31) + draw(tmp_path, 1, 1, 1)
    )
    settings = config(tmp_path, policy="native=64+32", batch_pixels=64 * 64 * 24)
    loaded = load_checkpoint(checkpoint)
    predictor = Predictor(loaded, "cpu", precision="float32")
    road = Road(Images(Reader(settings), None), predictor, loaded.labels, settings, 2, 1 << 30)
    shard = road.send(images)
    found = [outcome for _, outcome in sorted(shard.outcomes(), key=lambda pair: pair[0])]
    road.close()
    for image, outcome in zip(images, found, strict=True):
        pixels = np.array(Image.open(image.uri.removeprefix("file://")).convert("RGB"))
        (expected,) = predictor.through_windows([pixels], Tiling(64, 32), 24)
        assert outcome.status == "ok"
        assert (decode_mask(outcome.mask) == expected.mask).mean() > 0.999
    assert [outcome.bucket for outcome in found] == ["64x64"] * 8 + ["32x64", "32x32"]
    assert sorted(shard.batches) == [1, 1, 1, 1, 1, 5]  # 150x200 is 4x6 windows: a batch by itself
    assert sorted(shard.fills) == [(1, 48), (1, 96), (5, 24), (24, 24), (24, 24), (24, 24)]
    assert road.gate.held == 0


def test_each_look_is_made_of_the_image_itself_and_a_batch_is_as_large_as_the_largest_allows(tmp_path, checkpoint):
    images = draw(tmp_path, 5, 150, 100)
    settings = config(tmp_path, scales="0.5,1,1.5", flip=True, batch_pixels=3 * 96 * 160)
    loaded = load_checkpoint(checkpoint)
    predictor = Predictor(loaded, "cpu", precision="float32")
    asked: list[tuple[int, ...]] = []
    predictor.is_ready_for = lambda shape: asked.append(shape) or shape[1] != 96  # of a compiled network
    road = Road(Images(Reader(settings), None), predictor, loaded.labels, settings, 2, 1 << 30)
    shard = road.send(images)
    found = [outcome for _, outcome in sorted(shard.outcomes(), key=lambda pair: pair[0])]
    road.close()
    assert {outcome.bucket for outcome in found} == {"64x96"}
    assert sorted(shard.batches) == [2, 3], "of the bucket's size 7 would be a batch"
    assert {shape[1:] for shape in asked} == {(32, 64, 3), (64, 96, 3), (96, 160, 3)}
    assert shard.clock.seconds["compile", "busy"] > 0
    for image, outcome in zip(images, found, strict=True):
        pixels = np.array(Image.open(image.uri.removeprefix("file://")))
        views = [resize(pixels, *size)[None] for size in ((32, 64), (64, 96), (96, 160))]
        (expected,) = predictor.at_scales(views, (64, 96), [(100, 150)], flip=True)
        assert (decode_mask(outcome.mask) == expected.mask).mean() > 0.999
        assert outcome.segmentation.confidence == pytest.approx(expected.confidence, abs=1e-5)
    assert road.load(images[0], 100, 150).waiting > images[0].bytes + 6 * (32 * 64 + 64 * 96 + 96 * 160)
    assert road.gate.held == 0


def test_scaled_decoding_is_enough_for_the_largest_look(tmp_path, monkeypatch):
    data, decoded = draw_image(tmp_path / "large.jpg", 1200, 800).read_bytes(), []

    def spy(*arguments: object) -> Decoded:
        decoded.append(decode(*arguments))
        return decoded[-1]

    monkeypatch.setattr("pipeline.road.decode", spy)
    policy = parse_policy("short=64")
    for scales in ("0.5,1", "1,2", "1,6"):
        found = network_input(data, policy, config(tmp_path, scales=scales, scaled_decoding=True), lambda *size: None)
        largest = found.pixels[-1].shape
        assert (found.height, found.width) == (800, 1200)
        assert all(there >= wanted for there, wanted in zip(decoded[-1].pixels.shape, largest, strict=True))
    assert [image.pixels.shape[0] for image in decoded] == [100, 200, 400]


MIX = [(24, 640, 480, "jpg"), (4, 4032, 3024, "jpg"), (3, 2048, 1536, "png"), (12, 375, 500, "webp")]
MEASURE = """
import json, sys
from pathlib import Path
import torch
from model.checkpoint import load_checkpoint
from model.predictor import Predictor
from pipeline.containers import Images
from pipeline.reader import Reader
from pipeline.road import Road
from pipeline.segment import resident_memory
from tests.pipeline.test_road import config, draw

folder, checkpoint, memory, shapes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
options = json.loads(sys.argv[5])
images = [image for count, width, height, suffix in shapes for image in draw(folder, count, width, height, suffix)]
torch.set_num_threads(2)
settings = config(folder, **options)
loaded = load_checkpoint(checkpoint)
road = Road(Images(Reader(settings), None), Predictor(loaded, "cpu"), loaded.labels, settings, 2, memory)
Path("/proc/self/clear_refs").write_text("5")  # drawing took memory too: the peak counts from here
started = resident_memory("VmRSS")
shard = road.send(images)
assert all(outcome.status == "ok" for _, outcome in shard.outcomes())
print(json.dumps([started, resident_memory("VmHWM"), started + road.bound()]))
"""


@pytest.mark.parametrize(
    ("options", "memory", "shapes"),
    [
        ({"policy": "short=512"}, 256 << 20, [(16, 3840, 2160, "jpg")]),
        ({"policy": "short=512"}, 256 << 20, MIX),
        ({"policy": "short=512"}, 1, [(3, 3840, 2160, "png")]),
        (
            {"policy": "native=1024+256", "flip": True},
            256 << 20,
            [(6, 640, 480, "jpg"), (1, 2500, 1600, "jpg"), (1, 1536, 2048, "png")],
        ),
        ({"policy": "short=512", "flip": True, "scales": "0.5,1,1.5"}, 64 << 20, [(6, 1280, 960, "jpg")]),
    ],
    ids=["4K", "mix", "one at a time", "windows", "looks"],
)
def test_a_worker_stays_within_its_stated_memory(tmp_path, checkpoint, options, memory, shapes):
    arguments = [str(tmp_path), checkpoint, str(memory), json.dumps(shapes), json.dumps(options)]
    command = [sys.executable, "-c", MEASURE, *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    started, peak, bound = json.loads(done.stdout)
    assert started < peak <= bound < started + (1 << 30)
