"""Tables that are larger than memory: a DuckDB that spills what it holds, sorts and joins to disk.

An index of a hundred million images is sorted and joined here within a gigabyte or two. It spills into a scratch folder
and ends with the job; what is to be kept goes into the output.
"""

import contextlib
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.attempts import reason
from pipeline.storage import Store

MEMORY = 700  # MB of DuckDB's own buffers, and so many more for a million rows: a sort has a block of each of its runs
MEMORY_A_MILLION = 15
ROWS = 65_536  # of a batch on its way in


@dataclass(frozen=True)
class Workspace:
    """A database and a folder, which end together."""

    tables: duckdb.DuckDBPyConnection
    folder: Path


@contextlib.contextmanager
def workspace() -> Iterator[Workspace]:
    """An empty workspace where temporary files go (TMPDIR)."""
    with tempfile.TemporaryDirectory(prefix="swath-") as name, duckdb.connect() as tables:
        make_room(tables, 0)
        tables.execute("SET temp_directory = '{}/spilled'".format(name.replace("'", "''")))
        tables.execute("SET preserve_insertion_order = false")
        yield Workspace(tables, Path(name))


def make_room(tables: duckdb.DuckDBPyConnection, rows: int) -> None:
    """Allow as much memory as it takes to sort and join so many rows."""
    tables.execute(f"SET memory_limit = '{MEMORY + MEMORY_A_MILLION * rows // 1_000_000}MB'")


def stored(output: Store, names: list[str], schema: pa.Schema) -> pa.RecordBatchReader:
    """The rows of Parquet files in the output, a few batches at a time; to be read once.

    Each file is read whole, as only then it can be checked, while the rows of the one before it are used.
    """
    return pa.RecordBatchReader.from_batches(schema, batches(output, names, schema))


def batches(output: Store, names: list[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with ThreadPoolExecutor(1) as behind:
        reading = deque(behind.submit(output.read, name) for name in names[:1])
        for name, following in zip_longest(names, names[1:]):
            source = pa.BufferReader(reading.popleft().result())
            reading.extend(behind.submit(output.read, one) for one in [following] if one)
            try:
                table = pq.read_table(source, schema=schema, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise OSError(f"{name} is damaged ({reason(error)}); see swath verify") from None
            yield from table.to_batches(ROWS)
