"""A night: what an earlier one has left undone, then whatever is new since.

A run never takes up images that came after its plan, so a night that follows a failed one does two runs: the old one as
it was planned, and one over what came since.
"""

from pipeline.config import NightlySettings, SegmentSettings, build
from pipeline.run import Listener, Result, segment


def nightly(settings: NightlySettings, listener: Listener) -> list[Result]:
    """Finish the unfinished run over the same collection, if there is one, and do what is new; each run that was done.

    Raises as `run.segment`; what was done before is kept.
    """
    job = build(SegmentSettings, settings.model_dump())
    results = [segment(job, listener)]
    while results[-1].was_planned:
        results.append(segment(job, listener))
    return [result for result in results if result.record]
