"""A night: what an earlier one has left undone, then whatever is new since.

A run never takes up images that came after its plan, so a night that follows a failed one does two runs: the old one as
it was planned, and one over what came since.

A night that finds nothing new has no run whose metrics could tell of it, so the night itself says when it was done.
"""

import time

from pipeline.config import NightlySettings, SegmentSettings, build
from pipeline.endpoint import linger
from pipeline.filesystems import public_url
from pipeline.metrics import nightly_done
from pipeline.run import Listener, Result, segment


def nightly(settings: NightlySettings, listener: Listener) -> list[Result]:
    """Finish the unfinished run over the same collection, if there is one, and do what is new; each run that was done.

    Raises as `run.segment`; what was done before is kept.
    """
    job = build(SegmentSettings, settings.model_dump())
    results = [segment(job, listener)]
    while results[-1].was_planned:
        results.append(segment(job, listener))
    if settings.metrics_linger:
        done = nightly_done(public_url(settings.output), time.time())
        linger(settings, settings.metrics_port, [done], listener)
    return [result for result in results if result.record]
