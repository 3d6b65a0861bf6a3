"""Stages hand everything on, know where their time went, and hold no more than the gate lets in."""

import threading
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stages import Clock, Gate, Stage


@dataclass(eq=False)
class Task:
    """A job that remembers what came out."""

    clock: Clock = field(default_factory=Clock)
    error: BaseException | None = None
    out: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Thing:
    job: Task
    number: int


def arrive(thing: Thing) -> list[Thing]:
    thing.job.out.append(thing.number)
    return []


def test_each_stage_knows_what_it_waited_for():
    """The second of three is slow: the first is blocked by it, the third starves behind it."""
    last = Stage("last", 1, 1, lambda thing: None, arrive)
    slow = Stage("slow", 1, 1, lambda thing: time.sleep(0.02), lambda thing: [thing], last)
    first = Stage("first", 1, 1, lambda thing: None, lambda thing: [thing], slow)
    task = Task()
    for number in range(30):
        first.put(Thing(task, number))
    for stage in (first, slow, last):
        stage.close()
    assert task.out == list(range(30))
    busy, starved, blocked = (task.clock.of(state) for state in ("busy", "starved", "blocked"))
    assert busy["slow"] > 0.5
    assert blocked["first"] > 0.4 > 10 * starved["first"]
    assert starved["last"] > 0.4 > 10 * blocked["last"]
    assert task.clock.count == {"first": 30, "slow": 30, "last": 30}


def test_an_error_is_its_jobs_alone_and_the_thread_goes_on():
    def work(thing: Thing) -> None:
        if thing.number == 3:
            raise MemoryError("too much")

    stage = Stage("work", 1, 1, work, arrive)
    bad, good = Task(), Task()
    for number in range(8):
        stage.put(Thing(bad, number))
        stage.put(Thing(good, 10 + number))
    stage.close()
    assert isinstance(bad.error, MemoryError)
    assert good.error is None
    assert bad.out == list(range(8))  # carried to the end all the same
    assert good.out == list(range(10, 18))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=60), st.integers(1, 100))
def test_the_gate_holds_its_limit_or_one_thing_alone(sizes, limit):
    gate, inside, most, lock = Gate(limit), [], [], threading.Lock()

    def leave(size: int) -> None:
        with lock:
            inside.remove(size)
        gate.give_back(size)

    def hold(size: int) -> None:
        with lock:
            inside.append(size)
            most.append((sum(inside), len([one for one in inside if one])))
        time.sleep(0.0005)
        leave(size)

    threads = []
    for size in sizes:
        gate.admit(size)
        threads.append(threading.Thread(target=hold, args=[size]))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert gate.held == 0
    assert all(total <= limit or count == 1 for total, count in most)


def test_a_stage_grows_and_never_shrinks():
    stage = Stage("work", 2, 1, lambda thing: None, arrive)
    stage.grow(5)
    stage.grow(3)
    assert len(stage.threads) == 5
    stage.close()
    assert not any(thread.is_alive() for thread in stage.threads)


@pytest.mark.parametrize("threads", [1, 4])
def test_nothing_is_lost_between_many_threads(threads):
    last = Stage("last", threads, 2, lambda thing: None, arrive)
    first = Stage("first", threads, 2, lambda thing: None, lambda thing: [thing, thing], last)
    task = Task()
    for number in range(500):
        first.put(Thing(task, number))
    first.close()
    last.close()
    assert sorted(task.out) == sorted(2 * list(range(500)))
