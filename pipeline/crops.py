"""Examples to the crops of every step, loaded ahead of it by threads.

Which crop is where is a function of the seed and of its number alone: each epoch has an order of its own, each crop a
random generator of its own. So nothing has to be remembered to go on at any step, and however many workers share a
batch, it is the same batch.
"""

import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from model.augmentation import Augmentation, augment
from model.predictor import use_threads
from pipeline.ahead import ahead
from pipeline.config import StorageSettings
from pipeline.decode import decode
from pipeline.examples import LOST, UNUSABLE, place
from pipeline.filesystems import public_url
from pipeline.pairs import Masks
from pipeline.policy import Policy
from pipeline.reader import Reader
from pipeline.truth import Rules, read_truth

STEPS_AHEAD = 2
ORDER, CROP = 1, 2  # what a random generator is for, besides the seed


class LostExampleError(Exception):
    """An image or a mask is not any more what it was when it was looked through."""


class Examples:
    """Images and their truth, decoded. The first ones that fit into `memory` (bytes) are kept: an epoch is in an order
    of its own, so no other choice would be right more often.
    """

    def __init__(self, rows: pa.Table, rules: Rules, storage: StorageSettings, max_pixels: int, memory: int):
        self.rows, self.rules, self.max_pixels, self.room = rows, rules, max_pixels, memory
        self.source = Masks(Reader(storage))
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (H, W, 3) RGB, and class ids or IGNORED (H, W), int16 unless there are more classes than that has.

        Raises `LostExampleError`, and what a store that fails raises.
        """
        if index in self.kept:
            return self.kept[index]
        row: dict[str, Any] = self.rows.slice(index, 1).to_pylist()[0]
        at = row["image_uri"]
        try:
            image = decode(self.source.fetch(place(row, "image")), self.max_pixels)
            at = row["mask_uri"]
            truth = read_truth(self.source.fetch(place(row, "mask")), self.rules, (image.height, image.width))
        except (*LOST, *UNUSABLE) as error:
            raise LostExampleError(
                f"{public_url(at)}: has changed since the training was begun ({error}); put it back and run the same "
                "command again, or begin anew with --overwrite"
            ) from None
        found = image.pixels, truth.astype(np.int16 if self.rules.classes < 1 << 15 else np.int32)
        with self.lock:
            if (size := found[0].nbytes + found[1].nbytes) <= self.room and index not in self.kept:
                self.kept[index], self.room = found, self.room - size
        return found


class Crops:
    """The crops of every step."""

    def __init__(
        self, examples: Examples, policy: Policy, how: Augmentation, mean: tuple[float, ...], batch: int, seed: int
    ):
        """`mean` is that of the channels, 0 to 1; `batch` how many crops a step has."""
        self.examples, self.policy, self.how, self.batch, self.seed = examples, policy, how, batch, seed
        self.mean = np.array(mean) * 255
        self.order = lru_cache(maxsize=2)(self.order_of)

    def steps(self, first: int, last: int, worker: int, workers: int, threads: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A worker's part of each step's batch from step `first` to before `last`: uint8 (N, crop, crop, 3) and
        the truths (N, crop, crop).
        """
        own = self.batch // workers
        numbers = (step * self.batch + worker * own + place for step in range(first, last) for place in range(own))
        crops = ahead(self.crop, numbers, STEPS_AHEAD * own, threads, partial(use_threads, 1))
        while some := list(islice(crops, own)):
            images, truths = zip(*some, strict=True)
            yield torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(truths))

    def crop(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The crop of this number, counted from the first step on."""
        epoch, place = divmod(number, len(self.examples))
        image, truth = self.examples[int(self.order(epoch)[place])]
        rng = np.random.default_rng((self.seed, CROP, number))
        return augment(image, truth, self.policy.size(*truth.shape), rng, self.how, self.mean)

    def order_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.examples))
