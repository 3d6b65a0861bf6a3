"""Jobs that are sent to a cluster: a real one, with a head, two workers, a dashboard and a token of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import fsspec
import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobType

from jobs.cli import main
from pipeline.submission import SETTINGS, Work, exit_code, pack
from tests.conftest import draw_image
from tests.jobs.ray_cluster import RayCluster, free_ports, ray_cluster

ROOT = Path(__file__).parents[2]
WAITED = 300  # seconds
MANY = 80  # images, which take a while


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as started:
        yield started


def started(cluster: RayCluster, *arguments: object) -> subprocess.Popen:
    """`swath submit`, as a person at another machine gives it, whom another RAY_ADDRESS does not mislead."""
    command = [sys.executable, "-m", "jobs", "submit", "--ray-address", cluster.dashboard, *map(str, arguments)]
    environment = os.environ | cluster.environment() | {"RAY_ADDRESS": "http://127.0.0.1:1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def submitted(cluster: RayCluster, *arguments: object) -> tuple[int, str, str]:
    """Its exit code, the log of the job, and what was said besides."""
    process = started(cluster, *arguments)
    log, said = process.communicate(timeout=WAITED)
    return process.returncode, log, said


def query(output: str, question: str) -> list[tuple]:
    """What DuckDB answers to a question about the table of an output."""
    duck = duckdb.connect()
    protocol = output.partition("://")[0] if "://" in output else "file"
    duck.register_filesystem(fsspec.filesystem(protocol, skip_instance_cache=True))
    table = f"{output}/segments/*/*.parquet" if "://" in output else f"file://{output}/segments/*/*.parquet"
    return duck.sql(question.format(table=f"'{table}'")).fetchall()


ONE_ROW_EACH = "SELECT count(*), count(DISTINCT uri), count(mask) FROM {table}"


def record(output: str) -> dict:
    protocol = output.partition("://")[0] if "://" in output else "file"
    files = fsspec.filesystem(protocol, skip_instance_cache=True)
    (name,) = files.glob(f"{output}/runs/*/run.json")
    return json.loads(files.cat(name))


def test_a_job_is_submitted_and_followed_and_every_image_has_one_row(cluster, s3, bucket, collection, checkpoint):
    fsspec.filesystem("s3").put(f"{collection}/", f"{bucket}/images/", recursive=True)
    passed = [part for name in s3.environment() for part in ("--env", name)]
    job = ["segment", f"{bucket}/images", f"{bucket}/out", "--checkpoint", checkpoint, "--policy", "short=64"]
    code, log, said = submitted(cluster, *passed, "--submission-id", "first", "--", *job, "--shard-images", "4")
    assert (code, said) == (0, "submitted first\n"), log
    assert "segmenting 12/12" in log
    assert log.splitlines()[-1] == "swath: exit code 0"
    assert query(f"{bucket}/out", ONE_ROW_EACH) == [(12, 12, 12)]
    assert record(f"{bucket}/out")["submission_id"] == "first"
    assert s3.secret_key not in log + said


def test_what_is_wrong_is_said_at_once_with_exit_code_2_and_nothing_is_sent(capfd, monkeypatch, tmp_path):
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which is put back afterwards
    monkeypatch.setenv("SWATH_TEST_SECRET", "canary")

    def swath(*arguments: str) -> tuple[int, list[str]]:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        out, errors = capfd.readouterr()
        assert "canary" not in out + errors
        return code, errors.splitlines()

    segment = ["segment", str(tmp_path), f"{tmp_path}/out", "--checkpoint", "s3://bucket/b2"]
    nowhere = ["submit", "--ray-address", f"http://127.0.0.1:{port}", "--env", "SWATH_TEST_SECRET"]
    for wrong in (["--workers", "0"], ["--no-such"], ["--policy", "short"], ["--batch-pixels", "many"]):
        assert swath(*nowhere, "--", *segment, *wrong) == swath(*segment, *wrong)
        assert swath(*segment, *wrong)[0] == 2
    for command, words in [
        ([*nowhere, "--", *segment], f"no Ray job server at http://127.0.0.1:{port}"),
        ([*nowhere, "--", "demo"], "swath demo is not for a cluster"),
        ([*nowhere, "--", *segment, "--ray-address", "auto"], "--ray-address stands before --"),
        ([*nowhere, "--env", "SWATH_TEST_UNSET", "--", *segment], "SWATH_TEST_UNSET is not set here"),
        ([*nowhere, "--env", "=canary", "--", *segment], "expected NAME or NAME=VALUE"),
        ([*nowhere, "--submission-id", "a night/../x", "--", *segment], "submission_id: use letters, digits, - and _"),
        (["submit", "--ray-address", "head:6379", "--", *segment], "(http://HEAD:8265) (got 'head:6379')"),
        (nowhere, "command is missing"),
    ]:
        code, errors = swath(*command)
        assert (code, len(errors)) == (2, 1), errors
        assert words in errors[0]


def test_a_cluster_gets_the_code_and_the_settings_and_nothing_else(tmp_path):
    settings = {"input": ["s3://in"], "output": "s3://out", "workers": "1:8", "anonymous": True}
    for is_installed in (False, True):
        folder = tmp_path / str(is_installed)
        folder.mkdir()
        pack(Work("segment", settings, 25, is_installed), folder)
        sent = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert yaml.safe_load((folder / SETTINGS).read_text()) == settings
        if is_installed:
            assert sent == {SETTINGS}
        else:
            assert {"jobs/__main__.py", "pipeline/run.py", "model/segformer.py"} < sent
            assert {Path(name).suffix for name in sent - {SETTINGS}} <= {".py", ".so", ".html", ".css", ".js"}
            assert not any("bench" in name or "tests" in name for name in sent)


def test_a_job_that_is_stopped_drains_and_goes_on_without_losing_or_repeating_an_image(cluster, checkpoint, tmp_path):
    for number in range(MANY):
        draw_image(tmp_path / f"images/{number:03d}.png", 640, 480, seed=number)
    output = tmp_path / "out"
    job = ["segment", tmp_path / "images", output, "--checkpoint", checkpoint, "--shard-images", "4", "--run-id", "r"]
    process = started(cluster, "--submission-id", "stopped", "--", *job, "--grace", "120")
    wait_until(lambda: len(list(output.glob("segments/*/*.parquet"))) >= 2)
    stop = ray_job(cluster, "stop", "--no-wait", "stopped")
    assert stop.returncode == 0, stop.stderr
    log, _ = process.communicate(timeout=WAITED)
    assert process.returncode == 143, log
    assert "stopping: shards under way have 120 s to end" in log
    done = len(list(output.glob("segments/*/*.parquet")))
    assert f"swath: stopped: {done} of {MANY // 4} shards of run r are done" in log
    assert 2 <= done < MANY // 4
    assert not list(output.glob("runs/r/lease-*.json"))
    before = {path.name: path.read_bytes() for path in output.glob("segments/*/*.parquet")}

    code, log, _ = submitted(cluster, "--", *job)
    assert code == 0, log
    assert f"{done} of {MANY // 4} shards of run r are there already" in log
    assert query(str(output), ONE_ROW_EACH) == [(MANY, MANY, MANY)]
    assert record(str(output))["shards_done_before"] == done
    assert all((output / "segments/run=r" / name).read_bytes() == content for name, content in before.items())


def test_the_exit_code_is_that_of_the_job(cluster, collection, tmp_path):
    code, log, _ = submitted(cluster, "--", "segment", collection, tmp_path / "out", "--checkpoint", tmp_path / "none")
    assert code == 2
    assert f"swath: error: {tmp_path}/none" in log


@pytest.mark.parametrize(
    ("status", "code", "log", "expected"),
    [
        ("STOPPED", None, "stopping\nswath: exit code 143\n", 143),
        ("STOPPED", None, "swath: exit code 0\n", 0),  # it was just done
        ("STOPPED", None, "Runtime env is setting up.\n", 143),  # before it could say anything
        ("FAILED", None, "the node died\n", 1),
        ("FAILED", -9, "", 137),
        ("FAILED", 2, "swath: exit code 2\n", 2),
    ],
)
def test_a_job_without_an_exit_code_has_the_one_of_what_ended_it(status, code, log, expected):
    info = JobDetails(type=JobType.SUBMISSION, status=JobStatus(status), entrypoint="", driver_exit_code=code)
    assert exit_code(info, log) == expected


def test_who_leaves_the_log_leaves_the_job_running(cluster, collection, checkpoint, tmp_path):
    job = ["segment", collection, tmp_path / "out", "--checkpoint", checkpoint, "--policy", "short=64"]
    process = started(cluster, "--submission-id", "left", "--", *job)
    assert process.stderr
    assert process.stderr.readline() == "submitted left\n"
    assert process.stdout
    process.stdout.readline()  # the log has come
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=WAITED)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"ray job stop --address {cluster.dashboard} left" in said
    wait_until(lambda: bool(list(tmp_path.glob("out/runs/*/run.json"))))
    assert query(str(tmp_path / "out"), ONE_ROW_EACH) == [(12, 12, 12)]


FOLLOW = """
import sys
from pipeline import submission
submission.LOST_AFTER = 3
client = submission.connect(sys.argv[1])
job = client.submit_job(entrypoint="echo begun; sleep 8; echo ended")
sys.exit(submission.follow(client, job, lambda text: print(text, end="", flush=True)))
"""


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_log_outlives_a_broken_connection_and_ends_with_the_job_server(cluster, comes_back):
    with Door(cluster.dashboard) as door:
        command = [sys.executable, "-c", FOLLOW, door.url]
        environment = os.environ | cluster.environment()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout
        while process.stdout.readline() != "begun\n":
            assert process.poll() is None
        door.shut()
        if comes_back:
            time.sleep(1)
            door.open()
        log, said = process.communicate(timeout=WAITED)
    if comes_back:
        assert (process.returncode, log) == (0, "ended\n"), said
    else:
        assert process.returncode == 1
        assert "ConnectionError: the job server has not answered for 3 s" in said


class Door:
    """A way to a server that can be shut, which ends what goes through it."""

    def __init__(self, url: str):
        host, port = url.removeprefix("http://").split(":")
        self.behind, (self.port,) = (host, int(port)), free_ports(1)
        self.url, self.sockets, self.lock = f"http://{host}:{self.port}", [], threading.Lock()

    def __enter__(self) -> "Door":
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.shut()

    def open(self) -> None:
        listener = socket.create_server((self.behind[0], self.port))
        self.sockets.append(listener)
        threading.Thread(target=self.let_in, args=(listener,), daemon=True).start()

    def let_in(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                pair = [listener.accept()[0], socket.create_connection(self.behind)]
                with self.lock:
                    self.sockets += pair
                for one, other in (pair, pair[::-1]):
                    threading.Thread(target=self.pass_on, args=(one, other), daemon=True).start()

    def pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def shut(self) -> None:
        with self.lock:
            while self.sockets:
                one = self.sockets.pop()
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)  # else whoever waits for it would go on
                one.close()


def test_rays_own_command_does_the_same(cluster, collection, checkpoint, tmp_path):
    job = ["segment", collection, tmp_path / "out", "--checkpoint", checkpoint, "--policy", "short=64"]
    done = ray_job(
        cluster, "submit", "--working-dir", ".", "--submission-id", "rays", "--", "python", "-m", "jobs", *job
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "segmenting 12/12" in done.stdout
    assert query(str(tmp_path / "out"), ONE_ROW_EACH) == [(12, 12, 12)]
    assert record(str(tmp_path / "out"))["submission_id"] == "rays"


def ray_job(cluster: RayCluster, *arguments: object) -> subprocess.CompletedProcess:
    """`ray job`, given in this repository."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", *map(str, arguments)]
    environment = os.environ | cluster.environment() | {"RAY_API_SERVER_ADDRESS": cluster.dashboard}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WAITED
    )


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAITED
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)
