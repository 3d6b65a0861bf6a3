"""Masks at any size, and statistics that are what they say."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model import predictor
from model.checkpoint import load_checkpoint
from model.predictor import Predictor, segmentation, upsampled_argmax


def test_masks_have_the_size_asked_for_and_counts_are_their_histogram(checkpoint):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    sizes = [(64, 96), (301, 77), (1, 1)]
    for found, size in zip(Predictor(load_checkpoint(checkpoint))(images, sizes), sizes, strict=True):
        assert found.mask.shape == size
        assert found.mask.dtype == np.uint8
        assert np.array_equal(np.bincount(found.mask.ravel(), minlength=5), found.pixels)
        assert 0 < found.confidence <= 1
        assert 0 <= found.entropy <= np.log(5) + 1e-6


def test_an_image_gets_the_same_mask_alone_and_in_a_batch(checkpoint):
    images = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    predict = Predictor(load_checkpoint(checkpoint))
    together = predict(images, [(90, 90)] * 4)
    for image, found in zip(images, together, strict=True):
        alone = predict(image[None], [(90, 90)])[0]
        assert (alone.mask == found.mask).mean() > 0.999  # float sums differ in their last bit with the batch


def test_statistics_equal_a_plain_softmax():
    logits = 3 * torch.randn(6, 20, 30, generator=torch.Generator().manual_seed(5))
    found = segmentation(logits, (41, 57))
    probability = np.exp(logits.double().numpy())
    probability /= probability.sum(axis=0)
    winner, best = probability.argmax(axis=0), probability.max(axis=0)
    assert found.confidence == pytest.approx(best.mean(), abs=1e-6)
    assert found.entropy == pytest.approx(-(probability * np.log(probability)).sum(axis=0).mean(), abs=1e-6)
    for class_id in range(6):
        assert found.class_confidence[class_id] == pytest.approx(best[winner == class_id].mean(), abs=1e-6)


def test_a_class_that_wins_nothing_has_no_confidence():
    logits = torch.zeros(3, 4, 4)
    logits[1] = 5
    found = segmentation(logits, (8, 8))
    assert found.pixels.tolist() == [0, 64, 0]
    assert np.isnan(found.class_confidence[[0, 2]]).all()


@pytest.mark.parametrize("budget", [1, 40_000, 1 << 30])
def test_a_few_classes_at_a_time_give_the_mask_of_all_at_once(monkeypatch, budget):
    logits = torch.randn(37, 17, 23, generator=torch.Generator().manual_seed(2))
    logits[20] = logits[3]  # a tie, which goes to the smaller id
    expected = F.interpolate(logits[None], size=(71, 90), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    monkeypatch.setattr(predictor, "UPSAMPLING_BYTES", budget)
    assert torch.equal(upsampled_argmax(logits, (71, 90)), expected)


def test_more_than_256_classes_make_a_16_bit_mask():
    logits = torch.randn(300, 4, 4)
    logits[299, :2] = 100
    mask = segmentation(logits, (16, 16)).mask
    assert mask.dtype == np.uint16
    assert (mask[:4] == 299).all()
