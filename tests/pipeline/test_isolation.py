"""Work in processes apart, on real processes: who ends one is found, and everybody else is done."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.isolation import Death, IsolationError, cause_of, work_apart
from tests.pipeline import deeds


def apart(work: object, things: list[str], patience: float = 60) -> dict:
    found: dict = {}
    for number, result in work_apart(pickle.dumps(work), things, patience):
        assert number not in found or number is None
        found.setdefault(number, []).append(result)
    return found


def test_those_that_end_their_process_are_found_and_all_others_done():
    things = ["a", "b", "exit 7", "c", "segv", "d", "e"]
    found = apart(deeds.start_ahead, things)
    said = found.pop(None)
    results = {number: result for number, (result,) in found.items()}
    assert results == {
        0: "A",
        1: "B",
        2: Death("exit code 7"),
        3: "C",
        4: Death("signal 11 (SIGSEGV)"),
        5: "D",
        6: "E",
    }
    assert sum(said) == 5  # done by those that lived to the end


def test_what_hangs_is_killed():
    assert apart(deeds.start, ["a", "hang"], patience=2) == {0: ["A"], 1: [Death("no result within 2 s")]}


def test_a_process_that_cannot_start_blames_nothing():
    began = time.monotonic()
    with pytest.raises(IsolationError, match=r"no process could be started .*exit code 3"):
        apart(deeds.dying_start, ["a"])
    with pytest.raises(IsolationError, match="ValueError: no such checkpoint"):
        apart(deeds.failing_start, ["a"])
    with pytest.raises(IsolationError, match="OSError: the store is down"):
        apart(deeds.start, ["a", "error"])
    assert time.monotonic() - began < 60


PARENT = """
import pickle, sys
from pipeline.isolation import work_apart
from tests.pipeline import deeds

if __name__ == "__main__":
    list(work_apart(pickle.dumps(deeds.start_noting), [sys.argv[1]], 3600))
"""


def test_a_process_ends_with_its_parent_even_where_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    root, note = Path(__file__).parents[2], tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(note)], env=environment) as parent:
        wait_for(lambda: note.exists() and note.read_text())
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{note.read_text()}").exists())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_causes_are_said_in_words():
    assert cause_of(0) == "exit code 0"
    assert cause_of(-signal.SIGKILL) == "signal 9 (SIGKILL, as where memory runs out)"
