"""What the road costs, rung by rung, beside its peers: encoded images in, masks in Parquet out.

Each rung is a process of its own on the same images: plain processes that fetch, decode, encode and write; the worker's
stages; whole runs with a device that needs no time or that sleeps; the model alone, on images that lie in memory; the
whole run; and scripts that do the same with Ray Data, Daft and a DataLoader, as their documentation teaches, with
transformers. A rung's CPU time and memory (proportional, so shared pages count once) are those of all its processes.

  make bench                                       all rungs, images of 640x480 on the local disk
  python -m jobs.bench.road --images 40 --sizes uhd --only run
  python infra/local/s3_server.py -- .venv/bin/python -m jobs.bench.road --bucket s3://bench
"""

import argparse
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.dataset
from PIL import Image

from jobs.bench.model import installed, processor
from jobs.demo import WEIGHTS
from jobs.scenes.street import draw_scene

SIZES: dict[str, list[tuple[int, int]]] = {  # (width, height), each as often as it stands there
    "vga": [(640, 480)],
    "mix": [(640, 480), (500, 375), (480, 640), (1024, 683), (1600, 1200), (800, 533), (2048, 1536), (4032, 3024)],
    "uhd": [(3840, 2160)],
}
DISTINCT = {"vga": 128, "mix": 24, "uhd": 8}  # images that are drawn; the rest are copies
LOOK = 0.4  # seconds between two looks at CPU times, which take a millisecond or two themselves
MEMORY_LOOK = 5  # looks between two at memory, which take ten times as long
HELD_OUT = 3_000_000  # seeds of scenes that no training has seen
PEERS = {"Ray Data": "ray_data", "Daft": "daft_", "DataLoader": "dataloader"}
RUNGS = (
    *("bare: fetch", "bare: + decode", "bare: + encode", "bare: + Parquet", "stages, null model"),
    *("whole run, null model", "whole run, device sleeps", "model alone, one image at a time", "model alone"),
    *("whole run", *PEERS),
)
COLUMNS = ("", "images", "seconds", "images/s", "once started", "CPU-ms an image", "peak memory", "device busy")
CHEAP = RUNGS[:7]  # without a network: they are given all the images, the others as many as --model-images


def main() -> None:
    options = read_options()
    print(heading(options), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        collections = {
            images: upload(draw(root / f"images-{images}", images, options.sizes), options.bucket)
            for images in {options.images, options.model_images}
        }
        checkpoint = copy_checkpoint(root / "checkpoint", options.size)
        rows = []
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        for number, name in enumerate(RUNGS):
            if options.only and not any(text in name for text in options.only):
                continue
            images = options.images if name in CHEAP else options.model_images
            output = str(root / f"output-{number}")
            policy = "exact={}x{}".format(*options.size)
            case = {"source": collections[images], "output": output, "checkpoint": checkpoint, "policy": policy}
            row = {"rung": name, "images": images} | measure(name, case | {"threads": options.threads}, images)
            rows.append(row)
            print(line(row), flush=True)
        print(findings(rows, root), flush=True)
    setting = {"sizes": options.sizes, "source": "s3" if options.bucket else "local", "threads": options.threads}
    print(json.dumps(setting | {"hardware": processor("cpu"), "rungs": rows}))


def read_options() -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.road", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", choices=SIZES, default="vga", help="of the images (default: vga, 640x480)")
    parser.add_argument("--images", type=int, default=12_000, metavar="N", help="without a network (default: 12000)")
    parser.add_argument("--model-images", type=int, default=300, metavar="N", help="with a network (default: 300)")
    parser.add_argument(
        "--size", type=size, default="512x512", metavar="HEIGHTxWIDTH", help="network input (default: 512x512)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="(default: all CPUs)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="rungs whose name has TEXT; repeatable")
    parser.add_argument("--bucket", metavar="URL", help="put the images there first (default: a local folder)")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def draw(folder: Path, images: int, sizes: str) -> Path:
    """A folder of so many JPEGs, of which a few are distinct and the others have the same content."""
    folder.mkdir()
    shapes = SIZES[sizes]
    for number in range(images):
        path, distinct = folder / f"{number:06d}.jpg", number % DISTINCT[sizes]
        if number == distinct:
            scene = draw_scene(HELD_OUT + number, *shapes[number % len(shapes)])
            Image.fromarray(scene.image).save(path, quality=85)
        else:
            os.link(folder / f"{distinct:06d}.jpg", path)
    return folder


def upload(folder: Path, bucket: str | None) -> str:
    """Where the images are: the folder, or a prefix of its name in the bucket that they are copied to."""
    if not bucket:
        return str(folder)
    filesystem, root = fsspec.url_to_fs(bucket)
    with suppress(FileExistsError):
        filesystem.mkdir(root)
    filesystem.put(f"{folder}/", f"{root}/{folder.name}/", recursive=True)
    return f"{bucket}/{folder.name}"


def copy_checkpoint(folder: Path, network_size: tuple[int, int]) -> str:
    """The demo's network, with an image processor for peers that scales to the size that our policy asks for."""
    shutil.copytree(WEIGHTS, folder)
    path = folder / "preprocessor_config.json"
    height, width = network_size
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": height, "width": width}}))
    return str(folder)


def measure(name: str, case: dict[str, Any], images: int) -> dict[str, Any]:
    """Run one rung and say what it took."""
    if name in PEERS:
        values = [str(case[key]) for key in ("source", "output", "checkpoint", "threads")]
        command = [sys.executable, "-m", f"jobs.bench.peers.{PEERS[name]}", *values]
    else:
        command = [sys.executable, "-m", "jobs.bench.rungs", name, json.dumps(case)]
    with tempfile.TemporaryFile("w+") as log:
        started = time.time()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        tree = Tree(process.pid)
        code = process.wait()
        seconds = time.time() - started
        tree.stop()
        log.seek(0)
        said = log.read()
    if code:
        sys.exit(f"{name} failed:\n{said[-3000:]}")
    found = {"seconds": round(seconds, 1), "images_per_second": round(images / seconds, 2)}
    found |= {"peak_memory": tree.peak, "cpu_seconds": round(tree.cpu()[-1][1], 1)}
    if name in PEERS:
        return found
    stretch = json.loads(said.strip().split("\n")[-1])
    done, span = stretch["images"] - stretch["first"], stretch["ended"] - stretch["began"]
    if done and span:
        cpu = tree.at(stretch["ended"]) - tree.at(stretch["began"])
        found |= {"steady_images_per_second": round(done / span, 2), "steady_cpu_ms": round(1000 * cpu / done, 3)}
    notes = [text for text in said.split("\n") if text.startswith("worker memory")]
    return found | {"device_busy": stretch["device_busy"]} | ({"notes": notes[-1]} if notes else {})


class Tree:
    """CPU time and memory of a process and all that descend from it, sampled until it is stopped."""

    def __init__(self, root: int):
        self.root, self.peak = root, 0
        self.used: dict[tuple[int, str], float] = {}  # CPU seconds by process; an id may come again
        self.series: list[tuple[float, float]] = [(time.time(), 0.0)]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        looks = 0
        while not self.ended.wait(LOOK):
            family = self.family()
            self.series.append((time.time(), sum(self.used.values())))
            if looks % MEMORY_LOOK == 0:
                self.peak = max(self.peak, sum(map(proportional_memory, family)))
            looks += 1

    def family(self) -> set[int]:
        """The processes alive, and their times noted. Those whose parent has gone stay in the family."""
        tick = os.sysconf("SC_CLK_TCK")
        parents: dict[int, int] = {}
        times: dict[int, tuple[str, float]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                pid = int(path.parent.name)
                parents[pid], times[pid] = int(fields[1]), (fields[19], (int(fields[11]) + int(fields[12])) / tick)
        known = {pid for pid, start in self.used if times.get(pid, ("",))[0] == start} | {self.root}
        generation = known & set(parents)
        while generation:
            generation = {pid for pid, parent in parents.items() if parent in known} - known
            known |= generation
        family = known & set(times)
        for pid in family:
            self.used[pid, times[pid][0]] = times[pid][1]
        return family

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()

    def cpu(self) -> list[tuple[float, float]]:
        """(time, CPU seconds used by then) of each look."""
        return self.series

    def at(self, moment: float) -> float:
        """CPU seconds used by `moment`."""
        times, used = zip(*self.series, strict=True)
        return float(np.interp(moment, times, used))


def proportional_memory(pid: int) -> int:
    """Bytes of a process, each page shared between several counted in parts."""
    with suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else 0
    return 0


def heading(options: Any) -> str:
    """What this run is: hardware, versions, command."""
    versions = ", ".join(f"{name} {installed(name)}" for name in ("ray", "torch", "transformers", "daft", "pillow"))
    where = "the S3 server on loopback" if options.bucket else "the local disk"
    return (
        f"# The road: {options.sizes} images from {where}, B0\n\n"
        f"{processor('cpu')}, {options.threads} threads; Python {platform.python_version()}, {versions}.\n\n"
        f"`python -m jobs.bench.road {shlex.join(sys.argv[1:])}`\n"
    )


def line(row: dict[str, Any]) -> str:
    busy = f"{100 * row['device_busy']:.1f} %" if row.get("device_busy") is not None else ""
    steady = [str(row.get(key, "")) for key in ("steady_images_per_second", "steady_cpu_ms")]
    memory = f"{row['peak_memory'] / 2**20:,.0f} MiB"
    cells = [
        row["rung"],
        f"{row['images']:,}",
        str(row["seconds"]),
        str(row["images_per_second"]),
        *steady,
        memory,
        busy,
    ]
    return f"| {' | '.join(cells)} |" + (f"\n<!-- {row['notes']} -->" if "notes" in row else "")


def findings(rows: list[dict[str, Any]], root: Path) -> str:
    """The ratios that matter, of the rungs that were run."""
    by_name = {row["rung"]: row for row in rows}
    found = []

    def compare(text: str, name: str, other: str, key: str = "images_per_second") -> None:
        if name in by_name and other in by_name and by_name[other].get(key):
            found.append(f"- {text}: {by_name[name][key] / by_name[other][key]:.2f}")

    steady = "steady_images_per_second"
    compare("whole run to the model alone, once started", "whole run", "model alone", steady)
    compare("the same to all threads on one image at a time", "whole run", "model alone, one image at a time", steady)
    for peer in PEERS:
        compare(f"whole run to {peer}, end to end", "whole run", peer)
        compare(f"its peak memory to that of {peer}", "whole run", peer, "peak_memory")
        if "whole run" in by_name and peer in by_name:
            numbers = [RUNGS.index(name) for name in ("whole run", peer)]
            found.append(f"- equal mask pixels, to {peer}: {agreement(*(root / f'output-{n}' for n in numbers)):.4%}")
    if {"stages, null model", "whole run, null model", "bare: + encode"} <= set(by_name):
        less = by_name["bare: + encode"]["steady_cpu_ms"]
        found += [
            f"- {name}: {by_name[name]['steady_cpu_ms'] - less:.2f} CPU-ms an image beyond the bare loop that encodes"
            for name in ("stages, null model", "whole run, null model")
        ]
    return "\n" + "\n".join(found) + "\n"


def agreement(ours: Path, theirs: Path) -> float:
    """Share of equal mask pixels between our table and a peer's."""
    rows = pyarrow.dataset.dataset(ours / "segments").to_table(["uri", "mask"]).to_pylist()
    masks = {row["uri"].rpartition("/")[2]: row["mask"] for row in rows}
    equal = total = 0
    for row in pyarrow.dataset.dataset(theirs).to_table(["path", "mask"]).to_pylist():
        mine, other = (open_mask(png) for png in (masks[row["path"].rpartition("/")[2]], row["mask"]))
        equal += int((mine == other).sum())
        total += mine.size
    return equal / total


def open_mask(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


if __name__ == "__main__":
    main()
