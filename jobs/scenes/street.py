"""Streets: what the demo segments, and what its network was trained on.

Everything is placed in units of the image's height, so the same seed at two sizes is the same street.
"""

from math import cos, pi, sin

import numpy as np

from jobs.scenes.canvas import Canvas, Scene, expose, mix, tint, trapezium

CLASSES = ("sky", "building", "vegetation", "road", "sidewalk", "car", "person", "sign")
SKY, BUILDING, VEGETATION, ROAD, SIDEWALK, CAR, PERSON, SIGN = range(len(CLASSES))
PALETTE = (
    (118, 178, 228),
    (140, 110, 100),
    (82, 150, 62),
    (92, 84, 120),
    (222, 160, 190),
    (36, 72, 196),
    (226, 48, 60),
    (244, 200, 48),
)
ROUGHNESS = (2, 5, 16, 7, 6, 3, 4, 3)  # of each class: leaves are rough, sky is smooth


def draw_scene(seed: int, width: int, height: int) -> Scene:
    """The scene of `seed` at `width` x `height` pixels; the same arguments always give the same pixels."""
    rng = np.random.default_rng(seed)
    canvas = Canvas(width, height)
    horizon = rng.uniform(0.36, 0.52)
    draw_sky(canvas, rng, horizon)
    draw_skyline(canvas, rng, horizon)
    draw_ground(canvas, rng, horizon)
    draw_things(canvas, rng, horizon)
    return expose(canvas, rng, ROUGHNESS)


def draw_sky(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    """A vertical gradient from zenith to horizon, with a few clouds; a cloud is sky."""
    zenith = tint(rng, [(70, 130, 210), (110, 160, 220), (150, 160, 175), (60, 80, 130), (200, 150, 120)], 18)
    haze = mix(zenith, (235, 235, 235), rng.uniform(0.3, 0.8))
    bands = 24
    for band in range(bands):
        top = horizon * band / bands
        bottom = 1.0 if band == bands - 1 else horizon * (band + 1) / bands + 0.01
        canvas.rectangle((0, top, canvas.width, bottom), mix(zenith, haze, band / bands), SKY)
    for _ in range(rng.integers(0, 5)):
        x, y = rng.uniform(0, canvas.width), rng.uniform(0, horizon * 0.7)
        for _ in range(rng.integers(3, 7)):
            dx, dy, r = rng.uniform(-0.12, 0.12), rng.uniform(-0.015, 0.015), rng.uniform(0.02, 0.06)
            cloud = mix(haze, (255, 255, 255), rng.uniform(0.3, 0.7))
            canvas.ellipse((x + dx - 1.6 * r, y + dy - 0.5 * r, x + dx + 1.6 * r, y + dy + 0.5 * r), cloud, SKY)


def draw_skyline(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    """Buildings side by side with gaps, and rows of trees before them, all standing on the horizon."""
    left = -0.1
    while left < canvas.width:
        width = rng.uniform(0.12, 0.4)
        if rng.random() < 0.8:
            draw_building(canvas, rng, left, horizon - rng.uniform(0.08, 0.8) * horizon, left + width, horizon + 0.03)
        left += width + (rng.uniform(0.02, 0.2) if rng.random() < 0.4 else 0)
    for _ in range(rng.integers(1, 5)):
        x, size = rng.uniform(0, canvas.width), rng.uniform(0.1, 0.22)
        draw_tree(canvas, rng, x, horizon + 0.02, size)


def draw_building(canvas: Canvas, rng: np.random.Generator, left: float, top: float, right: float, base: float) -> None:
    walls = [(170, 120, 100), (190, 175, 150), (120, 120, 125), (150, 90, 75), (205, 200, 190), (95, 100, 115)]
    wall = tint(rng, walls, 20)
    canvas.rectangle((left, top, right, base), wall, BUILDING)
    if rng.random() < 0.35:
        roof = mix(wall, (60, 40, 40), 0.6)
        canvas.polygon([(left, top), ((left + right) / 2, top - rng.uniform(0.03, 0.08)), (right, top)], roof, BUILDING)
    glass = mix(wall, tint(rng, [(60, 75, 95), (235, 220, 150), (40, 45, 55)], 15), 0.8)
    step_x, step_y = rng.uniform(0.035, 0.06), rng.uniform(0.045, 0.075)
    for y in np.arange(top + 0.02, base - 0.05, step_y):
        for x in np.arange(left + 0.02, right - 0.03, step_x):
            canvas.rectangle((x, y, x + step_x * 0.55, y + step_y * 0.6), glass, BUILDING)


def draw_tree(canvas: Canvas, rng: np.random.Generator, x: float, base: float, size: float) -> None:
    trunk = tint(rng, [(90, 65, 45), (70, 55, 45)], 10)
    canvas.rectangle((x - size * 0.05, base - size * 0.6, x + size * 0.05, base), trunk, VEGETATION)
    leaves = tint(rng, [(60, 115, 50), (85, 130, 60), (45, 90, 55), (120, 130, 50)], 15)
    for _ in range(rng.integers(7, 13)):
        angle, reach, r = rng.uniform(0, 2 * pi), rng.uniform(0, 0.26) * size, rng.uniform(0.16, 0.3) * size
        cx, cy = x + reach * cos(angle), base - 0.78 * size + reach * sin(angle)
        shade = mix(leaves, (20, 40, 20) if rng.random() < 0.5 else (190, 210, 120), rng.uniform(0, 0.3))
        canvas.ellipse((cx - r, cy - r * 0.85, cx + r, cy + r * 0.85), shade, VEGETATION)


def draw_ground(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    """Grass or paving up to the horizon, and a road in perspective between two sidewalks."""
    far = canvas.width * rng.uniform(0.35, 0.65)  # the vanishing point
    near = canvas.width * rng.uniform(0.4, 0.6)
    if rng.random() < 0.6:
        side, label = tint(rng, [(90, 130, 60), (110, 125, 70), (75, 110, 60)], 15), VEGETATION
    else:
        side, label = tint(rng, [(175, 165, 155), (160, 155, 150)], 12), SIDEWALK
    canvas.rectangle((0, horizon, canvas.width, 1.0), side, label)
    half, kerb = canvas.width * rng.uniform(0.28, 0.42), rng.uniform(0.14, 0.26)
    paving = tint(rng, [(180, 170, 160), (165, 160, 158), (190, 178, 165)], 12)
    asphalt = tint(rng, [(75, 75, 80), (95, 95, 98), (60, 62, 70)], 12)
    wide, narrow = half + kerb, 0.08
    canvas.polygon(trapezium(far, near, narrow, wide, horizon), paving, SIDEWALK)
    canvas.polygon(trapezium(far, near, narrow * 0.6, half, horizon), asphalt, ROAD)
    marking = mix(asphalt, (245, 240, 215), 0.85)
    dashes = rng.integers(5, 9)
    for dash in range(dashes):
        near_t, far_t = ((dash + 1) / dashes) ** 2, ((dash + 0.55) / dashes) ** 2  # nearer dashes are longer
        canvas.polygon(
            [
                (far + (near - far) * t + side_ * 0.012 * t, horizon + (1 - horizon) * t)
                for t, side_ in ((far_t, -1), (far_t, 1), (near_t, 1), (near_t, -1))
            ],
            marking,
            ROAD,
        )


def draw_things(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    """Cars on the road, people, trees and signs beside it: far ones first, so that near ones cover them."""
    kinds = rng.choice(4, size=rng.integers(6, 13), p=[0.36, 0.3, 0.14, 0.2])
    for depth, kind in sorted(zip(rng.uniform(0.12, 0.85, len(kinds)), kinds, strict=True)):
        base = horizon + (1 - horizon) * depth
        middle, roadside = canvas.width / 2, canvas.width * (0.08 + 0.36 * depth)
        beside = middle + (roadside + rng.uniform(0, 0.2)) * (1 if rng.random() < 0.5 else -1)
        if kind == 0:
            draw_car(canvas, rng, middle + rng.uniform(-0.7, 0.7) * roadside, base, 0.1 + 0.32 * depth)
        elif kind == 1:
            draw_person(canvas, rng, beside, base, 0.12 + 0.36 * depth)
        elif kind == 2:
            draw_tree(canvas, rng, beside, base, 0.25 + 0.5 * depth)
        else:
            draw_sign(canvas, rng, beside, base, 0.16 + 0.42 * depth)


def draw_car(canvas: Canvas, rng: np.random.Generator, x: float, base: float, width: float) -> None:
    """A car from the side or, narrower, from behind."""
    body = tint(rng, [(190, 40, 40), (40, 70, 160), (225, 225, 225), (35, 35, 40), (215, 175, 60), (60, 130, 125)], 20)
    glass, tyre = mix(body, (50, 65, 80), 0.8), (25, 25, 28)
    if rng.random() < 0.45:
        width *= 0.62
        height = width * 0.8
    else:
        height = width * 0.42
    left, right, top = x - width / 2, x + width / 2, base - height
    waist = base - height * 0.58
    for wheel in (left + width * 0.2, right - width * 0.2):
        r = height * 0.2
        canvas.ellipse((wheel - r, base - 1.6 * r, wheel + r, base + 0.4 * r), tyre, CAR)
    canvas.rectangle((left, waist, right, base - height * 0.12), body, CAR)
    slope = width * 0.16
    canvas.polygon(
        [(left + slope, top), (right - slope, top), (right - slope * 0.4, waist), (left + slope * 0.4, waist)],
        body,
        CAR,
    )
    inset = height * 0.06
    window = (left + slope + inset, top + inset, right - slope - inset, waist - inset)
    canvas.rectangle(window, glass, CAR)
    for lamp in (left + width * 0.06, right - width * 0.14):
        canvas.rectangle(
            (lamp, waist + height * 0.08, lamp + width * 0.08, waist + height * 0.18), (250, 230, 170), CAR
        )


def draw_person(canvas: Canvas, rng: np.random.Generator, x: float, base: float, height: float) -> None:
    coat = tint(rng, [(200, 60, 60), (60, 60, 140), (230, 150, 50), (90, 50, 110), (220, 220, 210), (40, 120, 90)], 25)
    legs, skin = (
        tint(rng, [(40, 45, 70), (70, 60, 50), (30, 30, 30)], 10),
        tint(rng, [(225, 180, 150), (140, 95, 70)], 15),
    )
    width, stride = height * 0.26, height * rng.uniform(0.02, 0.09)
    for side in (-1, 1):
        foot = x + side * stride
        canvas.polygon(
            [
                (x - width * 0.24, base - height * 0.5),
                (x + width * 0.24, base - height * 0.5),
                (foot + width * 0.22, base),
                (foot - width * 0.22, base),
            ],
            legs,
            PERSON,
        )
    canvas.ellipse((x - width / 2, base - height * 0.86, x + width / 2, base - height * 0.4), coat, PERSON)
    head = height * 0.085
    canvas.ellipse((x - head, base - height, x + head, base - height + 2.2 * head), skin, PERSON)


def draw_sign(canvas: Canvas, rng: np.random.Generator, x: float, base: float, height: float) -> None:
    face = tint(rng, [(210, 30, 40), (30, 80, 190), (245, 200, 40)], 15)
    pole, r = height * 0.045, height * 0.2
    canvas.rectangle((x - pole, base - height * 0.7, x + pole, base), tint(rng, [(130, 130, 135)], 15), SIGN)
    cy = base - height + r
    corners, turn = ((3, -pi / 2), (4, pi / 4), (8, pi / 8))[rng.integers(3)]
    for radius, colour in ((r, face), (r * 0.6, (245, 245, 240))):
        points = [
            (x + radius * cos(turn + 2 * pi * i / corners), cy + radius * sin(turn + 2 * pi * i / corners))
            for i in range(corners)
        ]
        canvas.polygon(points, colour, SIGN)
