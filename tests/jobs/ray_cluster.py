"""A real Ray cluster on loopback: a head with dashboard and job server, and workers, each with processes of its own."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

HOST = "127.0.0.1"
STARTED_WITHIN = 240.0  # seconds, on a machine that is busy with other things
ENDED_WITHIN = 30.0


@dataclass(frozen=True)
class RayCluster:
    """Where it is."""

    address: str  # of the head, for `ray.init`
    dashboard: str  # for jobs
    folder: Path  # of what Ray writes
    token: str  # which every request must have

    def environment(self) -> dict[str, str]:
        """Of who may use it."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def nodes(self) -> int:
        """How many are alive."""
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = requests.get(f"{self.dashboard}/nodes?view=summary", headers=headers, timeout=20).json()
        return sum(node["raylet"]["state"] == "ALIVE" for node in answer["data"]["summary"])


@contextlib.contextmanager
def ray_cluster(workers: int = 2, cpus: int = 1) -> Iterator[RayCluster]:
    """A head and so many workers, each with so many CPUs, which are ended with the block."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, as the path of a socket has 107 bytes at most
    gcs, dashboard, client = free_ports(3)
    cluster = RayCluster(f"{HOST}:{gcs}", f"http://{HOST}:{dashboard}", folder, secrets.token_hex(32))
    head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    head += [f"--dashboard-host={HOST}", "--include-dashboard=true", f"--temp-dir={folder}"]
    with contextlib.ExitStack() as nodes:
        nodes.callback(shutil.rmtree, folder, ignore_errors=True)
        nodes.enter_context(node(cluster, [*head, f"--num-cpus={cpus}"], folder / "head.log"))
        wait_for(cluster, 1)
        for number in range(workers):
            worker = [f"--address={cluster.address}", f"--num-cpus={cpus}"]
            nodes.enter_context(node(cluster, worker, folder / f"worker-{number}.log"))
            wait_for(cluster, 2 + number)  # one by one: on one machine two that start together take the same ports
        yield cluster


@contextlib.contextmanager
def node(cluster: RayCluster, options: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """One `ray start --block`, which ends with the block, and all of its processes with it."""
    listen, grpc = free_ports(2)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={HOST}"]
    command += [f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000", "--num-gpus=0"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where a job finds its python
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")} | {
        "PATH": path
    }
    environment |= cluster.environment() | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}
    with open(log, "wb") as written:
        process = subprocess.Popen(
            [*command, *options], stdout=written, stderr=written, env=environment, cwd="/", start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDED_WITHIN)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(cluster: RayCluster, nodes: int) -> None:
    deadline = time.monotonic() + STARTED_WITHIN
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            if cluster.nodes() == nodes:
                return
        time.sleep(0.5)
    logs = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(cluster.folder.glob("*.log")))
    raise TimeoutError(f"no Ray cluster of {nodes} nodes after {STARTED_WITHIN:g} s\n{logs}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
