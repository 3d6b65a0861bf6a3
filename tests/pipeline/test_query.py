"""SQL on an output: which rows the views have, what is read for them, and from where."""

import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import fsspec
import pyarrow as pa
import pytest

from jobs.bench.outputs import MASK, write_output, write_run
from pipeline.changes import DELETIONS, RETURNS
from pipeline.config import ConfigurationError, StorageSettings
from pipeline.query import QueryError, SharedFile, ask, bytes_read, connect, questions
from pipeline.seal import write_sealed
from pipeline.storage import Store
from pipeline.totals import generalised
from pipeline.views import REASON

LABELS = ("sky", "road", "car")
QUESTIONS = (
    "SELECT status, count(*) FROM current GROUP BY 1 ORDER BY 1",
    "SELECT name, count(*), sum(pixels), avg(confidence) FROM class_stats GROUP BY 1 ORDER BY 1",
    "SELECT status, error, count(*) FROM failures GROUP BY ALL ORDER BY ALL",
    "SELECT run_id, finished, images, statuses FROM runs ORDER BY 1",
    "SELECT count(*) FROM deletions",
    "SELECT count(*) FROM returns",
    "SELECT uri, octet_length(mask) FROM segments ORDER BY 1, run_id LIMIT 5",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "masks"
    write_output(folder, 3000, runs=3, labels=LABELS)
    return folder


@pytest.fixture(scope="module")
def stored(output, s3) -> str:
    """The same in an object store, under an odd name."""
    bucket = f"test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    fsspec.filesystem("s3").put(f"{output}/", f"{bucket}/it's a%20[name]*/masks/", recursive=True)
    return f"s3://{bucket}/it's a%20[name]*/masks"


def answers(url: str, *asked: str) -> list[list[tuple]]:
    with connect(Store(url, StorageSettings())) as tables:
        return [[tuple(row.values()) for row in ask(tables, sql).read_all().to_pylist()] for sql in asked]


def test_current_has_each_image_once_as_the_run_finished_last_has_it(output):
    ((per_run,),) = [answers(str(output), "SELECT run_id, count(*) FROM current GROUP BY 1 ORDER BY 1")]
    assert per_run == [("night-1", 2970), ("night-3", 30)]
    assert answers(str(output), "SELECT count(DISTINCT uri) FROM current") == [[(3000,)]]


def test_a_run_that_is_not_finished_and_an_image_that_has_gone_are_not_current(output, tmp_path):
    folder = tmp_path / "masks"
    shutil.copytree(output, folder)
    (folder / "runs/night-3/run.json").unlink()
    uris = [uri for (uri,) in answers(str(folder), "SELECT uri FROM current ORDER BY 1 LIMIT 4")[0]]
    gone = [{"uri": uri, "is_gone": True, "noticed": datetime(2026, 2, 1, tzinfo=UTC)} for uri in uris[:3]]
    back = [{"uri": uris[0], "is_gone": False, "noticed": datetime(2026, 2, 2, tzinfo=UTC)}]
    (folder / "deletions").mkdir()
    data = write_sealed(pa.Table.from_pylist(gone + back, DELETIONS))
    (folder / "deletions/part-00000.parquet").write_bytes(data)
    counts = answers(
        str(folder),
        "SELECT run_id, count(*) FROM current GROUP BY 1 ORDER BY 1",
        "SELECT uri FROM deletions ORDER BY 1",
        "SELECT count(*) FROM segments",
    )
    gone_of = dict.fromkeys(uris[1:3])
    assert sum(count for _, count in counts[0]) == 3000 - len(gone_of)
    assert "night-3" not in dict(counts[0])
    assert counts[1] == [(uri,) for uri in uris[1:3]]
    assert counts[2] == [(3060,)]


def test_an_image_that_has_returned_has_its_older_row_until_a_later_run_has_one_and_no_mask_is_read_for_it(
    output, bucket, tmp_path
):
    folder = tmp_path / "masks"
    shutil.copytree(output, folder)
    twice = [uri for (uri,) in answers(str(folder), "SELECT uri FROM current WHERE run_id = 'night-3' ORDER BY 1")[0]]
    noticed = {day: datetime(2026, 1, day, 12, tzinfo=UTC) for day in (2, 3, 4)}  # each after the night of that day
    before = [{"uri": uri, "run_id": "night-1", "noticed": noticed[2]} for uri in twice]
    put_returns(folder, 0, before)
    per_run = "SELECT run_id, count(*) FROM current GROUP BY 1 ORDER BY 1"
    assert answers(str(folder), per_run) == [[("night-1", 2970), ("night-3", 30)]], "night 3 came later"
    after = [{"uri": uri, "run_id": "night-1", "noticed": noticed[3]} for uri in twice[:20]]
    again = [{"uri": uri, "run_id": "night-2", "noticed": noticed[4]} for uri in twice[:5]]
    put_returns(folder, 1, after + again)
    fsspec.filesystem("s3").put(f"{folder}/", f"{bucket}/masks/", recursive=True)
    for url in (str(folder), f"{bucket}/masks"):
        assert answers(url, per_run) == [[("night-1", 2985), ("night-2", 5), ("night-3", 10)]]
        assert answers(url, "SELECT count(DISTINCT uri) FROM current") == [[(3000,)]]
        assert answers(url, "SELECT run_id, noticed, count(*) FROM returns GROUP BY ALL ORDER BY ALL") == [
            [
                ("night-1", noticed[2].replace(tzinfo=None), 10),
                ("night-1", noticed[3].replace(tzinfo=None), 15),
                ("night-2", noticed[4].replace(tzinfo=None), 5),
            ]
        ]
        with connect(Store(url, StorageSettings())) as tables:
            for sql in QUESTIONS[:4]:
                ask(tables, sql).read_all()
                assert 0 < bytes_read(tables) < 3000 * MASK / 4
    (folder / "runs/night-1/run.json").unlink()
    assert answers(str(folder), per_run) == [[("night-2", 5), ("night-3", 25)]], "what is not finished is not current"


def put_returns(folder: Path, number: int, rows: list[dict]) -> None:
    (folder / "returns").mkdir(exist_ok=True)
    data = write_sealed(pa.Table.from_pylist(rows, RETURNS))
    (folder / f"returns/part-{number:05d}.parquet").write_bytes(data)


def test_before_the_first_run_is_finished_its_rows_are_segments_and_nothing_is_current(tmp_path):
    write_run(tmp_path, "first", 10, 0, LABELS, "s3://photos", {})
    (tmp_path / "runs/first/run.json").unlink()
    counts = answers(str(tmp_path), *(f"SELECT count(*) FROM {view}" for view in ("segments", "current", "runs")))
    assert counts == [[(10,)], [(0,)], [(0,)]]


def test_an_output_in_an_object_store_answers_the_same(output, stored):
    assert answers(stored, *QUESTIONS) == answers(str(output), *QUESTIONS)


def test_no_mask_is_read_for_a_question_on_statistics(output, stored):
    for url in (str(output), stored):
        store = Store(url, StorageSettings())
        fetched = []
        piece = store.reader.piece
        store.reader.piece = lambda *a, piece=piece, fetched=fetched: fetched.append(piece(*a)) or fetched[-1]
        with connect(store) as tables:
            for sql in QUESTIONS[:4]:
                fetched.clear()
                ask(tables, sql).read_all()
                assert 0 < bytes_read(tables) < 3000 * MASK / 4
                assert sum(len(one.data) for one in fetched) < 3000 * MASK / 3
            ask(tables, "SELECT sum(octet_length(mask)) FROM segments").read_all()
            assert bytes_read(tables) > 3000 * MASK * 0.9


def test_threads_that_share_a_file_each_read_what_they_asked_for(output):
    """DuckDB's threads seek and read in one file object, and come in between each other."""
    path = next(output.glob("segments/run=night-1/*.parquet"))
    data, store = path.read_bytes(), Store(str(output), StorageSettings())
    file = SharedFile(store.reader, store.uri(str(path.relative_to(output))))

    def read(start: int) -> bool:
        file.seek(start)
        time.sleep(0)  # let another thread come in between
        return file.read(1000) == data[start : start + 1000]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(0, len(data), 977)))
    file.seek(5)
    assert [file.read(4), file.read(3)] == [data[5:9], data[9:12]], "who does not seek goes on where it was"
    file.seek(5)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(file.read, 4).result() == data[5:9], "also where another thread has sought"
    assert file.read(3) == data[9:12]


def test_wrong_sql_says_where_and_an_output_without_rows_what_to_give(output, tmp_path):
    with connect(Store(str(output), StorageSettings())) as tables:
        for sql, expected in [
            ("SELECT nix FROM current", 'column "nix" not found'),
            ("SELEC 1", 'syntax error at or near "SELEC"'),
            ("-- nothing", "no statement"),
        ]:
            with pytest.raises(QueryError, match=expected):
                ask(tables, sql)
        assert ask(tables, "SET VARIABLE x = 3") is None
        assert ask(tables, "SET VARIABLE x = 4; SELECT getvariable('x') AS x").read_all().to_pylist() == [{"x": 4}]
    with (
        pytest.raises(ConfigurationError, match="no segments are here"),
        connect(Store(str(tmp_path), StorageSettings())),
    ):
        pass


def test_a_query_cannot_write_to_an_object_store(stored):
    with connect(Store(stored, StorageSettings())) as tables, pytest.raises((QueryError, duckdb.Error)):
        ask(tables, "COPY (SELECT 1) TO 'swath://segments/x.parquet'")


def test_an_output_may_have_any_name(output, tmp_path):
    for name in ("back\\slash", "a{b,c}[d]*?", "it's 100%20\n"):
        (tmp_path / name).symlink_to(output)
        assert answers(str(tmp_path / name), *QUESTIONS[:2]) == answers(str(output), *QUESTIONS[:2])


def test_reasons_are_alike_in_sql_and_in_a_run_record():
    errors = [
        "cannot read 'a b.jpg': 3 of 17 bytes",
        'tag "x" of s3://bucket/a/b.jpg?x=1 is damaged',
        "object 7fa1c0de-12ab-34cd-9f00-00c0ffee4242 is gone",
        "20000x14000 is over --max-pixels 100,000,000",
    ]
    rows = [{"error": error} for error in errors]
    found = duckdb.connect().register("errors", pa.Table.from_pylist(rows)).sql(f"SELECT {REASON} FROM errors")
    assert [reason for (reason,) in found.fetchall()] == list(map(generalised, errors))


def test_an_sql_file_is_paragraphs_whose_comments_are_titles():
    text = "-- only a remark\n\n-- How many?\n--  And why?\nSELECT 1,\n  -- inside\n  2;\n\n\nSELECT 3"
    assert [(one.title, one.sql) for one in questions(text)] == [
        ("How many? And why?", "SELECT 1,\n  -- inside\n  2;"),
        ("", "SELECT 3"),
    ]
