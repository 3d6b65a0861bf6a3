"""Whether a network that was trained at one size works at others: the same harbours drawn at half to four times the
size, seen whole, through windows, and scaled down; and harbours that are only wider, in which things keep their size.

    python -m jobs.bench.transfer [FOLDER] [--steps N] [--scenes N] [--plot transfer.svg]

SegFormer has no position embedding, so no table of positions must be stretched for a larger image (section 3.1 of the
paper). That is one of three things that change when the same scene is drawn larger: tokens have other places, there
are more of them to attend to, and what they show is larger. Wider harbours tell the first two from the third.

Two networks are trained from random weights with crops of one size of scenes of one size: one sees them as they are,
the other at random scales, as the published recipe has it, which teaches sizes that the first has never seen. Each then
segments scenes that it was not trained on: whole at their own size (`--policy native`, whose windows are larger than
any of them), through windows of the size of its crops, or scaled so that all have the size of the training scenes.
FOLDER keeps scenes, networks and masks; what is there is not made again. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from jobs.display import Display
from jobs.scenes.draw import TRAINING_SEEDS, Drawing, draw_folder
from pipeline.cluster import spread
from pipeline.config_truth import EvaluateSettings
from pipeline.evaluate import evaluate

KIND, SHORT, ASPECT = "harbour", 256, 1.5  # of the training scenes: 256 x 384
LARGER = (128, 192, 256, 384, 512, 768, 1024)  # short sides of what is segmented: multiples of 32, so nothing is scaled
WIDER = (1.5, 3.0, 6.0)  # width to height, at the training scenes' short side
TRAINING_SCENES, CROP, BATCH = 600, 256, 4
NETWORKS = {"one size": "1:1", "random scales": "0.5:2"}  # and their scales in training
WAYS = {  # of seeing an image, and the options for that
    "whole": ["--policy", "native"],
    "windows": ["--policy", f"native={CROP}+64"],
    "scaled": ["--policy", f"short={SHORT}"],
    "scaled, six looks": ["--policy", f"short={SHORT}", "--flip", "--scales", "0.75,1,1.25"],
}
COLOURS = dict(zip(WAYS, ("#1b6ca8", "#d1495b", "#5a8f3c", "#b08d2f"), strict=True))

Found = dict[str, dict[str, dict[str, dict[str, float]]]]  # by network, way and shape: pooled and averaged mean IoU


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="what is kept (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of each training (default: 1000)")
    parser.add_argument("--scenes", type=int, default=24, metavar="N", help="to segment, of each shape (default: 24)")
    parser.add_argument("--plot", metavar="FILE", help="where the plot goes: .svg, .png or .pdf")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report(measure(Path(options.folder or temporary), options.steps, options.scenes), options)


def measure(folder: Path, steps: int, scenes: int) -> Found:
    """Draw, train, segment and compare."""
    draw(folder / "train", TRAINING_SCENES, TRAINING_SEEDS, SHORT, ASPECT)
    for short, aspect in shapes():
        draw(folder / "held" / name_of(short, aspect), scenes, 0, short, aspect)
    found: Found = {}
    for network, scales in NETWORKS.items():
        weights = folder / network.replace(" ", "-")
        train(folder / "train", weights, steps, scales)
        found[network] = {}
        for way, options in WAYS.items():
            output = folder / "masks" / weights.name / way
            run("segment", folder / "held", output, "--include", "*/images/*", "--checkpoint", weights, *options)
            found[network][way] = compare(output, folder / "held")
    return found


def shapes() -> list[tuple[int, float]]:
    """Short side and aspect of all that is segmented."""
    return [(short, ASPECT) for short in LARGER] + [(SHORT, aspect) for aspect in WIDER if aspect != ASPECT]


def name_of(short: int, aspect: float) -> str:
    return f"{short}x{round(short * aspect)}"


def draw(folder: Path, scenes: int, seed: int, short: int, aspect: float) -> None:
    """Scenes of one shape. The same seeds at two sizes are the same scenes."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draw_folder(folder, Drawing(KIND, scenes, seed, (short, short), (aspect, aspect), "png"))


def train(scenes: Path, out: Path, steps: int, scales: str) -> None:
    """A B0 from random weights."""
    options = {
        "checkpoint": "new:b0",
        "policy": f"short={SHORT}",
        "crop": CROP,
        "batch": BATCH,
        "steps": steps,
        "scales": scales,
        "learning-rate": 2e-3,
        "decoder-factor": 1,
        "ema": 0.99,
        "colour": 0,
        "holdout": 0,
        "seed": 0,
    }
    run("finetune", scenes / "images", scenes / "masks", out, *(f"--{name}={value}" for name, value in options.items()))


def run(*command: object) -> None:
    """A job of Swath, as a person would start it; what is done already it does not do again."""
    began = time.monotonic()
    words = [str(word) for word in command]
    print("swath", *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "jobs", *words], check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"swath {words[0]} ended with exit code {done.returncode}")
    print(f"{words[0]} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def compare(output: Path, held: Path) -> dict[str, dict[str, float]]:
    """Of each shape, how far the masks of an output are the truth: mean IoU, and of how many images."""
    found = {}
    for shape in dict.fromkeys(name_of(*shape) for shape in shapes()):
        settings = EvaluateSettings(
            output=str(output),
            truth=f"{held}/{shape}/masks/*.png",
            where=f"uri LIKE '%/{shape}/images/%'",
            rename=("^.*/=",),
        )
        with Display() as display:
            evaluation = evaluate(settings, display, partial(spread, settings))
        assert not evaluation.left_out.counts, evaluation.left_out
        record = evaluation.record
        found[shape] = {way: round(record[way]["mean_iou"], 4) for way in ("pooled", "averaged")}
        found[shape]["images"] = record["images"]["compared"]
    return found


def report(found: Found, options: Any) -> None:
    """Tables, the plot, and the line for programs."""
    from jobs.bench.model import processor  # which imports much

    larger, wider = ([name_of(*shape) for shape in some] for some in series())
    for title, names in (
        ("Larger: the same harbours in more pixels", larger),
        ("Wider: things keep their size", wider),
    ):
        print(f"\n{title}\n\n| network | seen | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
        for network, ways in found.items():
            for way, shapes_ in ways.items():
                numbers = [f"{shapes_[name]['pooled']:.3f} ({shapes_[name]['averaged']:.3f})" for name in names]
                print(f"| {network} | {way} | {' | '.join(numbers)} |")
    if options.plot:
        plot(found, Path(options.plot))
    settings = {"steps": options.steps, "scenes": options.scenes, "crop": CROP, "batch": BATCH}
    print(json.dumps({"hardware": processor("cpu"), **settings, "mean_iou": found}))


def series() -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The shapes of the two tables and plots."""
    return [(short, ASPECT) for short in LARGER], [(SHORT, aspect) for aspect in WIDER]


def plot(found: Found, path: Path) -> None:
    """Mean IoU, pooled: of each network over the size, and of both over the width."""
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.hashsalt": "transfer", "svg.fonttype": "none", "font.size": 9})
    larger, wider = series()
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 4), sharey=True, width_ratios=[7, 7, 5])
    for axis, network in zip(axes, found, strict=False):
        draw_lines(axis, found, larger, {network: "-"}, f"trained at {network}")
        axis.set_xlabel("short side, times that of training")
    draw_lines(axes[2], found, wider, dict(zip(found, ("-", "--"), strict=True)), "both (dashed: random scales)")
    axes[2].set_xlabel("width, times that of training")
    axes[0].set_ylabel("mean IoU, pooled over pixels")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_lines(axis: Any, found: Found, shapes_: list[tuple[int, float]], lines: dict[str, str], title: str) -> None:
    """A line for each way of seeing images of these shapes, of each network in `lines`, which has their styles."""
    times = [short / SHORT * aspect / ASPECT for short, aspect in shapes_]  # one of the two is 1
    for network, line in lines.items():
        for way, colour in COLOURS.items():
            values = [found[network][way][name_of(*shape)]["pooled"] for shape in shapes_]
            axis.plot(times, values, line, color=colour, marker="o", markersize=4, label=way)
    axis.set_xscale("log", base=2)
    axis.set_xticks(times, [f"{ratio:g}" for ratio in times], minor=False)
    axis.minorticks_off()
    axis.set_title(title)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
