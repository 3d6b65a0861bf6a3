"""Leases: what only one driver may do at a time, as an object in the output that it renews while it lives.

    <name>-<n>.json     the nth holder of a lease; the greatest n has it

Who puts the next n has the lease, and the store lets only one put it. Nobody else ever writes that object, so plain
puts renew it, and all that is asked of a store is `If-None-Match`. A lease is free when there is no such object, as its
holder removes it, when its holder's process is gone from this very machine, or when it has not been renewed for
`SECONDS`, whatever became of its holder: one that was only asleep finds another's object when it wakes, or none, and
stops. A shard that it puts before would be there already or be the same: a lease spares work; that a shard is there
once is the doing of its name.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from pipeline.attempts import ERRORS
from pipeline.storage import Store

SECONDS = 60.0  # after which a lease that is not renewed is free
RENEWED_EVERY = 15.0  # seconds


class HeldError(Exception):
    """Another driver has the lease; the message says who."""


@dataclass(frozen=True)
class Holder:
    """Who has a lease: a process on a machine, and when it said so last, in seconds since 1970."""

    host: str
    pid: int
    machine: str  # its boot and namespace of processes: `pid` means something only there
    started: str  # the process, in clock ticks since the boot, as a pid is used again
    token: str
    renewed: float
    released: bool = False

    @staticmethod
    def here() -> "Holder":
        """This process, now."""
        pid = os.getpid()
        return Holder(socket.gethostname(), pid, this_machine(), started(pid), uuid.uuid4().hex, time.time())

    def is_gone(self) -> bool:
        """Whether its process has ended, as far as this machine can tell."""
        return self.machine == this_machine() and started(self.pid) != self.started

    def __str__(self) -> str:
        age = max(0, time.time() - self.renewed)
        return f"process {self.pid} on {self.host}, heard of {age:.0f} s ago"


class Lease:
    """A context manager: inside of it the lease is this process's, unless `check` says that it no longer is."""

    def __init__(self, store: Store, name: str, what: str):
        """`what` says in messages what is leased: "run night-1"."""
        hasty = store.settings.model_copy(update={"retry_seconds": RENEWED_EVERY})  # a lease does not wait
        self.store, self.name, self.what = Store(store.url, hasty), name, what
        self.number, self.holder = -1, Holder.here()
        self.ended = threading.Event()
        self.lost = False
        self.thread = threading.Thread(target=self.keep, daemon=True)

    def __enter__(self) -> "Lease":
        """Raises `HeldError` where another process has it."""
        while True:
            self.number, before = latest(self.store, self.name)
            if before and not self.is_free(self.number, before):
                raise HeldError(
                    f"{self.what} is held by {before}; if that has died, run again {SECONDS:.0f} s after its last word"
                )
            self.number += 1
            self.holder = replace(self.holder, renewed=time.time())
            with suppress(FileExistsError):  # another was quicker
                self.put(only_new=True)
                break
        for number in numbers(self.store, self.name):
            if number < self.number:
                self.store.delete(object_name(self.name, number))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease back."""
        self.ended.set()
        self.thread.join(RENEWED_EVERY)
        with suppress(*ERRORS):  # it ends by itself
            if self.is_ours():
                self.holder = replace(self.holder, released=True)
                self.put()
                self.store.delete(object_name(self.name, self.number))

    def check(self) -> None:
        """Raise `HeldError` where another process has taken the lease over."""
        if not self.is_ours():
            raise HeldError(f"{self.what} was taken over by another process, as this one was silent for too long")

    def is_ours(self) -> bool:
        """Whether nobody has taken the lease over, which the store knows."""
        number, found = latest(self.store, self.name)
        self.lost |= not found or (number, found.token) != (self.number, self.holder.token)
        return not self.lost

    def is_free(self, number: int, holder: Holder) -> bool:
        """Whether the lease may be taken over from a holder, who is watched for a while where a clock alone says so."""
        if holder.released or holder.is_gone():
            return True
        if abs(time.time() - holder.renewed) < SECONDS:
            return False
        time.sleep(1.5 * RENEWED_EVERY)
        return latest(self.store, self.name) == (number, holder)

    def put(self, only_new: bool = False) -> None:
        data = json.dumps(asdict(self.holder), indent=2).encode()
        self.store.put(object_name(self.name, self.number), data, only_new)

    def keep(self) -> None:
        """Renew the lease until the end, or until another has it."""
        while not self.ended.wait(RENEWED_EVERY):
            with suppress(*ERRORS):  # the next time, perhaps
                if not self.is_ours():
                    return
                self.holder = replace(self.holder, renewed=time.time())
                self.put()


def holder(store: Store, name: str) -> Holder | None:
    """Who has a lease, as far as is known: it may have died since."""
    _, found = latest(store, name)
    return None if not found or found.released or found.is_gone() else found


def latest(store: Store, name: str) -> tuple[int, Holder | None]:
    """The greatest number of a lease and its holder; (-1, None) for one that was never held."""
    for number in sorted(numbers(store, name), reverse=True):
        with suppress(FileNotFoundError):  # a newer holder has just removed it
            data = store.read(object_name(name, number))
            try:
                return number, Holder(**json.loads(data))
            except (ValueError, TypeError):  # nobody can hold what nobody can read
                return number, None
    return -1, None


def numbers(store: Store, name: str) -> list[int]:
    folder, _, beginning = name.rpartition("/")
    ours = (one.removeprefix(f"{beginning}-").removesuffix(".json") for one in store.names(folder))
    return [int(one) for one in ours if one.isdigit()]


def object_name(name: str, number: int) -> str:
    return f"{name}-{number:06d}.json"


def this_machine() -> str:
    """What a process id means something in: a boot of a machine, and a namespace of its processes."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    return uuid.uuid4().hex  # nothing is known, so nobody is the same


def started(pid: int) -> str:
    """When a process started, in clock ticks since the boot; nothing when there is none, or it has ended (proc(5))."""
    with suppress(OSError):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *others = file.read().rpartition(")")[2].split()
        return "" if state in "ZX" else others[18]
    return ""
