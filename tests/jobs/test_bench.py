"""The benchmarks run, and what they print last is JSON."""

import json
import subprocess
import sys


def test_the_road_is_timed_rung_by_rung():
    command = [sys.executable, "-m", "jobs.bench.road", "--images", "16", "--only", "+ encode", "--only", "stages"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n")
    found = json.loads(shown[-1])
    assert [rung["rung"] for rung in found["rungs"]] == ["bare: + encode", "stages, null model"]
    for rung in found["rungs"]:
        assert f"| {rung['rung']} | 16 |" in "\n".join(shown)
        assert rung["cpu_seconds"] > 0
        assert rung["peak_memory"] > 50 << 20
