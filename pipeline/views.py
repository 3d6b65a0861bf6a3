"""The output as SQL: views that DuckDB, and with few changes other engines, answer from the Parquet files themselves.

    segments     every row: an image, or a version of it, as one run and one model saw it
    runs         finished runs; times are UTC, here and below
    deletions    URIs that are no longer in the collection
    returns      URIs whose row is an older one again, and the run that has it: a version of the image that was put
                 back, or a model that was used before; it holds until a later run has a row
    current      of each image that is still there the row of the run that was finished last, or that it returned to
    class_stats  of each of these images the classes that its mask has, a row each
    failures     those of these images that have no mask, and why
    evaluations  a row for each image of each evaluation, and for masks of ground truth that belong to none

`current` finds its rows by URI and run alone, and holds no URI of the first run in memory, so that a query on
statistics never reads a mask, and one over a first run of many images and small ones since is as fast as a scan.
"""

import json
from glob import escape

from pipeline.changes import BACK_FOLDER, GONE_FOLDER, log_parts
from pipeline.config import ConfigurationError
from pipeline.storage import Store

EVALUATIONS_FOLDER = "evaluations"
SEGMENTS = """
CREATE OR REPLACE VIEW segments AS
  FROM read_parquet('{root}/segments/*/*.parquet', hive_partitioning = false);"""
RECORD = {  # of a run record, which is JSON of any size, as it names all files
    "run_id": "VARCHAR",
    "model_version": "VARCHAR",
    "started": "TIMESTAMP",
    "finished": "TIMESTAMP",
    "seconds": "DOUBLE",
    "shards_done_before": "BIGINT",
    "images": "BIGINT",
    "statuses": "MAP(VARCHAR, BIGINT)",
    "input_bytes": "BIGINT",
    "output_bytes": "BIGINT",
    "pixels": "BIGINT",
    "input": ["VARCHAR"],
    "checkpoint": "VARCHAR",
}
RUNS = """
CREATE OR REPLACE VIEW runs AS
  SELECT unnest(from_json(content, '{record}')) FROM read_text('{root}/runs/*/run.json');"""
GONE = """
CREATE OR REPLACE VIEW deletions AS
  SELECT uri, max(noticed) AT TIME ZONE 'UTC' AS noticed FROM read_parquet('{root}/{gone}/*.parquet')
  GROUP BY uri HAVING max_by(is_gone, noticed);"""
NONE_GONE = """
CREATE OR REPLACE VIEW deletions AS
  SELECT NULL::VARCHAR AS uri, NULL::TIMESTAMP AS noticed WHERE false;"""
# not max_by(run_id, noticed), as DuckDB keeps an aggregate of texts in memory
RETURNED = """
CREATE OR REPLACE VIEW returns AS
  SELECT uri, run_id, noticed AT TIME ZONE 'UTC' AS noticed FROM read_parquet('{root}/{back}/*.parquet')
  SEMI JOIN (SELECT uri, max(noticed) AS noticed FROM read_parquet('{root}/{back}/*.parquet') GROUP BY uri)
  USING (uri, noticed);"""
NONE_RETURNED = """
CREATE OR REPLACE VIEW returns AS
  SELECT NULL::VARCHAR AS uri, NULL::VARCHAR AS run_id, NULL::TIMESTAMP AS noticed WHERE false;"""
# an error without what differs from image to image: names, long identifiers, numbers
REASON = r"""regexp_replace(regexp_replace(regexp_replace(error,
    '''[^'']*''|"[^"]*"|\b\w+://\S+', '…', 'g'), '\b[0-9a-fA-F-]{16,}\b', '…', 'g'), '\d+', 'N', 'g')"""
PLACES = "(SELECT run_id, row_number() OVER (ORDER BY finished, run_id) AS place FROM runs)"
CURRENT_OF_ONE = """
CREATE OR REPLACE VIEW current AS
  SELECT s.* FROM segments s SEMI JOIN runs USING (run_id)"""
# written out twice, as DuckDB reads every column of what is joined with a CTE that it keeps
CURRENT = """
CREATE OR REPLACE VIEW current AS
  SELECT s.* FROM segments s JOIN {places} this USING (run_id)
  ANTI JOIN (SELECT uri, place FROM segments JOIN {places} that USING (run_id) WHERE place > 1) later
    ON later.uri = s.uri AND later.place > this.place"""
# after the runs that were finished by then; this too is written out twice
BACK = """(SELECT uri, run_id, 0.5 + (SELECT count(*) FROM runs WHERE finished <= noticed) AS place
      FROM returns SEMI JOIN runs USING (run_id))"""
CURRENT_AND_BACK = """
CREATE OR REPLACE VIEW current AS
  SELECT s.* FROM segments s JOIN {places} this USING (run_id)
  LEFT JOIN {back_places} back ON back.uri = s.uri AND back.run_id = s.run_id
  ANTI JOIN (
    SELECT uri, place FROM segments JOIN {places} that USING (run_id) WHERE place > 1
    UNION ALL SELECT uri, place FROM {back_places} that) later
    ON later.uri = s.uri AND later.place > coalesce(back.place, this.place)"""
STILL_THERE = """
  ANTI JOIN deletions ON deletions.uri = s.uri"""
CLASS_STATS = """
CREATE OR REPLACE VIEW class_stats AS
  SELECT uri, width, height, unnest(classes).class_id AS class_id, unnest(classes).name AS name,
    unnest(classes).pixels AS pixels, unnest(classes).fraction AS fraction,
    unnest(classes).confidence AS confidence, model_version, run_id
  FROM current;"""
FAILURES = """
CREATE OR REPLACE VIEW failures AS
  SELECT uri, status, {reason} AS reason,
    error, format, bytes, width, height, model_version, run_id FROM current WHERE status <> 'ok';"""

# of evaluations that are whole
EVALUATED = """
CREATE OR REPLACE VIEW evaluations AS
  SELECT * FROM read_parquet('{root}/{evaluations}/*/images/*.parquet', hive_partitioning = false)
  SEMI JOIN (SELECT content ->> '$.evaluation' AS evaluation
    FROM read_text('{root}/{evaluations}/*/evaluation.json')) USING (evaluation);"""
NONE_EVALUATED = """
CREATE OR REPLACE VIEW evaluations AS
  SELECT NULL::VARCHAR AS uri, NULL::VARCHAR AS etag, NULL::VARCHAR AS run_id, NULL::VARCHAR AS evaluation,
    NULL::VARCHAR AS status, NULL::VARCHAR AS error, NULL::VARCHAR AS truth, NULL::BIGINT AS pixels,
    NULL::DOUBLE AS accuracy, NULL::DOUBLE AS mean_accuracy, NULL::DOUBLE AS mean_iou, NULL::DOUBLE AS mean_dice,
    NULL::DOUBLE AS frequency_weighted_iou, NULL::DOUBLE AS mean_boundary_iou,
    NULL::STRUCT(class_id INTEGER, name VARCHAR, truth_pixels BIGINT, mask_pixels BIGINT, pixels BIGINT, iou DOUBLE,
      dice DOUBLE, accuracy DOUBLE, precision DOUBLE, boundary_iou DOUBLE)[] AS classes
  WHERE false;"""


def views(output: Store) -> str:
    """SQL that makes the views of an output that has rows; whether anything has gone or returned is as of now."""
    return views_at(output, local_root(output))


def run_folders(output: Store) -> list[str]:
    """The folders with rows, one a run. Raises `ConfigurationError` where there is none."""
    if not (found := output.names("segments")):
        raise ConfigurationError(f"{output.url}: no segments are here; give the OUTPUT of swath segment")
    return found


def local_root(output: Store) -> str:
    """The output's URL, or its path where it is on this machine."""
    return output.uri("").rstrip("/").removeprefix("file://")


def views_at(output: Store, root: str, is_one_run: bool = False) -> str:
    """The same where the engine that is asked reaches the output at `root`, a path or URL.

    Where there is but one run, and will be while these views are used, `current` need not look for later ones.
    """
    has_gone, has_returns = (bool(log_parts(output, folder)) for folder in (GONE_FOLDER, BACK_FOLDER))
    current = CURRENT_OF_ONE if is_one_run else CURRENT_AND_BACK if has_returns else CURRENT
    parts = [
        SEGMENTS,
        RUNS,
        GONE if has_gone else NONE_GONE,
        RETURNED if has_returns else NONE_RETURNED,
        current + (STILL_THERE if has_gone else "") + ";",
        CLASS_STATS,
        FAILURES,
        EVALUATED if has_evaluations(output) else NONE_EVALUATED,
    ]
    given = {"root": in_pattern(root), "gone": GONE_FOLDER, "back": BACK_FOLDER, "record": json.dumps(RECORD)}
    given["evaluations"] = EVALUATIONS_FOLDER
    return "\n".join(parts).format(**given, places=PLACES, back_places=BACK, reason=REASON).lstrip()


def has_evaluations(output: Store) -> bool:
    """Whether there is any that is whole."""
    names = output.names(EVALUATIONS_FOLDER)
    return any("evaluation.json" in output.names(f"{EVALUATIONS_FOLDER}/{name}") for name in names)


def in_pattern(root: str) -> str:
    """A path or URL as it stands in a pattern in an SQL literal, whatever it is called."""
    return escape(root).replace("'", "''")


def sql_text(text: str) -> str:
    """`text` as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"
