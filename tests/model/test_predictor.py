"""Masks at any size, statistics that are what they say, and engines that can be chosen."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from model import native
from model.checkpoint import load_checkpoint
from model.predictor import ENGINES, PRECISIONS, EngineError, Predictor
from pipeline.config import SegmentSettings


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_masks_have_the_size_asked_for_and_counts_are_their_histogram(checkpoint, engine):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    sizes = [(64, 96), (301, 77), (1, 1)]
    for found, size in zip(Predictor(load_checkpoint(checkpoint), "cpu", engine)(images, sizes), sizes, strict=True):
        assert found.mask.shape == size
        assert found.mask.dtype == np.uint8
        assert np.array_equal(np.bincount(found.mask.ravel(), minlength=5), found.pixels)
        assert 0 < found.confidence <= 1
        assert 0 <= found.entropy <= np.log(5) + 1e-6


def test_engines_agree(checkpoint):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    loaded = load_checkpoint(checkpoint)
    predictors = [Predictor(loaded, "cpu", engine, "float32") for engine in ("torch", "native", "compiled")]
    assert [predict.is_ready_for(images.shape) for predict in predictors] == [True, True, False]
    sizes = [(200, 300)] * 3
    first, *others = (
        predict(images, sizes) + predict.at_scales([images], (64, 96), sizes, flip=True)  # of the same shape
        for predict in predictors
    )
    assert predictors[2].is_ready_for((4, 64, 96, 3))  # three were filled up to four
    assert not predictors[2].is_ready_for((5, 64, 96, 3))
    assert [predict.full_batch(7) for predict in predictors] == [7, 7, 4]  # so that full batches are whole
    assert len(predictors[2].compiled) == 1
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert (ours.mask == theirs.mask).mean() > 0.9999
            assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-5)
            assert ours.entropy == pytest.approx(theirs.entropy, abs=1e-5)
            assert np.allclose(ours.class_confidence, theirs.class_confidence, atol=1e-4, equal_nan=True)


def test_a_class_that_wins_nothing_has_no_confidence(checkpoint):
    loaded = load_checkpoint(checkpoint)
    with torch.no_grad():
        loaded.model.decoder.classifier.bias[2] -= 1e4
    found = Predictor(loaded, "cpu")(np.zeros((1, 32, 32, 3), np.uint8), [(32, 32)])[0]
    assert found.pixels[2] == 0
    assert np.isnan(found.class_confidence[2])
    assert np.isfinite(found.class_confidence[found.pixels > 0]).all()


def test_the_settings_offer_the_engines_and_precisions_that_there_are():
    fields = SegmentSettings.model_fields
    assert fields["engine"].annotation.__args__ == ENGINES
    assert {"auto", *fields["precision"].annotation.__args__} == set(PRECISIONS)


def test_auto_is_the_fastest_engine_that_is_there(checkpoint, monkeypatch):
    loaded = load_checkpoint(checkpoint)
    assert str(Predictor(loaded, "cpu", precision="float32")) == "native float32"
    assert str(Predictor(loaded, "cpu", precision="bfloat16")) == "native bfloat16"
    monkeypatch.setattr(native, "library", lambda: None)
    assert str(Predictor(loaded, "cpu", precision="float32")) == "torch float32"
    with pytest.raises(EngineError, match="not built here"):
        Predictor(loaded, engine="native")
    with pytest.raises(EngineError, match="'quick' is none of auto, native"):
        Predictor(loaded, engine="quick")


MEMORY = """
import sys
import numpy as np
import torch
from model.checkpoint import Checkpoint
from model.labels import label_set
from model.predictor import Predictor
from model.segformer import Segformer, variant
network = Segformer(variant("b0", labels=150)).eval()
checkpoint = Checkpoint(network, label_set(["x"] * 150), (0.5,) * 3, (0.5,) * 3, "")
predict = Predictor(checkpoint, "cpu", sys.argv[1], "float32")
predict(np.zeros((1, 2048, 2048, 3), np.uint8), [(2048, 2048)])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_large_image_of_many_classes_needs_less_than_its_full_size_logits(engine):
    """2,048 x 2,048 pixels of 150 classes are 2.5 GB of logits; the whole process stays under 1.8 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, engine], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_800_000  # kB
