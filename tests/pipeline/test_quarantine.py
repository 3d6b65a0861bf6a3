"""Images that end their workers: found, written down, and paid for by nobody else."""

import ctypes
import os
import signal

import pytest

import pipeline.road
from model.checkpoint import Checkpoint, load_checkpoint
from model.predictor import Predictor
from pipeline.config import SegmentSettings
from pipeline.containers import Images
from pipeline.plan import PlannedImage
from pipeline.reader import Reader
from pipeline.road import Road
from pipeline.run import IncompleteRunError, segment
from pipeline.segment import Segmenter
from tests.conftest import draw_image
from tests.pipeline.test_road import outcomes
from tests.pipeline.test_run import Watcher, descendants, rows_of

KILL = b"a decoder's bug"  # after the end of an image
decode = pipeline.road.decode


class Mortal(Segmenter):
    """A worker whose decoder crashes with some images."""

    def __init__(self, *arguments: object):
        pipeline.road.decode = self.decode
        super().__init__(*arguments)

    def decode(self, data: bytes, *arguments: object) -> object:
        if data.endswith(KILL):
            ctypes.string_at(0)
        return decode(data, *arguments)


class HubKiller(Watcher):
    """Kills the hub when a shard is in quarantine, so that it knows of deaths."""

    killed = 0

    def segmenting(self, done: int, total: int, failures: int) -> None:
        super().segmenting(done, total, failures)
        apart = [pid for pid, command in descendants(os.getpid()) if "multiprocessing.spawn" in command]
        if apart and not self.killed:
            self.killed = next(pid for pid, command in descendants(os.getpid()) if "Hub" in command)
            os.kill(self.killed, signal.SIGKILL)


def test_an_image_that_kills_its_worker_each_time_is_a_row_and_a_hub_that_is_killed_counts_on(checkpoint, tmp_path):
    folder = tmp_path / "images"
    for number in range(3):
        draw_image(folder / f"{number}.png", 64, 48, seed=number)
        draw_image(folder / f"tall-{number}.png", 48, 64, seed=number)
    with (folder / "1.png").open("ab") as file:
        file.write(KILL)
    settings = SegmentSettings(
        input=str(folder), output=str(tmp_path / "out"), checkpoint=checkpoint, policy="short=64", shard_images=3
    )
    watcher = HubKiller()
    record = segment(settings, watcher, Mortal).record
    assert record["statuses"] == {"ok": 5, "failed": 1}
    rows = rows_of(tmp_path / "out")
    assert sorted(row["uri"] for row in rows) == sorted(f"file://{path}" for path in folder.glob("*"))
    (killer,) = [row for row in rows if row["status"] == "failed"]
    assert killer["uri"].endswith("/1.png")
    assert killer["error"] == "ended its worker: signal 11 (SIGSEGV)"
    assert record["quarantined"] >= 1

    assert watcher.killed
    assert watcher.seen[-1] == (6, 6, 1)
    assert watcher.metric('swath_images_total{status="ok"}') == 5
    assert watcher.metric('swath_images_total{status="failed"}') == 1
    assert watcher.metric("swath_quarantined_shards_total") == record["quarantined"]
    assert watcher.metric("swath_mask_pixels_total") == record["pixels"]
    assert watcher.metric("swath_planned_images") == 6
    assert watcher.metric("swath_workers") == 1

    loaded = load_checkpoint(checkpoint)
    road = Road(Images(Reader(settings), None), Predictor(loaded, "cpu"), loaded.labels, settings, 2, 1 << 30)
    images = [
        PlannedImage(*(row[name] for name in ("uri", "etag", "bytes", "format", "width", "height"))) for row in rows
    ]
    for row, ordinary in zip(rows, outcomes(road, images), strict=True):
        assert row["mask"] == (ordinary.mask if row is not killer else None)
    road.close()


class Stillborn(Segmenter):
    """A worker that dies when it loads."""

    def __init__(self, *arguments: object):
        pipeline.segment.LOADS = 1
        super().__init__(*arguments)

    def load(self, checkpoint: Checkpoint) -> Predictor:
        os._exit(3)


def test_a_worker_that_dies_whenever_it_loads_ends_the_run(collection, checkpoint, tmp_path):
    settings = SegmentSettings(input=str(collection), output=str(tmp_path / "out"), checkpoint=checkpoint)
    with pytest.raises(IncompleteRunError, match="a worker died 1 times while it loaded the checkpoint"):
        segment(settings, Watcher(), Stillborn)
