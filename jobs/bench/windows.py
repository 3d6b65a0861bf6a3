"""What windows do to masks: beside the whole image at once, beside a cut in the middle of each overlap, and the truth.

    python -m jobs.bench.windows [--scenes N] [--sizes 1500x2333 ...] [--picture windows.png] [--large FORMAT ...]

Scenes are the demo's and so is its network, which was trained with crops of 256 pixels of scenes of 128 to 600: at 512
it sees what it knows, at 1536 much that it does not, and the whole image is then no better a mask than the windows'.
`--large` segments a scene of 20,000 x 14,000 pixels as jpeg or png on the whole road of a worker, which takes some
minutes, and says what memory its process took. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.demo import WEIGHTS
from jobs.scenes.street import CLASSES, PALETTE, draw_scene
from model.checkpoint import load_checkpoint
from model.labels import label_set
from model.predictor import Predictor
from model.scores import Scores
from model.windows import Span, Tiling, cut_out
from pipeline.config import SegmentSettings
from pipeline.containers import Images
from pipeline.masks import overlay
from pipeline.plan import PlannedImage
from pipeline.reader import Reader
from pipeline.road import Road
from pipeline.segment import resident_memory
from pipeline.storage import Store

WHOLE = Tiling(8192, 32)
TILINGS = [Tiling(512, 128), Tiling(1024, 64), Tiling(1024, 256), Tiling(1024, 384), Tiling(2048, 512)]
SIZES = ["512x4096", "1536x2048", "1500x2333"]
BESIDE = [*range(-64, -15, 4), *range(16, 65, 4)]  # pixels from a seam


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure masks through windows.")
    parser.add_argument("--scenes", type=int, default=4, help="of each size (default: 4)")
    parser.add_argument("--sizes", nargs="*", default=SIZES, metavar="HEIGHTxWIDTH")
    parser.add_argument("--picture", help="where to put a scene, its whole mask and its mask through windows")
    parser.add_argument("--large", nargs="*", default=[], choices=["jpeg", "png"], help="formats of a large image")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return print(json.dumps(segment_large(Path(options.worker))))
    predictor = Predictor(load_checkpoint(str(WEIGHTS)), "cpu", precision="float32")
    found = []
    for size in options.sizes:
        height, width = map(int, size.split("x"))
        found += compare(predictor, height, width, options.scenes)
    if options.picture:
        draw_picture(predictor, Path(options.picture))
    large = [run_large(kind) for kind in options.large]
    print(json.dumps({"masks": found, "large": large}))


def compare(predictor: Predictor, height: int, width: int, count: int) -> list[dict[str, Any]]:
    """A row for the whole image and for each tiling, over so many scenes."""
    scenes = [draw_scene(seed, width, height) for seed in range(count)]
    whole = [through(predictor, scene.image, WHOLE) for scene in scenes]
    truth = [scene.mask for scene in scenes]
    print(f"\n{height}x{width}: the whole at once has a mean IoU of {mean_iou(whole, truth):.3f}\n")
    print("| window+overlap | windows | s | equal to the whole | mean IoU | edges at seams / beside, cut | blended |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for tiling in TILINGS:
        seams = [between(tiling.spans(height)), between(tiling.spans(width))]
        if not any(seams):
            continue
        started = time.perf_counter()
        masks = [through(predictor, scene.image, tiling) for scene in scenes]
        row: dict[str, Any] = {
            "size": f"{height}x{width}",
            "tiling": f"{tiling.window}+{tiling.overlap}",
            "windows": (len(seams[0]) + 1) * (len(seams[1]) + 1),
            "seconds": round((time.perf_counter() - started) / count, 2),
            "equal": [round(float((one == other).mean()), 4) for one, other in zip(masks, whole, strict=True)],
            "mean_iou": round(mean_iou(masks, truth), 4),
            "cut": edges([cut(predictor, scene.image, tiling) for scene in scenes], *seams),
            "blended": edges(masks, *seams),
        }
        equal = f"{np.mean(row['equal']):.4f} (least {min(row['equal']):.4f})"
        columns = (row["tiling"], row["windows"], row["seconds"], equal, row["mean_iou"], row["cut"], row["blended"])
        print(f"| {' | '.join(map(str, columns))} |", flush=True)
        rows.append(row)
    return rows


def through(predictor: Predictor, image: np.ndarray, tiling: Tiling) -> np.ndarray:
    """The mask of an image through windows, one after the other."""
    return predictor.through_windows([image], tiling, 1)[0].mask


def cut(predictor: Predictor, image: np.ndarray, tiling: Tiling) -> np.ndarray:
    """The mask if of each window only what is nearest to its centre is kept."""
    mask = np.empty(image.shape[:2], np.uint8)
    down, across = tiling.spans(image.shape[0]), tiling.spans(image.shape[1])
    rows, columns = (pairwise([0, *between(spans), spans[-1].stop]) for spans in (down, across))
    windows = product(zip(down, rows, strict=True), zip(across, columns, strict=True))
    for (seen_y, (top, bottom)), (seen_x, (left, right)) in windows:
        found = through(predictor, np.ascontiguousarray(cut_out(image, seen_y, seen_x)), tiling)
        space = mask[top:bottom, left:right]
        space[:] = found[top - seen_y.start :, left - seen_x.start :][: space.shape[0], : space.shape[1]]
    return mask


def between(spans: list[Span]) -> list[int]:
    """The middle of each overlap along a side, in pixels."""
    return [(one.stop + following.start) // 2 for one, following in pairwise(spans)]


def edges(masks: list[np.ndarray], rows: list[int], columns: list[int]) -> float:
    """How many neighbours across the seams differ, by how many do beside them: 1 is what no eye can see."""
    at, beside = [], []
    for mask in masks:
        for upright, seams in ((mask, rows), (mask.T, columns)):
            changes = [float((upright[1:] != upright[:-1])[seam - 1].mean()) for seam in seams]
            at += changes
            beside += [float((upright[seam + by] != upright[seam + by - 1]).mean()) for seam in seams for by in BESIDE]
    return round(float(np.mean(at) / np.mean(beside)), 2)


def mean_iou(masks: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """Over the classes, pooled over all pixels."""
    scores = Scores.empty(len(CLASSES))
    for mask, right in zip(masks, truth, strict=True):
        scores.add(right, mask)
    return float(scores.pooled().mean_iou)


def draw_picture(predictor: Predictor, path: Path, seed: int = 2) -> None:
    """A large scene's masks side by side: of the whole at once, through windows that are cut, and that are blended."""
    image, labels = draw_scene(seed, 2333, 1500).image, label_set(list(CLASSES), list(PALETTE))
    masks = [through(predictor, image, WHOLE), cut(predictor, image, Tiling()), through(predictor, image, Tiling())]
    Image.fromarray(np.concatenate([overlay(image, mask, labels, 0.8) for mask in masks], axis=1)).save(path)


def run_large(kind: str, width: int = 20_000, height: int = 14_000) -> dict[str, Any]:
    """What a worker takes for an image of this size and format, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        street = draw_scene(0, width // 10, height // 10).image
        path = Path(folder) / f"{width}x{height}.{kind}"
        Image.fromarray(np.tile(street, (10, 10, 1))).save(path, quality=90, compress_level=1)
        command = [sys.executable, "-m", "jobs.bench.windows", "--worker", str(path)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{width}x{height} {kind}: peak memory {found['peak_bytes'] / 1e9:.2f} GB, {found['seconds']:.0f} s", flush=True
    )
    return found


def segment_large(path: Path) -> dict[str, Any]:
    """Send one image down a worker's road; the bytes that this process had at most."""
    torch.set_num_threads(2)
    settings = SegmentSettings(
        input=(str(path.parent),), output=str(path.parent), checkpoint=str(WEIGHTS), policy="native", max_pixels=10**9
    )
    store, loaded = Store(str(path.parent), settings), load_checkpoint(str(WEIGHTS))
    (entry,) = [entry for _, entry in store.listing() if entry]
    width, height = map(int, path.stem.split("x"))
    image = PlannedImage(entry.uri, entry.etag, entry.bytes, path.suffix[1:], width, height)
    road = Road(
        Images(Reader(settings), None),
        Predictor(loaded, "cpu", precision="float32"),
        loaded.labels,
        settings,
        2,
        1 << 30,
    )
    started = time.perf_counter()
    ((_, outcome),) = road.send([image]).outcomes()
    seconds = time.perf_counter() - started
    peak = resident_memory("VmHWM")
    return {"image": path.name, "status": outcome.status, "seconds": round(seconds, 1), "peak_bytes": peak}


if __name__ == "__main__":
    main()
