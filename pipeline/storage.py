"""Collections and outputs at any URL that fsspec knows: what is listed, read, and put whole.

Two rules hold for everything that is written: a reader never sees half an object, and an object that must be the
first of its name is put with a condition that the store itself checks.
"""

import base64
import contextlib
import errno
import hashlib
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from botocore.exceptions import BotoCoreError
from fsspec.implementations.local import LocalFileSystem

from pipeline.attempts import AT_THE_DOOR, ERRORS, agreed, error_code, patiently, reason
from pipeline.config import ConfigurationError, StorageSettings
from pipeline.filesystems import etag_of, is_plain, local_etag, open_filesystem, public_url, regular_file
from pipeline.reader import ObjectFile, Reader

SINGLE_PUT = 4 << 30  # bytes: below this an object is put in one request, which S3 makes atomic
PIECE, PIECES = 16 << 20, 4  # bytes of one request for a larger file, and how many there are at once

T = TypeVar("T")


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
            self.filesystem, root = open_filesystem(url, settings)
        except (ValueError, ImportError, TypeError, BotoCoreError) as error:
            raise ConfigurationError(f"{self.url}: cannot be opened: {reason(error)}") from None
        self.root = root.rstrip("/") or root[:1]
        self.settings = settings
        self.reader = Reader(settings)

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
            if not found and not self.patiently(lambda: self.filesystem.exists(self.root)):
                raise FileNotFoundError
        except (*ERRORS, ValueError) as error:
            raise ConfigurationError(f"{self.url}: cannot be listed: {reason(error)}") from None

    def walk_local(self) -> Iterator[tuple[str, Entry | None]]:
        """Folder after folder, also behind symbolic links, each once."""
        if os.path.isfile(self.root):
            yield self.local_entry(self.root)
        seen = set()
        for folder, folders, files in os.walk(self.root, onerror=refuse, followlinks=True):
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
        for page in self.pages(AT_THE_DOOR, Bucket=bucket, Prefix=below + beginning):
            for found in page.get("Contents", ()):
                path = f"{bucket}/{found['Key']}"
                is_folder = path.endswith("/")  # as consoles make them
                yield self.name(path), None if is_folder else self.entry(path, etag_of(found), found["Size"])
        if prefix and not beginning and self.patiently(lambda: self.filesystem.isfile(self.root)):
            found = self.patiently(lambda: self.filesystem.info(self.root))
            yield self.name(self.root), self.entry(self.root, etag_of(found), found["size"])

    def pages(self, seconds: float = math.inf, **options: str) -> Iterator[dict[str, Any]]:
        """S3's answers to a question for a list, one after the other; the first is tried for `seconds` at most.

        A name that comes damaged would be an image that is not there; so over plain HTTP each is asked for twice.
        """

        def ask() -> dict[str, Any]:
            page = self.filesystem.call_s3("list_objects_v2", **options)
            return {key: value for key, value in page.items() if key != "ResponseMetadata"}

        while True:
            asking = partial(agreed, ask) if is_plain(self.filesystem) else ask
            page = patiently(asking, min(seconds, self.settings.retry_seconds))
            seconds = math.inf
            yield page
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def walk_other(self) -> Iterator[tuple[str, Entry | None]]:
        """All at once, as fsspec has no other way for every kind of store."""
        for path, found in self.patiently(lambda: self.filesystem.find(self.root, detail=True)).items():
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
        """All bytes of the object `name`, checked where its etag is their MD5. Raises FileNotFoundError."""
        return self.reader.fetch(self.uri(name))

    def open(self, name: str) -> ObjectFile:
        """The object `name` as a file of which only what is read is fetched. Raises FileNotFoundError."""
        return ObjectFile(self.reader, self.uri(name))

    def changed(self, name: str) -> float:
        """When the object `name` was put, in seconds since 1970; 0 where it is not there or the store does not say."""
        try:
            return self.patiently(lambda: self.filesystem.modified(self.path(name))).timestamp()
        except (FileNotFoundError, NotADirectoryError, NotImplementedError):
            return 0.0

    def names(self, folder: str) -> list[str]:
        """The names directly in `folder`, sorted, without it; none when there is no such folder."""
        try:
            return sorted(filter(None, self.names_on_s3(folder) if self.is_s3 else self.names_elsewhere(folder)))
        except FileNotFoundError:
            return []

    def names_on_s3(self, folder: str) -> Iterator[str]:
        bucket, _, key = self.path(folder).partition("/")
        prefix = f"{key}/" if key else ""
        for page in self.pages(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            for found in (*page.get("Contents", ()), *page.get("CommonPrefixes", ())):
                yield (found.get("Key") or found["Prefix"])[len(prefix) :].rstrip("/")

    def names_elsewhere(self, folder: str) -> Iterator[str]:
        for path in self.patiently(lambda: self.filesystem.ls(self.path(folder), detail=False, refresh=True)):
            yield path.rstrip("/").rpartition("/")[2]

    def times(self, folder: str) -> dict[str, float]:
        """When each object directly in `folder` was put, in seconds since 1970; none where the store does not say."""
        if self.is_local:
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path(folder)) as found:
                return {entry.name: entry.stat().st_mtime for entry in found}
        if not self.is_s3:
            return {}
        bucket, _, key = self.path(f"{folder}/").partition("/")
        pages = self.pages(Bucket=bucket, Prefix=key, Delimiter="/")
        listed = (found for page in pages for found in page.get("Contents", ()))
        return {found["Key"].removeprefix(key): found["LastModified"].timestamp() for found in listed}

    def put(self, name: str, data: bytes, only_new: bool = False) -> None:
        """Put an object whole: a reader sees all of it or none. With `only_new`, FileExistsError if it is there.

        Where the same is there already it may be our own, put by a request whose reply was lost, and is no error.
        """
        try:
            self.patiently(lambda: self.put_once(name, data, only_new))
        except FileExistsError:
            if self.read(name) != data:
                raise

    def put_once(self, name: str, data: bytes, only_new: bool) -> None:
        path = self.path(name)
        if self.is_local:
            put_local(path, lambda file: file.write(data), only_new)
            return
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        checked = {"chunksize": SINGLE_PUT, "ContentMD5": digest} if self.is_s3 else {}
        try:
            self.filesystem.pipe_file(path, data, mode="create" if only_new else "overwrite", **checked)
        except OSError as error:
            if error_code(error) in ("PreconditionFailed", "412"):  # not every server names the failed condition
                raise FileExistsError(self.uri(name)) from None
            raise

    def put_file(self, name: str, source: Path) -> None:
        """Put a local file of any size, as whole as `put` does; of it no more is in memory than a few pieces."""
        path = self.path(name)
        if self.is_local:
            with source.open("rb") as file:
                put_local(path, partial(shutil.copyfileobj, file), only_new=False)
            return
        pieces = {"chunksize": PIECE, "max_concurrency": PIECES} if self.is_s3 else {}
        self.patiently(lambda: self.filesystem.put_file(str(source), path, **pieces))

    def delete(self, name: str) -> None:
        """Remove the object `name`, if it is there and may be removed."""
        with contextlib.suppress(OSError):
            self.patiently(lambda: self.filesystem.rm_file(self.path(name)))

    def check_writable(self) -> None:
        """Raise `ConfigurationError` unless an object can be put below the root."""
        name = ".swath-is-writable"
        try:
            patiently(partial(self.put_once, name, b"", False), min(AT_THE_DOOR, self.settings.retry_seconds))
            self.delete(name)  # if that may be: to put is all that a run needs
        except (*ERRORS, ValueError, NotImplementedError) as error:
            raise ConfigurationError(f"{self.url}: cannot be written: {reason(error)}") from None

    def patiently(self, work: Callable[[], T]) -> T:
        return patiently(work, self.settings.retry_seconds)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def is_s3(self) -> bool:
        return "s3" in self.filesystem.protocol


def refuse(error: OSError) -> None:
    """Raise what came of listing a local folder: images that are not seen would be taken for images that have gone."""
    is_file_systems_own = os.path.basename(error.filename or "") == "lost+found" and isinstance(error, PermissionError)
    if not is_file_systems_own and not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise ConfigurationError(f"{error.filename}: cannot be listed: {error.strerror}") from None


def put_local(path: str, write: Callable[[BinaryIO], object], only_new: bool) -> None:
    """Write beside `path`, sync, then give it its name in one step that the file system makes atomic."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:  # which is to mean that `path` exists, not that a folder's name is a file's
        raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder should be", folder) from None
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if only_new:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
