"""Whole runs on a real Ray: from a collection to a table, on a local disk and on a real S3 server."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pandas
import polars
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from model.checkpoint import load_checkpoint
from model.predictor import Predictor
from pipeline import schema
from pipeline.config import ConfigurationError, SegmentSettings
from pipeline.decode import decode, resize
from pipeline.masks import decode_mask
from pipeline.run import IncompleteRunError, segment
from tests.conftest import NAMES, draw_image, spoil
from tests.pipeline.test_inputs import pack_parquet, pack_tar

POLICY = "short=64"  # small inputs: these tests are about the road, not about the network


class Watcher:
    """A listener that remembers, and scrapes the metrics endpoint while the run lasts."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seen: list[tuple[int, int, int]] = []
        self.scraped = ""
        self.logs = Path()  # Ray's own

    def say(self, text: str) -> None:
        self.lines.append(text)
        if "; metrics: " in text:
            self.logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())

    def listing(self, found: int) -> None:
        pass

    def indexing(self, done: int, total: int) -> None:
        pass

    def segmenting(self, done: int, total: int, failures: int) -> None:
        self.seen.append((done, total, failures))
        url = re.search(r"http://\S+/metrics", "\n".join(self.lines))
        with urllib.request.urlopen(url[0]) as reply:
            self.scraped = reply.read().decode()

    def metric(self, name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", self.scraped, re.MULTILINE)[1])


def run(source: object, output: object, checkpoint: str, watcher: Watcher | None = None, **options: object):
    values = {"policy": POLICY, "shard_images": 4, **options}
    inputs = [str(one) for one in source] if isinstance(source, list) else str(source)
    settings = SegmentSettings(input=inputs, output=str(output), checkpoint=checkpoint, **values)
    return segment(settings, watcher or Watcher())


def rows_of(output: object) -> list[dict]:
    return pyarrow.dataset.dataset(f"{output}/segments").to_table().to_pylist()


def test_every_object_in_a_bucket_becomes_one_row_that_all_readers_read(bucket, collection, checkpoint, s3):
    spoil(collection)
    filesystem = fsspec.filesystem("s3")
    filesystem.put(f"{collection}/", f"{bucket}/photos/", recursive=True)
    odd = f'{bucket}/photos/it\'s "odd"\n雪.png'.removeprefix("s3://")
    filesystem.pipe_file(odd, draw_image(collection / "tmp.png", 50, 41).read_bytes())
    filesystem.pipe_file(f"{bucket.removeprefix('s3://')}/photos/marker.png/", b"")
    watcher = Watcher()
    result = run(f"{bucket}/photos", f"{bucket}/out", checkpoint, watcher)

    pattern = f"{bucket}/out/segments/*/*.parquet"
    files = [f"s3://{path}" for path in filesystem.glob(pattern)]
    table = pyarrow.dataset.dataset([f.removeprefix("s3://") for f in files], filesystem=filesystem).to_table()
    rows = table.to_pylist()
    named = {path for path in filesystem.find(f"{bucket}/photos") if path.endswith((".jpg", ".png", ".webp", ".bmp"))}
    assert sorted(row["uri"] for row in rows) == sorted(f"s3://{path}" for path in named)
    assert len(rows) == 12 + 3 + 1
    assert {row["uri"].rpartition("/")[2]: row["status"] for row in rows if row["status"] != "ok"} == {
        "empty.jpg": "unreadable",
        "text.jpg": "unreadable",
        "truncated.jpg": "unreadable",
    }
    for row in rows:
        check_row(row, filesystem)

    record = result.record
    assert record["images"] == len(rows)
    assert record["statuses"] == {"ok": 13, "unreadable": 3}
    assert sum(record["class_pixels"].values()) == sum(row["width"] * row["height"] for row in rows if row["mask"])
    assert [f"{bucket}/out/{name}" for name in record["files"]] == files
    assert json.loads(filesystem.cat(f"{bucket}/out/runs/{record['run_id']}/run.json")) == json.loads(
        json.dumps(record)
    )

    assert watcher.seen[-1] == (16, 16, 3)
    assert watcher.metric('swath_images_total{status="ok"}') == 13
    assert watcher.metric('swath_images_total{status="unreadable"}') == 3
    assert watcher.metric("swath_mask_pixels_total") == record["pixels"]
    assert watcher.metric("swath_planned_images") == 16
    assert watcher.metric("swath_shards_total") == watcher.metric("swath_planned_shards") == len(files)
    written = b"".join(filesystem.cat(filesystem.find(f"{bucket}/out")).values())
    logged = b"".join(path.read_bytes() for path in watcher.logs.rglob("*") if path.is_file())
    assert len(list(watcher.logs.glob("*"))) > 5
    for text in (watcher.scraped.encode(), "\n".join(watcher.lines).encode(), written, logged):
        assert s3.secret_key.encode() not in text
    assert watcher.metric('swath_stage_seconds_total{stage="infer",state="busy"}') > 0
    assert watcher.metric('swath_stage_seconds_total{stage="fetch",state="blocked"}') > 0
    assert watcher.metric('swath_stage_seconds_total{stage="put",state="busy"}') > 0
    assert set(record["busy_shares"]) == {"fetch", "decode", "infer", "encode"}
    assert all(0 < share <= 1 for share in record["busy_shares"].values())
    memory = record["worker_memory"]
    assert 0 < memory["peak"] <= memory["bound"]
    assert watcher.metric("swath_worker_memory_peak_bytes") == memory["peak"]

    pixels = sum(record["class_pixels"].values())
    duck = duckdb.connect()
    duck.register_filesystem(filesystem)
    query = f"SELECT count(*), sum(list_sum(list_transform(classes, lambda c: c.pixels))) FROM '{pattern}'"
    assert duck.execute(query).fetchone() == (16, pixels)
    options = {
        "aws_endpoint_url": s3.endpoint_url,
        "aws_access_key_id": s3.access_key,
        "aws_secret_access_key": s3.secret_key,
        "aws_region": "us-east-1",
        "aws_allow_http": "true",
    }
    frame = polars.read_parquet(pattern, storage_options=options)
    assert len(frame) == 16
    assert frame["classes"].explode().struct.field("pixels").sum() == pixels
    frames = pandas.concat(pandas.read_parquet(file) for file in files)
    assert len(frames) == 16
    assert sum(c["pixels"] for classes in frames["classes"].dropna() for c in classes) == pixels


def check_row(row: dict, filesystem: fsspec.AbstractFileSystem) -> None:
    """A row says what its image is, and its numbers are those of its mask."""
    assert row["model_version"]
    assert row["bytes"] == filesystem.size(row["uri"])
    if row["status"] != "ok":
        assert row["error"]
        assert "\n" not in row["error"]
        assert row["mask"] is None
        assert row["classes"] is None
        return
    assert row["error"] is None
    with filesystem.open(row["uri"]) as file, Image.open(file) as image:
        assert (row["width"], row["height"]) == image.size
        assert row["format"] == image.format.lower()
    mask = decode_mask(row["mask"])
    assert mask.shape == (row["height"], row["width"])
    counts = {c["class_id"]: c["pixels"] for c in row["classes"]}
    assert counts == {int(i): int(n) for i, n in zip(*np.unique(mask, return_counts=True), strict=True)}
    assert sum(counts.values()) == row["width"] * row["height"]
    assert [c["name"] for c in row["classes"]] == [NAMES[c["class_id"]] for c in row["classes"]]
    assert sum(c["fraction"] for c in row["classes"]) == pytest.approx(1)
    assert 0 < row["confidence"] <= 1
    assert min(int(side) for side in row["bucket"].split("x")) == 64


def test_a_second_run_does_nothing_twice_and_says_so(collection, checkpoint, tmp_path):
    output = tmp_path / "out"
    first = run(collection, output, checkpoint, run_id="night-1")
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}

    watcher = Watcher()
    again = run(collection, output, checkpoint, watcher, run_id="night-1")
    assert not again.is_new
    assert again.record == json.loads(json.dumps(first.record))
    assert any("complete" in line and "nothing to do" in line for line in watcher.lines)

    watcher = Watcher()
    assert run(collection, output, checkpoint, watcher).record is None
    assert any("nothing new" in line for line in watcher.lines)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == files

    draw_image(collection / "new.png", 60, 50)
    assert run(collection, output, checkpoint).record["images"] == 1
    uris = [row["uri"] for row in rows_of(output)]
    assert len(uris) == len(set(uris)) == 13

    with pytest.raises(ConfigurationError, match=r"was planned with input .*another --run-id"):
        run(collection / "part 0", output, checkpoint, run_id="night-1")


def test_other_settings_of_the_model_make_another_version(collection, checkpoint, tmp_path):
    output = tmp_path / "out"
    run(collection, output, checkpoint)
    record = run(collection, output, checkpoint, policy="exact=64x96", flip=True, scales="1.5,1").record
    rows = rows_of(output)
    assert len(rows) == 24
    assert len({(row["uri"], row["model_version"]) for row in rows}) == 24
    assert record["settings"].items() >= {"policy": "exact=64x96", "flip": True, "scales": [1.0, 1.5]}.items()
    predictor = Predictor(load_checkpoint(checkpoint), "cpu", precision="float32")
    for row in (row for row in rows if row["run_id"] == record["run_id"]):
        assert row["bucket"] == "64x96"
        pixels, size = (
            decode(Path(row["uri"].removeprefix("file://")).read_bytes(), 10**6).pixels,
            (row["height"], row["width"]),
        )
        views = [resize(pixels, *shape)[None] for shape in ((64, 96), (96, 160))]
        (expected,) = predictor.at_scales(views, (64, 96), [size], flip=True)
        assert (decode_mask(row["mask"]) == expected.mask).mean() > 0.99
        assert row["entropy"] == pytest.approx(expected.entropy, abs=1e-4)


def test_a_run_that_was_killed_goes_on_where_it_was(collection, checkpoint, tmp_path):
    output = tmp_path / "out"
    for number in range(60):
        draw_image(collection / f"more/{number:02d}.png", 640, 480, seed=number)
    command = [sys.executable, "-m", "jobs", "segment", str(collection), str(output), "--checkpoint", checkpoint]
    command += ["--policy", "short=256", "--shard-images", "4"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 240
        while not list(output.glob("segments/*/shard-*.parquet")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("segments/*/shard-*.parquet")}
    assert kept
    assert not list(output.glob("runs/*/run.json"))

    watcher = Watcher()
    draw_image(collection / "new.png", 640, 480, seed=100)
    beside = run(f"{collection}/../collection/", output, checkpoint, watcher, policy="short=256", run_id="beside")
    assert beside.record["images"] == 1  # the others belong to the run that was killed
    assert any("is not finished" in line for line in watcher.lines)
    with pytest.raises(ConfigurationError, match=r"was planned with include \(\)"):
        run(collection, output, checkpoint, policy="short=256", include=["more/*"], run_id=killed_run(output))

    watcher = Watcher()
    result = run(collection, output, checkpoint, watcher, policy="short=256")
    assert any("was not finished, so it goes on" in line for line in watcher.lines)
    assert result.record["images"] == 72
    assert watcher.metric('swath_images_total{status="ok"}') == 72
    uris = [row["uri"] for row in rows_of(output)]
    assert len(uris) == len(set(uris)) == 73
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def killed_run(output: Path) -> str:
    return next(path.parent.name for path in output.glob("runs/*/plan.json") if path.parent.name != "beside")


def test_an_object_that_cannot_be_read_is_a_row_and_a_store_that_cannot_is_not(bucket, collection, checkpoint, s3):
    """The store's own policy refuses to give all objects, then one of them."""
    filesystem = fsspec.filesystem("s3")
    filesystem.put(f"{collection}/part 0/", f"{bucket}/photos/", recursive=True)

    class Vandal(Watcher):
        """Denies objects when the plan is made and the workers are about to begin."""

        def __init__(self, denied: str) -> None:
            super().__init__()
            self.denied = f"arn:aws:s3:::{bucket.removeprefix('s3://')}/photos/{denied}"

        def say(self, text: str) -> None:
            super().say(text)
            if "metrics" in text:
                policy = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": self.denied}
                document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
                filesystem.call_s3("put_bucket_policy", Bucket=bucket.removeprefix("s3://"), Policy=document)

    with pytest.raises(IncompleteRunError, match="access denied"):
        run(f"{bucket}/photos", f"{bucket}/out", checkpoint, Vandal("*"))
    result = run(f"{bucket}/photos", f"{bucket}/out", checkpoint, Vandal("image-03.bmp"))
    assert result.record["statuses"] == {"ok": 3, "failed": 1}


def test_a_collection_has_the_same_masks_however_it_is_kept(bucket, collection, checkpoint, tmp_path):
    """As files, as tar shards, as Parquet with images in it, and as a manifest, in one run over all four."""
    filesystem, name = fsspec.filesystem("s3"), bucket.removeprefix("s3://")
    filesystem.put(f"{collection}/", f"{bucket}/photos/", recursive=True)
    filesystem.put(str(pack_tar(tmp_path / "x.tar", collection)), f"{bucket}/packed/x.tar")
    filesystem.put(str(pack_parquet(tmp_path / "y.parquet", collection, True)), f"{bucket}/packed/y.parquet")
    filesystem.put(f"{collection}/", f"{bucket}/elsewhere/", recursive=True)
    lines = ["url", *(f"s3://{path}" for path in filesystem.find(f"{bucket}/elsewhere"))]
    filesystem.pipe_file(f"{name}/list.csv", "\n".join(lines).encode())
    run([f"{bucket}/photos", f"{bucket}/packed/", f"{bucket}/list.csv"], tmp_path / "out", checkpoint)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 48
    ways = [
        sorted(
            (hashlib.sha256(row["mask"]).hexdigest(), row["width"], row["confidence"])
            for row in rows
            if at in row["uri"]
        )
        for at in ("/photos/", "x.tar#", "y.parquet#", "/elsewhere/")
    ]
    assert len(set(ways[0])) == 12
    assert ways == [ways[0]] * 4


def test_a_worker_that_is_killed_costs_nothing_but_time(collection, checkpoint, tmp_path):
    class Killer(Watcher):
        """Kills the worker once, when the first images are done."""

        killed = 0

        def segmenting(self, done: int, total: int, failures: int) -> None:
            super().segmenting(done, total, failures)
            if done and not self.killed:
                self.killed = next(pid for pid, command in descendants(os.getpid()) if "MapWorker" in command)
                os.kill(self.killed, signal.SIGKILL)

    for number in range(40):
        draw_image(collection / f"more/{number:02d}.png", 640, 480, seed=number)
    killer = Killer()
    result = run(collection, tmp_path / "out", checkpoint, killer, policy="short=256")
    assert killer.killed
    assert result.record["statuses"] == {"ok": 52}
    assert killer.metric('swath_images_total{status="ok"}') == 52
    assert len({row["uri"] for row in rows_of(tmp_path / "out")}) == len(rows_of(tmp_path / "out")) == 52


def descendants(ancestor: int) -> list[tuple[int, str]]:
    """(pid, command line) of every process below `ancestor`."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (folder / "status").read_text()
            parents[int(folder.name)] = int(re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)[1])
            commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    found, generation = set(), {ancestor}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation} - found
        found |= generation
    return [(pid, commands[pid]) for pid in sorted(found)]


def test_an_image_that_changes_goes_or_is_too_large_has_a_row_that_says_so(collection, checkpoint, tmp_path):
    class Vandal(Watcher):
        """Changes the collection between its index and its run."""

        def say(self, text: str) -> None:
            super().say(text)
            if "headers read" in text:
                (collection / "part 0/image-00.jpg").unlink()
                draw_image(collection / "part 1/image-01.png", 48, 64, seed=99)
                draw_image(collection / "part 1/image-07.bmp", 101, 37, seed=99)  # of the same length

    result = run(collection, tmp_path / "out", checkpoint, Vandal(), max_pixels=100 * 100)
    rows = {row["uri"].rpartition("/")[2]: row for row in rows_of(tmp_path / "out")}
    assert rows["image-00.jpg"]["status"] == "missing"
    assert rows["image-01.png"]["status"] == "changed"
    assert [row["status"] for row in rows.values() if row["width"] == 128] == ["too_large"] * 2
    assert rows["image-07.bmp"]["status"] == "changed"
    assert result.record["statuses"] == {"ok": 7, "missing": 1, "changed": 2, "too_large": 2}


def test_the_files_say_what_is_in_them(collection, checkpoint, tmp_path):
    run(collection, tmp_path / "out", checkpoint, run_id="r")
    file = pq.ParquetFile(next((tmp_path / "out").glob("segments/run=r/*.parquet")))
    assert file.schema_arrow.equals(schema.SEGMENTS)
    units = {field.name: (field.metadata or {}).get(b"unit") for field in file.schema_arrow}
    assert (units["width"], units["bytes"], units["entropy"]) == (b"pixel", b"byte", b"nat")
    assert file.schema_arrow.metadata[b"swath.run_id"] == b"r"
    assert file.schema_arrow.metadata[b"swath.labels"].decode().split("\n") == NAMES
    columns = {file.metadata.row_group(0).column(i).path_in_schema: i for i in range(file.metadata.num_columns)}
    assert file.metadata.row_group(0).column(columns["confidence"]).is_stats_set


@pytest.mark.parametrize("taken", [True, False])
def test_the_metrics_port_can_be_chosen_and_a_taken_one_stops_the_run(collection, checkpoint, tmp_path, taken):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if taken:
            listener.listen()
            with pytest.raises(ConfigurationError, match=rf"{port} \(.*--metrics-port"):
                run(collection, tmp_path / "out", checkpoint, metrics_port=port)
            return
    watcher = Watcher()
    run(collection, tmp_path / "out", checkpoint, watcher, metrics_port=port)
    assert any(f"http://127.0.0.1:{port}/metrics" in line for line in watcher.lines)


def test_a_store_that_fails_leaves_a_run_that_can_go_on(collection, checkpoint, tmp_path):
    class Blocker(Watcher):
        """Puts a file where the run's shards would go."""

        def say(self, text: str) -> None:
            super().say(text)
            if "metrics" in text:
                (tmp_path / "out/segments").mkdir()
                (tmp_path / "out/segments/run=r").touch()

    with pytest.raises(
        IncompleteRunError, match=r"5 of 5 shards .* a file is where a folder should be.*run the same command again"
    ):
        run(collection, tmp_path / "out", checkpoint, Blocker(), run_id="r")
    (tmp_path / "out/segments/run=r").unlink()
    assert run(collection, tmp_path / "out", checkpoint).record["images"] == 12
