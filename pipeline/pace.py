"""How fast work is done, and so how long the rest will take."""

import math
from collections import deque

WINDOW = 300.0  # seconds over which the pace is measured: many shards, and yet soon right when workers come or go
EVERY = 2.0  # seconds between two points that are kept


class Pace:
    """What was done when, lately. Another thread may ask `seconds_for` at any time."""

    def __init__(self) -> None:
        self.points: deque[tuple[float, float]] = deque()  # (seconds, done) that are at most `WINDOW` old, and one more

    def note(self, now: float, done: float) -> None:
        """So much is done by now. The first call says when work began, and how much was done before."""
        if len(self.points) > 1 and self.points[-1][0] - self.points[-2][0] < EVERY:
            self.points[-1] = now, done
        else:
            self.points.append((now, done))
        while len(self.points) > 2 and now - self.points[1][0] >= WINDOW:
            self.points.popleft()

    def seconds_for(self, left: float, now: float) -> float:
        """How long so much more takes at this pace: NaN before anything is done, infinite when nothing was lately."""
        if left <= 0:
            return 0.0
        if len(self.points) < 2:
            return math.nan
        (began, before), (latest, done) = self.points[0], self.points[-1]
        if now - latest >= WINDOW or (done <= before and now - began >= WINDOW):
            return math.inf
        return left * (now - began) / (done - before) if done > before else math.nan
