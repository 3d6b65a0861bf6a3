"""How a run scales: 1, 2, 4 and 8 simulated nodes with a device each that sleeps as a GPU would; and an estimate, from
what is measured here and what is stated below, of a billion images on 64 GPUs.

  python -m jobs.bench.scale                     # 50 shards of a second for each node: about 10 minutes
  python -m jobs.bench.scale --nodes 1 8 --shards 50

All nodes are processes of this machine, so what is shown is Ray, the road and the store's protocol, not a network.
Efficiency is the time of one node for its shards by that of N nodes for N times as many. Each is counted from the first
batch to the last one's end: start-up is told apart. Idle in the tail is what devices wait for once each has done its
last shard, of all their time. The peer is one node. What a shard costs the driver is the difference between two runs
with a network that needs no time, one of many shards and one of few, each in a process of its own.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.bench.model import processor
from jobs.bench.rungs import NullPredictor, NullSegmenter
from model.checkpoint import Checkpoint
from model.predictor import Predictor
from model.segmentation import Segmentation
from pipeline.config import SegmentSettings
from pipeline.segment import Segmenter, resident_memory

WEIGHTS = Path(__file__).parents[1] / "scenes" / "weights"
SHARD_SECONDS = 1.0
FEW, MANY = 200, 2_200  # shards of the runs that tell what one costs the driver
IMAGES, GPUS = 1_000_000_000, 64
# What is assumed of the billion: an image's bytes and mask as in COCO's photographs, a shard's images (the most by
# default), what one GPU does, and a list request's answer
IMAGE_BYTES, MASK_BYTES, SHARD_IMAGES, GPU_RATE, LIST_SECONDS = 160_000, 6_000, 1024, 400, 0.1
HEADER_BYTES = 8_192
SPILL = 450  # bytes an image that the plan's join spilled at 100,000,000 of them; see results/*-collections.md
# What Amazon S3 documents: GETs a second of one prefix, names in one answer; US dollars for a thousand requests in its
# first region, and what a GPU of that kind costs there an hour, roughly
PREFIX_RATE, PAGE = 5_500, 1_000
GET_PRICE, PUT_PRICE, GPU_PRICE = 0.0004, 0.005, 2.0
# What a machine has at least: GPUs, bytes of network a second, and bytes of memory and disk of the one with the driver
GPUS_OF_A_MACHINE, NETWORK, HEAD_MEMORY, HEAD_DISK = 8, 25e9 / 8, 64e9, 1e12


class SleepingDevice(NullPredictor):
    """A device that takes a second for a shard's one image, and notes when."""

    def __init__(self, notes: Path):
        self.notes, self.device = notes / f"device-{os.getpid()}", threading.Lock()

    def __call__(self, images: np.ndarray, sizes: Iterable[tuple[int, int]]) -> list[Segmentation]:
        with self.device:
            began = time.time()
            time.sleep(SHARD_SECONDS * len(images))
            with self.notes.open("a") as file:
                file.write(f"{began} {time.time()}\n")
        return super().__call__(images, sizes)


class Sleeper(Segmenter):
    """The worker of a run, but for the network."""

    def load(self, checkpoint: Checkpoint) -> Predictor:
        return SleepingDevice(Path(self.job.settings.output))  # type: ignore[return-value]


class Nobody:
    """Nobody watches."""

    def say(self, text: str) -> None:
        pass

    def listing(self, found: int) -> None:
        pass

    def indexing(self, done: int, total: int) -> None:
        pass

    def segmenting(self, done: int, total: int, failures: int) -> None:
        pass


@dataclass(frozen=True)
class Measurement:
    """One size of cluster."""

    nodes: int
    shards: int
    start_up: float  # seconds until the first batch
    seconds: float  # from there to the end of the last one
    busy: float  # share of the devices' time
    tail: float  # share that they had nothing left to do
    gap: float  # seconds between two shards of a device, on average: what scheduling costs it


def measure(nodes: int, shards: int, folder: Path) -> Measurement:
    """A run of so many shards on so many nodes."""
    began = time.time()
    run(nodes, shards, folder, Sleeper)
    devices = [np.loadtxt(path, ndmin=2) for path in (folder / "masks").glob("device-*")]
    return summarise(nodes, shards, began, devices)


def run(nodes: int, shards: int, folder: Path, worker: type[Segmenter]) -> None:
    """Segment so many images, one a shard, on a cluster of nodes each with room for one worker."""
    from ray.cluster_utils import Cluster

    from pipeline.run import segment

    photos, output = folder / "photos", folder / "masks"
    photos.mkdir(parents=True)
    output.mkdir()
    for number in range(shards):
        Image.new("RGB", (64, 64), (number % 256, number // 256, 99)).save(photos / f"{number:05d}.png")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        settings = SegmentSettings(
            input=(str(photos),),
            output=str(output),
            checkpoint=str(WEIGHTS),
            policy="exact=64x64",
            shard_images=1,
            ray_address=cluster.address,
            workers=str(nodes),
            cpus_per_worker=1,
        )
        record = segment(settings, Nobody(), worker).record
    finally:
        cluster.shutdown()
    assert record
    assert record["statuses"] == {"ok": shards}, record["statuses"]


def summarise(nodes: int, shards: int, began: float, devices: list[np.ndarray]) -> Measurement:
    """`devices`: of each the beginning and end of every shard, in seconds."""
    assert len(devices) == nodes, f"{len(devices)} of {nodes} workers had work"
    assert sum(map(len, devices)) == shards
    first, last = min(device[0, 0] for device in devices), max(device[-1, 1] for device in devices)
    seconds = last - first
    busy = sum(float((device[:, 1] - device[:, 0]).sum()) for device in devices)
    tail = sum(last - float(device[-1, 1]) for device in devices)
    gaps = np.concatenate([device[1:, 0] - device[:-1, 1] for device in devices])
    everything = nodes * seconds
    return Measurement(nodes, shards, first - began, seconds, busy / everything, tail / everything, float(gaps.mean()))


@dataclass(frozen=True)
class Driver:
    """What a run costs the process that drives it; or what one shard does."""

    seconds: float  # of CPU time
    memory: float  # bytes, at its peak


def of_a_shard(folder: Path) -> Driver:
    """What each shard more costs the driver."""
    few, many = (driver(shards, folder) for shards in (FEW, MANY))
    return Driver((many.seconds - few.seconds) / (MANY - FEW), (many.memory - few.memory) / (MANY - FEW))


def driver(shards: int, folder: Path) -> Driver:
    """What a run of so many shards on one node costs it, in a process of its own."""
    command = [sys.executable, "-m", "jobs.bench.scale", "--driver", str(shards), str(folder / f"driver-{shards}")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Driver(**json.loads(done.stdout.strip().split("\n")[-1]))


def drive(shards: int, folder: Path) -> Driver:
    """Do such a run here."""
    run(1, shards, folder, NullSegmenter)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Driver(used.ru_utime + used.ru_stime, resident_memory("VmHWM"))


@dataclass(frozen=True)
class Limit:
    """Something of which there is only so much."""

    name: str
    wanted: str
    there: str
    share: float  # of it that is used; above 1 it breaks
    remedy: str


def estimate(shard: Driver) -> tuple[dict[str, float], list[Limit]]:
    """The billion: requests, bytes, time, money; and what breaks first. `shard`: what one costs the driver."""
    shards = IMAGES / SHARD_IMAGES
    seconds = IMAGES / (GPUS * GPU_RATE)
    gets, puts, lists = 2 * IMAGES, shards, IMAGES / PAGE
    rate, traffic = IMAGES / seconds, IMAGES * (IMAGE_BYTES + MASK_BYTES) / seconds
    listing, driving, memory = lists * LIST_SECONDS, shards * shard.seconds, shards * shard.memory
    wire = traffic / (GPUS / GPUS_OF_A_MACHINE)
    totals = {
        "shards": shards,
        "hours": seconds / 3600,
        "GET requests": gets,
        "PUT requests": puts,
        "LIST requests": lists,
        "terabytes read": IMAGES * (IMAGE_BYTES + HEADER_BYTES) / 1e12,
        "terabytes written": IMAGES * MASK_BYTES / 1e12,
        "gigabytes of the driver": memory / 1e9,
        "dollars for requests": gets / 1000 * GET_PRICE + (puts + lists) / 1000 * PUT_PRICE,
        "dollars for GPUs": GPUS * seconds / 3600 * GPU_PRICE,
    }
    prefixes = "keys under more prefixes; until then SlowDown is waited out"
    limits = [
        Limit("GETs of one S3 prefix", f"{rate:,.0f}/s", f"{PREFIX_RATE:,}/s", rate / PREFIX_RATE, prefixes),
        Limit(
            "listing, one page after the other",
            *(hours(listing), hours(seconds), listing / seconds),
            "a manifest, such as S3 Inventory's, as INPUT",
        ),
        Limit("the driver's CPU, one core", hours(driving), hours(seconds), driving / seconds, "larger --shard-images"),
        Limit(
            "the driver's memory",
            *(f"{memory / 1e9:,.0f} GB", f"{HEAD_MEMORY / 1e9:,.0f} GB", memory / HEAD_MEMORY),
            "larger --shard-images",
        ),
        Limit(
            "the driver's disk, while it plans",
            *(f"{IMAGES * SPILL / 1e9:,.0f} GB", f"{HEAD_DISK / 1e9:,.0f} GB", IMAGES * SPILL / HEAD_DISK),
            "a larger disk (TMPDIR), or several INPUTs",
        ),
        Limit(
            "a machine's network",
            *(f"{wire / 1e9:,.2f} GB/s", f"{NETWORK / 1e9:,.1f} GB/s", wire / NETWORK),
            "fewer GPUs a machine",
        ),
    ]
    return totals, sorted(limits, key=lambda limit: -limit.share)


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h"


def main() -> None:
    options = read_options()
    os.environ.pop("RAY_ADDRESS", None)
    if options.driver:
        shards, folder = options.driver
        print(json.dumps(asdict(drive(int(shards), Path(folder)))))
        return
    name = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as names of sockets in it must be
    os.environ["RAY_TMPDIR"] = name
    print(f"# A run on simulated nodes, devices that sleep {SHARD_SECONDS} s a shard\n")
    sizes = " ".join(map(str, options.nodes))
    print(f"{processor('cpu')}. `python -m jobs.bench.scale --nodes {sizes} --shards {options.shards}`\n")
    try:
        rows = scale(options.nodes, options.shards, Path(name))
        shard = of_a_shard(Path(name))
    finally:
        shutil.rmtree(name, ignore_errors=True)
    totals, limits = estimate(shard)
    cost = f"{shard.seconds * 1000:.1f} ms of CPU and {shard.memory / 1000:.1f} kB at its peak"
    print(f"\nA shard costs the driver {cost}.\n")
    print(f"{IMAGES:,} images on {GPUS} GPUs at {GPU_RATE} images/s each:\n\n| | |\n|---|---|")
    for what, value in totals.items():
        print(f"| {what} | {value:,.0f} |")
    print("\nWhat breaks first:\n\n| of what there is | | wanted | there | then |\n|---|---|---|---|---|")
    for limit in limits:
        print(f"| {limit.share:.0%} | {limit.name} | {limit.wanted} | {limit.there} | {limit.remedy} |")
    first, last = rows[0], rows[-1]
    result = {"efficiency": first.seconds / last.seconds, "nodes": last.nodes, "tail": last.tail}
    print("\n" + json.dumps(result | {"rows": [asdict(row) for row in rows], "driver_of_a_shard": asdict(shard)}))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8], help="sizes of cluster; the first is 1")
    parser.add_argument("--shards", type=int, default=50, help="for each node")
    parser.add_argument("--driver", nargs=2, help=argparse.SUPPRESS)  # shards and folder, in the process of `driver`
    return parser.parse_args()


def scale(sizes: list[int], shards: int, folder: Path) -> list[Measurement]:
    """Runs on clusters of these sizes, with so many shards a node, printed as they end."""
    print("| nodes | shards | start-up | seconds | efficiency | devices busy | idle in the tail | between two shards |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[Measurement] = []
    for nodes in sizes:
        rows.append(found := measure(nodes, shards * nodes, folder / f"n{nodes}"))
        efficiency = rows[0].seconds / found.seconds
        print(
            f"| {found.nodes} | {found.shards} | {found.start_up:.1f} s | {found.seconds:.1f} | {efficiency:.3f} | "
            f"{found.busy:.1%} | {found.tail:.1%} | {found.gap * 1000:.0f} ms |",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
