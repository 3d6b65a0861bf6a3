"""What scenes are painted on: an image and its mask by the same strokes, and what a camera then does to the image."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 2

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A picture whose every pixel has a known class: `image` uint8 (H, W, 3) RGB, `mask` uint8 (H, W) of class ids."""

    image: np.ndarray
    mask: np.ndarray


class Canvas:
    """An image and its mask, painted by the same strokes. Units: image heights, origin at the top left."""

    def __init__(self, width: int, height: int):
        self.scale = height * SUPERSAMPLING
        self.width = width / height  # in image heights
        size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
        self.image = Image.new("RGB", size)
        self.mask = Image.new("L", size)
        self.paint = ImageDraw.Draw(self.image)
        self.label = ImageDraw.Draw(self.mask)

    def polygon(self, points: list[tuple[float, float]], colour: Colour, label: int) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.paint.polygon(scaled, fill=colour)
        self.label.polygon(scaled, fill=label)

    def rectangle(self, box: Box, colour: Colour, label: int) -> None:
        x0, y0, x1, y1 = box
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, label)

    def ellipse(self, box: Box, colour: Colour, label: int) -> None:
        scaled = tuple(v * self.scale for v in box)
        self.paint.ellipse(scaled, fill=colour)
        self.label.ellipse(scaled, fill=label)


def expose(canvas: Canvas, rng: np.random.Generator, roughness: tuple[float, ...]) -> Scene:
    """What a camera adds: texture, uneven light, a colour cast, sensor noise; and the way down to the asked size.

    `roughness` is that of each class, in grey levels.
    """
    image = np.asarray(canvas.image.reduce(SUPERSAMPLING), dtype=np.float32)
    mask = np.asarray(canvas.mask)[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING].copy()
    height, width = mask.shape
    grain = np.array(roughness, dtype=np.float32)[mask]
    for cells in (24, 90):
        coarse = rng.standard_normal((cells, max(1, round(cells * canvas.width)))).astype(np.float32)
        image += (grain * np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)))[
            ..., None
        ]
    gain, tilt = rng.uniform(0.6, 1.2), rng.uniform(-0.15, 0.15)
    light = gain * (1 + tilt * np.linspace(-1, 1, width, dtype=np.float32))[None, :, None]
    cast = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    image = image * light * cast + rng.uniform(-12, 12)
    image += rng.uniform(1, 5) * rng.standard_normal((height, width, 1)).astype(np.float32)
    return Scene(image.clip(0, 255).astype(np.uint8), mask)


def trapezium(far: float, near: float, half_far: float, half_near: float, horizon: float) -> list[tuple[float, float]]:
    """The corners of a strip that runs from the horizon at `far` to the lower edge at `near`."""
    return [(far - half_far, horizon), (far + half_far, horizon), (near + half_near, 1.0), (near - half_near, 1.0)]


def tint(rng: np.random.Generator, colours: list[Colour], spread: int) -> Colour:
    """One of `colours`, each channel moved by up to `spread`."""
    r, g, b = (
        int(v) for v in np.clip(colours[rng.integers(len(colours))] + rng.integers(-spread, spread + 1, 3), 0, 255)
    )
    return r, g, b


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with `share` (0 to 1) of `second` in it."""
    r, g, b = (round(a + (c - a) * share) for a, c in zip(first, second, strict=True))
    return r, g, b
