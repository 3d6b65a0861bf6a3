"""A mask survives its PNG, whatever its class ids, and looks right in a viewer."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.labels import label_set
from pipeline.masks import decode_mask, encode_mask


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 1000), st.integers(0, 2**32 - 1))
def test_masks_survive_their_png(height, width, classes, seed):
    kind = np.uint8 if classes <= 256 else np.uint16
    mask = np.random.default_rng(seed).integers(0, classes, (height, width)).astype(kind)
    found = decode_mask(encode_mask(mask, label_set([str(i) for i in range(classes)])))
    assert found.dtype == kind
    assert np.array_equal(found, mask)


@pytest.mark.parametrize("classes", [1, 2, 5, 17, 256])
def test_the_palette_shows_each_class_in_its_colour(classes):
    labels = label_set([str(i) for i in range(classes)])
    mask = np.arange(classes, dtype=np.uint8)[None]
    image = Image.open(io.BytesIO(encode_mask(mask, labels)))
    assert image.mode == "P"
    assert [tuple(pixel) for pixel in np.asarray(image.convert("RGB"))[0].tolist()] == list(labels.palette)
