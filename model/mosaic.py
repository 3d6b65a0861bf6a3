"""One image through windows: their logits in, its mask and statistics out.

Logits are held of one row of windows: a strip across the image, along its shorter side. What no later window sees is
upsampled, counted and forgotten, so memory is the strip's and the mask's, not that of all pixels times all classes.
"""

from itertools import product

import numpy as np
import torch
from torch import Tensor

from model.segmentation import Segmentation
from model.upsample import mask_dtype, softmax_statistics, upsampled_argmax
from model.windows import CELL, Tiling, cut_out, weights

Place = tuple[int, int]  # of a window: which one down the image and across it, from the top left


class Mosaic:
    """An image on its way. Where the shorter side is the height, everything but pixels and mask lies on its side."""

    def __init__(self, image: np.ndarray, tiling: Tiling, classes: int, device: torch.device):
        """`image` is uint8 (H, W, 3) RGB; the strip is on `device`, where the logits are."""
        height, width = image.shape[:2]
        self.image, self.classes, self.device = image, classes, device
        self.is_turned = turned(height, width, tiling)
        sides = (width, height) if self.is_turned else (height, width)
        self.down, self.across = (tiling.spans(side) for side in sides)
        self.weights = [torch.from_numpy(weights(spans)).to(device) for spans in (self.down, self.across)]
        self.rows, self.columns = (-(-side // CELL) for side in sides)  # of logits
        self.strip: Tensor | None = None  # float32 (window / CELL + 1, columns, K), weighted sums
        self.first = self.finished = 0  # row that the strip begins with, and the first that has not been upsampled
        self.mask = np.empty((height, width), np.uint8 if mask_dtype(classes) == torch.uint8 else np.uint16)
        self.placed = 0  # lines of pixels that the mask has
        self.pixels, self.won = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
        self.confidence, self.entropy = np.zeros(classes), np.zeros(())

    def windows(self) -> list[Place]:
        """In the order in which their logits must come."""
        return list(product(range(len(self.down)), range(len(self.across))))

    def view(self, place: Place) -> np.ndarray:
        """What the network sees through a window: uint8 (h, w, 3)."""
        rows, columns = self.down[place[0]], self.across[place[1]]
        return cut_out(self.image, columns, rows) if self.is_turned else cut_out(self.image, rows, columns)

    def add(self, place: Place, logits: Tensor) -> list[Tensor]:
        """Take a window's logits, float32 (h / CELL, w / CELL, K).

        The last window of a row finishes a part of the mask, which `put` wants next, on the host: its class ids and
        what `softmax_statistics` says of it. Else the list is empty.
        """
        if self.is_turned:
            logits = logits.transpose(0, 1)
        row, column = place
        top, left = self.down[row].start // CELL, self.across[column].start // CELL
        part = logits[: self.rows - top, : self.columns - left]
        height, width = part.shape[:2]
        if self.strip is None:
            self.strip = torch.zeros(min(self.rows, height + 1), self.columns, self.classes, device=self.device)
        part = part * self.weights[0][row, top : top + height, None, None]
        part *= self.weights[1][column, left : left + width, None]
        self.strip[top - self.first : top - self.first + height, left : left + width] += part
        return self.finish(row) if column + 1 == len(self.across) else []

    def finish(self, row: int) -> list[Tensor]:
        """Upsample and count what is complete with this row of windows."""
        assert self.strip is not None
        is_last = row + 1 == len(self.down)
        end = self.rows if is_last else self.down[row + 1].start // CELL
        known = self.strip[: end + (not is_last) - self.first]  # the next row begins with weight 0: it is known too
        start, stop = self.finished - self.first, end - self.first
        mask, _ = upsampled_argmax(known, (CELL * known.shape[0], CELL * known.shape[1]))
        sure = softmax_statistics(known[start:stop])
        if is_last:
            self.strip = None
        else:  # the last line is interpolated with the next one
            kept = self.strip[stop - 1 :].clone()
            self.strip[len(kept) :] = 0
            self.strip[: len(kept)] = kept
            self.first, self.finished = end - 1, end
        return [mask[CELL * start : CELL * stop], sure.won, sure.confidence, sure.entropy]

    def put(self, mask: Tensor, won: Tensor, confidence: Tensor, entropy: Tensor) -> None:
        """Put a finished part into its place."""
        upright = self.mask.T if self.is_turned else self.mask
        space = upright[self.placed : self.placed + len(mask)]
        space[:] = mask.numpy()[: space.shape[0], : space.shape[1]]
        self.pixels += sum(np.bincount(line, minlength=self.classes) for line in space)
        self.placed += len(space)
        self.won += won.numpy()
        self.confidence += confidence.numpy()
        self.entropy += entropy.numpy()

    def segmentation(self) -> Segmentation:
        """What all windows say together."""
        return Segmentation.of(self.mask, self.pixels, self.won, self.confidence, self.entropy)


def turned(height: int, width: int, tiling: Tiling) -> bool:
    """Whether strips lie along the height. One window has no strips, and stays as it is."""
    return width > max(height, tiling.window)


def strip_pixels(height: int, width: int, tiling: Tiling) -> int:
    """The most pixels of the mask that an image finishes at once."""
    tall, wide = max(height, width), min(height, width)
    if not turned(height, width, tiling) and width > height:
        tall, wide = wide, tall
    return (min(tall, tiling.window) + 2 * CELL) * (wide + CELL)


def strip_bytes(height: int, width: int, tiling: Tiling, classes: int) -> int:
    """The most bytes of logits besides a window's: the strip, what is kept of it as it moves on, a weighted part."""
    cells = 2 * strip_pixels(height, width, tiling) + tiling.window**2
    return 4 * classes * cells // CELL**2
