"""What every chaos test needs: a collection whose right masks are known, and drivers that can be disturbed.

CHAOS=full has the numbers that the project promises; without it each test does the same in small, for CI. CHAOS_SEED
repeats what a failed test was given.
"""

import contextlib
import hashlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.dataset
from PIL import Image

FULL = os.environ.get("CHAOS") == "full"
SEED = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
IMAGES = 2000 if FULL else 200
SHARD = 8  # images
ROOT = Path(__file__).parents[2]
DECODER = Path(__file__).parent / "decoder"
PATIENCE = 600 if FULL else 240  # seconds that a run may take, far more than it does

Outcomes = dict[str, tuple[str, str | None]]  # by an image's name: status, SHA-256 of its mask


@dataclass(frozen=True)
class Collection:
    """The same images in a bucket and in a folder, and what an undisturbed run makes of them."""

    bucket: str
    folder: Path
    checkpoint: str
    ray_address: str  # of the cluster that tests share, as it takes seconds to start one
    expected: Outcomes = field(repr=False)

    @property
    def url(self) -> str:
        return f"{self.bucket}/photos"

    def settings(self) -> dict[str, object]:
        """With which `expected` was made, and which everyone else must use to get the same."""
        return {"checkpoint": self.checkpoint, "policy": "short=32", "shard_images": SHARD}

    def on_cluster(self) -> dict[str, object]:
        """The same on the cluster, by one worker."""
        return self.settings() | {"ray_address": self.ray_address, "workers": "1", "cpus_per_worker": 1}


def options(settings: dict[str, object]) -> list[str]:
    """Settings as the command line has them."""
    return [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]


def draw(folder: Path, images: int) -> None:
    """Fill `folder` with tiny images, of which no two are alike."""
    chance = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for number in range(images):
        width, height = (int(side) for side in chance.integers((40, 30), (65, 65)))
        blocks = Image.fromarray(chance.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
        noise = chance.integers(-20, 20, (height, width, 3))
        data = io.BytesIO()
        Image.fromarray((np.asarray(blocks) + noise).clip(0, 255).astype(np.uint8)).save(
            data, "png" if number % 3 else "jpeg"
        )
        (folder / f"{number:05d}.{'png' if number % 3 else 'jpg'}").write_bytes(data.getvalue())


def upload(folder: Path, url: str) -> None:
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe({f"{url}/{path.name}".removeprefix("s3://"): path.read_bytes() for path in folder.iterdir()})


def outcomes(output: str) -> Outcomes:
    """What became of each image, which must have exactly one row."""
    filesystem, root = fsspec.url_to_fs(output)
    filesystem.invalidate_cache()
    files = filesystem.glob(f"{root}/segments/*/shard-*.parquet")
    rows = pyarrow.dataset.dataset(files, filesystem=filesystem).to_table(["uri", "status", "mask"]).to_pylist()
    found = {row["uri"].rpartition("/")[2]: (row["status"], digest(row["mask"])) for row in rows}
    assert len(found) == len(rows), "an image has more than one row"
    return found


def digest(mask: bytes | None) -> str | None:
    return mask and hashlib.sha256(mask).hexdigest()


def errors(output: str) -> dict[str, str]:
    """What the rows of images without a mask say."""
    filesystem, root = fsspec.url_to_fs(output)
    files = filesystem.glob(f"{root}/segments/*/shard-*.parquet")
    rows = pyarrow.dataset.dataset(files, filesystem=filesystem).to_table(["uri", "error"]).to_pylist()
    return {row["uri"].rpartition("/")[2]: row["error"] for row in rows if row["error"]}


def shards(output: str) -> int:
    """How many are there by now."""
    filesystem, root = fsspec.url_to_fs(output)
    filesystem.invalidate_cache()
    return len(filesystem.glob(f"{root}/segments/*/shard-*.parquet"))


class Driver:
    """A `swath` command in a process and a session of its own, so that all that it starts can be found and ended."""

    def __init__(self, log: Path, *arguments: str, environment: dict[str, str] | None = None):
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs", *arguments],
                stdout=file,
                stderr=file,
                start_new_session=True,
                cwd=ROOT,
                env=os.environ | (environment or {}),
            )

    def said(self) -> str:
        return self.log.read_text()

    def complaint(self) -> str:
        """The one line in which it said what was wrong."""
        said = self.said()
        assert "Traceback" not in said, said
        lines = [line for line in said.split("\n") if line.startswith("swath:")]
        assert len(lines) == 1, said
        return lines[0]

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done after {seconds:.0f} s:\n{self.said()}") from None

    def wait_until(self, happened: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Until something has happened, which must be before it ends."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"it ended too soon:\n{self.said()}"
            assert time.monotonic() < deadline, f"nothing happened for {seconds:.0f} s:\n{self.said()}"
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL the driver, and then whatever of its Ray does not end by itself."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 1
        while (left := session(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def session(leader: int) -> list[int]:
    """The processes in a session that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def below(parents: set[int], text: str) -> list[int]:
    """The children of some processes whose command line has `text`, oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) in parents and fields[0] != "Z" and text in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return sorted(found)


class Onlooker:
    """A listener that remembers what was said and keeps the last metrics, and may disturb the run."""

    def __init__(self, disturb: Callable[[int], None] = lambda done: None):
        self.lines: list[str] = []
        self.scraped = ""
        self.disturb = disturb

    def say(self, text: str) -> None:
        self.lines.append(text)

    def listing(self, found: int) -> None:
        pass

    def indexing(self, done: int, total: int) -> None:
        pass

    def segmenting(self, done: int, total: int, failures: int) -> None:
        url = re.search(r"http://\S+/metrics", "\n".join(self.lines))
        assert url
        with contextlib.suppress(OSError), urllib.request.urlopen(url[0], timeout=5) as reply:
            self.scraped = reply.read().decode()
        self.disturb(done)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.scraped, re.MULTILINE)
        return sum(map(float, found))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own of so many bytes ("256k"), mounted on `folder`; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
