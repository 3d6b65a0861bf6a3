"""Which PNG encoder for masks: time and size of ours beside Pillow, OpenCV and others behind the same filter.

Masks are those of the demo's network at two sizes, flat as trained networks make them, and of a random network with
150 classes, which are as ragged as logits at a quarter of the resolution can be. Times are the best of several turns.

  python -m jobs.bench.masks
"""

import io
import json
import struct
import tempfile
import time
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from isal import isal_zlib
from PIL import Image

from jobs.bench.model import processor, save_random_network
from jobs.demo import WEIGHTS
from jobs.scenes.street import draw_scene
from model.checkpoint import load_checkpoint
from model.labels import label_set
from model.predictor import Predictor
from pipeline.masks import SIGNATURE, UP, chunk, decode_mask, encode_mask

HELD_OUT = 2_000_000  # seeds of scenes that no training has seen
TURNS = 7
CASES = {"640x480": (WEIGHTS, (480, 640), 6), "3840x2160": (WEIGHTS, (2160, 3840), 2), "ragged": (None, (480, 640), 4)}
LABELS = label_set([str(number) for number in range(150)])
PALETTE = [part for colour in LABELS.palette for part in colour]


def main() -> None:
    masks = {
        name: predict(str(weights) if weights else None, size, count) for name, (weights, size, count) in CASES.items()
    }
    print(f"# Masks as PNG\n\n{processor('cpu')}, one thread. `python -m jobs.bench.masks`\n")
    print("| | " + " | ".join(f"{case}: ms, kB, times ours" for case in CASES) + " |\n|" + "---|" * (len(CASES) + 1))
    rows: dict[str, dict[str, list[float]]] = {}
    for name, encode in ENCODERS.items():
        rows[name] = {case: measure(encode, masks[case]) for case in CASES}
        ours = next(iter(rows.values()))
        cells = [f"{ms:.2f}, {kb:.1f}, {ms / ours[case][0]:.1f}" for case, (ms, kb) in rows[name].items()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(json.dumps({"hardware": processor("cpu"), "ms_and_kb": rows}))


def predict(weights: str | None, size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Masks of a few scenes."""
    with tempfile.TemporaryDirectory() as folder:
        if not weights:
            save_random_network("b0", folder)
        predictor = Predictor(load_checkpoint(weights or folder), "cpu")
        scenes = [draw_scene(HELD_OUT + number, 704, 512).image for number in range(count)]
        return [predictor(scene[None], [size])[0].mask for scene in scenes]


def measure(encode: Callable[[np.ndarray], bytes], masks: list[np.ndarray]) -> list[float]:
    """Milliseconds and kilobytes a mask."""
    assert all(np.array_equal(decode_mask(encode(mask)), mask) for mask in masks)
    best = float("inf")
    for _ in range(TURNS):
        started = time.perf_counter()
        sizes = [len(encode(mask)) for mask in masks]
        best = min(best, time.perf_counter() - started)
    return [round(1000 * best / len(masks), 3), round(sum(sizes) / len(masks) / 1000, 2)]


def pillow(level: int, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> Callable[[np.ndarray], bytes]:
    def encode(mask: np.ndarray) -> bytes:
        image, file = Image.fromarray(mask).convert("P"), io.BytesIO()
        image.putpalette(PALETTE)
        image.save(file, "PNG", compress_level=level, compress_type=strategy)
        return file.getvalue()

    return encode


def opencv(*options: int) -> Callable[[np.ndarray], bytes]:
    return lambda mask: cv2.imencode(".png", mask, options)[1].tobytes()


def behind_up(compress: Callable[[bytes], bytes]) -> Callable[[np.ndarray], bytes]:
    """Another compressor behind the filter that ours has."""

    def encode(mask: np.ndarray) -> bytes:
        height, width = mask.shape
        rows = np.empty((height, 1 + width), np.uint8)
        rows[:, 0], rows[0, 1:] = UP, mask[0]
        np.subtract(mask[1:], mask[:-1], out=rows[1:, 1:])
        header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
        parts = [(b"IHDR", header), (b"PLTE", bytes(PALETTE)), (b"IDAT", compress(rows.tobytes())), (b"IEND", b"")]
        return SIGNATURE + b"".join(chunk(kind, data) for kind, data in parts)

    return encode


def run_lengths(rows: bytes) -> bytes:
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return compressor.compress(rows) + compressor.flush()


ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    "ours: up, zlib-ng run lengths": lambda mask: encode_mask(mask, LABELS),
    "up, zlib run lengths": behind_up(run_lengths),
    "up, zlib 1": behind_up(lambda rows: zlib.compress(rows, 1)),
    "up, ISA-L 1": behind_up(lambda rows: isal_zlib.compress(rows, 1)),
    "Pillow 6": pillow(6),
    "Pillow 1": pillow(1),
    "Pillow run lengths": pillow(1, zlib.Z_RLE),
    "OpenCV, no palette": opencv(),
    "OpenCV 1 run lengths, no palette": opencv(cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, 3),
}


if __name__ == "__main__":
    main()
