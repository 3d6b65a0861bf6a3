"""Work on some things at once, in their order and with a bound: what waits for a store need not wait in a row."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AHEAD = 8  # requests in flight, and results that wait

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    work: Callable[[T], R],
    items: Iterable[T],
    count: int = AHEAD,
    threads: int = AHEAD,
    begin: Callable[[], None] | None = None,
) -> Iterator[R]:
    """What `work` gives for each item, in order; `count` of them are worked on, by so many threads, or wait while the
    one before is used. Each thread does `begin` first.
    """
    coming, waiting = iter(items), deque[Future[R]]()
    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        try:
            waiting.extend(pool.submit(work, item) for item in islice(coming, count))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(coming, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
