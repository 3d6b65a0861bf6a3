"""The output as SQL: views that DuckDB, and with few changes other engines, answer from the Parquet files themselves.

    segments   every row: an image, or a version of it, as one run and one model saw it
    runs       finished runs
    deletions  URIs that are no longer in the collection
    current    of each image that is still there the row of the run that was finished last

`current` finds its rows by URI and run alone, so that a query on statistics still never reads a mask.
"""

from glob import escape

from pipeline.changes import FOLDER
from pipeline.storage import Store

SEGMENTS = "CREATE OR REPLACE VIEW segments AS\n  FROM read_parquet('{output}/segments/*/*.parquet');"
RUNS = """
CREATE OR REPLACE VIEW runs AS
  SELECT run_id, model_version, started::TIMESTAMPTZ AS started, finished::TIMESTAMPTZ AS finished, images, seconds
  FROM read_json('{output}/runs/*/run.json', columns = {{run_id: 'VARCHAR', model_version: 'VARCHAR',
                 started: 'VARCHAR', finished: 'VARCHAR', images: 'BIGINT', seconds: 'DOUBLE'}});"""
NONE_GONE = """
CREATE OR REPLACE VIEW deletions AS
  SELECT NULL::VARCHAR AS uri, NULL::TIMESTAMPTZ AS noticed WHERE false;"""
GONE = """
CREATE OR REPLACE VIEW deletions AS
  SELECT uri, max(noticed) AS noticed FROM read_parquet('{output}/{folder}/*.parquet')
  GROUP BY uri HAVING max_by(is_gone, noticed);"""
CURRENT = """
CREATE OR REPLACE VIEW current AS
  FROM segments SEMI JOIN (
    SELECT uri, run_id FROM segments JOIN runs USING (run_id) ANTI JOIN deletions USING (uri)
    QUALIFY row_number() OVER (PARTITION BY uri ORDER BY finished DESC, run_id DESC) = 1
  ) newest USING (uri, run_id);"""


def views(output: Store) -> str:
    """SQL that makes the views of an output with at least one finished run; `deletions` as of now."""
    deletions = GONE if output.names(FOLDER) else NONE_GONE
    return "\n".join([SEGMENTS, RUNS, deletions, CURRENT]).format(output=sql_root(output), folder=FOLDER).lstrip()


def sql_root(output: Store) -> str:
    """The output's root as it stands in a pattern in an SQL literal, whatever it is called."""
    return escape(output.uri("").rstrip("/").removeprefix("file://")).replace("'", "''")
