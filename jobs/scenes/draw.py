"""Draws scenes whose every pixel has a known class, as a folder of images and one of masks: data to train and to test.

    python -m jobs.scenes.draw FOLDER --scenes 200 --kind harbour
    python -m jobs.scenes.draw FOLDER --scenes 4000 --seed 1000000 --short 128:560

Streets are what the demo segments and its network knows, harbours what it has never seen. A scene is a function of its
seed and size alone, and its size of its seed and the ranges that are asked for: nothing has to be downloaded or stored,
the same command gives the same files on every machine, and a scene that was not drawn for training is held out by
construction. Sizes are log-uniform, so that small and large scenes are equally common, as a network wants them that is
to work at every size.

FOLDER gets images/scene-<seed>.jpg (or .png), masks/scene-<seed>.png with class ids and a palette, and labels.json, the
classes' names by id. A folder of this command is made anew, another one only if it is empty.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.display import Display
from jobs.scenes import harbour, street
from jobs.scenes.canvas import Scene
from model.labels import Colour, label_set
from pipeline.config import ConfigurationError
from pipeline.masks import encode_mask

TRAINING_SEEDS = 1_000_000  # from here on for training; what a demo draws is below
MARKER = ".swath-scenes"  # in a folder that this command made, and may therefore remove
SMALLEST = 16  # pixels of a side

Range = tuple[float, float]


@dataclass(frozen=True)
class Kind:
    """A kind of scenes: the names and colours of its classes, and what draws one from a seed, a width and a height."""

    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    draw: Callable[[int, int, int], Scene]


KINDS = {
    "street": Kind(street.CLASSES, street.PALETTE, street.draw_scene),
    "harbour": Kind(harbour.CLASSES, harbour.PALETTE, harbour.draw_scene),
}


@dataclass(frozen=True)
class Drawing:
    """What is asked for: `scenes` from seed `seed` on, with sides in pixels and width to height from these ranges."""

    kind: str
    scenes: int
    seed: int
    short: Range
    aspect: Range
    suffix: str

    def size(self, seed: int) -> tuple[int, int]:
        """Width and height of a scene, in pixels."""
        rng = np.random.default_rng((seed, 1))  # not the one that draws it, whose numbers would go along with the size
        short = math.exp(rng.uniform(*np.log(self.short)))
        aspect = math.exp(rng.uniform(*np.log(self.aspect)))
        return round(short * max(1, aspect)), round(short * max(1, 1 / aspect))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.scenes.draw",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--scenes", type=whole, default=200, metavar="N", help="how many (default: 200)")
    parser.add_argument(
        "--seed",
        type=whole,
        default=TRAINING_SEEDS,
        metavar="N",
        help=f"of the first scene; the others follow (default: {TRAINING_SEEDS}, as the demo draws those from 0 on)",
    )
    parser.add_argument(
        "--short", type=ranged, default="128:560", metavar="MIN:MAX", help="short side in pixels (default: 128:560)"
    )
    parser.add_argument(
        "--aspect", type=ranged, default="0.75:1.8", metavar="MIN:MAX", help="width to height (default: 0.75:1.8)"
    )
    parser.add_argument("--kind", choices=KINDS, default="street", help="what they show (default: street)")
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="of the images (default: jpg)")
    options = parser.parse_args()
    if not options.scenes:
        parser.error("argument --scenes: at least 1")
    if options.short[0] < SMALLEST:
        parser.error(f"argument --short: at least {SMALLEST} pixels (got {options.short[0]:g})")
    drawing = Drawing(options.kind, options.scenes, options.seed, options.short, options.aspect, options.format)
    try:
        draw_folder(options.folder, drawing)
    except ConfigurationError as error:
        parser.error(str(error))


def draw_folder(folder: Path, drawing: Drawing) -> None:
    """Draw all of it into `folder`. Raises `ConfigurationError` for a folder that is somebody else's."""
    fresh_folder(folder, MARKER)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    names = {str(number): name for number, name in enumerate(KINDS[drawing.kind].classes)}
    seeds = range(drawing.seed, drawing.seed + drawing.scenes)
    with Display() as display, get_context("forkserver").Pool(cpu_count()) as pool:
        files = pool.imap_unordered(partial(draw_file, folder, drawing), seeds, chunksize=8)
        for done, _ in enumerate(files, start=1):
            display.show(f"drawing {drawing.kind} scenes", done, drawing.scenes, "")
    (folder / "labels.json").write_text(json.dumps(names, indent=2) + "\n")  # last: with it the folder is whole


def fresh_folder(folder: Path, marker: str) -> Path:
    """`folder`, empty but for the marker. Raises `ConfigurationError` for one with content but without the marker."""
    if folder.exists() and not (folder / marker).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and was not made by this command; give another FOLDER")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / marker).touch()
    return folder


def draw_file(folder: Path, drawing: Drawing, seed: int) -> None:
    """Draw one scene and write its image and its mask."""
    kind, name = KINDS[drawing.kind], f"scene-{seed:07d}"
    scene = kind.draw(seed, *drawing.size(seed))
    Image.fromarray(scene.image).save(folder / "images" / f"{name}.{drawing.suffix}", quality=92, compress_level=1)
    mask = encode_mask(scene.mask, label_set(list(kind.classes), list(kind.palette)))
    (folder / "masks" / f"{name}.png").write_bytes(mask)


def whole(text: str) -> int:
    """A number of things, or a seed: from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative (got {text})")
    return number


def ranged(text: str) -> Range:
    """MIN:MAX as two numbers over 0, the same for a single one."""
    least, _, most = text.partition(":")
    try:
        found = float(least), float(most or least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be MIN:MAX or one number (got {text!r})") from None
    if not 0 < found[0] <= found[1] < math.inf:
        raise argparse.ArgumentTypeError(f"must be MIN:MAX with 0 < MIN <= MAX (got {text!r})")
    return found


if __name__ == "__main__":
    main()
