"""How good masks are: their pixels compared with those of ground truth, image after image, in a constant memory.

Every number comes twice. Pooled: of all pixels of all images together, as papers report it. Averaged: the mean over
images of each image's own number, in which a small image counts as much as a large one.

Pixels whose truth is `IGNORED` count nowhere. A class that neither truth nor mask has is undefined (NaN) and left out
of means; one that only the mask has is wrong there, with an IoU of 0, and counts.

    IoU, Dice              intersection over union; twice the intersection over both areas
    class accuracy         of the pixels of a class in the truth, those found (recall); precision: of those in the mask
    frequency-weighted     IoU, weighted with the class's share of the truth
    boundary IoU           IoU of the pixels of each class that are near its contour (Cheng et al. 2021,
                           arXiv:2103.16562): at most 2 % of the image's diagonal inside, where its border is contour

Boundaries of all classes are found at once: a pixel is no boundary if the square around it lies within the image and
has one class. Ignored pixels are an area of their own in both maps there, so where a class meets them is contour.

H W: height and width; K: classes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

IGNORED = -1  # a pixel of the truth that counts nowhere
BOUNDARY = 0.02  # of the diagonal (section 5 of the paper)
BLOCK = 1 << 18  # pixels that are counted at once, as NumPy makes eight bytes of each
FRACTION, LOW = 52, 26  # bits of a mean's sum, and of the lower of its two parts


@dataclass(frozen=True)
class Metrics:
    """Shares from 0 to 1, NaN where undefined; those of classes are float64 (K,)."""

    accuracy: float  # of pixels
    mean_accuracy: float
    mean_iou: float
    mean_dice: float
    frequency_weighted_iou: float
    mean_boundary_iou: float
    class_accuracy: np.ndarray
    class_precision: np.ndarray
    class_iou: np.ndarray
    class_dice: np.ndarray
    class_boundary_iou: np.ndarray


OVERALL = ("accuracy", "mean_accuracy", "mean_iou", "mean_dice", "frequency_weighted_iou", "mean_boundary_iou")
BY_CLASS = ("class_accuracy", "class_precision", "class_iou", "class_dice", "class_boundary_iou")


@dataclass(frozen=True)
class ImageScores:
    """What one image has; pixels are those whose truth is not ignored."""

    metrics: Metrics
    pixels: int
    hits: np.ndarray  # int64 (K,): pixels of each class in both, in the truth, in the mask
    truth: np.ndarray
    mask: np.ndarray


@dataclass
class Scores:
    """All images so far. Sums are integers, so the order of images and of merges changes nothing."""

    confusion: np.ndarray  # int64 (K, K + 1): pixels by truth and mask; the last column is of no class
    boundary: np.ndarray  # int64 (3, K): pixels of boundaries: in both, in the truth's, in the mask's
    images: int  # with any pixel that counts
    ignored: int  # images without
    overall: np.ndarray  # int64 (2, 6): sums over images of OVERALL, as `parts` gives them
    by_class: np.ndarray  # int64 (2, 5, K): of BY_CLASS
    counts: np.ndarray  # int64 (5, K): images in which each of these is defined

    @classmethod
    def empty(cls, classes: int) -> "Scores":
        """Of no image yet."""
        overall, by_class = len(OVERALL), len(BY_CLASS)
        return cls(
            confusion=np.zeros((classes, classes + 1), np.int64),
            boundary=np.zeros((3, classes), np.int64),
            images=0,
            ignored=0,
            overall=np.zeros((2, overall), np.int64),
            by_class=np.zeros((2, by_class, classes), np.int64),
            counts=np.zeros((by_class, classes), np.int64),
        )

    @property
    def classes(self) -> int:
        return len(self.confusion)

    def add(self, truth: np.ndarray, mask: np.ndarray) -> ImageScores:
        """Add an image: what it has by itself.

        `truth` is integer (H, W), class ids or IGNORED; `mask` uint8 or uint16 (H, W), class ids, or K for none of the
        classes, which is wrong everywhere. Raises ValueError where that is not so.
        """
        confusion, boundary = count(truth, mask, self.classes)
        self.confusion += confusion
        self.boundary += boundary
        hits, of_truth, of_mask = areas(confusion)
        metrics = measure(hits, of_truth, of_mask, boundary)
        pixels = int(of_truth.sum())
        if pixels:
            self.images += 1
            self.overall += parts(np.array([getattr(metrics, name) for name in OVERALL]))
            values = np.stack([getattr(metrics, name) for name in BY_CLASS])
            self.by_class += parts(values)
            self.counts += ~np.isnan(values)
        else:
            self.ignored += 1
        return ImageScores(metrics, pixels, hits, of_truth, of_mask)

    def merge(self, other: "Scores") -> None:
        """Add the images of another."""
        self.images += other.images
        self.ignored += other.ignored
        for name in ("confusion", "boundary", "overall", "by_class", "counts"):
            getattr(self, name).__iadd__(getattr(other, name))

    def pooled(self) -> Metrics:
        """Over all pixels."""
        return measure(*areas(self.confusion), self.boundary)

    def averaged(self) -> Metrics:
        """Means over images: of a class over those in which it is defined, of a mean over all that have any pixel."""
        overall = mean_of(self.overall, np.array(self.images))
        by_class = mean_of(self.by_class, self.counts)
        found = dict(zip(OVERALL, overall.tolist(), strict=True)), dict(zip(BY_CLASS, by_class, strict=True))
        return Metrics(**found[0], **found[1])


def measure(hits: np.ndarray, truth: np.ndarray, mask: np.ndarray, boundary: np.ndarray) -> Metrics:
    """Metrics of areas in pixels, (K,) each, and of boundaries (3, K)."""
    class_accuracy, iou = ratio(hits, truth), ratio(hits, truth + mask - hits)
    dice = ratio(2 * hits, truth + mask)
    boundary_iou = ratio(boundary[0], boundary[1] + boundary[2] - boundary[0])
    pixels = truth.sum()
    return Metrics(
        accuracy=float(ratio(hits.sum(), pixels)),
        mean_accuracy=mean(class_accuracy),
        mean_iou=mean(iou),
        mean_dice=mean(dice),
        frequency_weighted_iou=float(ratio((truth * np.nan_to_num(iou)).sum(), pixels)),
        mean_boundary_iou=mean(boundary_iou),
        class_accuracy=class_accuracy,
        class_precision=ratio(hits, mask),
        class_iou=iou,
        class_dice=dice,
        class_boundary_iou=boundary_iou,
    )


def areas(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class that truth and mask share, that the truth has, that the mask has."""
    return np.diagonal(confusion), confusion.sum(1), confusion[:, :-1].sum(0)


def count(truth: np.ndarray, mask: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The confusion (K, K + 1) and the boundaries (3, K) of an image, in pixels."""
    if truth.shape != mask.shape or truth.ndim != 2 or not truth.size:
        raise ValueError(f"truth of shape {truth.shape} and mask of shape {mask.shape}: expected two of the same size")
    least = truth.min()
    if least < IGNORED or truth.max() >= classes or mask.min() < 0 or mask.max() > classes:
        raise ValueError(f"ids of other classes than the {classes} that there are")
    reach = max(1, round(BOUNDARY * math.hypot(*truth.shape)))
    near_truth = near_contour(truth, reach)
    has_ignored = least == IGNORED
    near_mask = near_contour(np.where(truth == IGNORED, np.uint16(classes + 1), mask) if has_ignored else mask, reach)
    # one number for each pixel says all that is asked of it: truth + 1, mask, and whether it is near either's contour
    counts = np.zeros(4 * (classes + 1) ** 2, np.int64)
    for rows in blocks(*truth.shape):
        code = truth[rows].astype(np.int32)
        code += 1
        code *= classes + 1
        code += mask[rows]
        for near in (near_truth, near_mask):
            code *= 2
            code += near[rows]
        counts += np.bincount(code.ravel(), minlength=len(counts))
    counted = counts.reshape(classes + 1, classes + 1, 2, 2)[1:]  # without the row of ignored pixels
    in_truth = counted[:, :, 1].sum((1, 2))
    in_mask = counted[:, :-1, :, 1].sum((0, 2))
    return counted.sum((2, 3)), np.stack([np.diagonal(counted[:, :, 1, 1]), in_truth, in_mask])


def near_contour(ids: np.ndarray, reach: int) -> np.ndarray:
    """bool (H, W): whether the square of 2 * reach + 1 around a pixel has more than one id or leaves the image."""
    height, width = ids.shape
    near = np.ones((height, width), bool)
    if height <= 2 * reach or width <= 2 * reach:
        return near
    # a square has one id if each of its rows has, and its middle column
    in_rows = any_of(ids[:, 1:] != ids[:, :-1], 2 * reach, axis=1)  # (H, W - 2 * reach)
    middle = ids[:, reach : width - reach]
    in_columns = middle[1:] != middle[:-1]
    in_columns |= in_rows[1:]
    inside = any_of(in_columns, 2 * reach, axis=0)
    inside |= in_rows[: len(inside)]  # the first row of a square has no row before it to be compared with
    near[reach : height - reach, reach : width - reach] = inside
    return near


def any_of(flags: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Whether any of `length` neighbours along an axis is true, for each place that has so many, itself the first.

    Windows are joined to ones of twice the length, which takes as many passes as the length has bits.
    """
    reached = 1
    while reached < length:
        step = min(reached, length - reached)
        size = flags.shape[axis] - step
        flags = flags[:, :size] | flags[:, step:] if axis else flags[:size] | flags[step:]
        reached += step
    return flags


def blocks(height: int, width: int) -> Iterator[slice]:
    """Rows from top to bottom, about BLOCK pixels at a time."""
    rows = max(1, BLOCK // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where there is no whole."""
    with np.errstate(invalid="ignore"):
        return np.true_divide(part, whole)


def mean(values: np.ndarray) -> float:
    """Of those that are defined."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def parts(values: np.ndarray) -> np.ndarray:
    """int64 (2, ...): values from 0 to 1, or NaN for 0, in units of 2**-52, as a high and a low part.

    Their sums are exact, in any order, for a hundred billion images.
    """
    units = np.rint(np.nan_to_num(values) * 2.0**FRACTION).astype(np.int64)
    return np.stack([units >> LOW, units & ((1 << LOW) - 1)])


def mean_of(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The means of values whose `parts` have these sums."""
    return ratio((sums[0] * 2.0**LOW + sums[1]) * 2.0**-FRACTION, counts)
