"""A worker whose device sleeps, by itself, so that a process that has one does not import what tests need."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import ray

import pipeline.segment
from model.checkpoint import Checkpoint
from model.predictor import Predictor
from model.segmentation import Segmentation

LABELS = 5


class Device:
    """As long with each image as `pace` in the output's folder says; who has done how many is noted beside it."""

    lanes, batch_pixels = 1, 32 * 32

    def __init__(self, folder: Path):
        self.folder, self.node, self.seen = folder, ray.get_runtime_context().get_node_id(), 0

    def __call__(self, images: np.ndarray, sizes: Iterable[tuple[int, int]]) -> list[Segmentation]:
        time.sleep(json.loads((self.folder / "pace").read_text()) * len(images))
        self.seen += len(images)
        (self.folder / f"done-{self.node}-{os.getpid()}").write_text(str(self.seen))
        return [self.mask(*size) for size in sizes]

    def mask(self, height: int, width: int) -> Segmentation:
        pixels = np.r_[height * width, np.zeros(LABELS - 1, int)]
        return Segmentation(np.zeros((height, width), np.uint8), pixels, np.ones(LABELS, np.float32), 1.0, 0.0)

    def at_scales(
        self, views: Sequence[np.ndarray], bucket: tuple[int, int], sizes: list[tuple[int, int]], flip: bool
    ) -> list[Segmentation]:
        return self(views[0], sizes)

    def full_batch(self, images: int) -> int:
        return images

    def is_ready_for(self, shape: tuple[int, ...]) -> bool:
        return True

    def enter_lane(self) -> None:
        pass

    def activations(self, pixels: int, mask_pixels: int, looks: int) -> int:
        return 0

    def __str__(self) -> str:
        return "sleeper"


class Sleeper(pipeline.segment.Segmenter):
    """The worker of a run, but for the network."""

    def load(self, checkpoint: Checkpoint) -> Predictor:
        return Device(Path(self.job.settings.output))  # type: ignore[return-value]
