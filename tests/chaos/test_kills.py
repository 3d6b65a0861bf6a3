"""Whatever is killed, at whatever moment, the output has every image once, with the mask that it always has."""

import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from infra.local.s3_server import S3Server
from pipeline.config import SegmentSettings
from pipeline.run import segment
from tests.chaos.collection import (
    FULL,
    IMAGES,
    SHARD,
    Collection,
    Driver,
    Onlooker,
    named,
    outcomes,
    shards,
    spoiled_decoder,
)

SLOWLY = spoiled_decoder(seconds=0.1)  # an image, so that there is time to disturb the run


def test_a_driver_that_is_killed_again_and_again_loses_nothing(photos: Collection, tmp_path: Path, seed: int):
    chance, output = random.Random(seed), f"{photos.bucket}/killed-driver"
    kills = 20 if FULL else 2
    command = ["segment", photos.url, output, *photos.options()]
    for number in range(kills):
        with Driver(tmp_path / f"killed-{number}", *command, environment=SLOWLY) as driver:
            if number % 2:  # while it starts, or soon after
                time.sleep(chance.uniform(1, 12))
            else:
                enough = shards(output) + chance.randint(1, IMAGES // SHARD // kills)
                driver.wait_until(lambda enough=enough: shards(output) >= enough)
                time.sleep(chance.uniform(0, 0.5))
            assert driver.process.poll() is None, f"it ended before it was killed:\n{driver.said()}"
            driver.kill()
    assert shards(output) < IMAGES // SHARD
    with Driver(tmp_path / "last", *command) as driver:
        assert driver.wait() == 0, driver.said()
        assert "was not finished, so it goes on as planned" in driver.said()
    assert outcomes(output) == photos.expected


def test_workers_and_the_hub_are_killed_and_the_run_goes_on(photos: Collection, tmp_path: Path, seed: int):
    chance, output = random.Random(seed), f"{photos.bucket}/killed-actors"
    victims = ["MapWorker", "Hub"] * (5 if FULL else 1)
    chance.shuffle(victims)
    options = ["--workers", "2", "--cpus-per-worker", "1"]
    with Driver(
        tmp_path / "log", "segment", photos.url, output, *photos.options(), *options, environment=SLOWLY
    ) as driver:
        for number, victim in enumerate(victims):
            enough = shards(output) + chance.randint(1, max(1, IMAGES // SHARD // len(victims) // 2))
            driver.wait_until(lambda enough=enough: shards(output) >= enough)
            driver.wait_until(lambda victim=victim: bool(named(driver.process.pid, f"ray::{victim}")))
            os.kill(chance.choice(named(driver.process.pid, f"ray::{victim}")), signal.SIGKILL)
            print(f"{number}: killed {victim} at {enough} shards")
        assert driver.wait() == 0, driver.said()
    assert outcomes(output) == photos.expected


@pytest.mark.parametrize("how", ["killed", "stopped"] if FULL else ["killed"])
def test_a_store_that_is_away_for_a_while_is_waited_for(
    s3: S3Server, photos: Collection, tmp_path: Path, seed: int, how: str
):
    chance, output = random.Random(seed), f"{photos.bucket}/{how}-gateway"
    away = threading.Thread(target=be_away, args=(s3, how, 15 if FULL else 3))
    with Driver(tmp_path / "log", "segment", photos.url, output, *photos.options(), environment=SLOWLY) as driver:
        try:
            enough = chance.randint(1, IMAGES // SHARD // 2)
            driver.wait_until(lambda: shards(output) >= enough)
            away.start()
            assert driver.wait() == 0, driver.said()
        finally:
            away.join()
    assert outcomes(output) == photos.expected


def be_away(s3: S3Server, how: str, seconds: float) -> None:
    """Have the gateway die and start again, or answer nobody for a while and then go on."""
    os.kill(s3.gateway, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    time.sleep(seconds)
    if how == "killed":
        s3.start_gateway()
    else:
        os.kill(s3.gateway, signal.SIGCONT)


@contextlib.contextmanager
def cluster(nodes: int, cpus: int) -> Iterator[Cluster]:
    """A head without room for a worker, and so many nodes with room for one, all on this machine."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as names of sockets in it must be
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        for name, value in SLOWLY.items():
            patch.setenv(name, value)
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            for _ in range(nodes):
                started.add_node(num_cpus=cpus)
            yield started
        finally:
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def test_a_node_that_dies_for_good_leaves_its_work_to_the_others(
    photos: Collection, monkeypatch: pytest.MonkeyPatch, seed: int
):
    """Until Ray knows, its workers lose shard after shard; no number of tries of each is sure to outlast that."""
    monkeypatch.setattr("pipeline.run.TASK_RETRIES", 1)
    chance, output = random.Random(seed), f"{photos.bucket}/killed-node"
    enough = chance.randint(1, IMAGES // 2)
    killed: list[int] = []
    with cluster(nodes=2, cpus=1) as ray:

        def kill(done: int) -> None:
            if done >= enough and not killed:
                node = chance.choice(sorted(ray.worker_nodes, key=lambda node: node.node_id))
                killed.append(node.all_processes["raylet"][0].process.pid)
                os.kill(killed[0], signal.SIGKILL)

        settings = SegmentSettings(
            input=(photos.url,), output=output, ray_address=ray.address, cpus_per_worker=1, **photos.settings()
        )
        segment(settings, Onlooker(kill))
    assert killed
    assert outcomes(output) == photos.expected
