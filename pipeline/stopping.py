"""SIGINT and SIGTERM: Ctrl-C, `ray job stop`, a spot machine's notice.

Before there are workers a signal ends the job at once, as what it has read is kept. While they work it asks for an end:
no shard is begun any more, those under way may end within the grace, and a second signal does not wait for that.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interruption(KeyboardInterrupt):
    """A signal that ends the job at once."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StoppedError(Exception):
    """A run that a signal has ended before it was complete; the message says how to go on."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Over(Interruption):
    """What was asked to end has ended."""


class Request:
    """Whether an end was asked for, and by which signal."""

    number = 0
    is_over = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_over:
            install()  # once is enough
            raise Over(self.number or number)
        if self.number:
            end_at_once(number, frame)
        self.number = number

    def end(self) -> None:
        """Raise `Over` in the main thread, whatever it waits for: said by another one that knows there is no need."""
        if not self.is_over:
            self.is_over = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def end_at_once(number: int, _: FrameType | None = None) -> None:
    raise Interruption(number)


def install() -> None:
    """Have signals end this process at once, but in an orderly way. Ray installs its own handlers when it starts."""
    for number in NUMBERS:
        signal.signal(number, end_at_once)


@contextlib.contextmanager
def until_asked_to_end() -> Iterator[Request]:
    """A block in which a first signal is only noted."""
    request = Request()
    for number in NUMBERS:
        signal.signal(number, request.receive)
    try:
        yield request
    finally:
        install()
