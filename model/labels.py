"""Label sets: what a class id is called, and the colour it is drawn in."""

import colorsys
from dataclasses import dataclass

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSet:
    """The classes of a network: entry `i` of `names` and of `palette` (RGB, 0 to 255) belongs to class id `i`."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]

    def __len__(self) -> int:
        return len(self.names)


def label_set(names: list[str], palette: list[Colour] | None = None) -> LabelSet:
    """Names with their colours; without a palette each class gets one that is far from its neighbours'.

    A name that an earlier class has is told from it by its id, as classes are counted by name: "door (58)".
    """
    told = [f"{name} ({at})" if name in names[:at] else name for at, name in enumerate(names)]
    return LabelSet(tuple(told), tuple(palette) if palette else tuple(colour(i) for i in range(len(names))))


def colour(class_id: int) -> Colour:
    """A stable colour for a class id: hues step by the golden ratio, so that no two small ids look alike."""
    hue = class_id * 0.61803398875 % 1.0
    saturation, value = ((0.75, 0.9), (0.5, 0.75), (0.9, 0.6))[class_id % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue
