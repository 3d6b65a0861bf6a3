"""Threads in a row with bounded queues between them, and a gate in front that bounds what all of them hold together.

Each stage knows where its time went: busy, starved (nothing came in) or blocked (nobody took what it had). The stage
that is busiest is what bounds the whole.
"""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

T = TypeVar("T", bound="Traveller")
STATES = ("busy", "starved", "blocked")


class Clock:
    """Seconds spent in each (stage, state), and how often each stage was busy, summed over threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.count: dict[str, int] = defaultdict(int)

    def add(self, stage: str, state: str, seconds: float) -> None:
        with self.lock:
            self.seconds[stage, state] += seconds
            self.count[stage] += state == "busy"

    def of(self, state: str) -> dict[str, float]:
        """Seconds of each stage in one of `STATES`."""
        with self.lock:
            return {stage: seconds for (stage, kind), seconds in self.seconds.items() if kind == state}


class Job(Protocol):
    """What things on the way belong to: once it has failed they are carried to the end without any more work."""

    clock: Clock
    error: BaseException | None


class Traveller(Protocol):
    """A thing on its way through the stages."""

    @property
    def job(self) -> Job: ...


class Stage(Generic[T]):
    """Threads that work on what comes in and hand on what `then` makes of it.

    An error of `work` is the job's. `then` comes in any case, so that what is held is given back.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        capacity: int,
        work: Callable[[T], None],
        then: Callable[[T], Iterable["Traveller"]],
        following: "Stage | None" = None,
        initial: Callable[[], None] = lambda: None,
    ):
        """`initial` is called in each thread; up to `capacity` things wait in front of the stage."""
        self.name, self.work, self.then, self.following, self.initial = name, work, then, following, initial
        self.inbox: queue.Queue[T | None] = queue.Queue(capacity)
        self.threads: list[threading.Thread] = []
        self.clock = Clock()  # of all jobs together
        self.began = float("inf")  # when the first thing came; before it nobody waits
        self.grow(threads)

    def grow(self, threads: int) -> None:
        """Have at least so many threads, or as many as the system gives."""
        while len(self.threads) < threads:
            thread = threading.Thread(target=self.run, name=f"{self.name}-{len(self.threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # it has no more
                if not self.threads:
                    raise
                return
            self.threads.append(thread)

    def put(self, thing: T) -> None:
        self.began = min(self.began, time.perf_counter())
        self.inbox.put(thing)

    def run(self) -> None:
        self.initial()
        idle = time.perf_counter()
        while (thing := self.inbox.get()) is not None:
            idle = self.serve(thing, idle)
            del thing  # or this thread would hold it until the next one comes

    def serve(self, thing: T, idle: float) -> float:
        """Work on one thing and hand on what comes of it, by a thread that is idle since then; when it was done."""
        job = thing.job
        started = time.perf_counter()
        self.book(job, "starved", started - max(idle, min(self.began, started)))
        if not job.error:
            try:
                self.work(thing)
            except BaseException as error:  # whatever it is: a thread that dies would stop the rest
                job.error = error
        worked = time.perf_counter()
        self.book(job, "busy", worked - started)  # before others can say that the job is done
        for result in self.then(thing):
            assert self.following
            self.following.put(result)
        done = time.perf_counter()
        self.book(job, "blocked", done - worked)
        return done

    def book(self, job: Job, state: str, seconds: float) -> None:
        job.clock.add(self.name, state, seconds)
        self.clock.add(self.name, state, seconds)

    def seconds_each(self) -> float | None:
        """Mean time that one thing takes, so far; None before the first."""
        count = self.clock.count[self.name]
        return self.clock.seconds[self.name, "busy"] / count if count else None

    def close(self) -> None:
        """End the threads, once they have done what is in the inbox."""
        for _ in self.threads:
            self.inbox.put(None)
        for thread in self.threads:
            thread.join()


class Gate:
    """Admits things by their bytes: together those that are in hold at most `limit`, or there is one alone."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self.changed = threading.Condition()

    def admit(self, size: int) -> None:
        """Wait until `size` bytes more are within the limit."""
        with self.changed:
            self.changed.wait_for(lambda: not self.held or self.held + size <= self.limit)
            self.held += size

    def overdraw(self, size: int) -> None:
        """Admit what is in already and turns out to be larger: without waiting, as others may wait for it."""
        with self.changed:
            self.held += size

    def give_back(self, size: int) -> None:
        with self.changed:
            self.held -= size
            self.changed.notify_all()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Have `size` bytes for as long as the block lasts."""
        self.admit(size)
        try:
            yield
        finally:
            self.give_back(size)
