"""A full disk, a full store and one that may not be written to are said in one line, and cost nothing but a repeat."""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from infra.local.s3_server import S3Server
from tests.chaos.collection import Collection, Driver, options, outcomes, remount, small_disk

FULL_DISK = ("No space left", "disk full", "out of disk")
mounts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root, to mount a small disk of its own"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "320k") as folder:
        yield folder


@mounts
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(photos: Collection, tmp_path: Path, disk: Path):
    command = ["segment", photos.url, str(disk / "output"), *options(photos.on_cluster())]
    with small_disk(tmp_path / "scratch", "64k") as scratch:
        (scratch / "filler").write_bytes(bytes(48 << 10))
        with Driver(tmp_path / "scratch-log", *command, environment={"TMPDIR": str(scratch)}) as driver:
            assert driver.wait() in (1, 2), driver.said()
            assert any(words in driver.complaint() for words in FULL_DISK), driver.said()
    with Driver(tmp_path / "full-log", *command) as driver:
        assert driver.wait() == 1, driver.said()
        assert any(words in driver.complaint() for words in FULL_DISK), driver.said()
    assert not list(disk.glob("output/runs/*/run.json"))
    remount(disk, "size=64m")
    with Driver(tmp_path / "log", *command) as driver:
        assert driver.wait() == 0, driver.said()
    assert outcomes(str(disk / "output")) == photos.expected


@mounts
def test_an_output_that_may_not_be_written_to_stops_a_run_before_any_work(
    photos: Collection, tmp_path: Path, disk: Path
):
    remount(disk, "ro")
    with Driver(tmp_path / "log", "segment", photos.url, str(disk / "output"), *options(photos.on_cluster())) as driver:
        assert driver.wait(60) == 2
        assert "Read-only file system" in driver.complaint()


def test_a_full_quota_stops_a_run_that_goes_on_when_there_is_room(s3: S3Server, photos: Collection, tmp_path: Path):
    name = f"tenant-{uuid.uuid4().hex[:8]}"
    tenant = s3.add_user(name)
    filesystem = fsspec.filesystem(
        "s3", key=tenant.access_key, secret=tenant.secret_key, endpoint_url=s3.endpoint_url, skip_instance_cache=True
    )
    output = f"s3://{name}/output"
    filesystem.mkdir(name)
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.folder.iterdir())[:40]:
        shutil.copy(path, few)
    command = ["segment", str(few), output, *options(photos.on_cluster())]
    for name_and_value in (f"s3.key={tenant.access_key}", f"s3.secret={tenant.secret_key}"):
        command += ["--storage-option", name_and_value]  # for the workers too, whose environment is the cluster's
    s3.run("radosgw-admin", "quota", "set", "--quota-scope=user", f"--uid={name}", "--max-objects=6")
    s3.run("radosgw-admin", "quota", "enable", "--quota-scope=user", f"--uid={name}")
    with Driver(tmp_path / "full-log", *command) as driver:
        assert driver.wait() == 1, driver.said()
        assert "quota" in driver.complaint().lower()
    assert not filesystem.glob(f"{output}/runs/*/run.json")
    s3.run("radosgw-admin", "quota", "disable", "--quota-scope=user", f"--uid={name}")
    with Driver(tmp_path / "log", *command) as driver:
        assert driver.wait() == 0, driver.said()
    filesystem.get(f"{output}/segments/", str(tmp_path / "copy/segments/"), recursive=True)
    assert outcomes(str(tmp_path / "copy")) == {path.name: photos.expected[path.name] for path in few.iterdir()}
