"""SIGINT and SIGTERM: Ctrl-C, `ray job stop`, a spot machine's notice.

Before there are workers a signal ends the job at once, as what it has read is kept. While they work it asks for an end:
no shard is begun any more, those under way may end within the grace, and a second signal does not wait for that.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)
HEARD_WITHIN = 10.0  # seconds


class Interruption(KeyboardInterrupt):
    """A signal that ends the job at once. Where it meets Ray's own code, that makes a plain KeyboardInterrupt of it."""


class StoppedError(Exception):
    """A run that a signal has ended before it was complete; the message says how to go on."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Request:
    """Whether an end was asked for, and by which signal; and whether there is nothing left to wait for."""

    number = 0
    is_over = False
    raised = -math.inf  # when it was last said

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_over:
            self.raised = time.monotonic()
            raise Interruption
        if self.number:
            end_at_once(number, frame)
        self.number = number

    def end(self) -> None:
        """Interrupt the main thread, whatever it waits for: said by another one that knows there is no need.

        Said again it does so again, as Python drops what a handler raises within a destructor.
        """
        self.is_over = True
        if time.monotonic() - self.raised > HEARD_WITHIN:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


last = signal.SIGINT  # that has ended this process at once


def end_at_once(number: int, _: FrameType | None = None) -> None:
    global last  # noqa: PLW0603  (signals are the process's)
    last = signal.Signals(number)
    raise Interruption


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
