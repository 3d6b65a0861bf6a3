"""Whether a report grows with its collection: size, time and peak memory of the page of few images and of many.

The rows are made up and as many as real ones would be (`outputs`), their masks drawn scenes; each size is a process of
its own, and the peak is what the kernel noted (VmHWM). What the page is made of must not grow: it has numbers that were
counted by queries and a bounded number of pictures. The images themselves are not there, so that its pictures are masks
alone; what an image would add is printed below the table. What bounds the time is told by how much of it goes by until
the first picture, which are DuckDB's queries, and by how many cores were busy. A million images take 6 GB of the disk.

  python -m jobs.bench.report
  python -m jobs.bench.report --images 1000 1000000
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.bench.outputs import write_output
from jobs.display import Display
from jobs.page import make
from jobs.page.gallery import IMAGE_BYTES
from jobs.scenes.street import CLASSES, PALETTE, draw_scene
from model.labels import label_set
from pipeline.config import ReportSettings
from pipeline.masks import encode_mask

RUNS = 3  # of each output, so that a page looks for the newest row of an image
SIZES = [(width, height) for width in (640, 800, 1024) for height in (480, 600, 768)]  # as `outputs` has them
BASE64 = 4 / 3  # characters of a byte
FLAT = 1.1  # times as large a page as for few images, at most
SHOWN = {  # of a measurement, with what a table's number is of it
    "page_bytes": ("page, kB", 1e3),
    "output_bytes": ("output, MB", 1e6),
    "seconds": ("seconds", 1),
    "queries_seconds": ("of them queries", 1),
    "cpu_seconds": ("CPU seconds", 1),
    "peak": ("peak memory, MiB", 2**20),
}


def main() -> None:
    options = read_options()
    if options.make:
        print(json.dumps(measure(Path(options.make))))
        return
    from jobs.bench.model import processor  # which takes memory that a report does not

    few, many = options.images
    print(f"# Pages of {few:,} and {many:,} images in {RUNS} runs\n")
    print(f"{processor('cpu')}, {cores()} cores. `python -m jobs.bench.report --images {few} {many}`\n")
    found = {images: page_of(images) for images in (few, many)}
    ratios = {name: round(found[many][name] / found[few][name], 3) for name in SHOWN}
    print("| | few | many | ratio |\n|---|---|---|---|")
    for name, (title, unit) in SHOWN.items():
        numbers = [f"{found[images][name] / unit:,.1f}" for images in (few, many)]
        print(f"| {title} | {' | '.join(numbers)} | {ratios[name]} |")
    large = found[many]
    share, busy = large["queries_seconds"] / large["seconds"], large["cpu_seconds"] / large["seconds"]
    print(f"\nAn image in the gallery would add up to {IMAGE_BYTES * BASE64 / 1e3:,.0f} kB to the page.")
    print(f"\npage flat within {FLAT - 1:.0%}: {'yes' if ratios['page_bytes'] <= FLAT else 'no'}")
    print(f"bound by: queries {share:.0%} of the time, pictures the rest; {busy:.1f} of {cores()} cores busy\n")
    print(json.dumps({"hardware": processor("cpu"), "cores": cores(), "pages": found, "ratios": ratios, "limit": FLAT}))


def read_options() -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs=2, default=[1_000, 1_000_000], metavar="N", help="few and many")
    parser.add_argument("--make", help=argparse.SUPPRESS)  # the page of this output, in the process that measures it
    return parser.parse_args()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def page_of(images: int) -> dict[str, float]:
    """What making a page of so many images took, of which nothing was in memory before."""
    with tempfile.TemporaryDirectory() as folder:
        labels = label_set(list(CLASSES), list(PALETTE))
        masks = {size: encode_mask(draw_scene(7, *size).mask, labels) for size in SIZES}
        write_output(Path(folder), images, RUNS, prefix=f"file://{folder}/images", masks=masks)
        command = [sys.executable, "-m", "jobs.bench.report", "--make", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the page of {images:,} images failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().split("\n")[-1])


def measure(output: Path) -> dict[str, float]:
    """Make the page of an output, and say how large it is and what it took."""
    watch = Watch()
    page = make(ReportSettings(output=str(output), price=1.0), watch)
    ended, used = time.perf_counter(), time.process_time()
    lines = Path("/proc/self/status").read_text().split("\n")
    peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return {
        "page_bytes": len(page.encode()),
        "output_bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        "seconds": ended - watch.began,
        "queries_seconds": watch.drew - watch.began,
        "cpu_seconds": used - watch.used,
        "peak": peak,
    }


class Watch(Display):
    """Notes when a page is begun and when its first picture is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.drew, self.used = time.perf_counter(), 0.0, time.process_time()

    def say(self, text: str) -> None:
        pass

    def drawing(self, done: int, total: int) -> None:
        self.drew = self.drew or time.perf_counter()


if __name__ == "__main__":
    main()
