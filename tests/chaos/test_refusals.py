"""A store that will never do what is asked is found out at once: one line, exit code 2, nothing written.

In full each kind of store is each of input, output and checkpoint; in short each is one of them.
"""

import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.local.s3_server import free_port
from tests.chaos.collection import FULL, Collection, Driver

SOON = 30  # seconds
WRONG_KEY = {"AWS_SECRET_ACCESS_KEY": "wrong"}
PLACES = ("input", "output", "checkpoint")
NOBODY = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}


@pytest.mark.parametrize(
    ("environment", "bucket", "words", "place"),
    [
        pytest.param(WRONG_KEY, None, ("denied", "SignatureDoesNotMatch"), "checkpoint", id="wrong secret key"),
        pytest.param({}, f"s3://missing-{uuid.uuid4().hex}", ("no such",), "input", id="missing bucket"),
        pytest.param(NOBODY, None, ("connect",), "output", id="nobody listens"),
    ],
)
def test_a_store_that_refuses_for_good_stops_the_run_before_any_work(
    photos: Collection,
    tmp_path: Path,
    environment: dict[str, str],
    bucket: str | None,
    words: tuple[str, ...],
    place: str,
):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.folder.iterdir())[:3]:
        shutil.copy(path, few)
    there = bucket or photos.bucket

    def run(place: str) -> tuple[str, float, int, str]:
        places = {"input": str(few), "output": str(tmp_path / f"output-{place}"), "checkpoint": photos.checkpoint}
        places[place] = f"{there}/photos" if place == "input" else f"{there}/refused-{place}"
        started = time.monotonic()
        options = ["--checkpoint", places["checkpoint"], "--policy", "short=32"]
        with Driver(
            tmp_path / f"log-{place}",
            *("segment", places["input"], places["output"], *options),
            environment=environment,
        ) as driver:
            code = driver.wait(2 * SOON)
            return place, time.monotonic() - started, code, driver.complaint()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = list(pool.map(run, PLACES if FULL else [place]))
    for place, seconds, code, complaint in ended:
        assert code == 2, complaint
        assert seconds < SOON, (place, seconds)
        assert any(word.lower() in complaint.lower() for word in words), (place, complaint)
        assert there in complaint or "127.0.0.1" in complaint, (place, complaint)
        output = tmp_path / f"output-{place}"
        left = {path.relative_to(output).parts[0] for path in output.rglob("*") if path.is_file()}
        assert left <= {"index", "leases"}, (place, left)
