"""Masks and counts are those of interpolating all classes to full size, which is what is never done."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model import native, upsample, upsample_triton

IMPLEMENTATIONS = {
    "native": lambda logits, size: upsample.native_argmax(native.library(), logits, size),
    "portable": upsample.portable_argmax,
    "triton": upsample_triton.upsampled_argmax,
}


def random_logits(h: int, w: int, classes: int, seed: int = 0, smooth: bool = False) -> Tensor:
    logits = torch.randn(h, w, classes, generator=torch.Generator().manual_seed(seed))
    return logits.cumsum(0).cumsum(1) / 3 if smooth else logits


def check(found: tuple[Tensor, Tensor], logits: Tensor, size: tuple[int, int]) -> None:
    """Every pixel has the class that wins there, or one that is as good; and the counts are the mask's."""
    mask, pixels = found
    assert mask.shape == size
    assert torch.equal(pixels.cpu(), torch.bincount(mask.flatten().long(), minlength=logits.shape[2]))
    wrong = 0
    for first in range(0, size[0], 200):  # full-size logits of a few rows at a time
        rows = torch.arange(first, min(first + 200, size[0]))
        full = interpolated_rows(logits, size, rows)
        best, winner = full.max(dim=0)
        chosen = mask[rows].long()
        wrong += (chosen != winner).sum().item()
        assert (best - full.gather(0, chosen[None])[0]).max() <= 1e-4
    assert wrong <= 1e-4 * mask.numel()


def interpolated_rows(logits: Tensor, size: tuple[int, int], rows: Tensor) -> Tensor:
    """(K, rows, width) of `F.interpolate` to `size`: its rows by their weights in float64, its columns by itself."""
    h = logits.shape[0]
    centre = ((rows.double() + 0.5) * h / size[0] - 0.5).clamp(min=0)
    low = centre.long().clamp(max=h - 1)
    high, weight = (low + 1).clamp(max=h - 1), (centre - low)[:, None, None]
    lines = logits[low].double() * (1 - weight) + logits[high].double() * weight  # (rows, w, K)
    flat = lines.permute(2, 0, 1).reshape(1, -1, logits.shape[1])
    columns = F.interpolate(flat, size=size[1], mode="linear", align_corners=False)
    return columns.view(logits.shape[2], len(rows), size[1])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    classes=st.integers(1, 40),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    seed=st.integers(0, 1000),
    smooth=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_masks_equal_those_of_full_size_logits(name, h, w, classes, height, width, seed, smooth):
    logits = random_logits(h, w, classes, seed, smooth)
    expected = F.interpolate(logits.permute(2, 0, 1)[None], size=(height, width), mode="bilinear", align_corners=False)[
        0
    ]
    mask, pixels = IMPLEMENTATIONS[name](logits, (height, width))
    assert (expected.max(dim=0).values - expected.gather(0, mask.long()[None])[0]).max() <= 1e-4
    assert torch.equal(pixels, torch.bincount(mask.flatten().long(), minlength=classes))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (2000, 3000), (1999, 2999), (37, 1021), (128, 128), (64, 90)])
@pytest.mark.parametrize("smooth", [False, True], ids=["noise", "smooth"])
def test_any_output_size(size, smooth):
    logits = random_logits(32, 48, 21, smooth=smooth)
    check(IMPLEMENTATIONS["native"](logits, size), logits, size)
    check(IMPLEMENTATIONS["portable"](logits, size), logits, size)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_tie_goes_to_the_smaller_class(name):
    logits = random_logits(5, 6, 37)
    logits[:, :, 20] = logits[:, :, 3]
    mask, pixels = IMPLEMENTATIONS[name](logits, (40, 50))
    assert pixels[3] > 0
    assert not (mask == 20).any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_more_than_256_classes_make_a_16_bit_mask(name):
    logits = random_logits(4, 4, 300)
    logits[:2, :, 299] = 100
    mask, pixels = IMPLEMENTATIONS[name](logits, (16, 16))
    assert mask.dtype == torch.uint16
    assert (mask[:4].numpy() == 299).all()
    assert pixels[299] >= 64


@pytest.mark.parametrize("budget", [1, 40_000])
def test_a_few_classes_at_a_time_give_the_mask_of_all_at_once(monkeypatch, budget):
    logits = random_logits(17, 23, 37)
    expected, _ = upsample.portable_argmax(logits, (71, 90))
    monkeypatch.setattr(upsample, "STRIP_BYTES", budget)
    assert torch.equal(upsample.portable_argmax(logits, (71, 90))[0], expected)


def test_logits_that_are_not_numbers_still_give_a_mask():
    logits = torch.full((3, 3, 5), torch.nan)
    mask, pixels = IMPLEMENTATIONS["native"](logits, (9, 9))
    assert pixels.sum() == mask.numel()


@pytest.mark.parametrize("classes", [1, 2, 8, 150, 300])
def test_statistics_equal_a_plain_softmax(classes):
    logits = 3 * random_logits(20, 30, classes, seed=5)
    probability = np.exp(logits.double().numpy().reshape(-1, classes))
    probability /= probability.sum(axis=1, keepdims=True)
    winner, best = probability.argmax(axis=1), probability.max(axis=1)
    entropy = -(probability * np.log(probability)).sum()
    for sums in (upsample.native_statistics(native.library(), logits), upsample.portable_statistics(logits)):
        assert sums.won.tolist() == np.bincount(winner, minlength=classes).tolist()
        assert np.allclose(sums.confidence, np.bincount(winner, weights=best, minlength=classes), atol=1e-4)
        assert float(sums.entropy) == pytest.approx(entropy, abs=2e-3)
