"""What scaled decoding gains and what it changes, and how fast JPEGs are decoded beside Pillow and OpenCV.

Scenes that no training has seen are drawn, saved, decoded fully and scaled, and segmented with the demo's network by
the policy short=512. The masks of both are compared with each other, and each with the drawn truth. Times are the best
of several turns on one thread, from bytes to the network's input; libjpeg-turbo's work is what bounds them.

  python -m jobs.bench.decode
"""

import io
import json
import time
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from jobs.bench.model import processor
from jobs.demo import WEIGHTS
from jobs.scenes.street import CLASSES, draw_scene
from model.checkpoint import load_checkpoint
from model.predictor import Predictor, use_threads
from model.scores import Scores
from pipeline.decode import decode, resize
from pipeline.policy import parse_policy

HELD_OUT = 4_000_000  # seeds of scenes that no training has seen
SIZES = {(4000, 3000): 5, (3840, 2160): 5, (2048, 1536): 8, (1440, 1080): 12}  # (width, height): scenes
POLICY, QUALITY, TURNS, LIMIT = parse_policy("short=512"), 90, 5, 10**9


def main() -> None:
    print(f"# Decoding JPEGs\n\n{processor('cpu')}, one thread, {POLICY}. `python -m jobs.bench.decode`\n")
    print("| | full ms | scaled ms | times | Pillow ms | OpenCV ms | equal pixels: mean, worst | mIoU full, scaled |")
    print("|" + "---|" * 8)
    use_threads(1)
    predictor = Predictor(load_checkpoint(str(WEIGHTS)), "cpu")
    rows: dict[str, dict[str, float]] = {}
    for (width, height), count in SIZES.items():
        rows[f"{width}x{height}"] = row = compare(predictor, width, height, count)
        print(
            f"| {width}x{height} | {row['full']:.1f} | {row['scaled']:.1f} | {row['full'] / row['scaled']:.2f} "
            f"| {row['pillow']:.1f} | {row['opencv']:.1f} | {row['equal']:.5f}, {row['worst']:.5f} "
            f"| {row['miou_full']:.4f}, {row['miou_scaled']:.4f} |",
            flush=True,
        )
    print(json.dumps({"hardware": processor("cpu"), "sizes": rows}))


def compare(predictor: Predictor, width: int, height: int, count: int) -> dict[str, float]:
    """Milliseconds an image, the share of mask pixels that stay, and mIoU, over some scenes of a size."""
    readers = {"full": full, "scaled": scaled, "pillow": pillow, "opencv": opencv}
    seconds = dict.fromkeys(readers, 0.0)
    scores = {name: Scores.empty(len(CLASSES)) for name in ("full", "scaled")}
    equal = []
    for number in range(count):
        scene = draw_scene(HELD_OUT + number, width, height)
        data = as_jpeg(scene.image)
        masks = []
        for name, best in best_times(readers, data).items():
            seconds[name] += best
            if name in scores:
                masks.append(predictor(readers[name](data)[None], [(height, width)])[0].mask)
                scores[name].add(scene.mask, masks[-1])
        equal.append(float(np.mean(masks[0] == masks[1])))
    times = {name: 1000 * total / count for name, total in seconds.items()}
    mious = {f"miou_{name}": float(some.pooled().mean_iou) for name, some in scores.items()}
    return times | mious | {"equal": float(np.mean(equal)), "worst": min(equal)}


def as_jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def best_times(readers: Mapping[str, Callable[[bytes], np.ndarray]], data: bytes) -> dict[str, float]:
    """Seconds of each; they take turns, as a machine is not always equally fast."""
    best = dict.fromkeys(readers, float("inf"))
    for _ in range(TURNS):
        for name, read in readers.items():
            started = time.perf_counter()
            read(data)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def full(data: bytes) -> np.ndarray:
    return to_input(decode(data, LIMIT).pixels)


def scaled(data: bytes) -> np.ndarray:
    found = decode(data, LIMIT, POLICY.size)
    return resize(found.pixels, *POLICY.size(found.height, found.width))


def pillow(data: bytes) -> np.ndarray:
    return to_input(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def opencv(data: bytes) -> np.ndarray:
    import cv2

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    return to_input(np.asarray(pixels))


def to_input(pixels: np.ndarray) -> np.ndarray:
    """What the network sees, uint8 (h, w, 3)."""
    return resize(pixels, *POLICY.size(*pixels.shape[:2]))


if __name__ == "__main__":
    main()
