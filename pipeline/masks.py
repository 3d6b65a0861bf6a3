"""Masks as PNG files: one channel, the class id of each pixel, and the label set's palette where one fits."""

import io

import numpy as np
from PIL import Image

from model.labels import LabelSet

PALETTE_COLOURS = 256  # all that a PNG palette holds; more classes make a 16-bit mask without one


def encode_mask(mask: np.ndarray, labels: LabelSet) -> bytes:
    """PNG of class ids (H, W), uint8 with a palette or uint16. Any viewer shows the first one in colour."""
    image = Image.fromarray(mask)
    if mask.dtype == np.uint8:
        image = image.convert("L")
        image.putpalette([part for colour in labels.palette[:PALETTE_COLOURS] for part in colour])
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def decode_mask(png: bytes) -> np.ndarray:
    """Class ids (H, W), uint8 or uint16, as `encode_mask` got them: indices, never colours."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        pixels = np.asarray(image)
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)


def overlay(image: np.ndarray, mask: np.ndarray, labels: LabelSet, opacity: float = 0.55) -> np.ndarray:
    """uint8 (H, W, 3): the image with each class laid over it in its colour."""
    colours = np.array(labels.palette, dtype=np.float32)[mask]
    return (image * (1 - opacity) + colours * opacity).astype(np.uint8)
