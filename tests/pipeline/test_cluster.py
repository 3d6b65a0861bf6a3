"""Workers fit the machines that they are for, also where those come and go."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.cluster import IMAGE_MEMORY, gpu_share, image_memory, size_workers
from pipeline.config import SegmentSettings
from pipeline.run import segment
from pipeline.segment import SHARDS_AHEAD
from tests.conftest import Quiet, draw_image
from tests.pipeline.sleeper import Sleeper

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("node", "gpus", "cpus"),
    [
        ({"CPU": 16, "GPU": 1}, 1, 15),
        ({"CPU": 16, "GPU": 4}, 1, 3),
        ({"CPU": 16, "GPU": 1}, 0.5, 7),
        ({"CPU": 16, "GPU": 4}, 0.6, 3),
        ({"GPU": 1}, 1, 0),
    ],
)
def test_a_gpu_worker_gets_its_share_of_a_gpu_node(node, gpus, cpus):
    assert gpu_share(node, gpus) == cpus


def test_a_head_without_cpus_makes_no_worker_smaller(monkeypatch):
    hosts = [{"memory": 2 << 30}, {"CPU": 16.0, "memory": 64 << 30}, {"CPU": 8.0, "memory": 64 << 30}]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": host} for host in hosts])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(host.get("CPU", 0) for host in hosts)})
    settings = SegmentSettings(input="in", output="out", checkpoint="c", ray_address="head:6379")
    workers = size_workers(settings, shards=100)
    assert (workers.cpus, workers.gpus, workers.first) == (4, 0, 5), "23 CPUs, as one is Ray's"
    assert workers.memory == 2 << 30
    del hosts[1:]
    assert size_workers(settings, shards=100).cpus == 1, "of nodes that are still to come nothing is known"


def test_no_worker_has_parts_of_two_gpus(monkeypatch):
    hosts = [{"CPU": 8.0, "GPU": 2.0, "memory": 64 << 30}] * 2
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": host} for host in hosts])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 4.0})
    settings = SegmentSettings(input="in", output="out", checkpoint="c", ray_address="head:6379", gpus_per_worker=0.4)
    assert size_workers(settings, shards=100).first == 8, "two on each GPU, not ten in all"


def test_the_memory_for_images_is_a_part_of_the_smallest_share():
    large, small = {"CPU": 16, "memory": 128 << 30}, {"CPU": 4, "memory": 8 << 30}
    assert image_memory([large], 4) == 4 << 30
    assert image_memory([large, small], 2) == 512 << 20
    assert image_memory([{"CPU": 64, "memory": 8 << 30}], 1) == IMAGE_MEMORY[0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without room for a worker, and one node with room for one, all on this machine."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as names of sockets in it must be
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        # no handlers of signals, which a thread that adds a node could not install
        head = {"num_cpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=head)
        try:
            cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


class Run:
    """A run of sleeping workers in a thread, and what they have done."""

    def __init__(self, cluster: Cluster, folder: Path, checkpoint: str, shards: int):
        self.output = folder / "masks"
        self.output.mkdir()
        self.set_pace(1.0)
        for number in range(shards):
            draw_image(folder / "photos" / f"{number:03d}.png", 32, 32, number)
        self.settings = SegmentSettings(
            input=str(folder / "photos"),
            output=str(self.output),
            checkpoint=checkpoint,
            ray_address=cluster.address,
            policy="exact=32x32",
            shard_images=1,
            cpus_per_worker=1,
        )

    def set_pace(self, seconds: float) -> None:
        (self.output / "pace").write_text(str(seconds))

    def done(self) -> dict[str, int]:
        """Images done by each worker, by node and process."""
        return {path.name: int(path.read_text() or 0) for path in self.output.glob("done-*")}

    def do(self, meanwhile: Callable[["Run"], None]) -> dict:
        """The run's record, when `meanwhile` has ended as well."""
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(meanwhile, self)
            watching.add_done_callback(lambda _: self.set_pace(0))
            result = segment(self.settings, Quiet(), Sleeper)
            watching.result()
        return result.record


def wait_until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.2)


def test_a_node_that_joins_is_used_and_one_that_goes_costs_only_what_it_had(cluster, checkpoint, tmp_path):
    run = Run(cluster, tmp_path, checkpoint, shards=200)
    seconds = 0.0

    def come_and_go(run: Run) -> None:
        nonlocal seconds
        wait_until(lambda: sum(run.done().values()) >= 3)
        before, joined = set(run.done()), time.monotonic()
        node = cluster.add_node(num_cpus=1)
        wait_until(lambda: any(count >= 4 for name, count in run.done().items() if name not in before))
        seconds = time.monotonic() - joined
        cluster.remove_node(node, allow_graceful=False)

    record = run.do(come_and_go)
    assert record["statuses"] == {"ok": 200}
    rows = duckdb.sql(f"SELECT count(*), count(DISTINCT uri) FROM '{run.output}/segments/*/*.parquet'").fetchall()
    assert rows == [(200, 200)]
    again = sum(run.done().values()) - 200
    assert 0 <= again <= 2 * SHARDS_AHEAD, "only what the node had under way is done again"
    print(f"{seconds:.0f} s from joining to four images done")
