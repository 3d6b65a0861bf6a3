"""A shard that has ended its workers, on a road in a process apart, whose end costs no other shard anything.

Which image it is that ends the process, `isolation` finds out. Its row is `failed` and says how; all others are done as
they are anywhere.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pipeline.attempts import reason, take_retries
from pipeline.isolation import Death, Word, Work, work_apart
from pipeline.plan import PlannedImage
from pipeline.road import Shard
from pipeline.schema import Outcome

DEATHS = 2  # of workers with a shard, before it is done apart: one may have been the node's, or a neighbour's
PATIENCE = 600.0  # seconds without any outcome after which a process hangs
SLOWEST = 1e-4  # seconds a pixel, besides: the largest network through windows, on one thread


class Sender(Protocol):
    """A road, as far as a shard needs one."""

    def send(self, images: Sequence[PlannedImage]) -> Shard:
        """Put the images of a shard on their way."""


@dataclass(frozen=True)
class Report:
    """What a road apart has to say of its images together."""

    batches: list[int]
    fills: list[tuple[int, int]]
    halved: list[int]
    misfits: list[int]
    seconds: dict[tuple[str, str], float]  # by stage and state
    fetched: bool
    failure: str | None
    retries: dict[str, int]


class Quarantine:
    """A road whose images are done in processes apart."""

    def __init__(self, start: bytes, retried: Callable[[dict[str, int]], object], retry_seconds: float):
        """`start` is what `isolation` calls in a new process: `along` a road, pickled. `retried` hears of retries, for
        which a process may be silent for `retry_seconds`, and as long again.
        """
        self.start, self.retried = start, retried
        self.patience = PATIENCE + 2 * retry_seconds

    def send(self, images: Sequence[PlannedImage]) -> Shard:
        """Put the images of a shard on their way, in a process of their own."""
        shard = Shard(images)
        threading.Thread(target=self.work, args=(shard,), name="quarantine", daemon=True).start()
        return shard

    def work(self, shard: Shard) -> None:
        largest = max((image.width or 0) * (image.height or 0) for image in shard.images)
        try:
            for number, said in work_apart(self.start, shard.images, self.patience + SLOWEST * largest):
                if number is None:
                    self.note(shard, said)
                elif isinstance(said, Death):
                    shard.results.put((number, Outcome("failed", f"ended its worker: {said.cause}")))
                else:
                    shard.results.put((number, said))
        except Exception as error:  # no image's fault, and nobody else would hear of it
            shard.fail(error)

    def note(self, shard: Shard, report: Report) -> None:
        """Have the shard's own numbers grow by those of a road apart."""
        shard.batches += report.batches
        shard.fills += report.fills
        shard.halved += report.halved
        shard.misfits += report.misfits
        shard.fetched |= report.fetched
        if report.failure:
            shard.failure = OSError(report.failure)
        for (stage, state), seconds in report.seconds.items():
            shard.clock.add(stage, state, seconds)
        if report.retries:
            self.retried(report.retries)


def along(open_road: Callable[[], Sender]) -> Work:
    """The work of a process apart, along a road that it opens once."""
    return partial(outcomes, open_road())


def outcomes(road: Sender, images: Sequence[PlannedImage]) -> Iterator[Word]:
    """What becomes of images on a road, and at last the road's report."""
    shard = road.send(images)
    yield from shard.outcomes()
    failure = reason(shard.failure) if shard.failure else None
    numbers = shard.batches, shard.fills, shard.halved, shard.misfits
    yield None, Report(*numbers, shard.clock.seconds, shard.fetched, failure, take_retries())


class Turns:
    """Shards on a worker's own road go together; one in quarantine goes alone, and before those that come after it.

    So only shards that were with it from the start can end the worker of one in quarantine, which bounds how often
    that happens, and there is memory for the process apart.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.on_road = self.apart = 0  # under way on the road; in quarantine, or waiting for it
        self.is_taken = False  # by one that is alone

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have a turn along with others, for as long as the block lasts."""
        with self.changed:
            self.changed.wait_for(lambda: not self.apart)
            self.on_road += 1
        try:
            yield
        finally:
            with self.changed:
                self.on_road -= 1
                self.changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have a turn without any other."""
        with self.changed:
            self.apart += 1
            self.changed.wait_for(lambda: not self.on_road and not self.is_taken)
            self.is_taken = True
        try:
            yield
        finally:
            with self.changed:
                self.apart -= 1
                self.is_taken = False
                self.changed.notify_all()
