"""What the hub serves: names and labels that do not grow, times that are right, last words that stay for a while."""

import math
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from pipeline.config import ConfigurationError, NightlySettings, SegmentSettings, build
from pipeline.endpoint import linger, timestamp
from pipeline.metrics import Hub, choose_port
from pipeline.pace import EVERY, WINDOW, Pace
from pipeline.run import IncompleteRunError, lingering
from pipeline.schema import STATUSES
from pipeline.stopping import StoppedError
from pipeline.totals import Totals, count_reasons
from tests.conftest import Quiet

GB = 1 << 30


def hub_of(folder: Path, images: list[int], work: list[int] | None = None) -> Hub:
    settings = SegmentSettings(input=str(folder), output=str(folder), checkpoint="c")
    return Hub(settings, "r", "v", images, work or images, choose_port(settings), 1.7e9)


def scraped(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every series at an endpoint: its name and labels, and its value."""
    with urllib.request.urlopen(url) as reply:
        families = text_string_to_metric_families(reply.read().decode())
        return {
            (one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples
        }


def shard_of(images: int, number: int) -> Totals:
    """What a shard might say whose images are all different, and whose failures have all statuses and reasons."""
    statuses = dict.fromkeys(STATUSES, images // len(STATUSES))
    statuses["ok"] += images - sum(statuses.values())
    return Totals(
        images=images,
        statuses=statuses,
        engines={f"engine {number}": images},
        input_bytes=1000 * images,
        status_bytes={status: 1000 * count for status, count in statuses.items()},
        class_pixels={f"class {number}-{one}": 1 for one in range(images)},
        class_images={f"class {number}-{one}": 1 for one in range(images)},
        reasons=count_reasons(("failed", f"host-{number}.example says {one:x} no") for one in range(images)),
        stage_seconds=dict.fromkeys(("fetch", "decode", "infer", "compile", "encode"), 1.0),
    )


def test_no_series_comes_with_more_images_workers_or_trouble(tmp_path):
    counts = []
    for images in (200, 2000):
        hub = hub_of(tmp_path, [20] * (images // 20))
        before = scraped(hub.address())
        for number in range(images // 20):
            hub.worker_loads(f"worker {number}")
            hub.worker_lives(f"worker {number}", (number * GB, number * GB, 80 * GB))
            hub.begin(number)
            hub.begin(number)
            hub.progress(number, 10, 5)
            hub.retried({"throttled": number, "server": 1, "connection": 1, "timeout": 1, "checksum": 1})
            hub.finish(number, shard_of(20, number), 0.5, (number, GB))
        after = scraped(hub.address())
        assert set(before) == set(after), "a series is there before anything is counted"
        assert sum(value for (name, _), value in after.items() if name == "swath_images_total") == images
        assert sum(value for (name, _), value in after.items() if name == "swath_input_bytes_total") == 1000 * images
        assert after["swath_repeated_shards_total", ()] == images / 20
        counts.append(len(after))
    assert counts[0] == counts[1]


def test_the_gpu_that_has_least_to_spare_is_shown_for_as_long_as_its_worker_lives(tmp_path, monkeypatch):
    hub = hub_of(tmp_path, [1])

    def shown() -> tuple[float, ...]:
        found = scraped(hub.address())
        return tuple(found[f"swath_device_memory_{which}_bytes", ()] / GB for which in ("used", "peak", "size"))

    assert shown() == (0, 0, 0)
    hub.worker_lives("on a CPU")
    assert shown() == (0, 0, 0)
    hub.worker_lives("small", (20 * GB, 22 * GB, 24 * GB))
    hub.worker_lives("large", (40 * GB, 50 * GB, 80 * GB))
    assert shown() == (20, 22, 24)
    hub.heard["small"] -= 60
    hub.worker_lives("large", (30 * GB, 50 * GB, 80 * GB))
    assert shown() == (30, 50, 80)


def test_what_remains_follows_from_the_work_and_not_from_the_number_of_images(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    hub = hub_of(tmp_path, [10, 100], [900, 100])
    assert math.isnan(hub.remaining())
    hub.begin(0)
    assert math.isnan(hub.remaining())
    now += 10
    hub.progress(0, 5, 0)
    assert hub.remaining() == pytest.approx(550 / 45)
    now += 10
    hub.finish(0, Totals(10, {"ok": 10}))
    assert hub.remaining() == pytest.approx(100 / 45)
    hub.begin(1)
    now += 10
    hub.finish(1, Totals(100, {"ok": 100}))
    assert hub.remaining() == 0


def test_what_was_done_before_counts_for_no_pace(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    hub = hub_of(tmp_path, [100, 100, 100])
    hub.finish(0, Totals(100, {"ok": 100}))
    now += 500
    hub.begin(1)
    now += 10
    hub.finish(1, Totals(100, {"ok": 100}))
    assert hub.remaining() == pytest.approx(10)


def test_a_pace_is_of_lately_and_a_run_that_stands_still_never_ends():
    pace = Pace()
    for second in range(0, 1000):
        pace.note(second, 10 * second)
    for second in range(1000, 2000):
        pace.note(second, 10_000 + 100 * (second - 1000))
    assert pace.seconds_for(1000, 1999) == pytest.approx(10, rel=0.02)
    assert len(pace.points) <= WINDOW / EVERY + 2
    for second in range(2000, 2000 + int(2 * WINDOW)):
        pace.note(second, pace.points[-1][1])
    assert pace.seconds_for(1000, 2000 + 2 * WINDOW) == math.inf
    assert pace.seconds_for(0, 2000 + 2 * WINDOW) == 0
    silent = Pace()
    silent.note(0, 0)
    silent.note(10, 10)
    assert silent.seconds_for(10, 10) == 10
    assert silent.seconds_for(10, 10 + WINDOW) == math.inf


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 100)), min_size=2, max_size=300))
def test_a_pace_keeps_few_points_and_is_never_negative(steps):
    pace, now, done = Pace(), 0.0, 0.0
    for seconds, more in steps:
        now, done = now + seconds, done + more
        pace.note(now, done)
    assert len(pace.points) <= WINDOW / EVERY + 3
    assert not pace.seconds_for(1.0, now) < 0


def test_last_words_stay_for_as_long_as_asked_and_no_longer(tmp_path):
    settings = build(NightlySettings, {"input": "i", "output": "o", "checkpoint": "c", "metrics_linger": "1.5"})
    port, said = choose_port(settings), []

    class Speaker(Quiet):
        def say(self, text: str) -> None:
            said.append(text)

    word = timestamp("swath_some_timestamp_seconds", "Some.", 's3://a/"b"\n', 17.0)
    began = time.monotonic()
    thread = threading.Thread(target=linger, args=(settings, port, [word], Speaker()))
    thread.start()
    while not said:
        time.sleep(0.05)
    assert said == [f"the last metrics stay at http://127.0.0.1:{port}/metrics for 1.5 s"]
    found = scraped(f"http://127.0.0.1:{port}/metrics")
    assert found == {("swath_some_timestamp_seconds", (("output", 's3://a/"b"\n'),)): 17.0}
    thread.join()
    assert 1.5 <= time.monotonic() - began < 5
    with pytest.raises(OSError, match="refused"):
        scraped(f"http://127.0.0.1:{port}/metrics")
    linger(settings.model_copy(update={"metrics_linger": 0.0}), port, [word], Speaker())
    assert len(said) == 1


def test_a_run_that_ends_incomplete_has_last_words_and_one_that_is_stopped_has_none():
    values = {"input": "i", "output": "o", "checkpoint": "c", "metrics_linger": "0.2"}
    settings, said = build(SegmentSettings, values), []

    class Speaker(Quiet):
        def say(self, text: str) -> None:
            said.append(text)

    def run(error: Exception) -> None:
        with lingering(settings, Speaker()) as last:
            last.metrics = [timestamp("swath_some_timestamp_seconds", "Some.", "o", 17.0)]
            raise error

    for error in (IncompleteRunError("two of four"), StoppedError(15, "stopped")):
        with pytest.raises(type(error)):
            run(error)
        assert len(said) == 1
    with lingering(settings, Speaker()):
        pass
    assert len(said) == 1, "a run that had nothing to do has none either"


def test_the_hub_knows_when_a_run_of_its_output_was_last_committed(finished, tmp_path):
    empty, hub = hub_of(tmp_path, [1]), hub_of(finished.output, [1])
    committed = (finished.output / "runs/first/run.json").stat().st_mtime
    limit = time.monotonic() + 10
    while not (found := hub.metrics.last_commit.collect()[0].samples) and time.monotonic() < limit:
        time.sleep(0.05)
    assert found[0].labels == {"output": str(finished.output)}
    assert found[0].value == pytest.approx(committed, abs=1)
    assert empty.metrics.last_commit.collect()[0].samples == [], "where there is none, none is made up"


def test_last_words_wait_for_the_port_and_a_port_that_stays_taken_is_said(monkeypatch):
    monkeypatch.setattr("pipeline.endpoint.FREE_WITHIN", 0.5)
    settings = build(NightlySettings, {"input": "i", "output": "o", "checkpoint": "c", "metrics_linger": 0.1})
    said = []

    class Speaker(Quiet):
        def say(self, text: str) -> None:
            said.append(text)

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        linger(settings, port, [], Speaker())
        assert said == [f"metrics cannot be served any more at port {port} (Address already in use)"]
        threading.Timer(0.2, other.close).start()
        linger(settings, port, [], Speaker())
    assert said[1].startswith("the last metrics stay at")


@pytest.mark.parametrize("value", [-1, 1e9, "soon"])
def test_how_long_metrics_linger_is_checked(value):
    with pytest.raises(ConfigurationError, match="metrics_linger"):
        build(NightlySettings, {"input": "i", "output": "o", "checkpoint": "c", "metrics_linger": value})
