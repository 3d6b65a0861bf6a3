"""Whatever happens to a sealed file, down to one bit, is seen."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.seal import KEY, SealError, check_parquet, check_record, sealed, write_sealed

TABLE = pa.table({"name": ["a", "b"] * 50, "value": range(100)}).replace_schema_metadata({"note": "ours"})


def test_every_flipped_bit_of_a_file_is_seen():
    data = write_sealed(TABLE, compression="zstd")
    check_parquet(data)
    assert pq.read_table(io.BytesIO(data)).equals(TABLE)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealError):
            check_parquet(bytes(damaged))


def test_a_file_that_is_cut_off_or_another_is_seen():
    data = write_sealed(TABLE)
    plain = io.BytesIO()
    pq.write_table(TABLE, plain)
    for damaged in (b"", data[:4], data[:-1], data[1:], data + b"\0", data + data, b"PAR1" * 4, plain.getvalue()):
        with pytest.raises(SealError):
            check_parquet(damaged)


def test_text_that_looks_like_a_seal_does_no_harm():
    text = (KEY + b"\x18\x40" + b"0" * 64).decode()
    check_parquet(write_sealed(pa.table({text: [text]}).replace_schema_metadata({text: text, KEY: "0" * 64})))


def test_a_record_whose_values_have_changed_is_seen():
    record = sealed({"images": 3, "share": 0.1, "statuses": {"ok": 2, "missing": 1}})
    check_record(dict(reversed(record.items())))
    for damaged in ({}, record | {"images": 4}, {"images": 3}, record | {"more": None}, record | {"sha256": []}):
        with pytest.raises(SealError):
            check_record(damaged)
