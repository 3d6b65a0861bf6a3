"""Read the headers of a collection into an index, without segmenting anything.

The index remembers URI, etag, size and format of every image, so that a later plan or run opens only what is new.

  swath index s3://bucket/photos s3://bucket/masks
"""

from collections import Counter

from jobs.display import Display, size
from pipeline.config import IndexSettings

SETTINGS = IndexSettings


def run(settings: IndexSettings) -> int:
    from pipeline.index import summary, update_index
    from pipeline.storage import Store

    source, output = Store(settings.input, settings), Store(settings.output, settings)
    output.check_writable()
    with Display() as display:
        index = update_index(settings, source, output, display.indexing)
    images = index.images
    formats = Counter(name or "unreadable" for name in images["format"].to_pylist())
    total = sum(images["bytes"].to_pylist())
    print(f"{len(images):,} images, {size(total)}{summary(index.skipped)}; {index.opened:,} headers read")
    print("  ".join(f"{name} {count:,}" for name, count in formats.most_common()))
    print(f"index  {settings.output.rstrip('/')}/index/*.parquet")
    return 0
