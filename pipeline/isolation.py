"""Work in a process apart, on things of which some may end the process: which they are, and all the others done.

    parent: things ──▶ pipe ──▶ child: work ──▶ pipe ──▶ parent: a result of each, as it becomes known

When the child dies, those without a result are halved, and a new child tries each half, until one by itself ends its
child: its result is a `Death`. The child is spawned, never forked, as the parent has threads that hold locks.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

STARTS = 2  # children in a row that die before they are ready: it is not the things that they die of
READY_WITHIN = 600.0  # seconds: what is imported and loaded may lie on a slow disk
CORE_WITHIN = 60.0  # seconds from a broken pipe to the end of a process, which may have its memory to dump
Word = tuple[int | None, Any]  # the position of a thing and its result, or None and what is to be said of all
Work = Callable[[list[Any]], Iterable[Word]]


@dataclass(frozen=True)
class Death:
    """How a process ended that worked on one thing alone: "signal 11 (SIGSEGV)"."""

    cause: str


class IsolationError(Exception):
    """The work failed, or could not begin, whatever the things are."""


@dataclass(frozen=True)
class Ended:
    """The child is done with what it was given; `error` is what failed all of it."""

    error: str | None = None


class ChildDiedError(Exception):
    """A child died; the message says how."""


def work_apart(start: bytes, things: Sequence[Any], patience: float) -> Iterator[Word]:
    """What the work has to say of `things`, in any order; for one that ends its process its `Death`.

    `start` is a pickled function that a child calls once, for its work. A child that says nothing for `patience`
    seconds is killed. Raises `IsolationError`.
    """
    child: Child | None = None
    todo = [list(range(len(things)))]
    try:
        while todo:
            numbers = todo.pop()
            left = dict.fromkeys(numbers)
            try:
                child = child or begin(start)
                for position, result in child.work([things[number] for number in numbers], patience):
                    if position is None:
                        yield None, result
                    else:
                        del left[numbers[position]]
                        yield numbers[position], result
            except ChildDiedError as death:
                child = None
                if len(numbers) == 1 and left:
                    yield numbers[0], Death(str(death))
                    continue
                rest, middle = list(left), (len(left) + 1) // 2
                todo += [half for half in (rest[middle:], rest[:middle]) if half]
    finally:
        if child:
            child.end()


def begin(start: bytes) -> "Child":
    """A child that is ready to work."""
    for _ in range(STARTS):
        child = Child()
        try:
            child.load(start)
        except ChildDiedError as death:
            cause = str(death)
        else:
            return child
    raise IsolationError(f"no process could be started for it: {cause}")


class Child:
    """A child, seen from its parent."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, its_own = context.Pipe()
        self.process = context.Process(target=serve, args=(its_own,), daemon=True)
        self.process.start()
        its_own.close()  # so that the pipe ends when the child does

    def load(self, start: bytes) -> None:
        """Have it make itself ready. Raises `ChildDiedError`, and `IsolationError`."""
        self.tell(start)
        for _ in self.words(READY_WITHIN):
            pass

    def work(self, things: list[Any], patience: float) -> Iterator[Word]:
        """What it says of `things`. Raises as `load`."""
        self.tell(pickle.dumps(things))
        yield from self.words(patience)

    def tell(self, pickled: bytes) -> None:
        try:
            self.pipe.send_bytes(pickled)
        except OSError:
            raise ChildDiedError(self.death()) from None

    def words(self, patience: float) -> Iterator[Word]:
        """Word after word, until it says that this was all."""
        while not isinstance(word := self.hear(patience), Ended):
            yield word
        if word.error:
            self.end()
            raise IsolationError(word.error)

    def hear(self, patience: float) -> Any:
        try:
            if self.pipe.poll(patience):
                return self.pipe.recv()
        except (EOFError, OSError):  # between two words, or within one
            raise ChildDiedError(self.death()) from None
        self.end()
        raise ChildDiedError(f"no result within {patience:,.0f} s")

    def death(self) -> str:
        """How it has died, once its pipe is broken."""
        self.process.join(CORE_WITHIN)
        self.end()
        return cause_of(self.process.exitcode or 0)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def cause_of(exit_code: int) -> str:
    """In words, how a process ended that Python says ended so."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    hint = ", as where memory runs out" if exit_code == -signal.SIGKILL else ""
    return f"signal {-exit_code} ({signal.Signals(-exit_code).name}{hint})"


def serve(pipe: Connection) -> None:
    """All that a child does, until it is killed."""
    faulthandler.enable()  # where it crashes is in the worker's log
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        work: Work = pickle.loads(pipe.recv_bytes())()  # noqa: S301  (the parent's)
        pipe.send(Ended())
        while True:
            for word in work(pickle.loads(pipe.recv_bytes())):  # noqa: S301
                pipe.send(word)
            pipe.send(Ended())
    except Exception as error:
        pipe.send(Ended(" ".join(f"{type(error).__name__}: {error}".split())))


def end_with_parent() -> None:
    """End this process when its parent is gone, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
