"""One collection for all chaos tests, with the masks that an undisturbed run makes of it, and one cluster for most."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from ray.cluster_utils import Cluster

from infra.local.s3_server import S3Server
from pipeline.config import SegmentSettings
from pipeline.run import segment
from tests.chaos.collection import DECODER, FULL, IMAGES, ROOT, SEED, Collection, Onlooker, draw, outcomes, upload

BUCKET = "s3://chaos"  # always the same, as what meets a fault is decided by its name


@pytest.fixture(autouse=True)
def seed() -> int:
    """pytest shows what was printed with a failure."""
    print(f"CHAOS_SEED={SEED}" + (" CHAOS=full" if FULL else ""))
    return SEED


@pytest.fixture(scope="package")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that says how decoding is spoiled in every process that starts from now on; see decoder/."""
    wanted = tmp_path_factory.mktemp("decoder") / "wanted.json"
    wanted.write_text("{}")
    path = os.pathsep.join(filter(None, (str(DECODER), str(ROOT), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHAOS_DECODER", str(wanted))
        patch.setenv("PYTHONPATH", path)
        yield wanted


@pytest.fixture
def spoil(decoder: Path) -> Iterator[Callable[..., None]]:
    """Spoils the decoding of workers that start from now on, until the end of the test."""
    yield lambda **wanted: decoder.write_text(json.dumps(wanted)) and None
    decoder.write_text("{}")


@pytest.fixture(scope="package")
def cluster(s3: S3Server, decoder: Path) -> Iterator[Cluster]:
    """A head without room for a worker and two nodes with room for one each, all on this machine."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as names of sockets in it must be
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def photos(cluster: Cluster, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    folder = tmp_path_factory.mktemp("chaos") / "photos"
    collection = Collection(BUCKET, folder, checkpoint, cluster.address, {})
    draw(folder, IMAGES)
    fsspec.filesystem("s3").mkdir(BUCKET)
    upload(folder, collection.url)
    output = f"{BUCKET}/undisturbed"
    segment(SegmentSettings(input=(collection.url,), output=output, **collection.on_cluster()), Onlooker())
    expected = outcomes(output)
    assert len(expected) == IMAGES
    assert {status for status, _ in expected.values()} == {"ok"}
    return replace(collection, expected=expected)
