"""What processes apart do in the tests. It imports next to nothing, so that they start at once."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def start() -> Callable[[list[str]], Iterator[tuple[int | None, object]]]:
    return work


def work(things: list[str]) -> Iterator[tuple[int | None, object]]:
    """Each thing in capitals, unless it says what else to do; at last, how many there were."""
    for number, thing in enumerate(things):
        match thing.split():
            case ["exit", code]:
                os._exit(int(code))
            case ["segv"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["hang"]:
                time.sleep(3600)
            case ["error"]:
                raise OSError("the store is down")
        yield number, thing.upper()
    yield None, len(things)


def start_ahead() -> Callable[[list[str]], Iterator[tuple[int | None, object]]]:
    return work_ahead


def work_ahead(things: list[str]) -> Iterator[tuple[int | None, object]]:
    """The same by a road that has three things on it, so that who ends the process takes others along."""
    ahead: list[tuple[int | None, object]] = []
    for word in work(things):
        ahead.append(word)
        if len(ahead) == 3:
            yield ahead.pop(0)
    yield from ahead


def dying_start() -> None:
    os._exit(3)


def failing_start() -> None:
    raise ValueError("no such checkpoint")


def start_noting() -> Callable[[list[str]], Iterator[tuple[int | None, object]]]:
    return note


def note(things: list[str]) -> Iterator[tuple[int | None, object]]:
    """Note this process's id in a file, and stay."""
    Path(things[0]).write_text(str(os.getpid()))
    time.sleep(3600)
    yield None, 0
