"""The proxy does what it says, no more and no less."""

import hashlib
import http.client
import http.server
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import fsspec
import pytest

from tests.chaos.fault_proxy import Fault, FaultProxy

BODY = bytes(range(256)) * 40


class Echo(http.server.BaseHTTPRequestHandler):
    """Keeps what is put, gives it back, and says which Host it was asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.server.kept.get(self.path, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Host", self.headers["Host"])
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.server.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.kept = {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def proxy_of(server: http.server.ThreadingHTTPServer, *faults: Fault, seed: int = 0) -> FaultProxy:
    return FaultProxy("http://{}:{}".format(*server.server_address), faults, seed)


def ask(proxy: FaultProxy, method: str = "GET", path: str = "/b/k", body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=2)
    try:
        connection.request(method, path, body)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_without_faults_all_passes_on_one_connection_and_host_stays(upstream):
    with proxy_of(upstream) as proxy:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=2)
        for path in ("/one", "/two?x=y"):
            connection.request("PUT", path, path.encode())
            assert connection.getresponse().read() == b""
            connection.request("GET", path)
            reply = connection.getresponse()
            assert reply.read() == path.encode()
            assert reply.headers["X-Host"] == urlsplit(proxy.url).netloc
        connection.close()
        assert proxy.requests == 4
        assert not proxy.injected


def test_a_throttled_request_is_answered_and_not_carried_out(upstream):
    with proxy_of(upstream, Fault("throttle", match="^PUT ", times=1)) as proxy:
        status, body = ask(proxy, "PUT", body=b"x")
        assert status == 503
        assert b"<Code>SlowDown</Code>" in body
        assert not upstream.kept
        assert ask(proxy, "PUT", body=b"x")[0] == 200
        assert proxy.injected == {"throttle": 1}


def test_a_reset_request_is_not_carried_out_and_a_lost_reply_is(upstream):
    for kind, kept in (("reset", {}), ("lose", {"/b/k": b"x"})):
        with proxy_of(upstream, Fault(kind)) as proxy:
            with pytest.raises(ConnectionResetError):
                ask(proxy, "PUT", body=b"x")
            assert upstream.kept == kept
            assert proxy.injected == {kind: 1}


def test_a_truncated_reply_ends_before_its_length_says(upstream):
    with proxy_of(upstream, Fault("truncate")) as proxy:
        with pytest.raises((http.client.IncompleteRead, http.client.RemoteDisconnected, http.client.BadStatusLine)):
            ask(proxy)
        assert proxy.injected == {"truncate": 1}


def test_a_flipped_reply_differs_in_one_bit_and_an_empty_one_is_left_alone(upstream):
    with proxy_of(upstream, Fault("flip")) as proxy:
        status, body = ask(proxy)
        assert status == 200
        assert len(body) == len(BODY)
        assert sum((a ^ b).bit_count() for a, b in zip(body, BODY, strict=True)) == 1
        assert ask(proxy, "PUT", body=b"x") == (200, b"")
        assert proxy.injected == {"flip": 1}


def test_a_hanging_request_gets_no_answer(upstream):
    with proxy_of(upstream, Fault("hang")) as proxy:
        with pytest.raises(TimeoutError):
            ask(proxy)
        assert proxy.injected == {"hang": 1}


def test_rates_hold_and_the_seed_decides(upstream):
    def outcomes(seed: int) -> list[int]:
        with proxy_of(upstream, Fault("throttle", 0.3, "^GET "), seed=seed) as proxy:
            return [ask(proxy, path=f"/{number}")[0] for number in range(200)]

    first = outcomes(1)
    assert 30 <= first.count(503) <= 90
    assert outcomes(1) == first
    assert outcomes(2) != first


def test_signatures_stay_valid_through_it(s3, bucket):
    with FaultProxy(s3.endpoint_url) as proxy:
        options = {"key": s3.access_key, "secret": s3.secret_key, "skip_instance_cache": True}
        filesystem = fsspec.filesystem("s3", endpoint_url=proxy.url, **options)
        data = BODY * 100
        filesystem.pipe_file(f"{bucket}/some object", data)
        assert filesystem.cat_file(f"{bucket}/some object") == data
        assert filesystem.ls(bucket) == [f"{bucket.removeprefix('s3://')}/some object"]
        assert filesystem.info(f"{bucket}/some object")["ETag"].strip('"') == hashlib.md5(data).hexdigest()
        assert proxy.requests >= 4
