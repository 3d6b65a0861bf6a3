"""Index a bucket beside the least that it could cost: the first bytes of the same objects, read in parallel.

  python infra/local/s3_server.py -- python -m jobs.bench.index --objects 10000

The objects are JPEG, PNG and WebP images of a few sizes; one in twenty has a colour profile that pushes its size beyond
the first read. The bare reader has the listing for nothing, as many threads and the same client, and
looks at no byte. Both take turns; what is said of each is its best turn. The last line is one JSON object.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import fsspec
import numpy as np
from PIL import Image

from jobs.bench.plan import forget_peak, peak_memory
from pipeline.config import IndexSettings
from pipeline.index import REQUESTS, update_index
from pipeline.reader import HEAD, Reader
from pipeline.s3 import Piece
from pipeline.storage import Store
from pipeline.tables import workspace

SIZES = ((640, 480), (480, 640), (1024, 768), (333, 500), (1200, 800))  # width, height
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("JPEG", {"quality": 85}),
    ("JPEG", {"quality": 60, "progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
)
LARGE = 20  # one in so many has a large header
TURNS = 3


class Silent:
    """Whoever watches and says nothing."""

    def listing(self, found: int) -> None:
        pass

    def indexing(self, done: int, total: int) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=10_000, metavar="N")
    objects = parser.parse_args().objects
    bucket = f"s3://bench-{uuid.uuid4().hex[:12]}"
    fill(bucket, objects)
    bare, ours, requests = [], [], []
    for _ in range(TURNS):
        bare.append(read_bare(bucket))
        forget_peak()
        with counted_requests() as calls:
            ours.append(index(bucket, objects))
        requests.append(len(calls))
    ratio, peak = min(ours) / min(bare), peak_memory()
    print(
        f"{objects:,} objects: {min(ours):.1f} s, {objects / min(ours):,.0f} objects/s, "
        f"{requests[0] / objects:.3f} requests each"
    )
    print(f"bare parallel reads of {HEAD >> 10} KiB: {min(bare):.1f} s, {objects / min(bare):,.0f} objects/s")
    print(f"the index takes {ratio:.2f} times as long; {peak / 2**20:,.0f} MiB at most")
    result = {"objects": objects, "ratio": ratio, "requests_each": requests[0] / objects, "peak_bytes": peak}
    print(json.dumps(result | {"seconds": ours, "bare_seconds": bare}))


@contextlib.contextmanager
def counted_requests() -> Iterator[list[str]]:
    """The URI of every request that a reader makes within the block."""
    calls: list[str] = []
    get = Reader.get

    def counted(self: Reader, uri: str, *span: Any) -> Piece:
        calls.append(uri)
        return get(self, uri, *span)

    with patch.object(Reader, "get", counted):
        yield calls


def fill(bucket: str, objects: int) -> None:
    """Put the images; each key has an image of its own size and format."""
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir(bucket)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    kinds = [(size, *form, large) for size in SIZES for form in FORMATS for large in (False, True)]
    images = {number: encode(pixels, *kind) for number, kind in enumerate(kinds)}

    def put(number: int) -> None:
        kind = 2 * (number % (len(kinds) // 2)) + (number % LARGE == 0)
        filesystem.pipe_file(f"{bucket}/photos/{number % 100:02d}/{number:07d}", images[kind])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(objects)))


def encode(pixels: np.ndarray, size: tuple[int, int], form: str, options: dict, large: bool) -> bytes:
    """An encoded image, with a header that goes beyond the first read when it is `large`."""
    file = io.BytesIO()
    profile = {"icc_profile": bytes(150_000)} if large else {}
    Image.fromarray(pixels).resize(size).save(file, form, **options, **profile)
    return file.getvalue()


def read_bare(bucket: str) -> float:
    """Seconds to read the first bytes of every object."""
    settings = IndexSettings(input=(bucket,), output="-")
    uris = [entry.uri for _, entry in Store(bucket, settings).listing() if entry]
    reader = Reader(settings)
    started = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        for _ in pool.map(lambda uri: reader.get(uri, 0, HEAD), uris):
            pass
    return time.perf_counter() - started


def index(bucket: str, objects: int) -> float:
    """Seconds to index the bucket for the first time, from the listing to the last part that is put."""
    with tempfile.TemporaryDirectory() as output, workspace() as space:
        settings = IndexSettings(input=(bucket,), output=output, include=("*",))
        started = time.perf_counter()
        found = update_index(settings, Store(output, settings), space.tables, Silent(), map)
        seconds = time.perf_counter() - started
        known = space.tables.execute("SELECT count(*) FROM images WHERE width IS NOT NULL").fetchall()
        assert (found.images, known) == (objects, [(objects,)])
        return seconds


if __name__ == "__main__":
    main()
