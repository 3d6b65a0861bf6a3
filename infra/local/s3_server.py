"""A real S3 server on this machine: Ceph's RADOS Gateway, one monitor and one OSD, without systemd.

    python infra/local/s3_server.py [FOLDER] [--port PORT]     until Ctrl-C; prints what to export
    python infra/local/s3_server.py -- COMMAND ...             as long as COMMAND runs, with all in its environment

It listens on loopback only, checks signatures and honours conditional puts, so what works here works against S3.
Needs root and Debian's packages: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

PROGRAMS = {  # that are needed, and Debian's packages that bring them
    "radosgw": "radosgw",
    "radosgw-admin": "radosgw",
    "ceph": "ceph-mon",
    "ceph-mon": "ceph-mon",
    "monmaptool": "ceph-mon",
    "ceph-osd": "ceph-osd",
}
REGION = "us-east-1"

CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor_port}
ms bind ipv4 = true
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
crash dir = {folder}
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
paxos propose interval = 0.05
paxos min wait = 0.01
[mon]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = {capacity}
bluestore block db create = false
bluestore block wal create = false
osd memory target = 939524096
[client]
ms mon client mode = crc
pid file =
admin socket =
[client.rgw]
ms mon client mode = crc
pid file = {folder}/$name.pid
admin socket = {folder}/$name.asok
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw enable usage log = false
rgw enable ops log = false
"""


@dataclass(frozen=True)
class S3Server:
    """Where the server is, who may use it, and the folder with all its files."""

    endpoint_url: str
    access_key: str
    secret_key: str
    folder: Path

    def environment(self) -> dict[str, str]:
        """The usual variables, as every S3 client reads them."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }

    def run(self, program: str, *arguments: str) -> str:
        """What one of Ceph's programs prints, told of this server. Raises RuntimeError with what it complains of."""
        command = [program, "-c", str(self.folder / "ceph.conf"), *arguments]
        # files, as a daemon would keep a pipe open for ever, and each call its own, as several may run at once
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            code = subprocess.run(command, check=False, stdout=stdout, stderr=stderr, timeout=120).returncode
            stdout.seek(0)
            stderr.seek(0)
            if code:
                raise RuntimeError(f"{' '.join(command)} failed: {stderr.read().strip()[-500:]}")
            return stdout.read()

    @property
    def gateway(self) -> int:
        """The process that speaks S3; the data lies with others."""
        return int((self.folder / "client.rgw.pid").read_text())

    def start_gateway(self) -> None:
        """Start what speaks S3, also again after its process was killed, and wait until it answers."""
        self.run("radosgw", "-n", "client.rgw")
        wait_until_up(self.endpoint_url)

    def add_user(self, name: str) -> "S3Server":
        """The same server for another user, who has buckets and quotas of their own."""
        user = replace(self, access_key=name, secret_key=uuid.uuid4().hex)
        keys = (f"--access-key={user.access_key}", f"--secret-key={user.secret_key}")
        self.run("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}", "--max-buckets=0", *keys)
        return user


@contextlib.contextmanager
def s3_server(folder: Path, port: int | None = None, capacity: int = 4 << 30) -> Iterator[S3Server]:
    """Run a fresh server with its data in the empty `folder`; all of it ends with the block.

    `capacity` in bytes is a sparse file. Raises RuntimeError with the daemon's words when one does not start.
    """
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        packages = " ".join(sorted(set(PROGRAMS.values())))
        raise RuntimeError(f"{', '.join(missing)} not found; apt-get install --no-install-recommends {packages}")
    port, monitor_port = port or free_port(), free_port()
    folder.mkdir(parents=True, exist_ok=True)
    fsid, configuration = uuid.uuid4(), folder / "ceph.conf"
    values = {"fsid": fsid, "folder": folder, "port": port, "monitor_port": monitor_port, "capacity": capacity}
    configuration.write_text(CONFIGURATION.format(**values))
    (folder / "keyring").touch()
    server = S3Server(f"http://127.0.0.1:{port}", "", "", folder)
    run = server.run

    try:
        address = f"[v2:127.0.0.1:{monitor_port}]"
        subprocess.run(
            [
                "monmaptool",
                "--create",
                "--clobber",
                "--fsid",
                str(fsid),
                "--addv",
                "a",
                address,
                str(folder / "monmap"),
            ],
            check=True,
            capture_output=True,
        )
        run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(folder / "monmap"))
        run("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        run("ceph", "--connect-timeout", "30", "osd", "new", osd)
        (folder / "osd").mkdir()
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        run("ceph-osd", "-i", "0")
        server = server.add_user("swath")
        zonegroup = json.loads(run("radosgw-admin", "zonegroup", "get"))
        (folder / "zonegroup.json").write_text(json.dumps(zonegroup | {"api_name": REGION}))
        run("radosgw-admin", "zonegroup", "set", "--infile", str(folder / "zonegroup.json"))
        server.start_gateway()
        yield server
    finally:
        for daemon in ("client.rgw", "osd.0", "mon.a"):
            end(folder / f"{daemon}.pid")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_up(url: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, and refuses the unsigned request
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{url} did not answer within {seconds:.0f} s")


def end(pid_file: Path, seconds: float = 20) -> None:
    """Ask the daemon that wrote `pid_file` to end, and make it after `seconds`."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a real S3 server (Ceph RADOS Gateway) on loopback until Ctrl-C.")
    parser.add_argument("folder", nargs="?", help="where its data lies (default: a new temporary folder)")
    parser.add_argument("--port", type=int, default=9102, help="port to listen on (default: %(default)s)")
    mine, command = sys.argv[1:], []
    if "--" in mine:
        mine, command = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    arguments = parser.parse_args(mine)
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="swath-s3-")).resolve()
    with s3_server(folder, arguments.port) as server, contextlib.suppress(KeyboardInterrupt):
        if command:
            sys.exit(subprocess.run(command, env=os.environ | server.environment(), check=False).returncode)
        for name, value in server.environment().items():
            print(f"export {name}={value}")
        print(f"# S3 at {server.endpoint_url}, data in {folder}; Ctrl-C ends it", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
