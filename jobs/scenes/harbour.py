"""Harbours: other classes, colours and shapes than a street's, for a network that is taught something new.

No class has a colour of its own. The water is lit by the sky and mirrors what stands in it; hulls, cranes, buoys,
cargo on the quay and houses on the land are painted from one box of paints; a lighthouse is as white as a sail.
What tells them apart is shape, texture and where they stand. Units are image heights, as in a street.
"""

from math import hypot

import numpy as np

from jobs.scenes.canvas import Box, Canvas, Colour, Scene, expose, mix, tint
from jobs.scenes.coast import (
    BOAT,
    BUOY,
    CLASSES,
    CRANE,
    LAND,
    LIGHTHOUSE,
    PAINTS,
    PALETTE,
    ROUGHNESS,
    WATER,
    Quay,
    Sea,
    between,
    draw_cargo,
    draw_land,
    draw_quay,
    draw_sky,
    draw_water,
)

__all__ = ["CLASSES", "PALETTE", "draw_scene"]

SIZES = {LIGHTHOUSE: (0.16, 0.75), CRANE: (0.14, 0.8), BOAT: (0.1, 0.6), BUOY: (0.05, 0.24)}  # far away, and more near

Point = tuple[float, float]


def draw_scene(seed: int, width: int, height: int) -> Scene:
    """The scene of `seed` at `width` x `height` pixels; the same arguments always give the same pixels."""
    rng = np.random.default_rng(seed)
    canvas = Canvas(width, height)
    horizon = rng.uniform(0.3, 0.52)
    haze = draw_sky(canvas, rng, horizon)
    draw_land(canvas, rng, horizon, haze)
    sea = draw_water(canvas, rng, horizon, haze)
    quay = draw_quay(canvas, rng, sea) if rng.random() < 0.75 else None
    draw_things(canvas, rng, sea, quay)
    return expose(canvas, rng, ROUGHNESS)


def draw_things(canvas: Canvas, rng: np.random.Generator, sea: Sea, quay: Quay | None) -> None:
    """A lighthouse, cranes on the quay or far away, boats and buoys: far ones first, so that near ones cover them."""
    things: list[tuple[float, int]] = []
    if rng.random() < 0.8:
        things.append((rng.uniform(0.05, 0.6), LIGHTHOUSE))
    things += [(rng.uniform(0.0, 0.03), CRANE) for _ in range(rng.integers(0, 3))]
    if quay is not None:
        nearest = min(quay.near[1], 0.7)
        things += [(rng.uniform(quay.far[1], nearest), CRANE) for _ in range(rng.integers(1, 4))]
    things += [(rng.uniform(0.03, 0.8), BOAT) for _ in range(rng.integers(2, 6))]
    things += [(rng.uniform(0.08, 0.95), BUOY) for _ in range(rng.integers(1, 6))]
    for depth, kind in sorted(things):
        least, growth = SIZES[kind]
        size = least + growth * depth
        x, base = rng.uniform(0, canvas.width), sea.y(depth)
        if quay is not None and depth < quay.near[1] + 0.1:
            seaward = 1 if quay.side == 0 else -1
            x = between(rng, quay.edge(depth) + seaward * size / 2, canvas.width - quay.side, 0, 1)
        if kind == LIGHTHOUSE:
            draw_lighthouse(canvas, rng, sea, x, base, size)
        elif kind == CRANE:
            if quay is not None and depth >= quay.far[1]:
                x = between(rng, quay.side, quay.edge(depth), 0.55, 0.95)
            draw_crane(canvas, rng, x, base, size)
        elif kind == BOAT:
            draw_boat(canvas, rng, sea, x, base, size)
        else:
            draw_buoy(canvas, rng, sea, x, base, size)


def draw_lighthouse(canvas: Canvas, rng: np.random.Generator, sea: Sea, x: float, base: float, height: float) -> None:
    """A tapering tower in bands on a rock, which is land, with its gallery and lantern."""
    rock = tint(rng, [(92, 84, 80), (70, 72, 74), (128, 116, 100)], 12)
    mirror(canvas, sea, (x - height * 0.35, base, x + height * 0.35, base + height * 0.14), rock)
    points = [
        (x + height * side * rng.uniform(0.85, 1.15), base - height * rise * rng.uniform(0.8, 1.2))
        for side, rise in ((-0.42, -0.01), (-0.3, 0.08), (-0.14, 0.13), (0.12, 0.13), (0.28, 0.08), (0.42, -0.01))
    ]
    canvas.polygon(points, rock, LAND)
    white = tint(rng, [(232, 228, 218), (214, 208, 200)], 10)
    other = white if rng.random() < 0.3 else tint(rng, PAINTS, 15)
    foot, top = base - height * 0.08, base - height * 0.8
    bands = int(rng.integers(3, 7))
    for band in range(bands):
        lower, upper = band / bands, (band + 1) / bands
        half = [height * (0.1 - 0.045 * share) for share in (lower, upper)]
        y = [foot + (top - foot) * share for share in (lower, upper)]
        canvas.polygon(
            [(x - half[0], y[0]), (x + half[0], y[0]), (x + half[1], y[1]), (x - half[1], y[1])],
            white if band % 2 == 0 else other,
            LIGHTHOUSE,
        )
    iron = mix(other, (30, 30, 34), 0.6)
    canvas.rectangle(
        (x - height * 0.075, top - height * 0.02, x + height * 0.075, top + height * 0.01), iron, LIGHTHOUSE
    )
    lamp = (250, 234, 170) if rng.random() < 0.5 else (120, 140, 150)
    canvas.rectangle((x - height * 0.04, top - height * 0.11, x + height * 0.04, top - height * 0.02), lamp, LIGHTHOUSE)
    roof = [(x - height * 0.06, top - height * 0.1), (x, top - height * 0.2), (x + height * 0.06, top - height * 0.1)]
    canvas.polygon(roof, iron, LIGHTHOUSE)


def draw_crane(canvas: Canvas, rng: np.random.Generator, x: float, base: float, height: float) -> None:
    """A portal on legs with a tower, a cabin, a jib at some angle, its counterweight and its rope."""
    paint = tint(rng, PAINTS, 20)
    beam, way = height * 0.05, 1 if rng.random() < 0.5 else -1
    portal, knee = base - height * 0.32, height * 0.16
    for side in (-1, 1):
        strip(canvas, (x + side * knee * 1.1, base), (x + side * knee * 0.8, portal), beam, paint, CRANE)
    strip(canvas, (x - knee, portal), (x + knee, portal), beam * 1.2, paint, CRANE)
    strip(canvas, (x - knee * 0.9, base - height * 0.05), (x + knee * 0.8, portal), beam * 0.6, paint, CRANE)
    top = base - height * 0.72
    strip(canvas, (x, portal), (x, top), beam * 1.9, mix(paint, (30, 30, 34), 0.15), CRANE)
    tip = (x + way * height * rng.uniform(0.5, 0.75), base - height * rng.uniform(0.68, 1.1))
    strip(canvas, (x, top), tip, beam * 0.9, paint, CRANE)
    strip(canvas, (x, top - height * 0.1), tip, beam * 0.5, paint, CRANE)
    strip(canvas, (x, portal), (x, top - height * 0.12), beam * 0.8, paint, CRANE)
    strip(canvas, (x, top), (x - way * height * 0.26, top), beam, paint, CRANE)
    back = x - way * height * 0.24
    block = mix(paint, (40, 40, 44), 0.7)
    canvas.rectangle((back - beam * 1.4, top - beam, back + beam * 1.4, top + beam * 2), block, CRANE)
    cabin = x + way * height * 0.05
    canvas.rectangle(
        (cabin - beam * 1.3, top + beam * 0.8, cabin + beam * 1.3, top + beam * 3.4), tint(rng, PAINTS, 15), CRANE
    )
    strip(canvas, tip, (tip[0], tip[1] + height * rng.uniform(0.1, 0.4)), beam * 0.35, (50, 48, 50), CRANE)


def draw_boat(canvas: Canvas, rng: np.random.Generator, sea: Sea, x: float, base: float, length: float) -> None:
    """A hull, and on it sails, a cabin with a funnel, or a bridge and containers, which are boat here."""
    kind, way = rng.choice(3, p=[0.4, 0.3, 0.3]), 1 if rng.random() < 0.5 else -1
    length *= (0.8, 0.7, 1.5)[kind]
    hull, depth = tint(rng, PAINTS, 20), length * (0.12, 0.18, 0.15)[kind]
    white = tint(rng, [(236, 232, 224), (214, 206, 190), (246, 240, 226)], 10)
    deck = base - depth
    half = length / 2
    mirror(canvas, sea, (x - half * 0.85, base, x + half * 0.85, base + depth * 1.5), hull)
    bow, stern = x + way * half, x - way * half
    points = [(stern, deck), (bow, deck - depth * 0.35), (bow - way * depth, base), (stern + way * depth * 0.4, base)]
    if kind == 0:
        mast, head = x + way * half * 0.1, deck - length * rng.uniform(0.9, 1.3)
        sail = white if rng.random() < 0.7 else tint(rng, PAINTS, 20)
        strip(canvas, (mast, deck), (mast, head), length * 0.025, (90, 78, 66), BOAT)
        boom = deck - length * 0.07
        after, before = mast - way * length * 0.02, mast + way * length * 0.03
        canvas.polygon([(after, head), (after, boom), (stern + way * half * 0.25, boom)], sail, BOAT)
        if rng.random() < 0.8:
            canvas.polygon(
                [(before, head + length * 0.1), (before, boom), (bow - way * half * 0.1, boom)],
                mix(sail, (120, 120, 120), 0.2),
                BOAT,
            )
    elif kind == 1:
        cabin, high = x + way * half * rng.uniform(-0.3, 0.2), length * rng.uniform(0.16, 0.26)
        canvas.rectangle((cabin - length * 0.17, deck - high, cabin + length * 0.17, deck), white, BOAT)
        for pane in (-0.12, -0.02, 0.08):
            left = cabin + length * pane
            canvas.rectangle((left, deck - high * 0.8, left + length * 0.06, deck - high * 0.45), (52, 66, 76), BOAT)
        funnel = cabin - way * length * 0.24
        canvas.rectangle(
            (funnel - length * 0.05, deck - high * 0.9, funnel + length * 0.05, deck), tint(rng, PAINTS, 20), BOAT
        )
        strip(canvas, (cabin, deck - high), (cabin, deck - high * 2), length * 0.025, (80, 76, 74), BOAT)
    else:
        stack = length * 0.13
        for place in np.arange(-0.28, 0.4, 0.14):
            if rng.random() < 0.85:
                draw_cargo(canvas, rng, x + way * length * float(place), deck, stack, BOAT)
        bridge = stern + way * length * 0.12
        canvas.rectangle((bridge - length * 0.06, deck - length * 0.26, bridge + length * 0.06, deck), white, BOAT)
        panes = (bridge - length * 0.05, deck - length * 0.24, bridge + length * 0.05, deck - length * 0.2)
        canvas.rectangle(panes, (48, 60, 70), BOAT)
    canvas.polygon(points, hull, BOAT)
    water_line = mix(hull, (150, 40, 34) if rng.random() < 0.5 else (24, 24, 28), 0.8)
    canvas.polygon(
        [
            (stern + way * depth * 0.28, base - depth * 0.3),
            (bow - way * depth * 0.7, base - depth * 0.3),
            (bow - way * depth, base),
            (stern + way * depth * 0.4, base),
        ],
        water_line,
        BOAT,
    )


def draw_buoy(canvas: Canvas, rng: np.random.Generator, sea: Sea, x: float, base: float, height: float) -> None:
    """A float with a cone, a can or a cage on it, in one colour or two, and a mark on top."""
    paint, r = tint(rng, PAINTS[:5], 20), height * 0.26
    band = paint if rng.random() < 0.5 else tint(rng, PAINTS, 15)
    mirror(canvas, sea, (x - r, base, x + r, base + height * 0.4), paint)
    top, waist = base - height * 0.72, base - height * 0.2
    form = rng.integers(3)
    upper = (r * 0.25, r * 0.75, r * 0.3)[form]
    if form == 2:  # a cage: legs around air
        for side in (-1, 1):
            strip(canvas, (x + side * r * 0.7, waist), (x + side * upper, top), r * 0.3, paint, BUOY)
        middle = (waist + top) / 2
        strip(canvas, (x - r * 0.6, middle), (x + r * 0.6, middle), r * 0.25, band, BUOY)
    else:
        canvas.polygon([(x - r * 0.8, waist), (x - upper, top), (x + upper, top), (x + r * 0.8, waist)], paint, BUOY)
        half, y = (r * 0.8 + upper) / 2, (waist + top) / 2
        canvas.rectangle((x - half, y - height * 0.06, x + half, y + height * 0.06), band, BUOY)
    canvas.ellipse((x - r, waist - r * 0.35, x + r, base + r * 0.1), mix(paint, (24, 24, 28), 0.2), BUOY)
    strip(canvas, (x, top), (x, top - height * 0.14), r * 0.2, (50, 48, 50), BUOY)
    mark = top - height * 0.2
    canvas.ellipse((x - r * 0.35, mark - r * 0.3, x + r * 0.35, mark + r * 0.4), band, BUOY)


def mirror(canvas: Canvas, sea: Sea, box: Box, colour: Colour) -> None:
    """What the water shows of a thing above it, broken by waves; it is water."""
    left, top, right, bottom = box
    strips = 6
    for number in range(strips):
        share = number / strips
        y = top + (bottom - top) * share
        shrink = (right - left) * 0.08 * (number % 3)
        shown = mix(sea.colour(y), mix(colour, (20, 26, 32), 0.3), 0.6 * (1 - share))
        canvas.rectangle((left + shrink, y, right - shrink, y + (bottom - top) / strips), shown, WATER)


def strip(canvas: Canvas, begin: Point, end: Point, width: float, colour: Colour, label: int) -> None:
    """A straight beam of some width from one point to another."""
    along = (end[0] - begin[0], end[1] - begin[1])
    length = hypot(*along) or 1.0
    x, y = -along[1] / length * width / 2, along[0] / length * width / 2
    corners = [
        (begin[0] + x, begin[1] + y),
        (end[0] + x, end[1] + y),
        (end[0] - x, end[1] - y),
        (begin[0] - x, begin[1] - y),
    ]
    canvas.polygon(corners, colour, label)
