"""Images that lie in larger files: tar shards (WebDataset) and Parquet columns (Hugging Face datasets).

An image in a file has the URI `file#key`: the member's name in a tar, the number of the row in a Parquet file. Of a
tar, an index needs the headers, and a worker one range for each image. Of a Parquet file both need whole column chunks,
since what is in them is compressed together; those that were read last are kept.
"""

import os
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.decode import SUFFIXES, DecodeError, read_header
from pipeline.header import one_line
from pipeline.plan import PlannedImage
from pipeline.reader import ObjectFile, Reader

KINDS = {".tar": "tar", ".parquet": "parquet"}
COLUMNS = ("image", "img", "bytes", "image_bytes", "jpg", "png", "content", "data")  # looked for in this order
ROW_DIGITS = 9  # of a row's key, so that keys sort as rows do
ROWS, BUFFER = 64, 1 << 20  # rows and bytes that are read at once while a Parquet file is indexed
GROUP_BYTES = 1 << 30  # of the images in one row group, which has to be read to have one of them
KEPT_BYTES = 256 << 20  # of row groups, by a worker


@dataclass(frozen=True)
class Member:
    """One image in a file. `position` is where `Images` finds it, None where there is nothing to find."""

    uri: str
    bytes: int
    position: int | None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None


class ContainerError(Exception):
    """The file cannot be read, or not to its end; one line says why."""


class NoImagesError(Exception):
    """A Parquet file without a column of images."""


def kind_of(uri: str) -> str | None:
    """ "tar" or "parquet" by the name of a file that may hold images; None for any other."""
    return next((kind for suffix, kind in KINDS.items() if uri.lower().endswith(suffix)), None)


def members(file: ObjectFile, column: str | None, skipped: Counter[str]) -> Iterator[Member]:
    """Every image in a file and its header, in order; what is none in a tar is counted in `skipped`, by why.

    Raises `ContainerError` where the rest cannot be read, `reader.ChangedError`, or one of `storage.ERRORS`.
    """
    try:
        yield from tar_members(file, skipped) if kind_of(file.uri) == "tar" else rows(file, column)
    except (tarfile.TarError, pa.ArrowException, OSError, ValueError) as error:
        if file.failure:
            raise file.failure from None
        raise ContainerError(f"not a {kind_of(file.uri)} file, or a damaged one: {one_line(error)}") from None


def tar_members(file: ObjectFile, skipped: Counter[str]) -> Iterator[Member]:
    before = -1
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while found := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # which it would keep, a kilobyte each
            if found.size < 0 or tar.offset <= before:
                raise ContainerError(f"the tar is damaged at byte {found.offset:,}")
            before = tar.offset
            if why := why_no_image(found):
                skipped.update([why] if why != "a folder" else [])
                continue
            if found.offset_data + found.size > file.bytes:
                raise ContainerError(f"the tar is cut off at byte {file.bytes:,}, within {found.name!r}")
            data = cast(BinaryIO, tar.extractfile(found))
            member = describe(f"{file.uri}#{found.name}", data, found.size, found.offset_data)
            if file.failure:
                raise file.failure
            yield member
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):  # zeros are the end of a tar; tarfile ends at anything
            raise ContainerError(f"the tar is damaged at byte {tar.offset:,}")


def why_no_image(member: tarfile.TarInfo) -> str:
    """Why a member of a tar is no image, or nothing."""
    if member.isdir():
        return "a folder"
    if not member.isfile() or member.issparse():
        return "a link or the like in a tar"
    if not is_utf8(member.name):
        return "a name that is not UTF-8"
    return "" if is_image_name(member.name) else f"{extension(member.name)} in a tar"


def rows(file: ObjectFile, column: str | None) -> Iterator[Member]:
    parquet = pq.ParquetFile(file, buffer_size=BUFFER)
    path, number = image_column(parquet.schema_arrow, column), 0
    if path is None:
        raise NoImagesError
    for group in range(parquet.num_row_groups):
        if (size := group_bytes(parquet.metadata, group, path)) > GROUP_BYTES:
            raise ContainerError(f"row group {group} has {size:,} bytes of images; write smaller ones")
        for batch in parquet.iter_batches(ROWS, row_groups=[group], columns=[path]):
            for value in values(batch.column(0)):
                key = f"{file.uri}#{number:0{ROW_DIGITS}}"
                if value.is_valid:
                    yield describe(key, pa.BufferReader(value.as_buffer()), len(value.as_buffer()), number)
                else:
                    yield Member(key, 0, None, error="the row has no image bytes")
                number += 1


def describe(uri: str, data: BinaryIO, size: int, position: int) -> Member:
    """What the header of one image says."""
    try:
        header = read_header(data)
    except DecodeError as error:
        return Member(uri, size, position, error=str(error))
    return Member(uri, size, position, header.format, header.width, header.height)


def image_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """The column, as Parquet names it, that holds encoded images; None where there is none.

    It is `wanted`, or one of `COLUMNS`: bytes, or a struct with bytes in it as Hugging Face datasets have it.
    """
    for name in [wanted] if wanted else COLUMNS:
        place = schema.get_field_index(name)  # -1 also where there are two of that name
        kind = schema.field(place).type if place >= 0 else pa.null()
        if is_binary(kind):
            return name
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type):
            return f"{name}.bytes"
    return None


def is_binary(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def values(column: pa.Array) -> pa.Array:
    """The bytes of a column, whichever form it has."""
    found = column.field(0) if pa.types.is_struct(column.type) else column
    return found.dictionary_decode() if pa.types.is_dictionary(found.type) else found


def group_bytes(metadata: pq.FileMetaData, group: int, path: str) -> int:
    """Bytes of a column in a row group, once uncompressed."""
    chunks = (metadata.row_group(group).column(number) for number in range(metadata.num_columns))
    return next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == path)


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def extension(name: str) -> str:
    """What a name that is no image ends in, to be counted; what is too odd to be an extension is "other"."""
    found = os.path.splitext(name)[1].lower()
    return found if len(found) <= 8 and found[1:].isalnum() else "other" if found else "no extension"


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Images:
    """The bytes of any image of a plan, wherever they lie. Many threads may use one."""

    def __init__(self, reader: Reader, column: str | None):
        self.reader, self.groups = reader, RowGroups(reader, column)

    def fetch(self, image: PlannedImage) -> bytes:
        """Raises as `Reader.fetch`."""
        if image.file is None or image.position is None:
            return self.reader.fetch(image.uri, image.etag, image.bytes)
        if kind_of(image.file) == "tar":
            return self.reader.fetch_part(image.file, image.etag, image.position, image.bytes)
        return self.groups.value(image.file, image.etag, image.position)

    def bound(self) -> int:
        """The most bytes that are held between two images."""
        return self.groups.bound()


class RowGroups:
    """Image columns of Parquet files, a row group at a time; the last are kept, as a shard's images lie together."""

    def __init__(self, reader: Reader, column: str | None):
        self.reader, self.column = reader, column
        self.kept: OrderedDict[tuple[str, str, int], pa.ChunkedArray] = OrderedDict()  # by file, etag and first row
        self.opened: tuple[str, str, ObjectFile] | None = None
        self.largest = 0  # bytes of a group
        self.lock = threading.Lock()

    def value(self, uri: str, etag: str, row: int) -> bytes:
        """The bytes in a row of a file. Raises `ContainerError` where the file is damaged."""
        with self.lock:
            for key, column in self.kept.items():
                if key[:2] == (uri, etag) and key[2] <= row < key[2] + len(column):
                    self.kept.move_to_end(key)
                    return column[row - key[2]].as_py()
            file = self.open(uri, etag)
            try:
                first, column = self.read(file, row)
            except (pa.ArrowException, OSError, ValueError) as error:
                if file.failure:
                    raise file.failure from None
                raise ContainerError(f"the Parquet file is damaged: {one_line(error)}") from None
            self.kept[uri, etag, first] = column
            while len(self.kept) > 1 and sum(one.nbytes for one in self.kept.values()) > KEPT_BYTES:
                self.kept.popitem(last=False)
            return column[row - first].as_py()

    def open(self, uri: str, etag: str) -> ObjectFile:
        if not self.opened or self.opened[:2] != (uri, etag) or self.opened[2].failure:
            self.opened = uri, etag, ObjectFile(self.reader, uri, etag)
        return self.opened[2]

    def read(self, source: ObjectFile, row: int) -> tuple[int, pa.ChunkedArray]:
        """The images of the row group that has a row, and the number of its first row."""
        file = pq.ParquetFile(source)
        path, first, group = image_column(file.schema_arrow, self.column), 0, 0
        assert path, "the column is a part of the plan's origin"
        while row >= first + file.metadata.row_group(group).num_rows:
            first, group = first + file.metadata.row_group(group).num_rows, group + 1
        self.largest = max(self.largest, group_bytes(file.metadata, group, path))
        column = file.read_row_group(group, columns=[path]).column(0)
        images = pa.chunked_array([values(chunk) for chunk in column.chunks])
        self.largest = max(self.largest, images.nbytes)  # which is more where one image is in many rows
        return first, images

    def bound(self) -> int:
        """The most bytes of all this: what is kept, and a group that is read, compressed and not."""
        return max(KEPT_BYTES, self.largest) + 2 * self.largest if self.largest else 0
