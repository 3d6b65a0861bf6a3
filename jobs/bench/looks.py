"""What it gains to look more than once, and what it costs: --flip and --scales beside a single look.

Scenes that no training has seen are drawn, and segmented with the demo's network by the policy short=512, and by a
larger one, which is what the same time might buy instead. Mean IoU and accuracy are pooled over all pixels, as
`swath evaluate` has them; times are from the network's input to the mask, on one thread, and the ways take turns, as a
machine is not always equally fast.

  python -m jobs.bench.looks
"""

import argparse
import json
import time

import numpy as np

from jobs.bench.model import processor
from jobs.demo import SHAPES, WEIGHTS
from jobs.scenes.street import CLASSES, draw_scene
from model.checkpoint import load_checkpoint
from model.predictor import Predictor, use_threads
from model.scores import Scores
from pipeline.decode import resize
from pipeline.policy import ONE_LOOK, Looks, parse_policy

WAYS = {
    "short=512": ONE_LOOK,
    "short=512 --flip": Looks(flip=True),
    "short=512 --scales 0.75,1,1.25": Looks(scales=(0.75, 1.0, 1.25)),
    "short=512 --scales 1,1.5": Looks(scales=(1.0, 1.5)),
    "short=512 --flip --scales 0.75,1,1.25": Looks(True, (0.75, 1.0, 1.25)),
    "short=640": ONE_LOOK,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=24, help="how many (default: 24)")
    scenes = parser.parse_args().scenes
    use_threads(1)
    predictor = Predictor(load_checkpoint(str(WEIGHTS)), "cpu", precision="float32")
    scores = {way: Scores.empty(len(CLASSES)) for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for number in range(scenes):
        scene = draw_scene(number, *SHAPES[number % len(SHAPES)])
        for way, looks in WAYS.items():
            mask, taken = look(predictor, scene.image, way.split()[0], looks)
            scores[way].add(scene.mask, mask)
            seconds[way] += taken
    print(f"# Looks\n\n{processor('cpu')}, one thread, {scenes} scenes. `python -m jobs.bench.looks`\n")
    print("| | looks | ms an image | times | mean IoU | accuracy |\n" + "|---" * 6 + "|")
    rows = {}
    for way, looks in WAYS.items():
        pooled = scores[way].pooled()
        rows[way] = row = {
            "ms": 1000 * seconds[way] / scenes,
            "times": seconds[way] / seconds["short=512"],
            "miou": float(pooled.mean_iou),
            "accuracy": float(pooled.accuracy),
        }
        print(
            f"| {way} | {looks.count} | {row['ms']:.0f} | {row['times']:.2f} | {row['miou']:.4f} "
            f"| {row['accuracy']:.4f} |"
        )
    print(json.dumps({"hardware": processor("cpu"), "scenes": scenes, "ways": rows}))


def look(predictor: Predictor, image: np.ndarray, policy: str, looks: Looks) -> tuple[np.ndarray, float]:
    """The mask of an image, and the seconds that it took."""
    height, width = image.shape[:2]
    bucket = parse_policy(policy).size(height, width)
    views = [resize(image, *size)[None] for size in looks.sizes(*bucket)]
    started = time.perf_counter()
    (found,) = predictor.at_scales(views, bucket, [(height, width)], looks.flip)
    return found.mask, time.perf_counter() - started


if __name__ == "__main__":
    main()
