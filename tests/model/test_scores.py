"""Metrics equal those of an implementation that goes class by class and pixel by pixel, with sets."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.scores import BY_CLASS, IGNORED, OVERALL, Metrics, Scores

CLOSE = 1e-9
Pair = tuple[np.ndarray, np.ndarray]


def mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def contour(inside: np.ndarray, reach: int) -> np.ndarray:
    """The pixels of a class that as many erosions by a square of three, with nothing outside the image, take away."""
    left = inside
    height, width = inside.shape
    for _ in range(reach):
        around = np.pad(left, 1)
        left = np.logical_and.reduce([around[y : y + height, x : x + width] for y in range(3) for x in range(3)])
    return inside & ~left


def pixels_of(truth: np.ndarray, mask: np.ndarray, classes: int) -> list[dict[str, int]]:
    """Of each class: pixels in both, in truth, in mask, and the same of boundaries."""
    reach = max(1, round(0.02 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
    found = []
    for one in range(classes):
        in_truth, in_mask = truth == one, (mask == one) & (truth != IGNORED)
        both = {"both": int((in_truth & in_mask).sum()), "truth": int(in_truth.sum()), "mask": int(in_mask.sum())}
        near = {"near_both": 0, "near_truth": 0, "near_mask": 0}
        if both["truth"] or both["mask"]:
            near_truth, near_mask = contour(in_truth, reach), contour(in_mask, reach)
            near["near_both"] = int((near_truth & near_mask).sum())
            near |= {"near_truth": int(near_truth.sum()), "near_mask": int(near_mask.sum())}
        found.append(both | near)
    return found


def metrics_of(pixels: list[dict[str, int]]) -> dict[str, float | list[float | None] | None]:
    total = sum(one["truth"] for one in pixels)
    iou = [share(one["both"], one["truth"] + one["mask"] - one["both"]) for one in pixels]
    dice = [share(2 * one["both"], one["truth"] + one["mask"]) for one in pixels]
    near = [share(one["near_both"], one["near_truth"] + one["near_mask"] - one["near_both"]) for one in pixels]
    recall = [share(one["both"], one["truth"]) for one in pixels]
    weighted = (
        [one["truth"] / total * (value or 0) for one, value in zip(pixels, iou, strict=True)] if total else [None]
    )
    return {
        "accuracy": share(sum(one["both"] for one in pixels), total),
        "mean_accuracy": mean(recall),
        "mean_iou": mean(iou),
        "mean_dice": mean(dice),
        "frequency_weighted_iou": sum(weighted) if total else None,
        "mean_boundary_iou": mean(near),
        "class_accuracy": recall,
        "class_precision": [share(one["both"], one["mask"]) for one in pixels],
        "class_iou": iou,
        "class_dice": dice,
        "class_boundary_iou": near,
    }


def pooled(pairs: list[Pair], classes: int) -> dict:
    each = [pixels_of(*pair, classes) for pair in pairs]
    return metrics_of(
        [{name: sum(image[one][name] for image in each) for name in each[0][one]} for one in range(classes)]
    )


def averaged(pairs: list[Pair], classes: int) -> dict:
    each = [metrics_of(pixels_of(*pair, classes)) for pair in pairs if (pair[0] != IGNORED).any()]
    overall = {name: mean([one[name] for one in each]) for name in OVERALL}
    return overall | {name: [mean([one[name][at] for one in each]) for at in range(classes)] for name in BY_CLASS}


def assert_equal(found: Metrics, expected: dict) -> None:
    for name in (*OVERALL, *BY_CLASS):
        wanted = np.array(expected[name], float)
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=0, atol=CLOSE, equal_nan=True, err_msg=name)


@st.composite
def images(draw: st.DrawFn, classes: int) -> Pair:
    """Areas and noise of some of the classes, the mask a worse copy of the truth, some of it ignored."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width = draw(st.sampled_from([(1, 1), (1, 9), (3, 2), (13, 40), (90, 61), (120, 200)]))
    some = rng.integers(0, classes, draw(st.integers(1, min(classes, 9))))
    side = draw(st.integers(1, 40))
    areas = rng.choice(some, (height // side + 1, width // side + 1))
    truth = np.kron(areas, np.ones((side, side), np.int32))[:height, :width].astype(np.int32)
    mask = np.roll(truth, draw(st.integers(0, 5)), axis=1)
    wrong = rng.random(truth.shape) < draw(st.sampled_from([0, 0.02, 1]))
    mask[wrong] = rng.integers(0, classes + draw(st.booleans()), int(wrong.sum()))  # also of no class
    ignored = rng.random(areas.shape) < draw(st.sampled_from([0, 0.3, 1]))
    truth[np.kron(ignored, np.ones((side, side), bool))[:height, :width]] = IGNORED
    return truth, mask.astype(np.uint8 if classes < 255 else np.uint16)


@st.composite
def collections(draw: st.DrawFn) -> tuple[int, list[Pair]]:
    classes = draw(st.sampled_from([1, 2, 7, 150, 254, 255, 256, 300]))
    return classes, draw(st.lists(images(classes), min_size=1, max_size=3))


@settings(deadline=None, max_examples=25)
@given(collections())
def test_all_metrics_equal_those_of_sets_of_pixels(collection):
    classes, pairs = collection
    scores = Scores.empty(classes)
    for truth, mask in pairs:
        found = scores.add(truth, mask)
        assert_equal(found.metrics, metrics_of(pixels_of(truth, mask, classes)))
        assert found.pixels == (truth != IGNORED).sum()
    assert_equal(scores.pooled(), pooled(pairs, classes))
    assert_equal(scores.averaged(), averaged(pairs, classes))
    assert scores.confusion.sum() == sum((truth != IGNORED).sum() for truth, _ in pairs)


@settings(deadline=None, max_examples=8)
@given(collections(), st.integers(0, 3), st.randoms())
def test_parts_give_the_same_in_any_order_and_after_a_journey(collection, cut, random):
    classes, pairs = collection
    whole, first, second = Scores.empty(classes), Scores.empty(classes), Scores.empty(classes)
    for pair in pairs:
        whole.add(*pair)
    random.shuffle(pairs)
    for number, pair in enumerate(pairs):
        (first if number < cut else second).add(*pair)
    second.merge(pickle.loads(pickle.dumps(first)))
    assert pickle.dumps(second) == pickle.dumps(whole)


def test_a_mask_that_is_its_truth_is_perfect_and_an_ignored_image_is_counted_apart():
    scores = Scores.empty(3)
    truth = np.array([[0, 0, 1], [0, IGNORED, 1]], np.int32)
    scores.add(truth, np.where(truth == IGNORED, 2, truth).astype(np.uint8))
    scores.add(np.full((2, 2), IGNORED, np.int32), np.zeros((2, 2), np.uint8))
    assert (scores.images, scores.ignored) == (1, 1)
    for metrics in (scores.pooled(), scores.averaged()):
        assert {getattr(metrics, name) for name in OVERALL} == {1.0}
        assert metrics.class_iou[:2].tolist() == [1, 1]
        assert all(math.isnan(getattr(metrics, name)[2]) for name in BY_CLASS)


def test_a_class_that_only_the_mask_has_counts_with_zero():
    found = Scores.empty(3).add(np.zeros((4, 4), np.int32), np.tile(np.array([0, 0, 0, 1], np.uint8), (4, 1)))
    assert found.metrics.class_iou.tolist()[:2] == [0.75, 0]
    assert found.metrics.mean_iou == 0.375


@pytest.mark.parametrize(
    ("truth", "mask"),
    [([[0, 1]], [[0], [1]]), ([[-2]], [[0]]), ([[3]], [[0]]), ([[0]], [[4]]), ([[]], [[]]), ([0], [0])],
)
def test_what_cannot_be_compared_is_refused(truth, mask):
    with pytest.raises(ValueError, match=r"expected two of the same size|other classes"):
        Scores.empty(3).add(np.array(truth, np.int32), np.array(mask, np.int32))
