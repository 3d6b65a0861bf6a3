"""The benchmarks run, and what they print last is JSON."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jobs.bench import scale
from jobs.bench.scale import Driver, Measurement, estimate, summarise


def test_the_road_is_timed_rung_by_rung():
    command = [sys.executable, "-m", "jobs.bench.road", "--images", "16", "--only", "+ encode", "--only", "stages"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n")
    found = json.loads(shown[-1])
    assert [rung["rung"] for rung in found["rungs"]] == ["bare: + encode", "stages, null model"]
    for rung in found["rungs"]:
        assert f"| {rung['rung']} | 16 |" in "\n".join(shown)
        assert rung["cpu_seconds"] > 0
        assert rung["peak_memory"] > 50 << 20


def test_the_page_of_few_images_is_weighed_beside_that_of_many():
    command = [sys.executable, "-m", "jobs.bench.report", "--images", "60", "600"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n")
    found = json.loads(shown[-1])
    few, many = (found["pages"][images] for images in ("60", "600"))
    assert many["output_bytes"] > 5 * few["output_bytes"]
    assert found["ratios"]["page_bytes"] == round(many["page_bytes"] / few["page_bytes"], 3)
    assert 50_000 < few["page_bytes"] < 5_000_000
    assert 0 < many["queries_seconds"] < many["seconds"]
    assert many["peak"] > 50 << 20
    assert f"page flat within 10%: {'yes' if found['ratios']['page_bytes'] <= found['limit'] else 'no'}" in shown


def test_a_cluster_is_measured_from_its_first_batch_to_its_last():
    devices = [np.array([[105.0, 106.0], [106.2, 107.2]]), np.array([[105.5, 106.5], [106.5, 109.0]])]
    found = summarise(2, 4, 100.0, devices)
    assert (found.start_up, found.seconds) == (5.0, 4.0)
    assert found.busy == pytest.approx(5.5 / 8)
    assert found.tail == pytest.approx(1.8 / 8), "the first device waited from 107.2 to 109"
    assert found.gap == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="1 of 2 workers had work"):
        summarise(2, 2, 100.0, devices[:1])


def test_what_is_printed_names_the_very_command_that_made_it(monkeypatch, capsys):
    monkeypatch.setattr(
        scale, "measure", lambda nodes, shards, folder: Measurement(nodes, shards, 1, 4.0 + nodes, 1, 0, 0)
    )
    monkeypatch.setattr(scale, "of_a_shard", lambda folder: Driver(0.005, 15_000))
    monkeypatch.setattr(sys, "argv", ["scale", "--nodes", "1", "3", "--shards", "7"])
    monkeypatch.setenv("RAY_TMPDIR", "")  # which is put back afterwards
    scale.main()
    shown = capsys.readouterr().out.strip().split("\n")
    assert "`python -m jobs.bench.scale --nodes 1 3 --shards 7`" in shown[2]
    assert "| 3 | 21 | 1.0 s | 7.0 | 0.714 |" in "\n".join(shown)
    assert json.loads(shown[-1])["efficiency"] == pytest.approx(5 / 7)


def test_the_estimate_names_first_what_breaks_first():
    _, limits = estimate(Driver(0.005, 15_000))
    assert [limit.share for limit in limits] == sorted((limit.share for limit in limits), reverse=True)
    _, slow = estimate(Driver(1.0, 15_000))
    assert slow[0].name == "the driver's CPU, one core"
    assert slow[0].share > 20
