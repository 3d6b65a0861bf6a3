"""Several looks at an image are worth what their probabilities are on average, and one look is itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.demo import WEIGHTS
from jobs.scenes.street import draw_scene
from model.checkpoint import load_checkpoint
from model.looks import averaged
from model.predictor import Predictor
from model.upsample import softmax_statistics
from model.windows import CELL, STEP, Tiling

SIDE = st.integers(1, 4).map(lambda steps: steps * STEP)


@pytest.fixture(scope="module")
def predictors():
    loaded = load_checkpoint(str(WEIGHTS))
    return {engine: Predictor(loaded, "cpu", engine, "float32") for engine in ("native", "torch")}


class Opinions:
    """A network that says something else of every view, the same each time."""

    def __init__(self, classes: int, spread: float, seed: int):
        self.classes, self.spread, self.seed = classes, spread, seed

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        count, height, width, _ = images.shape
        numbers = torch.manual_seed(self.seed + int(images.astype(np.int64).ravel() @ np.arange(images.size)) % 2**31)
        shape = (count, height // CELL, width // CELL, self.classes)
        return self.spread * torch.randn(shape, generator=numbers)


def softmax(logits: np.ndarray) -> np.ndarray:
    found = np.exp(logits - logits.max(axis=3, keepdims=True))
    return found / found.sum(axis=3, keepdims=True)


def resized(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Bilinear along one axis: each of `size` cells is sampled where its centre lies among those that there are."""
    at = ((np.arange(size) + 0.5) * values.shape[axis] / size - 0.5).clip(0, values.shape[axis] - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, values.shape[axis] - 1)
    shape = [-1 if number == axis else 1 for number in range(4)]
    share = (at - low).reshape(shape)
    return values.take(low, axis) * (1 - share) + values.take(high, axis) * share


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.tuples(SIDE, SIDE),
    st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3),
    st.booleans(),
    st.integers(2, 9),
    st.sampled_from([1.0, 10.0, 300.0]),
    st.integers(0, 99),
)
def test_what_goes_on_is_the_mean_of_all_probabilities(images, bucket, sizes, flip, classes, spread, seed):
    """Of views of any sizes, by another implementation, in float64 and of all probabilities at once."""
    rng = np.random.default_rng(seed)
    views = [rng.integers(0, 256, (images, *size, 3), dtype=np.uint8) for size in sizes]
    network = Opinions(classes, spread, seed)
    found = averaged(network, views, flip, bucket)
    looks = [softmax(network(view).double().numpy()) for view in views]
    if flip:
        looks += [softmax(network(view[:, :, ::-1]).double().numpy())[:, :, ::-1] for view in views]
    rows, columns = (side // CELL for side in bucket)
    if len(looks) == 1:
        rows, columns = looks[0].shape[1:3]
    expected = np.mean([resized(resized(look, 1, rows), 2, columns) for look in looks], axis=0)
    assert found.shape == (images, rows, columns, classes)
    assert torch.isfinite(found).all()
    assert np.allclose(softmax(found.double().numpy()), expected, atol=2e-6)
    sure = softmax_statistics(found[0].contiguous())
    entropy = -(expected[0] * np.log(expected[0].clip(1e-300))).sum(axis=2)
    assert float(sure.confidence.sum()) == pytest.approx(expected[0].max(axis=2).sum(), rel=1e-4)
    assert float(sure.entropy) == pytest.approx(entropy.sum(), rel=1e-3, abs=1e-3)


@settings(deadline=None, max_examples=10)
@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.integers(0, 9))
def test_one_look_is_what_the_network_says_whatever_its_size(size, bucket, seed):
    said = []

    def network(images: np.ndarray) -> torch.Tensor:
        said.append(Opinions(3, 1.0, seed)(images))
        return said[-1]

    assert averaged(network, [np.zeros((2, *size, 3), np.uint8)], False, bucket) is said[0]
    assert len(said) == 1


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_with_flip_a_mirrored_image_has_the_mirrored_mask(predictors, engine):
    predict = predictors[engine]
    views = [draw_scene(3, width, height).image[None] for width, height in ((256, 192), (384, 288))]
    mirrored = [np.ascontiguousarray(view[:, :, ::-1]) for view in views]
    logits, again = (averaged(predict.logits, some, True, (192, 256)) for some in (views, mirrored))
    assert torch.allclose(again.flip(2), logits, atol=1e-4)
    logits, again = (averaged(predict.logits, some[:1], True, (192, 256)) for some in (views, mirrored))
    assert torch.equal(again.flip(2), logits), "where nothing is resized, to the last bit"
    (one,), (other,) = (predict.at_scales(some, (192, 256), [(230, 301)], flip=True) for some in (views, mirrored))
    assert (one.mask == other.mask[:, ::-1]).mean() > 0.9999
    assert one.confidence == pytest.approx(other.confidence, abs=1e-6)
    (plain,), (turned,) = (predict.at_scales(some, (192, 256), [(230, 301)]) for some in (views, mirrored))
    assert (plain.mask == turned.mask[:, ::-1]).mean() < 0.9999, "it is no wonder"


def test_engines_agree_about_several_looks(predictors):
    views = [draw_scene(5, side, side).image[None].repeat(2, axis=0) for side in (96, 128, 192)]
    both = (predict.at_scales(views, (128, 128), [(224, 224)] * 2, flip=True) for predict in predictors.values())
    for ours, theirs in zip(*both, strict=True):
        assert (ours.mask == theirs.mask).mean() > 0.999
        assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-5)
        assert ours.entropy == pytest.approx(theirs.entropy, abs=1e-5)


def test_windows_are_mirrored_each_by_itself(predictors):
    """One window is the whole image; of several the image's mirror, whose windows lie elsewhere, says the like."""
    predict, image = predictors["native"], draw_scene(2, 320, 192).image
    mirrored = np.ascontiguousarray(image[:, ::-1])
    (whole,) = predict.at_scales([image[None]], (192, 320), [(192, 320)], flip=True)
    (window,) = predict.through_windows([image], Tiling(320, 32), 1, flip=True)
    assert np.array_equal(window.mask, whole.mask)
    assert (window.confidence, window.entropy) == (whole.confidence, whole.entropy)
    found = [predict.through_windows([one], Tiling(192, 64), 2, flip=True)[0] for one in (image, mirrored)]
    assert (found[0].mask == found[1].mask[:, ::-1]).mean() > 0.999
    assert not np.array_equal(found[0].mask, predict.through_windows([image], Tiling(192, 64), 2)[0].mask)
