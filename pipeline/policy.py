"""The resolution policy: which size an image has when the network sees it.

Images of one size share a batch, so the sizes must be few. Scaling the short side and rounding the long one to a
multiple of 32, of 64 where it is twice as long, of 128 where it is four times (and so on), puts a collection of
thousands of shapes into a few dozen buckets without padding a pixel. Where no pixel may be scaled, an image is seen
through windows of one size instead (`model.windows`).

It may be seen more than once: `Looks` says how often, and at which sizes beside that of its bucket.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from model.windows import STEP, Sides, Tiling, padded

MAX_SIDE = 8192  # pixels of a network input
MAX_ASPECT = 8  # a longer image is squeezed to this: 512 x 4096 is the largest input of short=512


@dataclass(frozen=True)
class Policy:
    """`short=N`: the short side becomes N, the aspect is kept, but for 16 in N. `exact=HxW`: every image becomes H x W.

    `native=WINDOW+OVERLAP`: no pixel is scaled, and a larger image than a window is seen through overlapping ones.
    """

    short: int | None = None
    exact: tuple[int, int] | None = None
    native: Tiling | None = None

    def __str__(self) -> str:
        if self.native:
            return f"native={self.native.window}+{self.native.overlap}"
        return f"short={self.short}" if self.short else "exact={}x{}".format(*self.exact or ())

    def sizes(self, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Network input sizes, int64 (N,) heights and widths, of images of the given sizes (N,), in pixels."""
        heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
        if self.native:
            window = self.native.window
            return np.minimum(padded(heights), window), np.minimum(padded(widths), window)
        if self.exact:
            return np.full_like(heights, self.exact[0]), np.full_like(widths, self.exact[1])
        assert self.short
        short, long = np.minimum(heights, widths), np.maximum(heights, widths)
        step = STEP << np.log2((long // short).clip(1, MAX_ASPECT)).astype(np.int64)
        scaled = np.rint(self.short * long / short / step).astype(np.int64) * step
        scaled = scaled.clip(self.short, self.short * MAX_ASPECT)
        return np.where(heights <= widths, self.short, scaled), np.where(heights <= widths, scaled, self.short)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Network input (height, width) of one image."""
        return size_of(self, height, width)

    def windows(self, heights: Sides, widths: Sides) -> Sides:
        """How many inputs of its bucket's size an image makes, or each of several."""
        return self.native.count(heights) * self.native.count(widths) if self.native else heights * 0 + 1


@dataclass(frozen=True)
class Looks:
    """How the network sees each image: at all `scales`, factors on the bucket's sides, ascending; mirrored too with
    `flip`.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    @property
    def count(self) -> int:
        """How often it sees an image."""
        return (1 + self.flip) * len(self.scales)

    @property
    def work(self) -> float:
        """How many times the bucket's pixels it sees, roughly."""
        return (1 + self.flip) * sum(scale**2 for scale in self.scales)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Its input (height, width) at each scale, of a bucket; nearest multiples of `STEP`."""
        return [(scaled(height, scale), scaled(width, scale)) for scale in self.scales]

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """The greatest of them."""
        return self.sizes(height, width)[-1]


ONE_LOOK = Looks()


def scaled(side: int, scale: float) -> int:
    """A side in pixels times a factor, in whole steps."""
    return max(1, math.floor(side * scale / STEP + 0.5)) * STEP


@lru_cache(maxsize=10_000)  # a collection has few sizes, and NumPy takes its time for one number
def size_of(policy: Policy, height: int, width: int) -> tuple[int, int]:
    heights, widths = policy.sizes(np.array([height]), np.array([width]))
    return int(heights[0]), int(widths[0])


def parse_policy(text: str) -> Policy:
    """A policy from `short=512`, `exact=512x1024`, `native` or `native=2048+512`.

    ValueError says what is wrong with any other text.
    """
    if found := re.fullmatch(r"short=(\d+)", text):
        policy = Policy(short=int(found[1]))
    elif found := re.fullmatch(r"exact=(\d+)x(\d+)", text):
        policy = Policy(exact=(int(found[1]), int(found[2])))
    elif found := re.fullmatch(r"native(?:=(\d+)\+(\d+))?", text):
        policy = Policy(native=Tiling(int(found[1]), int(found[2])) if found[1] else Tiling())
    else:
        raise ValueError(
            "expected short=N (short=512), exact=HEIGHTxWIDTH (exact=512x1024), native or native=WINDOW+OVERLAP "
            "(native=2048+512)"
        )
    if policy.native:
        check_windows(policy.native)
    elif any(side % STEP or not STEP <= side <= MAX_SIDE for side in policy.exact or (policy.short or 0,)):
        raise ValueError(f"each side must be a multiple of {STEP} from {STEP} to {MAX_SIDE}")
    return policy


def check_windows(tiling: Tiling) -> None:
    """ValueError for windows that a network cannot see, or that do not get ahead."""
    if tiling.window % STEP or not 2 * STEP <= tiling.window <= MAX_SIDE:
        raise ValueError(f"the window must be a multiple of {STEP} from {2 * STEP} to {MAX_SIDE}")
    if tiling.overlap % STEP or not STEP <= tiling.overlap < tiling.window:
        raise ValueError(f"the overlap must be a multiple of {STEP} from {STEP} to less than the window")


def checked_scales(scales: tuple[float, ...], policy: Policy) -> tuple[float, ...]:
    """Scales in ascending order. ValueError for those at which nothing can be seen."""
    if not scales:
        raise ValueError("expected factors on the size of --policy (0.75,1,1.25)")
    if policy.native:
        if scales != (1.0,):
            raise ValueError("with --policy native no pixel is scaled; use --flip alone, or short=N")
        return scales
    sides = policy.exact or (policy.short or 0,)
    for scale in scales:
        if not STEP <= scale * min(sides) <= scale * max(sides) <= MAX_SIDE:
            raise ValueError(f"{scale:g} times the side of --policy {policy} is not from {STEP} to {MAX_SIDE} pixels")
    scales = tuple(sorted(scales))
    for one, following in pairwise(scales):
        if (side := scaled(min(sides), one)) == scaled(min(sides), following):
            raise ValueError(f"{one:g} and {following:g} times the side of --policy {policy} are both {side} pixels")
    return scales
