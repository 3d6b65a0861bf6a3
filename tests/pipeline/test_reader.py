"""Objects are read as they are, whichever client gets them, and only in the version that was asked for."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import pytest

from pipeline.attempts import ERRORS
from pipeline.config import StorageSettings
from pipeline.reader import ChangedError, ObjectFile, Reader
from pipeline.s3 import FAILURES
from pipeline.storage import Store

SETTINGS = StorageSettings()


@pytest.fixture(params=["local", "s3", "s3fs"])
def place(request, tmp_path) -> tuple[Store, Reader]:
    """A store and a reader; with s3fs alone where obstore is of no use."""
    url = str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")
    options = {"s3.max_concurrency": 4} if request.param == "s3fs" else {}
    settings = StorageSettings(storage_option=options)
    return Store(url, settings), Reader(settings)


def put(store: Store, name: str, data: bytes) -> tuple[str, str, int]:
    """What a listing says of an object that was put."""
    store.put(name, data)
    (entry,) = [entry for found, entry in store.listing() if found == name]
    return entry.uri, entry.etag, entry.bytes


def test_an_object_is_read_whole_or_in_part(place):
    store, reader = place
    uri, etag, size = put(store, "x.bin", bytes(range(256)) * 300)
    assert reader.fetch(uri, etag, size) == bytes(range(256)) * 300
    assert reader.fetch_part(uri, etag, 255, 3) == b"\xff\0\1"
    assert reader.fetch(uri, "", 0) == bytes(range(256)) * 300  # of which nothing is known
    assert reader.fetch(*put(store, "empty", b"")) == b""
    with pytest.raises(FileNotFoundError):
        reader.fetch(store.uri("gone"), etag, size)


def test_an_object_that_changed_is_not_mixed_up(place):
    store, reader = place
    uri, etag, size = put(store, "x.bin", b"before")
    store.put("x.bin", b"longer than before")
    with pytest.raises(ChangedError):
        reader.fetch(uri, etag, size)
    if store.is_local:
        os.utime(store.path("x.bin"), (1, 1))
    if not store.settings.storage_option:  # s3fs alone does not say of which version its bytes are
        with pytest.raises(ChangedError):
            reader.fetch_part(uri, etag, 0, size)
        with pytest.raises(ChangedError):
            ObjectFile(reader, uri, etag)


def test_a_file_fetches_what_is_read_and_a_block_ahead(place, monkeypatch):
    store, reader = place
    data = os.urandom(300_000)
    uri, _, _ = put(store, "x.bin", data)
    spans = []
    get = Reader.get
    monkeypatch.setattr(Reader, "get", lambda self, *span: spans.append(span[1:3]) or get(self, *span))
    file = ObjectFile(reader, uri, head=1000, ahead=10_000)
    assert file.read(1000) == data[:1000]
    assert spans == [(0, 1000)]
    assert file.read(500) == data[1000:1500]
    file.seek(-500, os.SEEK_END)
    assert file.read(10_000) == data[-500:]
    file.seek(10)
    assert file.read(4) == data[10:14]
    file.seek(200_000)
    assert file.read(50_000) == data[200_000:250_000]
    assert spans == [(0, 1000), (1000, 11_000), (299_500, 300_000), (200_000, 250_000)]
    file.seek(0)
    assert file.read() == data


def test_odd_keys_are_read_by_whichever_client_takes_them(bucket):
    store, reader = Store(bucket, SETTINGS), Reader(SETTINGS)
    for key in ('it\'s "odd"\n雪.jpg', "a%20b//c.jpg", "../up.jpg", "x" * 900):
        store.put(key, key.encode())
        assert reader.fetch(store.uri(key), "", 0) == key.encode()
    _, fetcher = reader.store(bucket)
    assert fetcher.failures == 0


def test_a_client_that_never_gets_an_object_is_not_asked_any_more(bucket):
    store, reader = Store(bucket, SETTINGS), Reader(SETTINGS)
    uri, etag, size = put(store, "a.jpg", b"a")
    _, fetcher = reader.store(bucket)
    fetcher.options["endpoint"] = "http://127.0.0.1:9"  # where nobody listens
    for _ in range(FAILURES + 1):
        assert reader.fetch(uri, etag, size) == b"a"
    assert fetcher.failures == FAILURES


def test_options_that_only_s3fs_knows_leave_all_to_it(bucket):
    assert Reader(StorageSettings(storage_option={"s3.requester_pays": True})).store(bucket)[1] is None
    assert Reader(SETTINGS).store("/tmp")[1] is None


def test_a_kind_of_store_that_nobody_knows_is_an_error_of_the_store():
    with pytest.raises(ERRORS, match="nix"):
        Reader(SETTINGS).fetch("nix://x/y.jpg", "", 0)


def test_a_web_server_that_fails_is_not_one_that_has_nothing():
    asked: list[int] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(code := int(self.path.strip("/")))
            self.send_response(code)
            self.end_headers()

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place, hasty = f"http://127.0.0.1:{server.server_port}", Reader(StorageSettings(retry_seconds=2))
        for code, raised in ((404, FileNotFoundError), (403, aiohttp.ClientError), (503, aiohttp.ClientError)):
            with pytest.raises(raised):
                hasty.fetch(f"{place}/{code}", "", 0)
        server.shutdown()
    assert asked.count(503) > 2 > asked.count(403) / 2, "only what may pass is tried again"
    with pytest.raises(aiohttp.ClientError):
        hasty.fetch(f"{place}/503", "", 0)


def test_no_file_has_a_name_with_a_nul():
    with pytest.raises(FileNotFoundError):
        Reader(SETTINGS).fetch("file:///tmp/a\0.png", "", 0)
