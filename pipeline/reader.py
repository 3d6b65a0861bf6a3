"""Objects at any URI, read: the first bytes, a range, or all of them, in the version that was asked for.

A collection may lie in many places (a manifest says where), so this knows no root: each URI leads to its own store.
Local files and S3 say with each read which version its bytes are; of other stores only the length is compared. What a
store fails to give is asked for again, and so is a whole object whose bytes are not those of its etag, where that is
their MD5: nothing else would notice a flipped bit on the way through plain HTTP, or in a proxy.
"""

import hashlib
import io
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from pipeline import attempts
from pipeline.attempts import ERRORS, error_code, patiently
from pipeline.config import StorageSettings
from pipeline.filesystems import etag_of, local_etag, open_filesystem, regular_file
from pipeline.s3 import Fetcher, Piece, fetcher, get_object

HEAD = 8 << 10  # bytes of the first read: enough for most images without an EXIF thumbnail or a colour profile
ONE_FOR_ALL = ("file", "s3", "s3a", "http", "https")  # protocols whose every host and bucket one client reaches
AHEAD = 256 << 10  # bytes of the next one, where that was not enough
MD5 = re.compile(r"[0-9a-f]{32}")  # an object put in one piece, unless the store has encrypted it with a key of its own
SURE = 3  # readings that agree with each other are right, and the etag is no MD5


class ChangedError(Exception):
    """The object is not the one of the etag and size that were asked for."""


class NoStoreError(OSError):
    """A URI of a kind that nothing here reads."""


class Reader:
    """Whatever a URI names. Many threads may use one."""

    def __init__(self, settings: StorageSettings):
        self.settings = settings
        self.stores: dict[str, tuple[AbstractFileSystem, Fetcher | None]] = {}
        self.has_md5: dict[str, bool] = {}  # by place, where it is known
        self.opening = threading.Lock()

    def fetch(self, uri: str, etag: str = "", size: int = 0) -> bytes:
        """All of an object. Raises `ChangedError` where its etag or size is another, unless `etag` is empty; and
        FileNotFoundError or another of `attempts.ERRORS`, when `retry_seconds` are over.
        """
        data = self.get(uri, 0, size + 1 if etag and size else None, etag).data
        if etag and len(data) != size:
            raise ChangedError(uri)
        return data

    def fetch_part(self, uri: str, etag: str, start: int, size: int) -> bytes:
        """`size` bytes of an object from `start` on. Raises as `fetch`."""
        data = self.get(uri, start, start + size, etag).data if size else b""
        if len(data) != size:
            raise ChangedError(uri)
        return data

    def get(self, uri: str, start: int, end: int | None, etag: str = "") -> Piece:
        """Bytes `start` to `end`, or fewer where the object ends before. Raises as `fetch`."""
        tries = count()

        def once() -> Piece:
            piece = self.piece(uri, start, end, etag, next(tries))
            is_whole = len(piece.data) == piece.bytes
            return self.checked(uri, piece, lambda: self.piece(uri, start, end, etag, 1)) if is_whole else piece

        return patiently(once, self.settings.retry_seconds)

    def piece(self, uri: str, start: int, end: int | None, etag: str, attempt: int) -> Piece:
        """The same, tried once; `attempt` counts from 0."""
        filesystem, sooner = self.store(uri)
        path = filesystem._strip_protocol(uri)
        if isinstance(filesystem, LocalFileSystem):
            piece = local_piece(path, start, end)
        elif "s3" in filesystem.protocol:
            found = sooner.fetch(path, start, end) if sooner and not attempt else None
            piece = found or s3_piece(filesystem, path, start, end)
        else:
            piece = other_piece(filesystem, path, start, end, etag)
        if etag and piece.etag != etag:
            raise ChangedError(uri)
        return piece

    def checked(self, uri: str, piece: Piece, again: Callable[[], Piece]) -> Piece:
        """A whole object whose bytes are those of its etag, or else the same in several readings."""
        place = "/".join(uri.split("/", 3)[:3])
        if not MD5.fullmatch(piece.etag) or not self.has_md5.get(place, True):
            return piece
        readings = Counter[str]()
        while (found := hashlib.md5(piece.data, usedforsecurity=False).hexdigest()) != piece.etag:
            readings[found] += 1
            if readings[found] == SURE:
                self.has_md5.setdefault(place, False)
                return piece
            piece = again()
        self.has_md5[place] = True
        for _ in range(readings.total()):
            attempts.count("checksum")
        return piece

    def store(self, uri: str) -> tuple[AbstractFileSystem, Fetcher | None]:
        """The file system of a URI, and what gets S3 objects sooner, where that can be."""
        protocol = get_protocol(uri)
        place = protocol if protocol in ONE_FOR_ALL else "/".join(uri.split("/", 3)[:3])
        with self.opening:
            if place not in self.stores:
                try:
                    filesystem, _ = open_filesystem(uri, self.settings)
                except (ValueError, ImportError, TypeError) as error:
                    raise NoStoreError(f"{protocol}://: {error}") from None
                self.stores[place] = filesystem, fetcher(filesystem, self.settings.storage_option)
            return self.stores[place]


def local_piece(path: str, start: int, end: int | None) -> Piece:
    if not regular_file(path):  # reading a pipe or a device might never end
        raise FileNotFoundError(path)
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        file.seek(start)
        return Piece(file.read(-1 if end is None else end - start), local_etag(found), found.st_size)


def s3_piece(filesystem: AbstractFileSystem, path: str, start: int, end: int | None) -> Piece:
    try:
        return get_object(filesystem, path, start, end)
    except OSError as error:
        if error_code(error) != "InvalidRange":
            raise
    found = filesystem.info(path)  # it ends before; S3 has no range of an empty object
    return Piece(b"", etag_of(found), int(found["size"]))


def other_piece(filesystem: AbstractFileSystem, path: str, start: int, end: int | None, etag: str) -> Piece:
    """By fsspec, which does not say of which version the bytes are; that is asked only where nothing is known."""
    if etag:
        return Piece(filesystem.cat_file(path, start=start or None, end=end), etag, -1)
    try:
        found = filesystem.info(path)
    except FileNotFoundError as error:  # which HTTP's file system says whatever the server has said
        said = error.__cause__
        if isinstance(said, ERRORS) and getattr(said, "status", None) not in (404, 410):
            raise said from None
        raise
    return Piece(filesystem.cat_file(path, start=start or None, end=end), etag_of(found), int(found.get("size") or 0))


class ObjectFile(io.RawIOBase):
    """An object as a seekable file that fetches what is read, a block ahead, and keeps its beginning and one block.

    Those who parse what they read take any error for a sign of damage: `failure` is the store's, if it had one.
    """

    def __init__(self, reader: Reader, uri: str, etag: str = "", head: int = HEAD, ahead: int = AHEAD):
        self.reader, self.uri, self.ahead = reader, uri, ahead
        first = reader.get(uri, 0, head)
        if etag and first.etag != etag:
            raise ChangedError(uri)
        self.etag, self.bytes = first.etag, first.bytes
        self.pieces = [(0, first.data), (0, b"")]
        self.position = 0
        self.failure: Exception | None = None

    def read(self, count: int = -1) -> bytes:
        found = self.read_at(self.position, count)
        self.position += len(found)
        return found

    def read_at(self, position: int, count: int | None = -1) -> bytes:
        """The `count` bytes from `position` on, or all, or fewer where the object ends before."""
        left = max(0, self.bytes - position)
        count = left if count is None or count < 0 else min(count, left)
        for start, data in self.pieces:
            if start <= position and position + count <= start + len(data):
                break
        else:
            start = position
            data = self.fetch(start, min(self.bytes, start + max(count, self.ahead)))
            self.pieces[1] = start, data
        return data[position - start : position - start + count]

    def fetch(self, start: int, end: int) -> bytes:
        try:
            return self.reader.get(self.uri, start, end, self.etag).data
        except (*ERRORS, ChangedError) as error:
            self.failure = error
            raise

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.bytes}[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
