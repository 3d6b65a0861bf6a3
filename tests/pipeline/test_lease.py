"""One driver at a time: refused while another lives, let in when it is dead, told when it was taken for dead."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import lease
from pipeline.config import StorageSettings
from pipeline.lease import HeldError, Lease, holder
from pipeline.storage import Store

NAME = "runs/r/lease"


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    return Store(request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path), StorageSettings())


@pytest.fixture
def hasty(monkeypatch):
    """Seconds become hundredths."""
    monkeypatch.setattr(lease, "SECONDS", 0.6)
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.15)


def take(store: Store) -> Lease:
    return Lease(store, NAME, "run r")


def test_of_many_who_want_it_at_once_one_has_it(store):
    ready, results = threading.Barrier(8), []

    def want() -> None:
        ready.wait()
        try:
            with take(store):
                results.append("had it")
                ready.wait()
        except HeldError as error:
            results.append(str(error))
            ready.wait()

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("had it") == 1
    assert all("run r is held by process" in result for result in results if result != "had it")
    assert holder(store, NAME) is None


def test_it_is_held_as_long_as_its_block_and_leaves_one_object(store, hasty):
    for _ in range(3):
        with take(store):
            time.sleep(1)  # longer than an unrenewed lease would last
            assert holder(store, NAME)
            with pytest.raises(HeldError, match=r"heard of 0 s ago; if that has died, run again 1 s after"):
                take(store).__enter__()
    assert store.names("runs/r") == []


def test_that_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path):
    code = f"""
from pipeline.lease import Lease
from pipeline.storage import Store
from pipeline.config import StorageSettings
import os
Lease(Store({str(tmp_path)!r}, StorageSettings()), {NAME!r}, "run r").__enter__()
os.kill(os.getpid(), 9)
"""
    dead = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    store = Store(str(tmp_path), StorageSettings())
    while not (holding := list(tmp_path.glob("runs/r/*.json"))) or not holder_is_gone(holding[0]):
        time.sleep(0.1)
    began = time.monotonic()
    with take(store):
        assert time.monotonic() - began < 2
    dead.wait()  # a process that nobody has waited for is as dead


def holder_is_gone(path: Path) -> bool:
    return lease.Holder(**json.loads(path.read_text())).is_gone()


def test_that_of_a_process_elsewhere_is_free_when_it_was_silent_for_long(store, hasty, monkeypatch):
    with take(store) as first:
        first.ended.set()  # it renews nothing any more, as if its machine slept
        first.thread.join()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(lease, "this_machine", lambda: "another")
            with pytest.raises(HeldError):
                take(store).__enter__()
            time.sleep(0.7)
            with take(store), pytest.raises(HeldError, match="was taken over"):
                first.check()  # it wakes
            with pytest.raises(HeldError, match="was taken over"):
                first.check()  # also when the other one is done
    assert holder(store, NAME) is None


def test_one_that_nobody_can_read_holds_nothing(store):
    store.put(f"{NAME}-000004.json", b"{")
    with take(store):
        assert store.names("runs/r") == ["lease-000005.json"]
