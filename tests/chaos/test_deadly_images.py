"""An image that ends every process that decodes it is one row, and the others are what they always are."""

import hashlib
import random
from collections.abc import Callable

from pipeline.config import SegmentSettings
from pipeline.run import segment
from tests.chaos.collection import IMAGES, Collection, Onlooker, errors, outcomes


def test_images_that_kill_their_worker_cost_one_row_each(photos: Collection, spoil: Callable[..., None], seed: int):
    """One image in 500, by an exit code or by a signal."""
    chance, output = random.Random(seed), f"{photos.bucket}/deadly-images"
    deadly = chance.sample(sorted(photos.expected), IMAGES // 500 or 1)
    digests = [hashlib.sha256((photos.folder / name).read_bytes()).hexdigest() for name in deadly]
    turn = chance.randrange(2)
    by_exit, by_signal = deadly[turn::2], deadly[1 - turn :: 2]
    spoil(exit=digests[turn::2], signal=digests[1 - turn :: 2])
    settings = SegmentSettings(input=(photos.url,), output=output, **photos.on_cluster())
    result = segment(settings, Onlooker())
    assert result.record
    assert result.record["statuses"] == {"ok": IMAGES - len(deadly), "failed": len(deadly)}
    found = outcomes(output)
    assert found == photos.expected | dict.fromkeys(deadly, ("failed", None))
    said = errors(output)
    assert all("exit code 7" in said[name] for name in by_exit), said
    assert all("SIGSEGV" in said[name] for name in by_signal), said
