"""swath query as a person uses it: tables, other formats, and one line for what is wrong."""

import csv
import io
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from jobs.bench.outputs import write_output
from jobs.cli import main


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("masks")
    write_output(folder, 500, labels=("sky", "<b>road[/]"))
    return str(folder)


@pytest.fixture
def query(output, capfdbinary):
    """(exit code, standard output, standard error) of swath query."""

    def run(*arguments: str) -> tuple[int, bytes, str]:
        code = main(["query", output, *arguments])
        out, errors = capfdbinary.readouterr()
        return code, out, errors.decode()

    return run


def test_a_table_is_for_a_person(query):
    code, out, errors = query("SELECT name, count(*) AS images, 0.5 AS half FROM class_stats GROUP BY 1 ORDER BY 1")
    lines = out.decode().splitlines()
    assert (code, lines[0].split()) == (0, ["name", "images", "half"])
    assert lines[1].startswith("<b>road[/]"), "a name is no markup"
    assert "2 rows in" in errors
    assert "read" in errors
    _, out, errors = query("SELECT uri FROM current")
    assert len(out.splitlines()) == 1 + 200
    assert "500 rows (the first 200 are shown; --format csv gives all)" in errors


def test_a_terminal_obeys_no_value(query):
    _, out, _ = query("SELECT chr(27) || '[31mred' || chr(10) || 'next' AS text, NULL AS nothing, 'x'::BLOB AS bytes")
    assert out.decode().splitlines()[1].split() == ["\\x1b[31mred\\nnext", "1", "B"]


def test_an_answer_without_rows_is_still_an_answer(query):
    sql = "SELECT uri, bytes FROM current WHERE false"
    _, out, errors = query(sql)
    assert (out.decode().split(), errors.split()[:2]) == (["uri", "bytes"], ["0", "rows"])
    assert query(sql, "--format", "csv")[1] == b"uri,bytes\n"
    assert json.loads(query(sql, "--format", "json")[1]) == []
    assert pq.read_table(io.BytesIO(query(sql, "--format", "parquet")[1])).column_names == ["uri", "bytes"]


def test_columns_of_one_name_stand_each_under_its_own(query):
    _, out, _ = query("SELECT 'left' AS uri, 'right' AS uri, 'run' AS run_id")
    assert [line.split() for line in out.decode().splitlines()] == [["uri", "uri", "run_id"], ["left", "right", "run"]]


@pytest.mark.parametrize("sql", ["DESCRIBE current", "SUMMARIZE runs", "EXPLAIN SELECT 1", "SHOW TABLES"])
def test_statements_that_read_no_rows_are_answered(query, sql):
    code, out, errors = query(sql)
    assert (code, "Traceback" in errors) == (0, False)
    assert out


def test_a_name_or_an_error_made_of_data_moves_no_terminal(query):
    _, out, _ = query("PIVOT (SELECT chr(27) || '[31m' AS x, 1 AS y) ON x USING sum(y)")
    assert out.decode().splitlines()[0].strip() == "\\x1b[31m"
    for arguments in ([], ["--format", "csv"]):
        code, _, errors = query("SELECT CAST(chr(27) || uri AS INT) FROM segments", *arguments)
        assert code == 2
        assert "\\x1bs3://" in errors
        assert "\x1b" not in errors


def test_what_fails_while_rows_come_is_said_as_what_fails_before(query):
    for arguments in ([], ["--format", "json"]):
        code, _, errors = query("SELECT CAST(uri AS INT) FROM segments WHERE uri LIKE '%499.jpg'", *arguments)
        assert (code, "Traceback" in errors) == (2, False)
        assert "Could not convert string 's3://photos/" in errors


def test_other_formats_have_every_row_in_order(query):
    sql = "SELECT uri, classes, mask, confidence FROM segments WHERE status = 'ok' ORDER BY uri"
    _, out, _ = query(sql, "--format", "parquet")
    table = pq.read_table(io.BytesIO(out))
    assert table.num_rows == 498
    assert table["uri"].to_pylist() == sorted(table["uri"].to_pylist())
    _, out, _ = query(sql.replace("mask, ", ""), "--format", "json")
    assert [row["uri"] for row in json.loads(out)] == table["uri"].to_pylist()
    assert json.loads(out)[0]["classes"] == table["classes"][0].as_py()
    _, out, _ = query(sql, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out.decode())))
    assert [row["uri"] for row in rows] == table["uri"].to_pylist()


def test_without_sql_the_views_are_listed_with_their_columns(query):
    _, out, _ = query()
    shown = out.decode()
    for name in (
        "segments",
        "current",
        "class_stats",
        "failures",
        "runs",
        "deletions",
        "returns",
        "fraction",
        "finished",
    ):
        assert name in shown


def test_a_file_of_questions_is_put_one_by_one(query, tmp_path):
    file = tmp_path / "questions.sql"
    file.write_text("SET VARIABLE x = 7;\n\n-- What is [x]?\nSELECT getvariable('x') AS x;\n\nSELECT 8 AS y\n")
    code, out, _ = query("--file", str(file))
    assert (code, out.decode().split()) == (0, ["What", "is", "[x]?", "x", "7", "y", "8"])
    file.write_text("\ufeffSET VARIABLE x = 7;\n\nSELECT getvariable('x') AS x;\n")
    assert query("--file", str(file), "--format", "csv")[:2] == (0, b"x\n7\n")


def test_what_is_wrong_is_said_with_exit_code_2(query, tmp_path):
    empty = tmp_path / "empty.sql"
    empty.write_text("-- nothing\n")
    many = tmp_path / "many.sql"
    many.write_text("SELECT 1\n\nSELECT 2\n")
    for arguments, expected in [
        (["SELECT nix FROM current"], 'Referenced column "nix" not found'),
        (["SELECT 1", "--file", str(many)], "give SQL or --file, not both"),
        (["--file", str(tmp_path / "none.sql")], "none.sql cannot be read"),
        (["--file", str(empty)], "has no SQL"),
        (["--file", str(many), "--format", "csv"], "csv is for one question"),
        (["SELECT 1", "--format", "xml"], "format"),
    ]:
        code, out, errors = query(*arguments)
        assert (code, out) == (2, b"")
        assert expected in errors
        assert "Traceback" not in errors


def test_a_reader_that_has_seen_enough_is_no_error(output):
    command = [sys.executable, "-m", "jobs", "query", output, "SELECT * FROM segments", "--format", "csv"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, "")
