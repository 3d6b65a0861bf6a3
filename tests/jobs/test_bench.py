"""The benchmarks run, and what they print last is JSON."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jobs.bench.scale import Driver, estimate, summarise


def test_the_road_is_timed_rung_by_rung():
    command = [sys.executable, "-m", "jobs.bench.road", "--images", "16", "--only", "+ encode", "--only", "stages"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n")
    found = json.loads(shown[-1])
    assert [rung["rung"] for rung in found["rungs"]] == ["bare: + encode", "stages, null model"]
    for rung in found["rungs"]:
        assert f"| {rung['rung']} | 16 |" in "\n".join(shown)
        assert rung["cpu_seconds"] > 0
        assert rung["peak_memory"] > 50 << 20


def test_a_cluster_is_measured_from_its_first_batch_to_its_last():
    devices = [np.array([[105.0, 106.0], [106.2, 107.2]]), np.array([[105.5, 106.5], [106.5, 109.0]])]
    found = summarise(2, 4, 100.0, devices)
    assert (found.start_up, found.seconds) == (5.0, 4.0)
    assert found.busy == pytest.approx(5.5 / 8)
    assert found.tail == pytest.approx(1.8 / 8), "the first device waited from 107.2 to 109"
    assert found.gap == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="1 of 2 workers had work"):
        summarise(2, 2, 100.0, devices[:1])


def test_the_estimate_names_first_what_breaks_first():
    _, limits = estimate(Driver(0.005, 15_000))
    assert [limit.share for limit in limits] == sorted((limit.share for limit in limits), reverse=True)
    _, slow = estimate(Driver(1.0, 15_000))
    assert slow[0].name == "the driver's CPU, one core"
    assert slow[0].share > 20
