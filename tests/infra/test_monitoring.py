"""What infra/monitoring has, against a real Prometheus that watches a real run, and against Grafana's own types.

A metric that is misspelt in a rule, an alert or a panel has no data there, and is in no list of names.
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml
from prometheus_client import CollectorRegistry

from infra.local.prometheus import GRAPHS, Prometheus, prometheus
from pipeline.config import SegmentSettings
from pipeline.metrics import LAST_COMMIT, NIGHTLY, Metrics
from pipeline.nightly import nightly
from pipeline.run import segment
from tests.conftest import Quiet, draw_image, installed, spoil
from tests.infra.manifests import ROOT
from tests.pipeline.sleeper import Sleeper

MONITORING = ROOT / "infra/monitoring"
CASES = [ROOT / "tests/infra/alerts.yaml", ROOT / "tests/infra/alerts_of_nights.yaml"]
DASHBOARD = json.loads((MONITORING / "grafana/swath.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"][0]["rules"]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule["expr"] for rule in RULES if "alert" in rule}
IMAGES = 60
PACE = 0.15  # seconds that the device takes for each
PROGRAMS = {"prometheus": "prometheus", "promtool": "prometheus", "amtool": "prometheus-alertmanager"}
# what Grafana's types are, as of the Grafana of compose.yaml
GRAFANA = {"@grafana/schema": "12.3.0", "typescript": "5.9.3"}


@pytest.fixture(scope="session")
def tools() -> None:
    """Debian's packages, installed where they are missing."""
    installed(PROGRAMS)


def said_by(*command: str, given: str = "", code: int = 0) -> str:
    """What a tool says, which is to end with this exit code."""
    done = subprocess.run(command, input=given, check=False, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def port_of_nobody() -> int:
    """A port that stays free until the run has come to it: none that the system gives to whoever asks for any."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(21_000, 32_000))) as one:
            return one.getsockname()[1]


@dataclass(frozen=True)
class Watched:
    """A Prometheus, and what it has watched: a run, and a night that found nothing new."""

    prometheus: Prometheus
    output: Path
    record: dict[str, Any]
    began: float
    done: float  # when the run had said its last words
    ended: float  # when those of the night had gone, too
    lines: list[str]
    served: list[str]  # the last words of each, as they were served

    def values(self, query: str) -> list[dict[str, Any]]:
        """Each series of a query over all that time, its values that are numbers."""
        found = self.prometheus.ask("query_range", query=query, start=str(self.began), end=str(self.ended), step="1")
        series = [one["metric"] | {"values": [float(value) for _, value in one["values"]]} for one in found["result"]]
        for one in series:
            one["values"] = [value for value in one["values"] if math.isfinite(value)]
        return [one for one in series if one["values"]]

    def last(self, query: str) -> dict[str, float]:
        """The last value of each series of a metric, by its only label that is ours."""
        found = self.values(query)
        ours = {"__name__", "instance", "job", "values"}
        return {"".join(value for key, value in one.items() if key not in ours): one["values"][-1] for one in found}


@pytest.fixture(scope="module")
def watched(
    tools: None, tmp_path_factory: pytest.TempPathFactory, checkpoint: str, shared_ray: str
) -> Iterator[Watched]:
    """A run whose device sleeps, so that it lasts for a dozen scrapes, and whose totals stay for another few."""
    folder = tmp_path_factory.mktemp("watched")
    images, output, port = folder / "images", folder / "masks", port_of_nobody()
    output.mkdir()
    (output / "pace").write_text(str(PACE))
    for number in range(IMAGES):
        draw_image(images / f"{number:03d}.{'png' if number % 2 else 'jpg'}", 40 + number % 5, 32, number)
    spoil(images)
    lines: list[str] = []
    served: list[str] = []

    class Listener(Quiet):
        def say(self, text: str) -> None:
            lines.append(text)
            if found := re.search(r"the last metrics stay at (\S+)", text):
                served.append(urllib.request.urlopen(found[1]).read().decode())

    settings = SegmentSettings(
        input=str(images),
        output=str(output),
        checkpoint=checkpoint,
        policy="exact=32x32",
        shard_images=8,
        cpus_per_worker=1,
        workers="1",
        metrics_port=port,
        metrics_linger=3,
        ray_address=shared_ray,
    )
    with prometheus(folder / "tsdb", f"127.0.0.1:{port}", port_of_nobody()) as server:
        began = time.time()
        result = segment(settings, Listener(), Sleeper)
        done = time.time()
        assert nightly(settings.model_copy(update={"run_id": None}), Listener()) == []
        ended = time.time()
        time.sleep(2)  # for what is recorded of it
        assert result.record
        yield Watched(server, output, result.record, began, done, ended, lines, served)


def names_of_metrics() -> set[str]:
    """Every name under which Prometheus knows a metric of ours."""
    registry = CollectorRegistry()
    Metrics(registry)
    families = [(metric.name, metric.type) for metric in registry.collect()]
    return {name + "_total" * (kind == "counter") for name, kind in families} | {LAST_COMMIT[0], NIGHTLY[0]}


def names_in(query: str) -> set[str]:
    return set(re.findall(r"swath[_:][a-z0-9_:]*", re.sub(r'"[^"]*"', "", query)))


def asked_by_grafana(query: str) -> str:
    """A panel's query with the dashboard's variable, as it is at first, put in."""
    return query.replace("$instance", ".*")


def without_thresholds(expression: str) -> list[str]:
    """An alert that adds where it compares, and so has data where all that it compares has; what is after `unless`."""
    return re.sub(r" (>=?|==|or) ", " + ", expression).split(" unless on (output) ")


def test_every_rule_records_data_of_a_real_run(watched):
    assert {name: watched.values(name) for name in RECORDED if not watched.values(name)} == {}
    assert {name for name, expr in RECORDED.items() if not watched.values(expr)} == set()


def test_what_every_alert_compares_has_data_in_a_real_run_and_the_run_is_healthy(watched):
    for name, expression in ALERTS.items():
        parts = without_thresholds(expression)
        assert parts != [expression], name
        assert [part for part in parts if not watched.values(part)] == [], name
        for moment in (watched.done - 1, watched.ended - 1):  # while the run's metrics are served, and the night's
            assert watched.prometheus.ask("query", query=expression, time=str(moment))["result"] == [], name
    assert watched.prometheus.ask("query", query="swath:images_done", time=str(watched.done - 1))["result"]
    assert watched.values('ALERTS{alertstate="firing"}') == []


@pytest.mark.parametrize(("panel", "query"), QUERIES)
def test_every_query_of_the_dashboard_has_data_of_a_real_run(watched, panel, query):
    assert watched.values(asked_by_grafana(query))


def test_the_page_of_the_monitor_asks_for_what_is_there(watched):
    assert [expr for expr in GRAPHS if not watched.values(expr)] == []
    page = watched.prometheus.page()
    assert page.startswith(watched.prometheus.url)
    assert page.count(".expr=") == len(GRAPHS)


def monitor(*command: str, **options: Any) -> subprocess.Popen:
    program = [sys.executable, "-m", "infra.local.prometheus", "--port", str(port_of_nobody())]
    return subprocess.Popen(
        [*program, "--", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_monitor_ends_what_it_started(tools, number, tmp_path):
    command = [sys.executable, "-c", "import os, time; print(os.getppid(), os.getpid(), flush=True); time.sleep(60)"]
    with monitor(*command, env=os.environ | {"TMPDIR": str(tmp_path)}) as process:
        page = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(page) as reply:
            assert b"Prometheus" in reply.read()
        parent, child = map(int, process.stdout.readline().split())
        assert parent == process.pid
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(page)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_page_stays_when_the_command_has_ended(tools):
    with monitor("true") as process:
        said = [process.stdout.readline() for _ in range(4)]
        assert said[0] == said[2]
        assert urllib.request.urlopen(said[2].split()[1]).status == 200
        assert said[3].startswith("ends")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_a_monitor_without_prometheus_says_what_to_install(tmp_path):
    with monitor("true", env={"PATH": str(tmp_path)}) as process:
        _, said = process.communicate()
    assert process.returncode == 1
    assert said == "monitor: not installed: prometheus; sudo apt-get install prometheus\n"


def test_totals_at_the_end_are_the_rows_of_the_table(watched):
    rows = duckdb.connect().from_parquet(f"{watched.output}/segments/*/*.parquet", hive_partitioning=False)
    counted = {
        status: (images, size) for status, images, size in rows.aggregate("status, count(*), sum(bytes)").fetchall()
    }
    assert set(counted) == {"ok", "unreadable"}
    images, sizes = watched.last("swath_images_total"), watched.last("swath_input_bytes_total")
    assert {status: (images[status], sizes[status]) for status in counted} == counted
    assert sum(images.values()) == sum(count for count, _ in counted.values()) == IMAGES + 3
    ((pixels, masks),) = (
        rows.filter("status = 'ok'").aggregate("sum(width * height), sum(octet_length(mask))").fetchall()
    )
    assert watched.last("swath_mask_pixels_total") == {"": pixels}
    assert watched.last("swath_mask_bytes_total") == {"": masks}
    files = len(list((watched.output / "segments").rglob("*.parquet")))
    assert watched.last("swath_shards_total") == watched.last("swath_planned_shards") == {"": files}
    assert watched.last("swath_batches_total") == {"": watched.record["batches"]}
    assert watched.last("swath_batch_inputs_total") == {"": IMAGES}
    for name in ("swath:images_left", "swath:shards_left", "swath_shards_underway", "swath_images_underway"):
        assert watched.last(name) == {"": 0}, name
    assert watched.last("swath_remaining_seconds") == watched.last("swath_workers") == {"": 0}


def test_numbers_on_the_way_are_what_the_device_made_them(watched):
    (done,), (rate,) = watched.values("swath:images_done"), watched.values("swath:images_per_second:2m")
    assert done["values"] == sorted(done["values"])
    assert len(set(done["values"])) > 5
    assert 0.3 / PACE < max(rate["values"]) < 1.2 / PACE
    (each,) = watched.values("swath_remaining_seconds / (swath:images_left > 0)")
    assert 0.5 * PACE < statistics.median(each["values"]) < 4 * PACE
    shares = {one["state"]: one["values"][-1] for one in watched.values('swath:stage_share:5m{stage="infer"}')}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["busy"] > 0.8, "the device that sleeps is the bottleneck"
    assert watched.last("swath:batch_fill:15m") == {"": 1}


def test_a_commit_and_a_night_that_finds_nothing_new_are_known_afterwards(watched):
    finished = (watched.output / "runs" / watched.record["run_id"] / "run.json").stat().st_mtime
    url = f"file://{watched.output}"
    (commit,), (night,) = watched.values(LAST_COMMIT[0]), watched.values(NIGHTLY[0])
    assert commit["output"].removeprefix("file://") == night["output"].removeprefix("file://") == str(watched.output), (
        url
    )
    assert commit["values"][-1] == pytest.approx(finished, abs=2)
    assert commit["values"][-1] < night["values"][-1] <= watched.ended
    assert 0 <= watched.values("swath:nightly_age_seconds")[0]["values"][-1] < 60
    assert sum("the last metrics stay at" in line for line in watched.lines) == 2


def test_names_and_units_are_as_prometheus_wants_them(watched):
    assert [text.count("swath_nightly") > 0 for text in watched.served] == [False, True]
    for text in watched.served:
        assert said_by("promtool", "check", "metrics", given=text) == ""
    assert {line.split()[2] for line in "".join(watched.served).splitlines() if line.startswith("# TYPE")} == (
        names_of_metrics()
    )
    assert "counter metrics should have" in said_by(
        "promtool", "check", "metrics", given="# HELP a b\n# TYPE a counter\na 1\n", code=3
    )


def test_no_query_asks_for_a_name_that_is_nowhere():
    known = names_of_metrics()
    assert all(name.startswith("swath_") for name in known)
    for query in (*RECORDED.values(), *ALERTS.values(), *GRAPHS, *(query for _, query in QUERIES)):
        assert names_in(query), query
        assert names_in(query) <= known | set(RECORDED), query
    asked = [*RECORDED.values(), *ALERTS.values(), *GRAPHS, *(query for _, query in QUERIES)]
    assert set(RECORDED) <= set().union(*map(names_in, asked)), "nothing is recorded that nobody asks for"
    texts = [text for rule in RULES for text in rule.get("annotations", {}).values()]
    assert set().union(*map(names_in, texts)) <= known | set(RECORDED)


def test_rules_and_configurations_are_clean(tools):
    assert "0 rules" not in said_by("promtool", "check", "rules", str(MONITORING / "rules.yaml"))
    said_by("promtool", "check", "config", str(MONITORING / "prometheus.yaml"))
    said_by("amtool", "check-config", str(MONITORING / "alertmanager.example.yaml"))
    for path in MONITORING.rglob("*"):
        assert not re.search(r"(secret|password|token)\s*:|hooks\.slack", path.read_text() if path.is_file() else "")


def test_each_alert_comes_in_its_trouble_and_none_in_a_healthy_run(tools):
    said_by("promtool", "test", "rules", *map(str, CASES))
    cases = [case for path in CASES for case in yaml.safe_load(path.read_text())["tests"]]
    assert {case["alertname"] for case in cases[0]["alert_rule_test"]} == set(ALERTS)
    assert not [case for case in cases[0]["alert_rule_test"] if "exp_alerts" in case]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == set(ALERTS)


def test_alerts_that_come_too_late_fail_their_cases(tools, tmp_path):
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        if "alert" in rule:
            rule["for"] = "14d"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    for path in CASES:
        cases = yaml.safe_load(path.read_text()) | {"rule_files": ["rules.yaml"]}
        (tmp_path / path.name).write_text(yaml.safe_dump(cases))
    said = said_by("promtool", "test", "rules", *(str(tmp_path / path.name) for path in CASES), code=1)
    assert set(re.findall(r"alertname: (\w+)", said)) == set(ALERTS)


def test_each_alert_tells_the_person_what_to_do_in_swaths_own_words():
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert re.search(r"`?(swath|ray) \w+|--[a-z-]+", rule["annotations"]["description"]), rule["alert"]
            assert "{{ $value" in rule["annotations"]["summary"]


@pytest.fixture(scope="session")
def grafana_types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which TypeScript finds Grafana's types; kept in .venv, so that it is made once."""
    versions = "-".join(GRAFANA.values())
    folder = Path(os.environ.get("VIRTUAL_ENV") or ROOT / ".venv") / f"grafana-types-{versions}"
    if not (folder / "node_modules/.bin/tsc").exists():
        installed({"npm": "npm"})
        made = tmp_path_factory.mktemp("npm", numbered=True)
        packages = [f"{name}@{version}" for name, version in GRAFANA.items()]
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", *packages]
        subprocess.run(command, cwd=made, check=True)
        if folder.parent.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(made, folder)
        else:
            return made
    return folder


def complaints(dashboards: list[str], types: Path, tmp_path: Path) -> list[set[str]]:
    """What TypeScript has against each of some dashboards, by the names of its errors."""
    (tmp_path / "node_modules").symlink_to(types / "node_modules")
    shutil.copy(ROOT / "tests/infra/grafana/dashboard.ts", tmp_path)
    names = [f"check-{number}.ts" for number in range(len(dashboards))]
    for name, dashboard in zip(names, dashboards, strict=True):
        kind = 'import type { OurDashboard } from "./dashboard";\n'
        (tmp_path / name).write_text(f"{kind}export const dashboard: OurDashboard = {dashboard};\n")
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--target", "es2022"]
    command = [types / "node_modules/.bin/tsc", *options, "--moduleResolution", "bundler", *names]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    found = re.findall(r"^([\w.-]+)\(\d+,\d+\): error (TS\d+)", done.stdout, re.MULTILINE)
    assert bool(found) == bool(done.returncode), done.stdout + done.stderr
    assert {name for name, _ in found} <= set(names), done.stdout
    return [{error for name, error in found if name == own} for own in names]


def test_the_dashboard_has_the_types_of_the_grafana_that_shows_it_and_each_wrong_type_is_found(grafana_types, tmp_path):
    image = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]["grafana"]["image"]
    assert image.partition(":")[2] == GRAFANA["@grafana/schema"]
    right, *wrong = complaints([json.dumps(DASHBOARD), *wrong_dashboards()], grafana_types, tmp_path)
    assert right == set()
    assert all(wrong), wrong
    assert len(wrong) > 5


def wrong_dashboards() -> Iterator[str]:
    """The dashboard with one thing wrong in it."""
    text = json.dumps(DASHBOARD)
    for right, wrong in (
        ('"h": 4', '"h": "4"'),
        ('"colorMode": "value"', '"colorMode": "values"'),
        ('"drawStyle"', '"drawStile"'),
        ('"sizing": "auto"', '"sizing": 1'),
        ('"refresh": 2', '"refresh": 7'),
        ('"expr"', '"exp"'),
        ('"type": "gauge"', '"type": "gouge"'),
    ):
        assert right in text
        yield text.replace(right, wrong, 1)


def test_panels_are_complete_and_lie_side_by_side():
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in ((x, y) for x in range(24) for y in range(place["y"], place["y"] + place["h"])):
            if place["x"] <= cell[0] < place["x"] + place["w"]:
                assert cell not in taken, f"{panel['title']} lies on {taken.get(cell)}"
                taken[cell] = panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert {y for _, y in taken} == set(range(max(y for _, y in taken) + 1)), "no gap"
    for panel in PANELS:
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for _, query in [(panel["title"], target["expr"]) for target in panel["targets"]]:
            assert set(re.findall(r"\$(\w+)", query)) <= variables


def test_grafana_finds_the_dashboard_and_prometheus_where_compose_puts_them():
    services = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"] if volume.startswith("./"))
    assert all(volume.endswith(":ro") for volume in services["grafana"]["volumes"] if volume.startswith("./"))
    (provider,) = yaml.safe_load((MONITORING / "grafana/dashboards.yaml").read_text())["providers"]
    assert str(Path(mounts["./monitoring/grafana/swath.json"]).parent) == provider["options"]["path"]
    (source,) = yaml.safe_load((MONITORING / "grafana/datasource.yaml").read_text())["datasources"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"])[1] in services
    rules = dict(volume.split(":")[:2] for volume in services["prometheus"]["volumes"] if volume.startswith("./"))
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    assert [f"/etc/prometheus/{name}" for name in config["rule_files"]] == [rules["./monitoring/rules.yaml"]]
