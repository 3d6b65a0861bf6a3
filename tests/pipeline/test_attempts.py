"""What a store fails to do is tried again, for as long as was said; what it gives is right."""

import time
from itertools import pairwise

import aiohttp
import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from botocore.utils import parse_timestamp

from infra.local.s3_server import free_port
from pipeline import attempts
from pipeline.attempts import agreed, cause, patiently
from pipeline.config import StorageSettings
from pipeline.reader import Reader
from pipeline.storage import Store
from tests.chaos.fault_proxy import Fault, FaultProxy

CAUSES = {"throttle": "throttled", "reset": "connection", "truncate": "connection", "flip": "checksum"}
DATA = bytes(range(256)) * 400


def answer(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answer("SlowDown", 503), "throttled"),
        (answer("TooManyRequests", 429), "throttled"),
        (answer("InternalError", 500), "server"),
        (answer("NotImplemented", 501), None),
        (answer("RequestTimeout", 400), "timeout"),
        (answer("BadDigest", 400), "checksum"),
        (answer("AccessDenied", 403), None),
        (answer("NoSuchBucket", 404), None),
        (answer("PreconditionFailed", 412), None),
        (ReadTimeoutError(endpoint_url="x"), "timeout"),
        (EndpointConnectionError(endpoint_url="x"), "connection"),
        (NoCredentialsError(), None),
        (aiohttp.ClientPayloadError(), "connection"),
        (ConnectionResetError(), "connection"),
        (TimeoutError(), "timeout"),
        (FileNotFoundError(), None),
        (PermissionError(), None),
        (OSError(28, "No space left on device"), None),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(error, expected):
    assert cause(error) == expected


def test_trying_again_ends_when_the_time_is_over_and_each_time_is_counted():
    def work() -> None:
        calls.append(time.monotonic())
        raise ConnectionResetError

    calls: list[float] = []
    attempts.take_retries()
    with pytest.raises(ConnectionResetError):
        patiently(work, 2)
    assert calls[-1] - calls[0] < 2
    assert attempts.take_retries() == {"connection": len(calls) - 1}
    assert attempts.take_retries() == {}
    pauses = [later - sooner for sooner, later in pairwise(calls)]
    assert len(set(pauses)) > 1


def test_what_two_readings_say_is_believed():
    readings = iter(["a", "b", "b", "c"])
    assert agreed(lambda: next(readings)) == "b"


@pytest.fixture
def faulty(bucket, s3, monkeypatch):
    """A function that puts faults in front of the store, and a Store and a Reader behind them."""
    with FaultProxy(s3.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        settings = StorageSettings(endpoint_url=proxy.url, retry_seconds=60)

        def arrange(*faults: Fault) -> tuple[Store, Reader]:
            proxy.faults = list(faults)
            attempts.take_retries()
            return Store(f"{bucket}/out", settings), Reader(settings)

        arrange.proxy = proxy
        yield arrange


@pytest.mark.parametrize("kind", ["throttle", "reset", "truncate", "flip"])
def test_a_bad_answer_is_asked_for_again(faulty, bucket, kind):
    store, reader = faulty()
    store.put("a", DATA)
    store, reader = faulty(Fault(kind, times=2, match="^GET"))
    assert store.read("a") == DATA
    assert faulty.proxy.injected[kind] == 2
    assert attempts.take_retries().get(CAUSES[kind], 0) >= 1  # a client sends anew what a stale connection refused
    store, reader = faulty(Fault(kind, times=3, match="^GET"))
    assert list(store.listing()) == list(store.listing())
    assert store.names("") == ["a"]
    (entry,) = [entry for _, entry in store.listing()]
    assert reader.fetch(entry.uri, entry.etag, entry.bytes) == DATA
    assert sum(faulty.proxy.injected.values()) == 5


@pytest.mark.parametrize("only_new", [False, True])
@pytest.mark.parametrize("kind", ["throttle", "reset", "lose"])
def test_a_put_that_fails_or_is_not_heard_of_is_done_once(faulty, kind, only_new):
    store, _ = faulty(Fault(kind, times=2, match="^PUT"))
    store.put("a", DATA, only_new=only_new)
    assert faulty.proxy.injected[kind] == 2
    assert store.read("a") == DATA
    with pytest.raises(FileExistsError):
        store.put("a", b"another", only_new=True)
    assert store.read("a") == DATA


def test_another_writers_object_is_not_taken_for_our_own_after_a_lost_reply(faulty):
    store, _ = faulty()
    store.put("a", b"theirs")
    store, _ = faulty(Fault("reset", times=1, match="^PUT"))
    with pytest.raises(FileExistsError):
        store.put("a", b"ours", only_new=True)


def test_a_store_whose_etags_are_no_md5_is_read_all_the_same(bucket, monkeypatch):
    """As with encryption by a key of the customer's; here the etag is made out to be another."""
    store = Store(bucket, StorageSettings())
    store.put("a", DATA)
    reader, pieces = Reader(StorageSettings()), []
    piece = reader.piece

    def encrypted(*arguments: object) -> object:
        found = piece(*arguments)
        pieces.append(found)
        return type(found)(found.data, "0" * 32, found.bytes)

    monkeypatch.setattr(reader, "piece", encrypted)
    assert reader.fetch(f"{bucket}/a") == DATA
    assert len(pieces) == 3
    assert reader.fetch(f"{bucket}/a") == DATA
    assert len(pieces) == 4  # it is known now


def test_what_no_attempt_would_mend_fails_at_once(faulty, bucket):
    store, _ = faulty()
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    wrong = StorageSettings(endpoint_url=faulty.proxy.url, storage_option={"s3.key": "testkey", "s3.secret": "wrong"})
    with pytest.raises(PermissionError):
        Reader(wrong).fetch(f"{bucket}/a")
    assert time.monotonic() - began < 5
    assert attempts.take_retries() == {}


def test_nobody_there_is_given_up_after_the_time_that_was_said():
    settings = StorageSettings(endpoint_url=f"http://127.0.0.1:{free_port()}", retry_seconds=1.5)
    began = time.monotonic()
    with pytest.raises(attempts.ERRORS):
        Reader(settings).fetch("s3://bucket/a")
    assert time.monotonic() - began < 10
    assert fsspec


def test_a_list_whose_dates_came_damaged_is_asked_for_again():
    with pytest.raises(ValueError, match="timestamp") as caught:
        parse_timestamp("2026-11-24T1x:00:00Z")
    assert cause(caught.value) == "checksum"
    assert cause(ValueError("Invalid endpoint: nowhere")) is None
