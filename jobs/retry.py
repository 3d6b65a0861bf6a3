"""Try again what failed in a run, or was missing.

Images whose status may be otherwise the next time are done in a new run with the settings of the old one, whose rows
stay. RUN is OUTPUT/runs/ID, or OUTPUT for the run that was begun last. What a retry has made ok is not tried again, and
one that was interrupted goes on when the same command is given again. An image that has changed is another one:
swath segment does it.

  swath retry s3://bucket/masks/runs/night-1
  swath retry s3://bucket/masks --unreadable --workers 8
"""

from jobs.display import Display, print_record
from pipeline.config import RetrySettings

SETTINGS = RetrySettings


def run(settings: RetrySettings) -> int:
    from pipeline.commit import choose
    from pipeline.retry import retry

    with Display() as display:
        run = choose(settings.run, settings)
        if not settings.run.rstrip("/").endswith(f"/runs/{run.id}"):
            display.say(f"run {run.id}, which was begun last")
        result = retry(settings.model_copy(update={"run": run.url}), display)
    if result.record and result.is_new:
        print_record(result.record, run.store.url)
    return 0
