"""One collection for all chaos tests, with the masks that an undisturbed run makes of it."""

import uuid
from dataclasses import replace

import fsspec
import pytest

from infra.local.s3_server import S3Server
from pipeline.config import SegmentSettings
from pipeline.run import segment
from tests.chaos.collection import FULL, IMAGES, SEED, Collection, Onlooker, draw, outcomes, upload


@pytest.fixture(autouse=True)
def seed() -> int:
    """pytest shows what was printed with a failure."""
    print(f"CHAOS_SEED={SEED}" + (" CHAOS=full" if FULL else ""))
    return SEED


@pytest.fixture(scope="session")
def photos(s3: S3Server, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    bucket = f"s3://chaos-{uuid.uuid4().hex}"
    folder = tmp_path_factory.mktemp("chaos") / "photos"
    collection = Collection(bucket, folder, checkpoint, {})
    draw(folder, IMAGES)
    fsspec.filesystem("s3").mkdir(bucket)
    upload(folder, collection.url)
    output = f"{bucket}/undisturbed"
    segment(SegmentSettings(input=(collection.url,), output=output, **collection.settings()), Onlooker())
    expected = outcomes(output)
    assert len(expected) == IMAGES
    assert {status for status, _ in expected.values()} == {"ok"}
    return replace(collection, expected=expected)
