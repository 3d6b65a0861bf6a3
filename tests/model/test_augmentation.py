"""A crop is a function of its generator, keeps image and truth together, and never invents a class."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.augmentation import Augmentation, augment, colour_change, is_varied, recoloured
from model.scores import IGNORED

PLAIN = Augmentation(32, scales=(1.0, 1.0), flip=0, colour=0, most_of_one_class=1)
MEAN = np.array([10.0, 20.0, 30.0])


def pair(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image that shows its truth: the red of a pixel is 40 times its class."""
    truth = np.random.default_rng(seed).integers(0, 5, (height, width)).astype(np.int16)
    truth = np.repeat(np.repeat(truth, 8, 0), 8, 1)[:height, :width]
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 40 * truth
    return image, truth


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 120), st.integers(1, 120), st.integers(0, 99))
def test_a_crop_has_its_size_and_the_same_generator_gives_the_same_crop(height, width, tall, wide, seed):
    image, truth = pair(height, width)
    crops = [augment(image, truth, (tall, wide), np.random.default_rng(seed), Augmentation(32), MEAN) for _ in range(2)]
    for pixels, ids in crops:
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert ids.shape == (32, 32)
        assert set(np.unique(ids)) <= set(np.unique(truth)) | {IGNORED}
    assert np.array_equal(crops[0][0], crops[1][0])
    assert np.array_equal(crops[0][1], crops[1][1])


@pytest.mark.parametrize("flip", [0, 1])
def test_without_scaling_and_colours_a_crop_is_a_part_of_the_image_and_truth_goes_along(flip):
    image, truth = pair(80, 70)
    pixels, ids = augment(image, truth, (80, 70), np.random.default_rng(3), replace(PLAIN, flip=flip), MEAN)
    assert np.array_equal(pixels[..., 0], 40 * ids)
    assert any(
        np.array_equal(ids[:, :: -1 if flip else 1], truth[y : y + 32, x : x + 32])
        for y in range(49)
        for x in range(39)
    )


def test_what_an_image_does_not_cover_is_ignored_and_has_the_mean_colour():
    image, truth = pair(20, 24)
    pixels, ids = augment(image, truth, (20, 24), np.random.default_rng(0), PLAIN, MEAN)
    assert np.array_equal(ids[:20, :24], truth)
    assert (ids[20:] == IGNORED).all()
    assert (ids[:, 24:] == IGNORED).all()
    assert (pixels[20:] == MEAN).all()


def test_scaling_keeps_image_and_truth_in_the_same_place():
    image, truth = pair(96, 96)
    for scale in (0.5, 2.0):
        how = replace(PLAIN, scales=(scale, scale))
        pixels, ids = augment(image, truth, (96, 96), np.random.default_rng(1), how, MEAN)
        inside = np.abs(pixels[..., 0].astype(int) - 40 * ids) < 20  # but where two classes are mixed at their border
        assert inside.mean() > 0.75


def test_a_crop_that_is_almost_all_of_one_class_is_not_taken_where_there_is_another():
    truth = np.zeros((256, 256), np.int16)
    truth[:64, :64] = 1
    image = np.zeros((256, 256, 3), np.uint8)
    how = replace(PLAIN, most_of_one_class=0.9)
    found = [augment(image, truth, (256, 256), np.random.default_rng(n), how, MEAN)[1] for n in range(100)]
    blind = [augment(image, truth, (256, 256), np.random.default_rng(n), PLAIN, MEAN)[1] for n in range(100)]
    chosen, any_of_all = (sum(is_varied(ids, 0.9) for ids in crops) for crops in (found, blind))
    assert chosen > 3 * any_of_all


def test_colours_change_as_brightness_contrast_saturation_and_hue_do():
    grey = np.full((2, 2, 3), 100, np.uint8)
    how = Augmentation(32, brightness=0, contrast=(1, 1))
    for seed in range(20):  # a grey has neither saturation nor hue
        assert np.abs(recoloured(grey, *colour_change(np.random.default_rng(seed), how)).astype(int) - 100).max() <= 1
    none = Augmentation(32, colour=0)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    assert np.abs(recoloured(image, *colour_change(np.random.default_rng(1), none)).astype(int) - image).max() <= 1
    light = Augmentation(32, contrast=(1, 1), saturation=(1, 1), hue=0)
    moved = {int(recoloured(grey, *colour_change(np.random.default_rng(seed), light))[0, 0, 0]) for seed in range(60)}
    assert 68 <= min(moved) < 100 < max(moved) <= 132
