"""Collections and outputs at any URL that fsspec knows: what is listed, read, and put whole.

Two rules hold for everything that is written: a reader never sees half an object, and an object that must be the
first of its name is put with a condition that the store itself checks.
"""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import fsspec
import pyarrow.fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.config import ConfigurationError, StorageSettings

S3_OPTIONS: dict[str, Any] = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 60,
    "retries": {"max_attempts": 3, "mode": "standard"},
    "max_pool_connections": 128,
    "request_checksum_calculation": "when_required",  # servers other than AWS refuse botocore's newer default
    "response_checksum_validation": "when_required",
}
ERRORS = (OSError, BotoCoreError, ClientError, aiohttp.ClientError, TimeoutError)  # what a store that fails raises
CREDENTIALS = ("ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch")
REQUESTS = 32  # in flight, where nothing else is said
SINGLE_PUT = 4 << 30  # bytes: below this an object is put in one request, which S3 makes atomic


@dataclass(frozen=True)
class Entry:
    """One listed object: `uri` as rows name it, `etag` that changes with its content, its size in bytes."""

    uri: str
    etag: str
    bytes: int


class Store:
    """A folder, bucket or prefix, and the objects below it. Names are relative to it, with `/` between folders."""

    def __init__(self, url: str, settings: StorageSettings):
        """Raises `ConfigurationError` where the URL's protocol or the options are unknown."""
        self.url = public_url(url)
        try:
            self.filesystem, root = url_to_fs(url, **storage_options(url, settings))
        except (ValueError, ImportError, TypeError, BotoCoreError) as error:
            raise ConfigurationError(f"{self.url}: cannot be opened: {reason(error)}") from None
        self.root = root.rstrip("/") or root[:1]
        self.settings = settings

    def path(self, name: str) -> str:
        """The file system's own path of `name`."""
        return f"{self.root}/{name}" if name else self.root

    def uri(self, name: str) -> str:
        """`name` as a URL."""
        return self.filesystem.unstrip_protocol(self.path(name))

    def listing(self, beginning: str = "") -> Iterator[tuple[str, Entry | None]]:
        """Every object below the root as (name, entry), as it is found; what is no file has no entry.

        A store that can be asked for them gives only names with that `beginning`.

        Raises `ConfigurationError` when the root does not exist or may not be listed.
        """
        walk = self.walk_local if self.is_local else partial(self.walk_s3, beginning) if self.is_s3 else self.walk_other
        found = False
        try:
            for listed in walk():
                found = True
                yield listed
            if not found and not self.filesystem.exists(self.root):
                raise FileNotFoundError
        except (*ERRORS, ValueError) as error:
            raise ConfigurationError(f"{self.url}: cannot be listed: {reason(error)}") from None

    def walk_local(self) -> Iterator[tuple[str, Entry | None]]:
        """Folder after folder, also behind symbolic links, each once."""
        if os.path.isfile(self.root):
            yield self.local_entry(self.root)
        seen = set()
        for folder, folders, files in os.walk(self.root, followlinks=True):
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in seen:
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            for name in folders:
                yield self.name(os.path.join(folder, name)), None
            for name in files:
                yield self.local_entry(os.path.join(folder, name))

    def local_entry(self, path: str) -> tuple[str, Entry | None]:
        file = regular_file(path)
        uri = self.filesystem.unstrip_protocol(path)
        return self.name(path), Entry(uri, local_etag(file), file.st_size) if file else None

    def walk_s3(self, beginning: str) -> Iterator[tuple[str, Entry | None]]:
        """Page after page, so that a bucket of any size is listed in a bounded memory."""
        bucket, _, prefix = self.root.partition("/")
        if not bucket:
            raise ValueError("Cannot traverse all of S3; name a bucket")
        below = f"{prefix}/" if prefix else ""
        options = {"Bucket": bucket, "Prefix": below + beginning}
        while True:
            page = self.filesystem.call_s3("list_objects_v2", **options)
            for found in page.get("Contents", ()):
                path = f"{bucket}/{found['Key']}"
                is_folder = path.endswith("/")  # as consoles make them
                yield self.name(path), None if is_folder else self.entry(path, etag_of(found), found["Size"])
            if not page.get("IsTruncated"):
                break
            options["ContinuationToken"] = page["NextContinuationToken"]
        if prefix and not beginning and self.filesystem.isfile(self.root):
            found = self.filesystem.info(self.root)
            yield self.name(self.root), self.entry(self.root, etag_of(found), found["size"])

    def walk_other(self) -> Iterator[tuple[str, Entry | None]]:
        """All at once, as fsspec has no other way for every kind of store."""
        for path, found in self.filesystem.find(self.root, detail=True).items():
            if found["type"] != "file":
                yield self.name(path), None
            elif found.get("size") is None:
                raise ValueError("this kind of store does not tell the size of its files; copy them")
            else:
                yield self.name(path), self.entry(path, etag_of(found), int(found["size"]))

    def entry(self, path: str, etag: str, size: int) -> Entry:
        return Entry(self.filesystem.unstrip_protocol(path), etag, size)

    def name(self, path: str) -> str:
        """A file system's path as a name below the root; of the root itself the last part."""
        return path[len(self.root) :].lstrip("/") or path.rpartition("/")[2]

    def read(self, name: str) -> bytes:
        """All bytes of the object `name`. Raises FileNotFoundError."""
        return self.filesystem.cat_file(self.path(name))

    def changed(self, name: str) -> float:
        """When the object `name` was put, in seconds since 1970; 0 where it is not there or the store does not say."""
        try:
            return self.filesystem.modified(self.path(name)).timestamp()
        except (FileNotFoundError, NotImplementedError):
            return 0.0

    def names(self, folder: str) -> list[str]:
        """The names directly in `folder`, sorted, without it; none when there is no such folder."""
        try:
            entries = self.filesystem.ls(self.path(folder), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        except ERRORS as error:
            raise ConfigurationError(f"{self.url}: cannot be listed: {reason(error)}") from None
        return sorted(filter(None, (entry.rstrip("/").rpartition("/")[2] for entry in entries)))

    def put(self, name: str, data: bytes, only_new: bool = False) -> None:
        """Put an object whole: a reader sees all of it or none. With `only_new`, FileExistsError if it is there."""
        path = self.path(name)
        if self.is_local:
            put_local(path, data, only_new)
            return
        whole = {"chunksize": SINGLE_PUT} if self.is_s3 else {}
        try:
            self.filesystem.pipe_file(path, data, mode="create" if only_new else "overwrite", **whole)
        except OSError as error:
            if error_code(error) in ("PreconditionFailed", "412"):  # not every server names the failed condition
                raise FileExistsError(self.uri(name)) from None
            raise

    def check_writable(self) -> None:
        """Raise `ConfigurationError` unless an object can be put below the root."""
        name = ".swath-is-writable"
        try:
            self.put(name, b"")
            with contextlib.suppress(OSError):  # to put is all that a run needs
                self.filesystem.rm_file(self.path(name))
        except (*ERRORS, ValueError, NotImplementedError) as error:
            raise ConfigurationError(f"{self.url}: cannot be written: {reason(error)}") from None

    def arrow(self) -> pyarrow.fs.FileSystem:
        """The same store for PyArrow's readers."""
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.filesystem))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def is_s3(self) -> bool:
        return "s3" in self.filesystem.protocol


def put_local(path: str, data: bytes, only_new: bool) -> None:
    """Write beside `path`, sync, then give it its name in one step that the file system makes atomic."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:  # which is to mean that `path` exists, not that a folder's name is a file's
        raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder should be", folder) from None
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if only_new:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def storage_options(url: str, settings: StorageSettings) -> dict[str, Any]:
    """What fsspec is told about the store behind `url`."""
    protocol = fsspec.utils.get_protocol(url)
    protocol = "s3" if protocol == "s3a" else protocol
    given = {key.partition(".")[2]: value for key, value in settings.storage_option.items() if is_for(key, protocol)}
    if protocol != "s3":
        return given
    region = settings.region or os.environ.get("AWS_REGION")  # which botocore itself does not read
    client = {"region_name": region} if region else {}
    return {
        "anon": settings.anonymous,
        "endpoint_url": settings.endpoint_url,
        "client_kwargs": client,
        "config_kwargs": S3_OPTIONS,
        "use_listings_cache": False,
    } | given


def is_for(key: str, protocol: str) -> bool:
    return key.partition(".")[0] == protocol


def regular_file(path: str) -> os.stat_result | None:
    """The file at `path` or behind its symbolic links; None for a folder, for what is gone, and for a pipe or socket,
    whose reading would never end."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def local_etag(file: os.stat_result) -> str:
    """What a local file has in place of an etag: its size and its time of change."""
    return f"{file.st_size}-{file.st_mtime_ns}"


def etag_of(info: Mapping[str, Any]) -> str:
    """The store's own version of an object, or, where it has none, its size and the time of its change."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "version"):
        if info.get(key):
            return str(info[key]).strip('"')
    changed = info.get("last_modified") or info.get("updated") or info.get("LastModified") or ""
    return f"{info.get('size', 0)}-{changed}"


def public_url(url: str) -> str:
    """`url` without what may be secret: a password, the query of a web address."""
    protocol, _, rest = url.rpartition("://")
    if not protocol:
        return url
    host, slash, path = rest.partition("/")
    if protocol in ("http", "https"):
        path = path.partition("?")[0]
    return f"{protocol}://{host.rpartition('@')[2] if ':' in host.partition('@')[0] else host}{slash}{path}"


def reason(error: BaseException) -> str:
    """What went wrong with a store, in one line that says what to do where that is known."""
    match error:
        case NoCredentialsError():
            return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use --anonymous"
        case FileNotFoundError():
            return "no such file, folder or bucket"
        case PermissionError():
            return "access denied; check the credentials and what they allow"
    text = " ".join(str(error).split()) or type(error).__name__
    code = error_code(error)
    return f"{code}: {text}"[:300] if code and code not in text else text[:300]


def error_code(error: BaseException) -> str:
    """S3's own code of an error ("SlowDown"), or nothing."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    return str(cause.response.get("Error", {}).get("Code", "")) if isinstance(cause, ClientError) else ""
