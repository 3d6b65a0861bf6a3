"""Whatever is killed, at whatever moment, the output has every image once, with the mask that it always has."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from infra.local.s3_server import S3Server
from pipeline.config import SegmentSettings
from pipeline.run import segment
from tests.chaos.collection import FULL, IMAGES, SHARD, Collection, Driver, Onlooker, below, options, outcomes, shards

SLOWLY = 0.1 if FULL else 0.05  # seconds more for each image, so that there is time to disturb the run


def test_a_driver_that_is_killed_again_and_again_loses_nothing(
    photos: Collection, spoil: Callable[..., None], tmp_path: Path, seed: int
):
    """Its Ray with it, or its workers only, where they are a cluster's."""
    chance, output = random.Random(seed), f"{photos.bucket}/killed-driver"
    kills = 20 if FULL else 2
    command = ["segment", photos.url, output]
    spoil(seconds=SLOWLY)
    for number in range(kills):
        settings = photos.on_cluster() if number % 2 else photos.settings()
        with Driver(tmp_path / f"killed-{number}", *command, *options(settings)) as driver:
            if number % 4 > 1:  # while it starts, or soon after
                time.sleep(chance.uniform(1, 12))
            else:
                enough = shards(output) + chance.randint(1, IMAGES // SHARD // (kills + 1))
                driver.wait_until(lambda enough=enough: shards(output) >= enough)
                time.sleep(chance.uniform(0, 0.3))
            assert driver.process.poll() is None, f"it ended before it was killed:\n{driver.said()}"
            driver.kill()
    assert shards(output) < IMAGES // SHARD
    spoil()
    with Driver(tmp_path / "last", *command, *options(photos.on_cluster())) as driver:
        assert driver.wait() == 0, driver.said()
        assert "was not finished, so it goes on as planned" in driver.said()
    assert outcomes(output) == photos.expected


def test_workers_and_the_hub_are_killed_and_the_run_goes_on(
    cluster: Cluster, photos: Collection, spoil: Callable[..., None], seed: int
):
    chance, output = random.Random(seed), f"{photos.bucket}/killed-actors"
    victims = ["ray::MapWorker", "ray::Hub"] * (5 if FULL else 1)
    chance.shuffle(victims)
    moments = sorted(chance.sample(range(1, IMAGES * 3 // 4), len(victims)))

    def kill(done: int) -> None:
        if moments and done >= moments[0] and (found := below(raylets(cluster), victims[0])):
            print(f"killed {victims[0]} when {done} images were done")
            os.kill(chance.choice(found), signal.SIGKILL)
            del moments[0], victims[0]

    spoil(seconds=SLOWLY)
    settings = photos.on_cluster() | {"workers": "2"}
    segment(SegmentSettings(input=(photos.url,), output=output, **settings), Onlooker(kill))
    assert not victims
    assert outcomes(output) == photos.expected


def raylets(cluster: Cluster) -> set[int]:
    """The processes that have started a cluster's workers."""
    return {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}


@pytest.mark.parametrize("how", ["killed", "stopped"] if FULL else ["killed"])
def test_a_store_that_is_away_for_a_while_is_waited_for(
    s3: S3Server, photos: Collection, spoil: Callable[..., None], seed: int, how: str
):
    chance, output = random.Random(seed), f"{photos.bucket}/{how}-gateway"
    moment = chance.randint(1, IMAGES // 2)
    away = threading.Thread(target=be_away, args=(s3, how, 15 if FULL else 3))

    def begin(done: int) -> None:
        if done >= moment and not away.ident:
            away.start()

    spoil(seconds=SLOWLY)
    try:
        settings = SegmentSettings(input=(photos.url,), output=output, **photos.on_cluster())
        segment(settings, Onlooker(begin))
    finally:
        assert away.ident
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


def test_a_node_that_dies_for_good_leaves_its_work_to_the_others(
    cluster: Cluster, photos: Collection, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], seed: int
):
    """Until Ray knows, its workers lose shard after shard; no number of tries of each is sure to outlast that."""
    monkeypatch.setattr("pipeline.run.TASK_RETRIES", 1)
    chance, output = random.Random(seed), f"{photos.bucket}/killed-node"
    moment = chance.randint(1, IMAGES // 2)
    node = chance.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id))
    is_killed = threading.Event()

    def kill(done: int) -> None:
        if done >= moment and not is_killed.is_set():
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            is_killed.set()

    spoil(seconds=SLOWLY)
    try:
        settings = photos.on_cluster() | {"workers": "2"}
        segment(SegmentSettings(input=(photos.url,), output=output, **settings), Onlooker(kill))
    finally:
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)  # for the tests that follow
    assert is_killed.is_set()
    assert outcomes(output) == photos.expected
