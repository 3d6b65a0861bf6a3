"""Seals: a file says in itself what its bytes were when it was written, so that whoever reads it later can prove them.

Parquet's page checksums say nothing of the footer, where statistics, offsets and our own counts are. A Parquet file of
ours carries the SHA-256 of all its bytes, computed with zeros in the digest's place; a record in JSON carries that of
its values. Neither is a signature: who changes a file on purpose can seal it again.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NAME = "sha256"  # of the value in a record
KEY = b"swath.sha256"  # of the metadata in a Parquet file
EMPTY = b"0" * 64
# as the footer has it: two strings of Thrift's compact protocol, each behind its field's type and its own length
FIELD = re.compile(re.escape(KEY + b"\x18\x40") + b"([0-9a-f]{64})")
MAGIC = b"PAR1"


class SealError(Exception):
    """Bytes are not those that were written; the message says how it is seen."""


def write_sealed(table: pa.Table, **options: Any) -> bytes:
    """`table` as a sealed Parquet file, written with `options` of pyarrow's ParquetWriter."""
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: EMPTY})
    data = memoryview(buffer.getvalue())
    start = place(data)
    return b"".join([data[:start], digest(data, start), data[start + len(EMPTY) :]])


def check_parquet(data: bytes) -> None:
    """Raise `SealError` unless `data` is, to the last bit, a file that `write_sealed` made."""
    start = place(memoryview(data))
    if data[start : start + len(EMPTY)] != digest(memoryview(data), start):
        raise SealError("its bytes are not those that were written (SHA-256)")


def place(data: memoryview) -> int:
    """Where the digest is. Raises `SealError`."""
    if len(data) < 12 or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise SealError("is no whole Parquet file")
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    found = [match.start(1) for match in FIELD.finditer(data, max(0, footer))]
    if not found:
        raise SealError("has no checksum: it is damaged, or this version has not written it")
    return found[-1]  # columns' statistics, which come before it, may have any text


def digest(data: memoryview, start: int) -> bytes:
    """In hexadecimal, of the bytes with zeros at `start`."""
    found = hashlib.sha256(data[:start])
    found.update(EMPTY)
    found.update(data[start + len(EMPTY) :])
    return found.hexdigest().encode()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the digest of its values, which must be JSON's."""
    return {**record, NAME: values_digest(record)}


def check_record(record: Mapping[str, Any]) -> None:
    """Raise `SealError` unless the record's values are those that were sealed."""
    if NAME not in record:
        raise SealError("has no checksum: it is damaged, or this version has not written it")
    if record[NAME] != values_digest({name: value for name, value in record.items() if name != NAME}):
        raise SealError("its values are not those that were written (SHA-256)")


def values_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
