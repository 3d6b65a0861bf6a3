"""A CPU stage in front of the workers changes nothing but who decodes."""

import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigurationError, SegmentSettings
from pipeline.decode import decode
from pipeline.decoders import Decoder, Decoders
from pipeline.plan import PlannedImage
from pipeline.policy import parse_policy
from pipeline.road import network_input
from pipeline.run import segment
from tests.conftest import draw_image
from tests.pipeline.mortal import KILL, Idle, Mortal, MortalDecoder
from tests.pipeline.test_run import Watcher, descendants, rows_of, spoil


def settings_of(folder: Path, checkpoint: str, output: Path, **more: object) -> SegmentSettings:
    given = {"input": str(folder), "output": str(output), "checkpoint": checkpoint, "policy": "short=64"}
    return SegmentSettings(**(given | more))


def all_but_the_run(output: Path) -> list[dict]:
    rows = [{name: value for name, value in row.items() if name != "run_id"} for row in rows_of(output)]
    return sorted(rows, key=lambda row: row["uri"])


class DecoderKiller(Watcher):
    """Kills a decoder when it is there."""

    killed = 0

    def segmenting(self, done: int, total: int, failures: int) -> None:
        super().segmenting(done, total, failures)
        found = [pid for pid, command in descendants(os.getpid()) if "Decoder" in command]
        if found and not self.killed:
            self.killed = found[0]
            os.kill(self.killed, signal.SIGKILL)


def test_what_workers_get_from_decoders_is_what_they_would_have_made(collection, checkpoint, tmp_path):
    alone = segment(settings_of(collection, checkpoint, tmp_path / "alone"), Watcher()).record
    helped = segment(settings_of(collection, checkpoint, tmp_path / "helped", decoders=1), Watcher(), Idle).record
    assert alone["statuses"] == helped["statuses"] == {"ok": 12}, "no worker has decoded anything"
    assert alone["model_version"] == helped["model_version"]
    assert all_but_the_run(tmp_path / "helped") == all_but_the_run(tmp_path / "alone")


@pytest.mark.parametrize("policy", ["short=64", "native=64+32"])
def test_bad_images_files_of_images_and_a_decoder_that_dies_give_the_same_rows(
    collection, checkpoint, tmp_path, policy
):
    spoil(collection)
    with tarfile.open(collection / "some.tar", "w") as tar:
        tar.add(draw_image(tmp_path / "tarred.jpg", 80, 60, seed=50), "tarred.jpg")
    data = draw_image(tmp_path / "row.jpg", 60, 80, seed=51).read_bytes()
    pq.write_table(pa.table({"image": [data, b"no image"]}), collection / "rows.parquet")
    common = {"policy": policy, "shard_images": 3}
    alone = segment(settings_of(collection, checkpoint, tmp_path / "alone", **common), Watcher()).record
    watcher = DecoderKiller()
    helped = segment(settings_of(collection, checkpoint, tmp_path / "helped", **common, decoders=1), watcher).record
    assert watcher.killed
    assert alone["statuses"] == helped["statuses"]
    assert len(alone["statuses"]) > 1
    assert all_but_the_run(tmp_path / "helped") == all_but_the_run(tmp_path / "alone")


def test_an_image_that_ends_decoders_and_workers_is_one_row(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.decoders.Decoder", MortalDecoder)
    folder = tmp_path / "images"
    for number in range(4):
        draw_image(folder / f"{number}.png", 64, 48, seed=number)
    with (folder / "1.png").open("ab") as file:
        file.write(KILL)
    settings = settings_of(folder, checkpoint, tmp_path / "out", decoders=1)
    record = segment(settings, Watcher(), Mortal).record
    assert record["statuses"] == {"ok": 3, "failed": 1}
    (row,) = [row for row in rows_of(tmp_path / "out") if row["status"] == "failed"]
    assert (row["uri"].rpartition("/")[2], row["error"]) == ("1.png", "ended its worker: signal 11 (SIGSEGV)")


def test_a_decoder_gives_what_the_road_makes_or_leaves_it_to_the_worker(checkpoint, tmp_path):
    path = draw_image(tmp_path / "photos" / "a.jpg", 101, 77, seed=1)
    info = path.stat()
    settings = settings_of(path.parent, checkpoint, tmp_path / "out", scales="0.5,1")
    image = PlannedImage(f"file://{path}", f"{info.st_size}-{info.st_mtime_ns}", info.st_size, "jpeg", 101, 77)
    decoder = Decoder(settings, 1 << 20)
    found = decoder.decode(image)
    expected = network_input(path.read_bytes(), parse_policy("short=64"), settings, lambda height, width: None)
    assert [pixels.shape for pixels in found.pixels] == [(32, 64, 3), (64, 96, 3)]
    assert (found.height, found.width) == (77, 101)
    assert all(map(np.array_equal, found.pixels, expected.pixels))
    unscaled = Decoder(settings_of(path.parent, checkpoint, tmp_path / "out", policy="native"), 1).decode(image)
    assert np.array_equal(unscaled.pixels[0], decode(path.read_bytes(), 1 << 20).pixels)
    assert decoder.decode(replace(image, width=100)) is None, "not the size that is planned for"
    assert decoder.decode(replace(image, etag="another")) is None
    assert decoder.decode(replace(image, uri=image.uri + "x")) is None
    path.write_bytes(path.read_bytes()[:200])
    assert decoder.decode(image) is None
    assert decoder.gate.held == 0
    assert Decoders([])(image) is None


def test_decoders_leave_a_cpu_to_a_worker(collection, checkpoint, tmp_path):
    many = (os.cpu_count() or 1) + 1
    with pytest.raises(ConfigurationError, match=f"is to have {many} decoders"):
        segment(settings_of(collection, checkpoint, tmp_path / "out", decoders=many), Watcher())
