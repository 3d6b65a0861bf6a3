"""Ask an output in SQL, which DuckDB answers in this process from the Parquet files themselves.

Views:
  current      of each image that is still there the newest row: uri, status, width, height, classes, confidence, ...
  class_stats  a row an image and class of these: name, pixels, fraction (of the image), confidence
  failures     those of these images that have no mask: status, error
  segments     every row of every run and model, also of images that have gone
  runs         finished runs: when, how long, how many images, bytes and pixels
  deletions    images that are no longer there
  returns      images whose current row is an older one again: a version that was put back, a model that is used again
  evaluations  of each evaluation a row an image: status, truth, mean_iou, accuracy, classes, ...

Without SQL it lists the views with all their columns. A mask is read only where a query names that column. With --file
every question of a file is put, infra/queries.sql in this project's folder for a start; its comments become titles.

  swath query /data/masks "SELECT name, sum(pixels) FROM class_stats GROUP BY name ORDER BY 2 DESC"
  swath query s3://bucket/masks "SELECT uri, error FROM failures" --format csv > failures.csv
  swath query s3://bucket/masks --file infra/queries.sql
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from jobs.display import print_whole, size
from pipeline.config import ConfigurationError, QuerySettings
from pipeline.names import printable

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from pipeline.query import Question

SETTINGS = QuerySettings
ROWS_SHOWN = 200
LOOK: dict[str, Any] = {"box": None, "header_style": "bold", "pad_edge": False}
LENGTH_SHOWN = 60  # characters of a cell that is no text
COPIED = {"csv": "FORMAT csv, HEADER", "json": "FORMAT json, ARRAY true", "parquet": "FORMAT parquet"}


def run(settings: QuerySettings) -> int:
    from pipeline.query import ask, connect
    from pipeline.storage import Store

    asked = read_questions(settings)
    try:
        with connect(Store(settings.output, settings)) as tables:
            if not asked:
                print_views(tables)
            for question in asked:
                if settings.format == "table":
                    print_answer(tables, question)
                elif (answer := ask(tables, question.sql)) is not None:
                    copy(answer, settings.format)
    except BrokenPipeError:  # whoever reads this has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def read_questions(settings: QuerySettings) -> list["Question"]:
    """What is to be asked: the SQL of the settings, or that of their file. Raises `ConfigurationError`."""
    from pipeline.query import Question, gives_rows, questions

    if settings.sql and settings.file:
        raise ConfigurationError("give SQL or --file, not both")
    if settings.format == "parquet" and sys.stdout.isatty():
        raise ConfigurationError("format: parquet is not for a terminal; redirect it: > answer.parquet")
    if not settings.file:
        return [Question("", settings.sql)] if settings.sql.strip() else []
    try:
        found = list(questions(Path(settings.file).read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"file: {settings.file} cannot be read ({error})") from None
    if not found:
        raise ConfigurationError(f"file: {settings.file} has no SQL")
    answers = sum(gives_rows(question.sql) for question in found)
    if answers > 1 and settings.format != "table":
        raise ConfigurationError(f"format: {settings.format} is for one question, {settings.file} has {answers}")
    return found


def print_views(tables: "duckdb.DuckDBPyConnection") -> None:
    """Which views there are, and what they hold."""
    found = tables.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal ORDER BY 1").fetchall()
    for (view,) in found:
        table = Table(view, Column(no_wrap=True), **LOOK)
        for name, kind, *_ in tables.execute(f"DESCRIBE {view}").fetchall():
            table.add_row(name, escape(kind))
        print_whole(table)
        print()


def print_answer(tables: "duckdb.DuckDBPyConnection", question: "Question") -> None:
    """A question's title, the first rows of its answer, and what it has cost."""
    from pipeline.query import ask, bytes_read

    console, told = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)
    began = time.perf_counter()
    if (answer := ask(tables, question.sql)) is None:
        return
    if question.title:
        console.print(escape(question.title), style="bold")
    table = Table(*(Column(Text(printable(name))) for name in answer.schema.names), **LOOK)
    for column, field in zip(table.columns, answer.schema, strict=True):
        column.justify, column.no_wrap = ("right" if is_number(field.type) else "left"), True
    rows = 0
    for batch in answer:
        shown = batch.slice(0, max(0, ROWS_SHOWN - rows))
        values = (column.to_pylist(maps_as_pydicts="lossy") for column in shown.columns)
        for row in zip(*values, strict=True):
            table.add_row(*(Text(cell(value)) for value in row))
        rows += len(batch)
    seconds = time.perf_counter() - began
    print_whole(table)
    more = f" (the first {ROWS_SHOWN} are shown; --format csv gives all)" if rows > ROWS_SHOWN else ""
    told.print(
        f"{rows:,} row{'s' * (rows != 1)}{more} in {seconds:.2f} s, {size(bytes_read(tables))} read\n", style="dim"
    )


def is_number(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def cell(value: Any) -> str:
    """A value for a person, on one line."""
    match value:
        case None:
            return ""
        case str():
            return printable(value).replace("\n", "\\n")
        case bytes():
            return size(len(value))
        case float():
            return f"{value:.6g}"
    text = printable(str(value)).replace("\n", "\\n")
    return text if len(text) <= LENGTH_SHOWN else text[: LENGTH_SHOWN - 1] + "…"


def copy(answer: "pa.RecordBatchReader", form: str) -> None:
    """Write an answer to the standard output, as DuckDB writes it. Raises `QueryError` as `ask` does."""
    import duckdb

    from pipeline.query import explained
    from pipeline.views import sql_text

    with tempfile.TemporaryDirectory(prefix="swath-") as folder, duckdb.connect() as writer:
        path = Path(folder, "answer")
        writer.register("answer", answer)
        with explained():
            writer.execute(f"COPY answer TO {sql_text(str(path))} ({COPIED[form]})")
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
