"""What training sees of an image: a random part of it at a random scale, mirrored or not, in changed colours.

Each crop is a function of the image, its truth and a random generator alone, so a training that goes on after a kill
sees what it would have seen. What is cheap comes first: the part of the image that the crop shows is cut out before it
is scaled, so a large image costs no more than a small one, and colours are changed in the crop. Brightness, contrast,
saturation and hue are all affine in RGB, so one product of matrices does them at once (the published recipe goes
through HSV, where a hue costs most of the time).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from model.scores import IGNORED

TRIES = 10  # at a crop that is not almost all of one class
LOOKED_EVERY = 4  # pixels, when the classes of a crop are counted
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of RGB (ITU-R BT.601)
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True)
class Augmentation:
    """How far a crop may differ from its image. The colours are those of the published recipe (MMSegmentation's
    PhotoMetricDistortion): each change is made with a probability of a half.
    """

    crop: int  # pixels, height and width
    scales: tuple[float, float] = (0.5, 2.0)  # log-uniform, of the size at which the network sees the whole image
    flip: float = 0.5  # probability
    colour: float = 1.0  # 0 for none, 1 for the ranges below
    most_of_one_class: float = 0.75  # share of a crop's pixels, if any other crop can be found
    brightness: float = 32.0  # of 255
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 36.0  # degrees, either way


def augment(
    image: np.ndarray,
    truth: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
    how: Augmentation,
    mean: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A crop, uint8 (crop, crop, 3) RGB, of an image uint8 (H, W, 3), and (crop, crop) of its truth, signed (H, W).

    `size` is the (height, width) at which the network would see the whole image. Where the scaled image is smaller than
    the crop, the rest is `mean` (RGB, 0 to 255) in the image and IGNORED in the truth.
    """
    scale = math.exp(rng.uniform(*np.log(how.scales)))
    part, shown = choose_part(truth, size, scale, rng, how)
    pixels = scaled(image[part], *shown)
    ids = nearest(truth[part], *shown)
    turn = slice(None, None, -1 if rng.random() < how.flip else 1)
    if how.colour:
        pixels = recoloured(pixels, *colour_change(rng, how))
    crop = np.empty((how.crop, how.crop, 3), np.uint8)
    crop[:] = mean
    crop[: shown[0], : shown[1]] = pixels[:, turn]
    wanted = np.full((how.crop, how.crop), IGNORED, truth.dtype)
    wanted[: shown[0], : shown[1]] = ids[:, turn]
    return crop, wanted


def choose_part(
    truth: np.ndarray, size: tuple[int, int], scale: float, rng: np.random.Generator, how: Augmentation
) -> tuple[tuple[slice, slice], tuple[int, int]]:
    """Which rows and columns of the image the crop shows, and in how many pixels, (height, width) up to the crop."""
    sides, shown = [], []
    for length, seen in zip(truth.shape, size, strict=True):
        whole = max(1, round(seen * scale))
        shown.append(min(how.crop, whole))
        sides.append(max(1, min(length, round(length * how.crop / whole))))
    for _ in range(TRIES):
        top, left = (int(rng.integers(length - side + 1)) for length, side in zip(truth.shape, sides, strict=True))
        part = slice(top, top + sides[0]), slice(left, left + sides[1])
        if how.most_of_one_class >= 1 or is_varied(truth[part], how.most_of_one_class):
            break
    return part, (shown[0], shown[1])


def is_varied(truth: np.ndarray, most: float) -> bool:
    """Whether a part of a truth has at least two classes, and none of them more than this share."""
    seen = truth[::LOOKED_EVERY, ::LOOKED_EVERY].ravel()
    pixels = np.bincount(seen[seen >= 0])
    return bool(np.count_nonzero(pixels) > 1 and pixels.max() < most * pixels.sum())


def scaled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (height, width, 3), antialiased bilinear as in inference."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # a copy, as a part is no tensor
    found = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return found[0].permute(1, 2, 0).numpy()


def nearest(truth: np.ndarray, height: int, width: int) -> np.ndarray:
    """Ids (H, W) to ids (height, width): of each pixel the one at its centre, as ids cannot be mixed."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * (there / wanted)).astype(np.intp)
        for wanted, there in zip((height, width), truth.shape, strict=True)
    )
    return truth[rows[:, None], columns]


def colour_change(rng: np.random.Generator, how: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (3, 3) and an offset (3,) that change RGB samples from 0 to 255; always the same number of draws."""
    chosen = rng.random(4) < 0.5
    drawn = rng.random(4)

    def between(low: float, high: float, index: int, neutral: float) -> float:
        value = low + (high - low) * drawn[index] if chosen[index] else neutral
        return neutral + how.colour * (value - neutral)

    offset = between(-how.brightness, how.brightness, 0, 0.0)
    contrast = between(*how.contrast, 1, 1.0)
    saturation = between(*how.saturation, 2, 1.0)
    angle = math.radians(between(-how.hue, how.hue, 3, 0.0))
    cosine, sine = saturation * math.cos(angle), saturation * math.sin(angle)  # chroma, turned and stretched
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    matrix = contrast * (np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ)
    return matrix.astype(np.float32), np.full(3, contrast * offset, np.float32)


def recoloured(image: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) after a matrix and an offset, cut to 0 to 255."""
    samples = torch.from_numpy(np.array(image)).float().reshape(-1, 3)
    changed = torch.addmm(torch.from_numpy(offset + np.float32(0.5)), samples, torch.from_numpy(matrix.T.copy()))
    return changed.clamp_(0, 255).to(torch.uint8).reshape(image.shape).numpy()
