"""The classes of a harbour, and what lies around it: sky, land, water and the quay."""

from dataclasses import dataclass
from math import pi, sin

import numpy as np

from jobs.scenes.canvas import Canvas, Colour, mix, tint

CLASSES = ("sky", "water", "land", "quay", "boat", "crane", "lighthouse", "buoy")
SKY, WATER, LAND, QUAY, BOAT, CRANE, LIGHTHOUSE, BUOY = range(len(CLASSES))
PALETTE = (
    (250, 190, 140),
    (20, 90, 100),
    (120, 80, 130),
    (150, 150, 140),
    (240, 240, 250),
    (230, 120, 20),
    (200, 20, 90),
    (150, 220, 60),
)
ROUGHNESS = (2, 6, 11, 8, 3, 4, 4, 3)  # of each class, as `expose` wants it
PAINTS = [(196, 62, 40), (226, 128, 36), (232, 196, 62), (44, 96, 120), (48, 110, 80), (225, 222, 212), (70, 62, 66)]


@dataclass(frozen=True)
class Sea:
    """The water from the horizon to the lower edge, `far` and `near` its colours there."""

    horizon: float
    far: Colour
    near: Colour

    def y(self, depth: float) -> float:
        """Where water lies that is `depth` (0 to 1) of the way from the horizon to the lower edge."""
        return self.horizon + (1 - self.horizon) * depth

    def colour(self, y: float) -> Colour:
        return mix(self.far, self.near, min(1.0, max(0.0, (y - self.horizon) / (1 - self.horizon))) ** 0.6)


@dataclass(frozen=True)
class Quay:
    """A quay that runs from the left edge (`side` 0) or the right one, with its outer edge from `near` to `far`."""

    side: float  # x of the image's edge that it comes from
    near: tuple[float, float]  # x and depth
    far: tuple[float, float]

    def edge(self, depth: float) -> float:
        """x of the outer edge at a depth."""
        return float(np.interp(depth, (self.far[1], self.near[1]), (self.far[0], self.near[0])))


def draw_sky(canvas: Canvas, rng: np.random.Generator, horizon: float) -> Colour:
    """A gradient with long thin clouds and now and then the sun, all of them sky; the colour at the horizon."""
    zenith = tint(
        rng, [(96, 128, 140), (170, 130, 150), (48, 56, 92), (140, 142, 146), (222, 186, 140), (110, 176, 184)], 18
    )
    haze = mix(zenith, tint(rng, [(244, 190, 130), (238, 226, 200), (214, 170, 180), (200, 212, 210)], 12), 0.75)
    bands = 24
    for band in range(bands):
        canvas.rectangle(
            (0, horizon * band / bands, canvas.width, horizon + 0.01), mix(zenith, haze, band / bands), SKY
        )
    if rng.random() < 0.35:
        x, y, r = rng.uniform(0, canvas.width), rng.uniform(0.3, 1) * horizon, rng.uniform(0.02, 0.05)
        canvas.ellipse((x - r, y - r, x + r, y + r), mix(haze, (255, 246, 214), 0.8), SKY)
    for _ in range(rng.integers(2, 12)):
        x, y = rng.uniform(0, canvas.width), horizon * rng.uniform(0, 0.95)
        length, thickness = rng.uniform(0.08, 0.5), rng.uniform(0.004, 0.02)
        cloud = mix(haze, (250, 244, 240) if rng.random() < 0.6 else (92, 84, 104), rng.uniform(0.2, 0.6))
        canvas.ellipse((x - length, y - thickness, x + length, y + thickness), cloud, SKY)
    return haze


def draw_land(canvas: Canvas, rng: np.random.Generator, horizon: float, haze: Colour) -> None:
    """One or two ranges of hills behind the water, pale where far, with houses at the foot of the nearer one."""
    ranges = rng.integers(1, 3)
    for distance in range(ranges, 0, -1):
        earth = tint(rng, [(96, 84, 76), (74, 88, 72), (120, 104, 128), (150, 128, 92), (64, 66, 74)], 15)
        earth = mix(earth, haze, 0.12 + 0.35 * (distance - 1))
        height = rng.uniform(0.05, 0.2) * (1 + 0.5 * (distance - 1))
        begin, end = rng.uniform(-0.9, 0.5) * canvas.width, rng.uniform(0.5, 1.9) * canvas.width
        waves = [(rng.uniform(2, 5) * 2**octave, rng.uniform(0, 2 * pi), 0.5**octave) for octave in range(5)]
        slopes = []
        for x in np.linspace(max(begin, -0.1), min(end, canvas.width + 0.1), 60):
            ridge = 0.55 + 0.28 * sum(share * sin(rate * x + phase) for rate, phase, share in waves)
            coast = min(1.0, 5 * min(x - begin, end - x))  # it falls to the water where it ends
            slopes.append((float(x), horizon - height * max(0.04, ridge) * max(0.05, coast)))
        left, right = slopes[0][0], slopes[-1][0]
        canvas.polygon([(left, horizon + 0.01), *slopes, (right, horizon + 0.01)], earth, LAND)
        for x, top in slopes[2:-2]:
            y, r = rng.uniform(top, horizon), rng.uniform(0.1, 0.5) * (horizon - top)
            if y - r > top:  # a wood or a rock
                shade = mix(earth, (40, 46, 44) if rng.random() < 0.6 else (210, 200, 170), rng.uniform(0.1, 0.4))
                canvas.ellipse((x - 2 * r, y - r * 0.8, x + 2 * r, min(y + r * 0.8, horizon)), shade, LAND)
        if distance == 1 and rng.random() < 0.6:
            for x in rng.uniform(left, right, rng.integers(3, 16)):
                size, wall = rng.uniform(0.012, 0.03), tint(rng, PAINTS, 15)
                canvas.rectangle((x - size, horizon - size, x + size, horizon), mix(wall, haze, 0.25), LAND)
                roof = mix(tint(rng, PAINTS, 15), haze, 0.25)
                points = [(x - size * 1.2, horizon - size), (x, horizon - 1.8 * size), (x + size * 1.2, horizon - size)]
                canvas.polygon(points, roof, LAND)


def draw_water(canvas: Canvas, rng: np.random.Generator, horizon: float, haze: Colour) -> Sea:
    """Water in the sky's light, with waves that grow as they come nearer."""
    deep = tint(rng, [(30, 84, 92), (58, 74, 88), (24, 48, 82), (92, 118, 108), (112, 108, 116), (96, 84, 70)], 15)
    sea = Sea(horizon, mix(deep, haze, rng.uniform(0.35, 0.9)), mix(deep, haze, rng.uniform(0, 0.2)))
    bands = 30
    for band in range(bands):
        top = sea.y(band / bands)
        canvas.rectangle((0, top, canvas.width, 1.0), sea.colour(top), WATER)
    for depth in np.sort(rng.uniform(0, 1, rng.integers(80, 300)) ** 1.3):
        x, y = rng.uniform(0, canvas.width), sea.y(depth)
        length = (0.006 + 0.09 * depth) * rng.uniform(0.4, 1.6)
        thickness = length * rng.uniform(0.03, 0.12)
        foam = mix(sea.colour(y), haze if rng.random() < 0.5 else (16, 28, 40), rng.uniform(0.1, 0.45))
        canvas.ellipse((x - length, y, x + length, y + thickness), foam, WATER)
    return sea


def draw_quay(canvas: Canvas, rng: np.random.Generator, sea: Sea) -> Quay:
    """A stone quay from one side of the picture into the distance, with cargo on it; cargo there is quay."""
    left = rng.random() < 0.5
    near, far = rng.uniform(0.05, 0.5) * canvas.width, rng.uniform(0.1, 0.6) * canvas.width
    quay = Quay(
        0.0 if left else canvas.width,
        (near if left else canvas.width - near, rng.uniform(0.55, 1.3)),
        (far if left else canvas.width - far, rng.uniform(0.03, 0.2)),
    )
    stone = tint(rng, [(150, 144, 132), (122, 120, 122), (172, 152, 128), (98, 92, 90)], 14)
    (near_x, near_depth), (far_x, far_depth) = quay.near, quay.far
    corners = [(near_x, sea.y(near_depth)), (far_x, sea.y(far_depth))]
    wall = [0.02 + 0.13 * near_depth, 0.02 + 0.13 * far_depth]
    for share, label in ((1.8, WATER), (1.0, QUAY)):  # what the water mirrors, then the wall itself
        face = mix(stone, (24, 28, 30), 0.45)
        lower = [(x, y + share * drop) for (x, y), drop in zip(corners, wall, strict=True)]
        shown = face if label == QUAY else mix(sea.colour(corners[1][1]), face, 0.45)
        canvas.polygon([*corners, lower[1], lower[0]], shown, label)
        if near_depth < 1:  # its end towards us
            end = lower[0][1]
            canvas.polygon([corners[0], lower[0], (quay.side, end), (quay.side, corners[0][1])], shown, label)
    canvas.polygon([*corners, (quay.side, corners[1][1]), (quay.side, corners[0][1])], stone, QUAY)
    for share in np.linspace(0.05, 0.95, rng.integers(4, 12)):  # joints and tyres along the wall
        depth = far_depth + (near_depth - far_depth) * share**2
        x, y, r = quay.edge(depth), sea.y(depth), 0.02 + 0.13 * depth
        canvas.ellipse((x - r * 0.25, y + r * 0.15, x + r * 0.25, y + r * 0.65), (34, 32, 34), QUAY)
    for depth in np.sort(rng.uniform(far_depth, min(near_depth, 0.95), rng.integers(0, 9))):
        draw_cargo(canvas, rng, between(rng, quay.side, quay.edge(depth), 0.1, 0.75), sea.y(depth), 0.03 + 0.12 * depth)
    return quay


def draw_cargo(canvas: Canvas, rng: np.random.Generator, x: float, base: float, size: float, label: int = QUAY) -> None:
    """A stack of one to three containers, ribbed."""
    for level in range(rng.integers(1, 4)):
        paint = tint(rng, PAINTS, 20)
        top = base - (level + 1) * size * 0.5
        canvas.rectangle((x - size / 2, top, x + size / 2, top + size * 0.48), paint, label)
        for rib in np.linspace(-0.42, 0.34, 5):
            rib_x = x + size * rib
            canvas.rectangle(
                (rib_x, top + size * 0.06, rib_x + size * 0.05, top + size * 0.42), mix(paint, (20, 20, 24), 0.3), label
            )


def between(rng: np.random.Generator, begin: float, end: float, least: float, most: float) -> float:
    """A place on the way from `begin` to `end`, at a share of it from `least` to `most`."""
    return begin + (end - begin) * rng.uniform(least, most)
