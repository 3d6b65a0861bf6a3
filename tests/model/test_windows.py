"""Images through windows: every pixel once, no jump where a window begins, and one window changes nothing."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.demo import WEIGHTS
from jobs.scenes.street import draw_scene
from model import native
from model.checkpoint import load_checkpoint
from model.mosaic import Mosaic, strip_pixels
from model.predictor import Predictor
from model.upsample import softmax_statistics, upsampled_argmax
from model.windows import CELL, Tiling, cut_out, padded, weights

SIDE = st.integers(1, 700)
TILING = st.sampled_from([Tiling(64, 32), Tiling(128, 32), Tiling(128, 96), Tiling(256, 128)])


@pytest.fixture(scope="module")
def demo():
    return Predictor(load_checkpoint(str(WEIGHTS)), "cpu", precision="float32")


@given(st.integers(1, 30_000), st.sampled_from([Tiling(), Tiling(64, 32), Tiling(512, 384), Tiling(8192, 32)]))
def test_windows_cover_a_side_and_share_what_is_asked(side, tiling):
    assert tiling.count(np.array([side])) == [tiling.count(side)]
    assert type(tiling.count(side)) is int, "else the run record could not be written"
    spans = tiling.spans(side)
    assert (spans[0].start, spans[-1].stop) == (0, padded(side))
    assert {span.stop - span.start for span in spans} == {min(padded(side), tiling.window)}
    assert all(span.start % 32 == 0 for span in spans)
    for one, following in pairwise(spans):
        assert one.start < following.start <= one.stop - tiling.overlap


@given(st.integers(1, 5000), TILING)
def test_at_every_logit_the_windows_count_as_one_and_only_where_they_see(side, tiling):
    spans = tiling.spans(side)
    found = weights(spans)
    assert np.allclose(found.sum(axis=0), 1, atol=1e-6)
    for number, (span, one) in enumerate(zip(spans, found, strict=True)):
        assert not one[: span.start // CELL].any()
        assert not one[span.stop // CELL :].any()
        if number:
            assert one[span.start // CELL] == 0  # it fades in from nothing


@settings(deadline=None, max_examples=25)
@given(SIDE, SIDE, TILING, st.integers(0, 99))
def test_windows_that_agree_make_the_mask_and_the_statistics_of_the_whole(height, width, tiling, seed):
    """Each window sees its part of the same logits: what comes out is what they say without windows."""
    rows, columns = -(-height // CELL), -(-width // CELL)
    logits = torch.randn(padded(height) // CELL, padded(width) // CELL, 5, generator=torch.manual_seed(seed))
    mosaic = Mosaic(np.zeros((height, width, 3), np.uint8), tiling, 5, torch.device("cpu"))
    largest = 0
    for place in mosaic.windows():
        down, across = mosaic.down[place[0]], mosaic.across[place[1]]
        y, x = (across, down) if mosaic.is_turned else (down, across)
        seen = logits[y.start // CELL : y.stop // CELL, x.start // CELL : x.stop // CELL]
        if part := mosaic.add(place, seen):
            largest = max(largest, part[0].numel())
            mosaic.put(*part)
    found, logits = mosaic.segmentation(), logits[:rows, :columns].contiguous()
    mask = upsampled_argmax(logits, (CELL * rows, CELL * columns))[0].numpy()[:height, :width]
    sure = softmax_statistics(logits)
    assert found.mask.shape == (height, width)
    assert (found.mask == mask).mean() > 0.999
    assert np.array_equal(found.pixels, np.bincount(found.mask.ravel(), minlength=5))
    assert found.confidence == pytest.approx(float(sure.confidence.sum()) / rows / columns, abs=1e-5)
    assert found.entropy == pytest.approx(float(sure.entropy) / rows / columns, abs=1e-5)
    assert largest <= strip_pixels(height, width, tiling)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_an_image_of_one_window_is_what_it_is_without(checkpoint, engine):
    predict = Predictor(load_checkpoint(checkpoint), "cpu", engine, "float32")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    plain = predict(images, [(64, 96)] * 3)
    for one, other in zip(plain, predict.through_windows(list(images), Tiling(), 3), strict=True):
        assert np.array_equal(one.mask, other.mask)
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.class_confidence, other.class_confidence, equal_nan=True)
        assert (one.confidence, one.entropy) == (other.confidence, other.entropy)


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (31, 33), (257, 256)])
def test_images_smaller_than_a_step_and_thin_ones_have_masks_of_their_size(demo, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    (found,) = demo.through_windows([image], Tiling(256, 64), 4)
    assert found.mask.shape == size
    assert found.pixels.sum() == image[..., 0].size
    assert 0 < found.confidence <= 1


def test_behind_its_end_an_image_goes_on_as_it_ends():
    image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    (rows,), (columns,) = Tiling().spans(40), Tiling().spans(50)
    seen = cut_out(image, rows, columns)
    assert seen.shape == (64, 64, 3)
    assert np.array_equal(seen[:40, :50], image)
    assert (seen[40:, :50] == image[-1]).all()


def test_how_many_windows_go_together_and_with_which_images_changes_nothing(demo):
    images = [draw_scene(seed, 500, 330).image for seed in range(2)]
    alone = [demo.through_windows([image], Tiling(256, 64), 1)[0] for image in images]
    for one, other in zip(alone, demo.through_windows(images, Tiling(256, 64), 5), strict=True):
        assert np.array_equal(one.mask, other.mask)
        assert one.confidence == other.confidence


@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_strip_needs_no_kernels(demo, monkeypatch, with_kernels):
    image = draw_scene(3, 500, 330).image
    expected = demo.through_windows([image], Tiling(256, 64), 1)[0]
    if not with_kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    predict = Predictor(load_checkpoint(str(WEIGHTS)), "cpu", "auto", "float32")
    (found,) = predict.through_windows([image], Tiling(256, 64), 2)
    assert (found.mask == expected.mask).mean() > 0.999


@pytest.mark.parametrize("seed", [0, 2])
def test_windows_show_what_the_whole_image_does_where_the_network_has_seen_such_streets(demo, seed):
    """A street as tall as in training and four times as wide; `jobs.bench.windows` says what happens beyond that."""
    image = draw_scene(seed, 2048, 512).image
    whole, windows = (demo.through_windows([image], tiling, 1)[0] for tiling in (Tiling(2048, 32), Tiling()))
    assert (whole.mask == windows.mask).mean() > 0.99
    assert windows.confidence == pytest.approx(whole.confidence, abs=0.01)
