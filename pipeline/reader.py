"""Objects at any URI, read: the first bytes, a range, or all of them, in the version that was asked for.

A collection may lie in many places (a manifest says where), so this knows no root: each URI leads to its own store.
Local files and S3 say with each read which version its bytes are; of other stores only the length is compared.
"""

import io
import os
import threading
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from pipeline.config import StorageSettings
from pipeline.s3 import Fetcher, Piece, fetcher
from pipeline.storage import ERRORS, error_code, etag_of, local_etag, regular_file, storage_options

HEAD = 8 << 10  # bytes of the first read: enough for most images without an EXIF thumbnail or a colour profile
ONE_FOR_ALL = ("file", "s3", "s3a", "http", "https")  # protocols whose every host and bucket one client reaches
AHEAD = 256 << 10  # bytes of the next one, where that was not enough


class ChangedError(Exception):
    """The object is not the one of the etag and size that were asked for."""


class Reader:
    """Whatever a URI names. Many threads may use one."""

    def __init__(self, settings: StorageSettings):
        self.settings = settings
        self.stores: dict[str, tuple[AbstractFileSystem, Fetcher | None]] = {}
        self.opening = threading.Lock()

    def fetch(self, uri: str, etag: str, size: int) -> bytes:
        """All of an object. Raises `ChangedError` where its etag or size is another, unless `etag` is empty; and
        FileNotFoundError or another of `storage.ERRORS`.
        """
        piece = self.get(uri, 0, size + 1 if etag and size else None, etag)
        if etag and len(piece.data) != size:
            raise ChangedError(uri)
        return piece.data

    def fetch_part(self, uri: str, etag: str, start: int, size: int) -> bytes:
        """`size` bytes of an object from `start` on. Raises as `fetch`."""
        data = self.get(uri, start, start + size, etag).data if size else b""
        if len(data) != size:
            raise ChangedError(uri)
        return data

    def get(self, uri: str, start: int, end: int | None, etag: str = "") -> Piece:
        """Bytes `start` to `end`, or fewer where the object ends before. Raises as `fetch`."""
        filesystem, sooner = self.store(uri)
        path = filesystem._strip_protocol(uri)
        if isinstance(filesystem, LocalFileSystem):
            if not regular_file(path):  # reading a pipe or a device might never end
                raise FileNotFoundError(path)
            with open(path, "rb") as file:
                found = os.fstat(file.fileno())
                file.seek(start)
                piece = Piece(file.read(-1 if end is None else end - start), local_etag(found), found.st_size)
        elif sooner and (sooner_found := sooner.fetch(path, start, end)):
            piece = sooner_found
        else:
            return self.slowly(filesystem, path, start, end, etag)
        if etag and piece.etag != etag:
            raise ChangedError(uri)
        return piece

    def slowly(self, filesystem: AbstractFileSystem, path: str, start: int, end: int | None, etag: str) -> Piece:
        """By fsspec, which does not say of which version the bytes are; that is asked only where nothing is known."""
        if etag:
            try:
                return Piece(filesystem.cat_file(path, start=start or None, end=end), etag, -1)
            except OSError as error:
                if error_code(error) == "InvalidRange":  # it is shorter now
                    raise ChangedError(path) from None
                raise
        found = filesystem.info(path)
        size = int(found.get("size") or 0)
        is_empty = end is not None and start >= min(end, size)  # S3 has no range of an empty object
        return Piece(b"" if is_empty else filesystem.cat_file(path, start=start or None, end=end), etag_of(found), size)

    def store(self, uri: str) -> tuple[AbstractFileSystem, Fetcher | None]:
        """The file system of a URI, and what gets S3 objects sooner, where that can be."""
        protocol = get_protocol(uri)
        place = protocol if protocol in ONE_FOR_ALL else "/".join(uri.split("/", 3)[:3])
        with self.opening:
            if place not in self.stores:
                try:
                    filesystem, _ = url_to_fs(uri, **storage_options(uri, self.settings))
                except (ValueError, ImportError, TypeError) as error:
                    raise OSError(f"{protocol}://: {error}") from None
                self.stores[place] = filesystem, fetcher(filesystem, self.settings.storage_option)
            return self.stores[place]


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
        left = max(0, self.bytes - self.position)
        count = left if count is None or count < 0 else min(count, left)
        for start, data in self.pieces:
            if start <= self.position and self.position + count <= start + len(data):
                break
        else:
            start = self.position
            data = self.fetch(start, min(self.bytes, start + max(count, self.ahead)))
            self.pieces[1] = start, data
        found = data[self.position - start : self.position - start + count]
        self.position += len(found)
        return found

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
