"""Bring an output up to date with its collection: only images that are new, changed or done by another model.

What a night that failed has left is done first, as it was planned, then whatever came since. Nothing new is no error,
takes seconds and starts no workers. Images that are no longer there are told of once and left out of `current`
(swath views); their rows stay. An image that is put back as it was, or a model that is used again, has its rows
already: they are `current` again, which is told of once too. Give the same INPUT every night, as only of that a listing
can tell what has gone. With --metrics-linger Prometheus hears of each night, also of one with nothing new, and so
notices one that is missing.

  swath nightly s3://bucket/photos s3://bucket/masks --checkpoint s3://bucket/models/b2
  swath nightly --config nightly.yaml
"""

from jobs.display import Display, print_record
from pipeline.config import NightlySettings

SETTINGS = NightlySettings


def run(settings: NightlySettings) -> int:
    from pipeline.nightly import nightly

    with Display() as display:
        results = nightly(settings, display)
    for result in results:
        if result.record:
            print_record(result.record, settings.output)
    return 0
