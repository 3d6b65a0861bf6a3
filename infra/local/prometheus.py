"""A real Prometheus on this machine, with the rules and alerts of infra/monitoring, that watches runs.

    python -m infra.local.prometheus [--port PORT] [--target PORT] [-- COMMAND ...]

It listens on loopback only, scrapes 127.0.0.1:TARGET each second, where a run serves its metrics with --metrics-port,
and prints the page to open. COMMAND, if there is one, runs beside it. Ctrl-C ends both; what was scraped is in a
temporary folder and goes with them. Needs Debian's package, which root has installed here: apt-get install prometheus
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.local.debian import install_missing

PROGRAMS = {"prometheus": "prometheus"}  # and Debian's package that brings it
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # what is on this machine needs no proxy
MONITORING = Path(__file__).parents[1] / "monitoring"
GRAPHS = (  # of the page, from the top
    "{__name__=~'swath:images_done|swath_planned_images'}",
    "swath:images_per_second:2m",
    "swath_remaining_seconds",
    "swath:stage_share:5m{state='busy'}",
    "swath:failure_share",
    "swath:batch_fill:15m",
)


@dataclass(frozen=True)
class Prometheus:
    """Where it is."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API: ask("query", query="up"). Raises OSError with its own words."""
        try:
            with DIRECTLY.open(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise OSError(f"{path} {parameters}: {error.read().decode(errors='replace')}") from None

    def page(self) -> str:
        """Its own page, which differs between versions and Debian's package, with some graphs."""
        with DIRECTLY.open(self.url) as reply:
            page = reply.url.partition("?")[0]
        fields = [(f"g{n}.{key}", value) for n, expr in enumerate(GRAPHS) for key, value in graph(expr).items()]
        return f"{page}?{urllib.parse.urlencode(fields, quote_via=urllib.parse.quote)}"


def graph(expression: str) -> dict[str, str]:
    return {"expr": expression, "tab": "0", "range_input": "10m"}


@contextlib.contextmanager
def prometheus(folder: Path, target: str, port: int) -> Iterator[Prometheus]:
    """Run one that keeps its data in `folder` and scrapes `target` (HOST:PORT) each second; it ends with the block.

    Raises RuntimeError with its own words when it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration(target)))
    server = Prometheus(f"http://127.0.0.1:{port}")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,  # else Ctrl-C would end it first
        )
    try:
        wait_until_ready(server, process, folder / "log")
        yield server
    finally:
        process.terminate()
        process.wait(30)


def configuration(target: str) -> dict[str, Any]:
    """That of infra/monitoring for a target on this machine, which is asked often, as runs here are short."""
    made: dict[str, Any] = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    made["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    made["rule_files"] = [str(MONITORING / name) for name in made["rule_files"]]
    made["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    return made


def wait_until_ready(server: Prometheus, process: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), DIRECTLY.open(f"{server.url}/-/ready", timeout=5):
            return
        time.sleep(0.1)
    raise RuntimeError(f"prometheus did not start: {log.read_text().strip()[-500:] or 'it said nothing'}")


def watch(port: int, target: int, command: list[str]) -> int:
    """Run Prometheus, and the command beside it, until Ctrl-C; the command's exit code."""
    install_missing(PROGRAMS)
    code = 0
    with (
        tempfile.TemporaryDirectory(prefix="swath-prometheus-") as folder,
        prometheus(Path(folder), f"127.0.0.1:{target}", port) as server,
    ):
        print(f"open     {server.page()}", flush=True)
        if command:
            with subprocess.Popen(command) as process:
                try:
                    code = process.wait()
                except (KeyboardInterrupt, SystemExit):
                    process.send_signal(signal.SIGINT if process.poll() is None else 0)
                    process.wait()  # which Popen itself does for a quarter of a second
                    raise
        print(f"\nopen     {server.page()}\nends     with Ctrl-C", flush=True)
        signal.pause()
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a real Prometheus on loopback that watches runs, until Ctrl-C.")
    parser.add_argument("--port", type=int, default=9095, help="port to listen on (default: %(default)s)")
    parser.add_argument("--target", type=int, default=9090, help="port of a run's metrics (default: %(default)s)")
    mine, command = sys.argv[1:], []
    if "--" in mine:
        mine, command = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    arguments = parser.parse_args(mine)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(watch(arguments.port, arguments.target, command))
    except RuntimeError as error:
        sys.exit(f"monitor: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
