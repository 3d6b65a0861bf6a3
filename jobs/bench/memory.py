"""Whether memory grows with the collection: the peaks of a run's processes, for few images and for ten times as many.

Whole runs of small images on the local disk with a network that needs no time, so that what is seen is the road's own:
the driver that lists, indexes and plans, the worker, and the hub that counts. Each size is a process of its own, and a
peak is what the kernel noted (VmHWM). Memory is no timing: other load on the machine does not matter.

  python -m jobs.bench.memory
  python -m jobs.bench.memory --images 2000 200000
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.bench.model import processor
from jobs.demo import WEIGHTS

DISTINCT = 64  # images that are drawn; the rest are links to them
WIDTH, HEIGHT = 64, 48
FLAT = 1.1  # times as much memory as for few images, at most
PROCESSES = ("driver", "worker", "hub")


def main() -> None:
    options = read_options()
    if options.run:
        print(json.dumps(peaks(Path(options.run))))
        return
    few, many = options.images
    print(f"# Peak resident memory, {few:,} and {many:,} images of {WIDTH}x{HEIGHT}, null model\n")
    print(f"{processor('cpu')}. `python -m jobs.bench.memory --images {few} {many}`\n")
    found = {images: measure(images) for images in (few, many)}
    ratios = {name: round(found[many][name] / found[few][name], 3) for name in PROCESSES}
    print("| process | few, MiB | many, MiB | ratio |\n|---|---|---|---|")
    for name in PROCESSES:
        sizes = [f"{found[images][name] / 2**20:,.0f}" for images in (few, many)]
        print(f"| {name} | {' | '.join(sizes)} | {ratios[name]} |")
    print(f"\nflat within {FLAT - 1:.0%}: {'yes' if max(ratios.values()) <= FLAT else 'no'}\n")
    print(json.dumps({"hardware": processor("cpu"), "peaks": found, "ratios": ratios, "limit": FLAT}))


def read_options() -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs=2, default=[2_000, 20_000], metavar="N", help="few and many")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the folder of a size, in the process that measures it
    return parser.parse_args()


def measure(images: int) -> dict[str, int]:
    """Bytes that each process of a run had resident at most."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "images", images)
        command = [sys.executable, "-m", "jobs.bench.memory", "--run", folder]
        # a session of its own, by which its hub is found
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        if done.returncode:
            sys.exit(f"a run of {images:,} images failed:\n{done.stdout[-3000:]}")
        return json.loads(next(line for line in done.stdout.split("\n") if line.startswith("{")))


def draw(folder: Path, images: int) -> None:
    """Small JPEGs, many with the same content."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(images):
        path = folder / f"{number:07d}.jpg"
        if number < DISTINCT:
            blocks = Image.fromarray(chance.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            blocks.resize((WIDTH, HEIGHT)).save(path, quality=90)
        else:
            os.link(folder / f"{number % DISTINCT:07d}.jpg", path)


def peaks(folder: Path) -> dict[str, int]:
    """Do a run, and say what its processes, this one among them, had at most."""
    from jobs.bench.rungs import NullSegmenter
    from pipeline.config import SegmentSettings
    from pipeline.run import segment
    from pipeline.segment import resident_memory

    watch = HubWatch()
    settings = SegmentSettings(
        input=(str(folder / "images"),), output=str(folder / "output"), checkpoint=str(WEIGHTS), workers="1"
    )
    record = segment(settings, watch, NullSegmenter).record
    assert record
    assert set(record["statuses"]) == {"ok"}, record["statuses"]
    return {"driver": resident_memory("VmHWM"), "worker": record["worker_memory"]["peak"], "hub": watch.peak}


class HubWatch:
    """Listens to a run and looks, while it lasts, at what its hub has taken."""

    peak = 0  # bytes

    def say(self, text: str) -> None:
        print(text, flush=True)

    def listing(self, found: int) -> None:
        pass

    def indexing(self, done: int, total: int) -> None:
        pass

    def segmenting(self, done: int, total: int, failures: int) -> None:
        self.peak = max(self.peak, peak_of("ray::Hub"))


def peak_of(name: str) -> int:
    """The greatest VmHWM, in bytes, of the processes of this session that are called so."""
    found = [0]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):
            if (folder / "cmdline").read_text().startswith(name) and os.getsid(int(folder.name)) == os.getsid(0):
                lines = (folder / "status").read_text().split("\n")
                found.append(1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
    return max(found)


if __name__ == "__main__":
    main()
