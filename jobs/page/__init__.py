"""The page of `swath report`: its numbers, its pictures, and the template that shows them."""

from jobs.display import Display
from jobs.page.figures import read_figures
from jobs.page.gallery import choose, colours, draw, gather, read_rows
from jobs.page.render import Page, render
from jobs.page.runs import read_runs
from pipeline.config import ReportSettings
from pipeline.query import connect
from pipeline.storage import Store

UNFINISHED = "No run is finished yet: these are the rows of all shards that are there so far."
NEWEST = "Each image counts once, by its newest row of a finished run; those that have gone from the collection do not."

ONCE = (  # what each query would do again: open every file, read every record
    "SET parquet_metadata_cache = true",
    "CREATE TEMP TABLE finished AS FROM runs",
    "CREATE OR REPLACE VIEW runs AS FROM finished",
)

# of an object store every file is opened once and not for each query, which takes requests and their time
FETCHED = (
    "CREATE TEMP TABLE fetched AS SELECT * EXCLUDE (mask) FROM current",
    "CREATE OR REPLACE VIEW current AS FROM fetched",
)


def make(settings: ReportSettings, display: Display) -> str:
    """The page of an output, as HTML. Raises `ConfigurationError` where that has no rows."""
    output = Store(settings.output, settings)
    with connect(output) as tables:
        display.say(f"reading the rows of {output.url}")
        for statement in ONCE:
            tables.execute(statement)
        runs = read_runs(output, tables)
        if not runs.finished:
            tables.execute("CREATE OR REPLACE VIEW current AS FROM segments")
        for statement in () if output.is_local else FETCHED:
            tables.execute(statement)
        figures = read_figures(tables)
        frequent = [one.name for one in figures.classes[: 2 * settings.images]]
        chosen = choose(tables, settings.images, frequent) if settings.images and figures.masks else []
        rows = read_rows(output, tables, chosen)
    pictures = draw(output, rows, display.drawing)
    return render(
        Page(
            output=output.url,
            figures=figures,
            runs=runs,
            groups=gather(chosen, pictures),
            colours=colours(rows),
            price=settings.price,
            note=NEWEST if runs.finished else UNFINISHED,
        )
    )
