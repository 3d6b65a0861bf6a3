"""The wire between a training's workers and its driver: how far they are, and whether they are to stop.

`Wire` becomes an actor, one for each training. It imports nothing that is large: Ray keeps the class of an actor, and
with it all that its file can reach, past the end of the interpreter, of which DuckDB then complains.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """How far a training is."""

    step: int  # that are done
    loss: float  # of the last one
    best: float | None  # mean IoU


class Wire:
    """What the first worker has said last, and what the driver has."""

    def __init__(self) -> None:
        self.latest: Report | None = None
        self.is_stopping = False
        self.failure = ""

    def report(self, report: Report) -> bool:
        """Say how far it is; whether to stop."""
        self.latest = report
        return self.is_stopping

    def look(self) -> tuple[Report | None, str]:
        """The last report, and what no other try would mend."""
        return self.latest, self.failure

    def stop(self) -> None:
        """Have the workers end after the step under way."""
        self.is_stopping = True

    def fail(self, why: str) -> None:
        """Say what no other try would mend."""
        self.failure = self.failure or why
