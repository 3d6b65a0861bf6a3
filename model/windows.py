"""An image at its own size through windows: where each one lies, and how much it counts.

A network can see a window, not 280 megapixels: attention costs the square of what it sees, and the activations of a
forward pass are a hundred times its pixels. So a large image is seen through windows on a grid of the encoder's
stride, that overlap. Where several see a logit it is their mean, each weighted by how far it sees beyond: a window
knows least at its own edge, and as each fades in from nothing, nothing jumps where one begins. (A cut in the middle of
the overlap leaves twice as many edges of the mask along it as elsewhere: `python -m jobs.bench.windows`.)

Plain NumPy, as a policy is read where nobody waits for PyTorch.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

STEP = 32  # pixels: the encoder's total stride, so that every stage halves its map without a remainder
CELL = 4  # pixels of a side that a logit stands for
Sides = TypeVar("Sides", int, np.ndarray)


@dataclass(frozen=True)
class Span:
    """What a window has of one side of the image, in pixels; up to 31 of them may be behind its end."""

    start: int
    stop: int


@dataclass(frozen=True)
class Tiling:
    """How images are seen: the side of a window, and what neighbours share of it at least; multiples of `STEP`."""

    window: int = 2048
    overlap: int = 512

    def count(self, sides: Sides) -> Sides:
        """How many windows lie along a side of so many pixels, or along each of several."""
        beyond = padded(sides) - self.window
        return 1 + -(-beyond * (beyond > 0) // (self.window - self.overlap))

    def spans(self, side: int) -> list[Span]:
        """The windows along a side of so many pixels, spread evenly from its start to the end of the last `STEP`."""
        end = padded(side)
        if end <= self.window:
            return [Span(0, end)]
        gaps = self.count(side) - 1
        starts = [number * ((end - self.window) // STEP) // gaps * STEP for number in range(gaps + 1)]
        return [Span(start, start + self.window) for start in starts]


def padded(side: Sides) -> Sides:
    """Sides in pixels, rounded up to whole steps."""
    return -(-side // STEP) * STEP


def weights(spans: list[Span]) -> np.ndarray:
    """How much each of n windows counts at each logit of a side: float32 (n, pixels / `CELL`), columns sum to 1.

    It is 0 at the first logit of a window, and at the last, where another one goes on.
    """
    end = spans[-1].stop // CELL
    starts, stops = (np.array([getattr(span, name) // CELL for span in spans]) for name in ("start", "stop"))
    starts[0], stops[-1] = -end, 2 * end  # there is nothing beyond the image that a window could know better
    cells = np.arange(end)
    reach = np.minimum(cells - starts[:, None], stops[:, None] - 1 - cells).clip(0)
    return (reach / reach.sum(axis=0)).astype(np.float32)


def cut_out(image: np.ndarray, rows: Span, columns: Span) -> np.ndarray:
    """The window of an image (H, W, 3); behind its end the last pixels are repeated."""
    seen = image[rows.start : rows.stop, columns.start : columns.stop]
    missing = (rows.stop - rows.start - seen.shape[0], columns.stop - columns.start - seen.shape[1])
    return np.pad(seen, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else seen
