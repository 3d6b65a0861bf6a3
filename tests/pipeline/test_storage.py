"""Objects are put whole and listed as they are, on a local disk and on a real S3 server."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.config import ConfigurationError, StorageSettings
from pipeline.filesystems import public_url
from pipeline.reader import ObjectFile, Reader
from pipeline.storage import Store

SETTINGS = StorageSettings()


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    url = request.getfixturevalue("bucket") + "/deep/er" if request.param == "s3" else str(tmp_path / "deep/er")
    return Store(url, SETTINGS)


def test_an_object_is_read_as_it_was_put(store):
    store.put("a/b.bin", b"one")
    store.put("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"
    assert store.names("a") == ["b.bin"]
    assert store.names("nowhere") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/c.bin")


def test_a_file_of_several_pieces_is_put_whole_and_replaces_what_was_there(store, tmp_path):
    data = os.urandom(40 << 20)
    (tmp_path / "large").write_bytes(data)
    store.put("a/large", b"small")
    store.put_file("a/large", tmp_path / "large")
    assert store.read("a/large") == data
    assert store.names("a") == ["large"]
    store.put_file("a/large", Path(__file__))
    assert store.read("a/large") == Path(__file__).read_bytes()


def test_a_store_says_when_objects_were_put(store):
    before = time.time()
    store.put("a/one", b"1")
    store.put("a/deeper/two", b"2")
    times = store.times("a")
    assert before - 2 <= times["one"] <= time.time() + 2  # S3 knows whole seconds
    assert set(times) <= {"one", "deeper"}
    assert store.times("nowhere") == {}


def test_only_one_of_many_writers_of_a_new_object_wins(store):
    won = []

    def write(number: int) -> None:
        try:
            store.put("lease", str(number).encode(), only_new=True)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("lease") == str(won[0]).encode()
    assert store.names("") == ["lease"]


@pytest.mark.parametrize(
    "name", ['it\'s "quoted".jpg', "new\nline.jpg", "star*[x]?.jpg", "ünïcode 雪.jpg", "a%20b#c.jpg"]
)
def test_odd_names_are_listed_and_read_as_they_are(store, name):
    store.put(name, b"data")
    ((found, entry),) = list(store.listing())
    assert found == name
    assert entry.bytes == 4
    assert Reader(SETTINGS).fetch(entry.uri, entry.etag, 4) == b"data"
    assert Reader(SETTINGS).fetch_part(entry.uri, entry.etag, 1, 2) == b"at"
    assert ObjectFile(Reader(SETTINGS), entry.uri).read() == b"data"


@pytest.mark.parametrize(("call", "place"), [("scandir", "b"), ("stat", "b/2.jpg")])
def test_a_local_folder_that_cannot_be_looked_into_is_an_error_and_not_empty(tmp_path, monkeypatch, call, place):
    store = Store(str(tmp_path), SETTINGS)
    for name in ("a/1.jpg", "b/2.jpg", "lost+found/3"):
        store.put(name, b"data")
    system_call, closed = getattr(os, call), {str(tmp_path / "lost+found")} if call == "scandir" else set()

    def refuses(path: str, **options: bool) -> object:
        if path in closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return system_call(path, **options)

    monkeypatch.setattr(os, call, refuses)
    assert {"a/1.jpg", "b/2.jpg"} < set(dict(store.listing())), "what is the file system's own stops nobody"
    closed.add(str(tmp_path / place))
    with pytest.raises(ConfigurationError, match=r"cannot be listed: (Permission|access) denied"):
        list(store.listing())


def test_an_etag_changes_with_the_object(store):
    store.put("x", b"one")
    ((_, before),) = store.listing()
    store.put("x", b"two")
    os.utime(store.path("x"), (1, 1)) if store.is_local else None
    ((_, after),) = store.listing()
    assert before.etag != after.etag


def test_a_local_object_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    store = Store(str(tmp_path), SETTINGS)
    store.put("x.parquet", b"one", only_new=True)
    with pytest.raises(FileExistsError):
        store.put("x.parquet", b"two", only_new=True)
    assert os.listdir(tmp_path) == ["x.parquet"]


def test_what_cannot_be_reached_is_one_line_with_the_reason(s3, monkeypatch, tmp_path):
    def complaint(work) -> str:
        with pytest.raises(ConfigurationError) as caught:
            work()
        assert "\n" not in str(caught.value)
        assert s3.secret_key not in str(caught.value)
        return str(caught.value)

    missing = Store("s3://no-such-bucket/x", SETTINGS)
    assert "no such" in complaint(lambda: list(missing.listing()))
    assert "cannot be written" in complaint(missing.check_writable)
    assert "no such" in complaint(lambda: list(Store(str(tmp_path / "none"), SETTINGS).listing()))
    assert "cannot be opened" in complaint(lambda: Store("nix://x", SETTINGS))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Store(str(tmp_path), SETTINGS).put("file/x", b"", only_new=True)
    assert "name a bucket" in complaint(lambda: list(Store("s3://", SETTINGS).listing()))
    assert "cannot be written" in complaint(Store(str(tmp_path / "file"), SETTINGS).check_writable)
    dead = Store("s3://b/x", StorageSettings(endpoint_url="http://127.0.0.1:1"))
    assert "127.0.0.1:1" in complaint(lambda: list(dead.listing()))
    anonymous = Store("s3://no-such-bucket/x", StorageSettings(anonymous=True))
    assert complaint(lambda: list(anonymous.listing()))


def test_wrong_credentials_are_access_denied(s3, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = Store(f"{bucket}/x", StorageSettings(storage_option={"s3.skip_instance_cache": True}))
    with pytest.raises(ConfigurationError, match="access denied"):
        store.check_writable()


def test_secrets_in_a_url_are_not_repeated():
    assert public_url("https://me:secret@host/x?sig=secret") == "https://host/x"
    assert public_url("https://secret@host/x#1") == "https://host/x#1"
    assert public_url("https://host?sig=secret/x") == "https://host"
    assert public_url("HTTPS://host/x?sig=secret&next=https://other/y") == "HTTPS://host/x"
    assert public_url("simplecache::https://me:secret@host/x?sig=secret") == "simplecache::https://host/x"
    assert public_url("ftp://me:secret@host/x") == "ftp://host/x"
    assert public_url("abfs://container@account/x") == "abfs://container@account/x"
    assert public_url("s3://bucket/a@b") == "s3://bucket/a@b"
    assert public_url("/local/path?x") == "/local/path?x"
