"""`hf://` checkpoints, through the real client. The hub itself cannot be had here: a server speaks its protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from model.checkpoint import load_checkpoint

REPOSITORY, COMMIT = "someone/segformer-test", "0" * 40
LOAD = "import sys; from model.checkpoint import load_checkpoint; print(load_checkpoint(sys.argv[1]).digest)"


def hub_of(folder: Path) -> type[BaseHTTPRequestHandler]:
    """A handler that serves the files of `folder` as one model repository."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, data: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/{REPOSITORY}/resolve/"):
                file = folder / path.split("/", 5)[5]
                if file.is_file():
                    data = file.read_bytes()
                    span = self.headers.get("Range", "").removeprefix("bytes=").split("-")
                    part = data[int(span[0]) : int(span[1]) + 1] if len(span) == 2 else data
                    etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT}
                    return self.reply(part, 206 if len(span) == 2 else 200, **etag)
            elif path == f"/api/models/{REPOSITORY}" or path.startswith(f"/api/models/{REPOSITORY}/revision/"):
                return self.reply(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode())
            elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                return self.reply(json.dumps([describe(file) for file in folder.iterdir()]).encode())
            self.reply(b"{}", 404, X_Error_Code="RepoNotFound" if REPOSITORY not in path else "EntryNotFound")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.reply(json.dumps([describe(file) for file in folder.iterdir() if file.name in asked]).encode())

        def log_message(self, *_: object) -> None:
            pass

    def describe(file: Path) -> dict:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "1" * 40}

    return Hub


@pytest.fixture
def hub(checkpoint) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_of(Path(checkpoint)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load(url: str, hub: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", LOAD, url], check=False, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_checkpoint_on_the_hub_loads_by_its_name(hub, checkpoint):
    digest = load_checkpoint(checkpoint).digest
    for url in (f"hf://{REPOSITORY}", f"hf://{REPOSITORY}/model.safetensors"):
        done = load(url, hub)
        assert done.stdout.strip() == digest, done.stderr


def test_a_name_that_the_hub_does_not_know_is_one_readable_error(hub):
    done = load("hf://someone/else", hub)
    assert "CheckpointError: hf://someone/else: " in done.stderr.strip().splitlines()[-1]
