"""Read the headers of a collection into an index, without segmenting anything.

The index remembers URI, etag, size and format of every image, so that a later plan or run opens only what is new.

  swath index s3://bucket/photos s3://bucket/masks
"""

from functools import partial

from jobs.display import Display, size
from pipeline.config import IndexSettings

SETTINGS = IndexSettings
FORMATS = (
    "SELECT coalesce(format, 'unreadable'), count(*), sum(bytes)::BIGINT FROM images GROUP BY 1 ORDER BY 2 DESC, 1"
)


def run(settings: IndexSettings) -> int:
    from pipeline.cluster import spread
    from pipeline.index import update_index
    from pipeline.inputs import summary
    from pipeline.storage import Store
    from pipeline.tables import workspace

    output = Store(settings.output, settings)
    output.check_writable()
    with Display() as display, workspace() as space:
        index = update_index(settings, output, space.tables, display, partial(spread, settings))
        formats = space.tables.execute(FORMATS).fetchall()
    total = size(sum(count for _, _, count in formats))
    print(f"{index.images:,} images, {total}{summary(index.skipped)}; {index.opened:,} headers read")
    print("  ".join(f"{name} {count:,}" for name, count, _ in formats))
    print(f"index  {settings.output.rstrip('/')}/index/*.parquet")
    return 0
