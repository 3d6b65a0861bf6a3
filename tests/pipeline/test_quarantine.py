"""Images that end their workers: found, written down, and paid for by nobody else."""

import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import load_checkpoint
from model.predictor import Predictor
from pipeline.config import SegmentSettings
from pipeline.containers import Images
from pipeline.metrics import Hub, Snapshot, choose_port
from pipeline.plan import PlannedImage
from pipeline.quarantine import Quarantine, Turns, along
from pipeline.reader import Reader
from pipeline.road import Road, Shard
from pipeline.run import IncompleteRunError, segment
from pipeline.segment import RowsError, check_rows
from pipeline.totals import Totals
from tests.conftest import draw_image
from tests.pipeline.mortal import KILL, Mortal, Stillborn
from tests.pipeline.test_road import LABELS, Brightness, config, draw, outcomes
from tests.pipeline.test_run import Watcher, descendants, rows_of


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
    for number in range(2):
        draw_image(folder / f"{number}.png", 64, 48, seed=number)
        draw_image(folder / f"tall-{number}.png", 48, 64, seed=number)
    with (folder / "1.png").open("ab") as file:
        file.write(KILL)
    settings = SegmentSettings(
        input=str(folder), output=str(tmp_path / "out"), checkpoint=checkpoint, policy="short=64", shard_images=2
    )
    watcher = HubKiller()
    record = segment(settings, watcher, Mortal).record
    assert record["statuses"] == {"ok": 3, "failed": 1}
    rows = rows_of(tmp_path / "out")
    assert sorted(row["uri"] for row in rows) == sorted(f"file://{path}" for path in folder.glob("*"))
    (killer,) = [row for row in rows if row["status"] == "failed"]
    assert killer["uri"].endswith("/1.png")
    assert killer["error"] == "ended its worker: signal 11 (SIGSEGV)"
    assert record["quarantined"] >= 1

    assert watcher.killed
    assert watcher.seen[-1] == (4, 4, 1)
    assert watcher.metric('swath_images_total{status="ok"}') == 3
    assert watcher.metric('swath_images_total{status="failed"}') == 1
    assert watcher.metric("swath_quarantined_shards_total") == record["quarantined"]
    assert watcher.metric("swath_mask_pixels_total") == record["pixels"]
    assert watcher.metric("swath_planned_images") == 4
    assert watcher.metric("swath_workers") == 1

    loaded = load_checkpoint(checkpoint)
    predictor = Predictor(loaded, "cpu", settings.engine, settings.precision)
    road = Road(Images(Reader(settings), None), predictor, loaded.labels, settings, 2, 1 << 30)
    images = [
        PlannedImage(*(row[name] for name in ("uri", "etag", "bytes", "format", "width", "height"))) for row in rows
    ]
    for row, ordinary in zip(rows, outcomes(road, images), strict=True):
        assert row["mask"] == (ordinary.mask if row is not killer else None)
    road.close()


@pytest.mark.usefixtures("on_shared_ray")
def test_a_worker_that_dies_whenever_it_loads_ends_the_run(collection, checkpoint, tmp_path):
    settings = SegmentSettings(input=str(collection), output=str(tmp_path / "out"), checkpoint=checkpoint)
    with pytest.raises(IncompleteRunError, match="a worker died 1 times while it loaded the checkpoint"):
        segment(settings, Watcher(), Stillborn)


def test_a_shard_that_ends_its_workers_goes_alone_and_before_those_that_come_later():
    turns, order, release = Turns(), [], threading.Event()

    def take(name: str, turn: object, wait: threading.Event | None = None) -> None:
        with turn():
            order.append(name)
            if wait:
                wait.wait(10)
            order.append(f"{name} done")

    def begin(*arguments: object) -> threading.Thread:
        thread = threading.Thread(target=take, args=arguments)
        thread.start()
        time.sleep(0.05)
        return thread

    threads = [begin("first", turns.together, release), begin("second", turns.together)]
    threads += [begin("apart", turns.alone), begin("also apart", turns.alone), begin("later", turns.together)]
    assert order == ["first", "second", "second done"]
    release.set()
    for thread in threads:
        thread.join(10)
    assert order[3] == "first done"
    assert {tuple(order[4:6]), tuple(order[6:8])} == {("apart", "apart done"), ("also apart", "also apart done")}
    assert order[8:] == ["later", "later done"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_do_not_depend_on_what_shares_a_batch(checkpoint, precision):
    """So a mask in quarantine, where other images are in a batch, is the same bit for bit. With the native kernels."""
    predictor = Predictor(load_checkpoint(checkpoint), "cpu", "native", precision)
    images = np.random.default_rng(0).integers(0, 256, (7, 64, 96, 3), dtype=np.uint8)
    together = predictor.logits(images)
    for parts in (1, 2, 3):
        some = [predictor.logits(images[first : first + parts]) for first in range(0, 7, parts)]
        assert torch.equal(torch.cat(some), together)


def test_a_road_apart_reports_what_a_shard_counts(tmp_path):
    settings = config(tmp_path)
    road = Road(Images(Reader(settings), None), Brightness(), LABELS, settings, 2, 1 << 30)
    *found, (number, report) = along(lambda: road)(draw(tmp_path, 6))
    road.close()
    assert number is None
    assert sorted(number for number, _ in found) == [0, 1, 2, 3, 4, 5]
    shard = Shard([])
    Quarantine(b"", print, 0).note(shard, report)
    Quarantine(b"", print, 0).note(shard, pickle.loads(pickle.dumps(report)))
    assert sorted(shard.batches) == [2, 2, 4, 4]
    assert (shard.fetched, shard.failure) == (True, None)
    assert shard.clock.of("busy")["decode"] == pytest.approx(2 * report.seconds["decode", "busy"])


def hub_of(output: Path, checkpoint: str) -> Hub:
    settings = SegmentSettings(input=str(output), output=str(output), checkpoint=checkpoint)
    return Hub(settings, "r", "v", [4, 4, 4], [8, 8, 8], choose_port(settings), 1.7e9)


def test_the_hub_knows_how_many_workers_a_shard_has_ended(checkpoint, tmp_path):
    hub = hub_of(tmp_path, checkpoint)
    assert [hub.begin(0), hub.begin(1), hub.begin(0), hub.begin(0)] == [0, 0, 1, 2]
    assert hub.snapshot().begun == 2
    hub.end(0)
    assert hub.begin(0) == 0, "a shard that failed in an orderly way has ended no worker"
    hub.progress(1, 3, 1)
    assert hub.snapshot() == Snapshot(3, 1, 0, 2)
    hub.finish(1, Totals(4, {"ok": 3, "failed": 1}, quarantined=1, halvings=2))
    hub.finish(1, Totals(4, {"ok": 3, "failed": 1}, quarantined=1, halvings=2))
    assert hub.snapshot() == Snapshot(4, 1, 1, 1)
    hub.stop()
    assert hub.begin(0) is None
    assert hub.begin(2) is None
    assert hub.snapshot().begun == 0, "what is not begun again is not waited for"
    hub.retried({"SlowDown": 2})
    hub.retried({"SlowDown": 1, "timeout": 1})
    assert hub.retries() == {"SlowDown": 3, "timeout": 1}
    values = {sample.name: sample.value for metric in hub.registry.collect() for sample in metric.samples}
    assert values["swath_batch_halvings_total"] == 2
    assert values["swath_quarantined_shards_total"] == 1
    assert values["swath_retries_total"] in (3, 1)


def test_the_hub_counts_workers_that_live_and_deaths_while_they_load(checkpoint, tmp_path, monkeypatch):
    hub = hub_of(tmp_path, checkpoint)
    assert [hub.worker_loads("a"), hub.worker_loads("a"), hub.worker_loads("b")] == [0, 1, 0]
    hub.worker_lives("a")
    assert hub.worker_loads("a") == 0
    hub.worker_lives("b")
    assert hub.workers() == 2
    monkeypatch.setattr("pipeline.metrics.LATELY", 0.0)
    assert hub.workers() == 0


def test_a_hub_that_begins_again_hears_of_what_is_under_way(checkpoint, tmp_path):
    hub = hub_of(tmp_path, checkpoint)
    hub.progress(2, 1, 0)
    assert hub.snapshot() == Snapshot(1, 0, 0, 1)
    assert hub.begin(2) == 1


def test_rows_that_are_not_those_of_the_plan_are_not_put():
    images = [PlannedImage(f"file:///{number}", "", 1, None, None, None) for number in range(3)]
    check_rows(7, images, 3)
    for wrong, planned in ((images, 4), (images[:2], 3), ([*images[:2], images[0]], 3)):
        with pytest.raises(RowsError, match=f"shard 7 is planned with {planned} images"):
            check_rows(7, wrong, planned)
