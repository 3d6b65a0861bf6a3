"""S3 objects, in whole or in part, together with the version that the bytes are of.

obstore fetches them at a fraction of what s3fs spends on a request, which is more CPU time than decoding the image
takes: in Rust and without the interpreter's lock. It is asked for nothing else, and nothing depends on it: where it
does not get an object, s3fs is asked, which knows every kind of server, key and error; and where it never gets one, it
is not asked any more.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import botocore.session
import obstore
from fsspec.asyn import sync
from obstore.exceptions import BaseError, GenericError
from obstore.store import S3Store
from s3fs import S3FileSystem

from pipeline.attempts import PassingError, cause_of_reply

FAILURES = 20  # one after the other, and this is no client for this server
CREDENTIALS_FOR = timedelta(minutes=5)  # then botocore is asked again, which renews those that end
LONGEST = 600.0  # seconds that an object may take, however it trickles
TIMEOUTS = {"connect_timeout": "5s", "timeout": "60s"}
THREADS: set[int] = set()  # processes in which obstore has some, of those that this one was forked from, and this one
STATUS = re.compile(r"\bstatus(?: code:)? (\d{3})\b")  # in obstore's words


@dataclass(frozen=True)
class Piece:
    """Some bytes of an object, and what the store says of all of it."""

    data: bytes
    etag: str
    bytes: int


class Fetcher:
    """Objects of the buckets that an s3fs file system reaches."""

    def __init__(self, filesystem: S3FileSystem):
        filesystem.connect()
        client = filesystem.s3.meta
        self.options: dict[str, Any] = {
            "region": client.region_name or "us-east-1",
            "endpoint": client.endpoint_url,
            "client_options": TIMEOUTS | {"allow_http": client.endpoint_url.startswith("http://")},
            "retry_config": {"max_retries": 0},
        }
        if filesystem.anon:
            self.options["skip_signature"] = True
        else:
            self.options["credential_provider"] = credential_provider()
        self.stores: dict[str, S3Store] = {}
        self.failures = 0

    def fetch(self, path: str, start: int, end: int | None) -> Piece | None:
        """Bytes `start` to `end`, or to the last, of the object at "bucket/key"; None where s3fs should be asked.

        Raises `PassingError` for what is to be tried again, by s3fs too.
        """
        bucket, _, key = path.partition("/")
        if self.failures >= FAILURES or key != key.strip("/"):  # it would strip them too, and get another object
            return None
        try:
            if bucket not in self.stores:
                self.stores[bucket] = S3Store(bucket, **self.options)
            found = obstore.get(self.stores[bucket], key, options={} if end is None else {"range": (start, end)})
            piece = Piece(bytes(found.bytes()), (found.meta["e_tag"] or "").strip('"'), found.meta["size"])
        except GenericError as error:  # of the connection or the server, or of what this client does not know
            self.failures += 1
            words = str(error).splitlines()[0]  # behind it are the client's settings
            raise PassingError(cause_of(words), f"{bucket}/{key}: {words}") from None
        except (BaseError, ValueError):  # missing, denied, or a key that it does not take
            pass
        else:
            self.failures = 0
            return piece
        return None


def get_object(filesystem: S3FileSystem, path: str, start: int, end: int | None) -> Piece:
    """The same as `Fetcher.fetch` by s3fs. Raises as it does; OSError with the code InvalidRange beyond the end."""
    bucket, key, version = filesystem.split_path(path)
    options = {"VersionId": version} if version else {}
    if start or end is not None:
        options["Range"] = f"bytes={start}-{'' if end is None else end - 1}"

    async def get() -> Piece:
        found = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **options)
        async with found["Body"] as body:
            data = await body.read()
        size = int(found["ContentRange"].rpartition("/")[2]) if "ContentRange" in found else found["ContentLength"]
        return Piece(data, found["ETag"].strip('"'), size)

    return sync(filesystem.loop, get, timeout=LONGEST)


def cause_of(words: str) -> str:
    """Which of `attempts.CAUSES` obstore's words mean."""
    if found := STATUS.search(words):
        return cause_of_reply("", int(found[1])) or "server"
    return "timeout" if "timed out" in words else "connection"


def fetcher(filesystem: Any, options: dict[str, Any]) -> Fetcher | None:
    """A fetcher for a file system, unless that is no S3, cannot be reached or has options that only s3fs knows, or this
    process was forked from one that has fetchers.
    """
    if not isinstance(filesystem, S3FileSystem) or options:
        return None
    THREADS.add(os.getpid())
    if len(THREADS) > 1:  # a fork takes no threads along, without which obstore would wait for ever
        return None
    with suppress(Exception):  # whatever it is, s3fs says it better
        return Fetcher(filesystem)
    return None


def credential_provider() -> Callable[[], dict[str, Any]]:
    """botocore's own credentials, in the form that obstore asks for."""
    found = botocore.session.get_session().get_credentials()

    def provide() -> dict[str, Any]:
        now = found.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_FOR,
        }

    provide()  # raises where there are none
    return provide
