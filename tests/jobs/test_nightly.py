"""Nights over a bucket that changes: each does what it should and no more, as the server's own requests show."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import duckdb
import fsspec
import pytest
import torch

from jobs.cli import main
from model.checkpoint import save_huggingface
from model.labels import label_set
from model.segformer import Segformer, variant
from pipeline.config import NightlySettings, StorageSettings, VerifySettings
from pipeline.nightly import nightly
from pipeline.storage import Store
from pipeline.verify import verify
from pipeline.views import views
from tests.chaos.fault_proxy import FaultProxy
from tests.conftest import NAMES, Quiet, draw_image
from tests.pipeline.test_verify import no_spread
from tests.ray_here import ray_here

IDLE_REQUESTS = 60  # of a night with nothing to do after three others, at the most


@pytest.fixture
def another_checkpoint(tmp_path) -> str:
    torch.manual_seed(8)
    save_huggingface(Segformer(variant("b0", labels=len(NAMES))), label_set(NAMES), str(tmp_path / "another"))
    return str(tmp_path / "another")


@pytest.fixture
def night(bucket, s3, monkeypatch, capfd):
    """Run a night through a proxy that counts: its record or None, what it said, the images that it fetched."""
    fs = fsspec.filesystem("s3")
    with FaultProxy(s3.endpoint_url) as proxy, contextlib.ExitStack() as held:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("RAY_ADDRESS", held.enter_context(ray_here()))
        type(fs).clear_instance_cache()  # whose file systems go to the server itself

        def run(checkpoint: str) -> tuple[dict | None, str, Counter[str]]:
            before = set(fs.glob(f"{bucket}/masks/runs/*/run.json"))
            proxy.seen.clear()
            arguments = ["nightly", f"{bucket}/photos", f"{bucket}/masks", "--checkpoint", checkpoint]
            code = main([*arguments, "--policy", "short=32", "--workers", "1"])
            said = capfd.readouterr().err
            assert code == 0, said
            fs.invalidate_cache()
            new = set(fs.glob(f"{bucket}/masks/runs/*/run.json")) - before
            assert len(new) <= 1
            record = json.loads(fs.cat_file(new.pop())) if new else None
            lines = [line for line in proxy.seen.elements() if line.startswith("GET ") and "/photos/" in line]
            fetched = Counter(unquote(line).partition("?")[0].rpartition("/")[2] for line in lines)
            return record, said, fetched

        run.proxy, run.fs = proxy, fs
        yield run
        type(fs).clear_instance_cache()


def put(night, bucket: str, folder: Path, names: range, seed: int) -> set[str]:
    """Put images, or others in their place."""
    for number in names:
        path = draw_image(folder / f"{number:03d}.jpg", 48 + number % 3 * 16, 48, seed + number)
        night.fs.put_file(str(path), f"{bucket}/photos/{path.name}")
    return {f"{number:03d}.jpg" for number in names}


def test_each_night_over_a_changing_bucket_does_just_what_it_should(
    night, bucket, checkpoint, another_checkpoint, tmp_path
):
    everything = put(night, bucket, tmp_path, range(50), 0)
    first, said, fetched = night(checkpoint)
    assert first["changes"] == {"new": 50, "changed": 0, "other_model": 0}
    assert (first["statuses"], set(fetched)) == ({"ok": 50}, everything)

    changed = put(night, bucket, tmp_path, range(10), 1000)
    record, said, fetched = night(checkpoint)
    assert record["changes"] == {"new": 0, "changed": 10, "other_model": 0}
    assert (record["statuses"], set(fetched)) == ({"ok": 10}, changed)

    gone = [f"{bucket}/photos/{number:03d}.jpg" for number in range(5, 10)]
    night.fs.rm(gone)
    record, said, fetched = night(checkpoint)
    assert (record, fetched) == (None, Counter())
    assert f"5 gone (gone: {', '.join(gone[:3])}, ...)" in said

    record, said, fetched = night(checkpoint)
    assert (record, fetched) == (None, Counter())
    assert "nothing new" in said
    assert "gone" not in said
    assert 0 < night.proxy.seen.total() < IDLE_REQUESTS, night.proxy.seen
    assert not any(
        line.startswith("GET ") and "/segments/" in line and "list-type" not in line for line in night.proxy.seen
    )

    record, said, fetched = night(another_checkpoint)
    assert record["changes"] == {"new": 0, "changed": 0, "other_model": 45}
    assert (record["statuses"], set(fetched)) == ({"ok": 45}, everything - {url.rpartition("/")[2] for url in gone})

    output = Store(f"{bucket}/masks", StorageSettings())
    with duckdb.connect() as sql:
        sql.register_filesystem(fsspec.filesystem("s3"))
        sql.execute(views(output))
        assert sql.sql("SELECT count(*) FROM segments").fetchall() == [(105,)]
        found = sql.sql("SELECT model_version, count(*), count(DISTINCT uri) FROM current GROUP BY 1").fetchall()
        assert found == [(record["model_version"], 45, 45)]
        assert sql.sql("SELECT uri FROM deletions ORDER BY 1").fetchall() == [(url,) for url in gone]

    put(night, bucket, tmp_path, range(1), 0)  # as it was the first night, and so is the model
    record, said, fetched = night(checkpoint)
    assert (record, fetched) == (None, Counter())
    assert "45 returned to a version that was done before" in said
    assert "nothing new: every image has a row" in said

    record, said, fetched = night(checkpoint)
    assert (record, fetched) == (None, Counter())
    assert "returned" not in said

    with duckdb.connect() as sql:
        sql.register_filesystem(fsspec.filesystem("s3"))
        sql.execute(views(output))
        assert sql.sql("SELECT count(*) FROM segments").fetchall() == [(105,)]
        found = sql.sql("SELECT model_version, count(*), count(DISTINCT uri) FROM current GROUP BY 1").fetchall()
        assert found == [(first["model_version"], 45, 45)]
        found = sql.sql("SELECT right(uri, 7) FROM current WHERE run_id <> ? ORDER BY 1", params=[first["run_id"]])
        assert found.fetchall() == [(name,) for name in sorted(changed)[1:5]]
    report = verify(VerifySettings(output=f"{bucket}/masks"), Quiet(), no_spread)
    assert (report.findings.first, report.checked["deletion parts"], report.checked["return parts"]) == ([], 1, 1)
    part = f"{bucket}/masks/deletions/part-00000.parquet"
    data = bytearray(night.fs.cat_file(part))
    data[len(data) // 2] ^= 1
    night.fs.pipe_file(part, bytes(data))
    (finding,) = verify(VerifySettings(output=f"{bucket}/masks"), Quiet(), no_spread).findings.first
    assert "deletions/part-00000.parquet" in str(finding)


class Watcher(Quiet):
    def __init__(self) -> None:
        self.said = ""

    def say(self, text: str) -> None:
        self.said += text + "\n"


@pytest.mark.usefixtures("on_shared_ray")
def test_a_night_after_one_that_failed_finishes_it_and_then_does_what_came_since(tmp_path, checkpoint):
    collection, output = tmp_path / "photos", tmp_path / "it's [new] *masks?"
    for number in range(8):
        draw_image(collection / f"{number:03d}.jpg", 64, 48, number)
    settings = NightlySettings(
        input=str(collection), output=str(output), checkpoint=checkpoint, policy="short=32", shard_images=1, workers="1"
    )
    (failed,) = nightly(settings, Watcher())
    run = failed.record["run_id"]
    (output / "runs" / run / "run.json").unlink()  # as if its driver had been killed with four shards to go
    for shard in range(4):
        (output / f"segments/run={run}/shard-{shard:06d}.parquet").unlink()
    draw_image(collection / "later.jpg", 64, 48, 99)
    first, second = nightly(settings, watcher := Watcher())
    assert "was not finished, so it goes on as planned" in watcher.said
    assert (first.record["run_id"], first.record["images"], first.record["shards_done_before"]) == (run, 8, 4)
    assert (second.record["images"], second.record["changes"]["new"]) == (1, 1)
    assert nightly(settings, Watcher()) == []
    with duckdb.connect() as sql:
        sql.execute(views(Store(str(output), settings)))
        assert sql.sql("SELECT count(*), count(DISTINCT uri) FROM current").fetchall() == [(9, 9)]
        assert sql.sql("SELECT count(*) FROM deletions").fetchall() == [(0,)]
