"""Images in, masks and statistics out: the network on a device, fed with uint8 images of one shape.

The logits come at a quarter of the network's input. A mask is wanted at the image's own size, so they are upsampled
once, straight to it. Full-size logits are never held whole: 150 classes of a 12-megapixel photo would be 7.2 GB.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import Checkpoint

UPSAMPLING_BYTES = 256 << 20  # how much of the full-size logits is in memory at once


@dataclass(frozen=True)
class Segmentation:
    """What the network says about one image of `height` x `width` pixels with K classes.

    Confidence is the greatest softmax probability (0 to 1), entropy the softmax distribution's in nats (0 to ln K);
    both are means over the logits' own resolution, a quarter of the network's input.
    """

    mask: np.ndarray  # (height, width) uint8, or uint16 for more than 256 classes: the class id of each pixel
    pixels: np.ndarray  # (K,) int64: how many pixels of the mask each class has
    class_confidence: np.ndarray  # (K,) float32: mean where the class wins; NaN where it wins no logit
    confidence: float
    entropy: float


class Predictor:
    """A checkpoint on a device."""

    def __init__(self, checkpoint: Checkpoint, device: str | None = None):
        """`device` as PyTorch names it; by default the GPU where there is one."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = checkpoint.model.to(self.device).eval()
        self.mean = 255 * torch.tensor(checkpoint.mean, device=self.device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(checkpoint.std, device=self.device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[Segmentation]:
        """Segment `images`, uint8 (N, H, W, 3) RGB, into masks of `sizes`: N times (height, width)."""
        logits = self.logits(images)
        return [segmentation(one, size) for one, size in zip(logits, sizes, strict=True)]

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> Tensor:
        """Logits, float32 (N, K, ceil(H/4), ceil(W/4)) on the device, of uint8 images (N, H, W, 3) RGB."""
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # (N, 3, H, W)
        return self.model((pixels.float() - self.mean) / self.std)


def segmentation(logits: Tensor, size: tuple[int, int]) -> Segmentation:
    """Mask of `size` (height, width) and statistics of one image's logits (K, h, w)."""
    classes = logits.shape[0]
    mask = upsampled_argmax(logits, size)
    pixels = torch.bincount(mask.flatten(), minlength=classes)
    log_probability = F.log_softmax(logits, dim=0)
    best, winner = log_probability.max(dim=0)  # (h, w) each
    confidence = best.exp()
    won = torch.bincount(winner.flatten(), minlength=classes)
    sums = torch.bincount(winner.flatten(), weights=confidence.flatten().double(), minlength=classes)
    entropy = -(log_probability.exp() * log_probability).sum(dim=0)
    return Segmentation(
        mask=mask.to(torch.uint8 if classes <= 256 else torch.uint16).cpu().numpy(),
        pixels=pixels.cpu().numpy(),
        class_confidence=(sums / won).float().cpu().numpy(),  # 0 / 0 is NaN: the class wins nowhere
        confidence=float(confidence.mean()),
        entropy=float(entropy.mean()),
    )


def upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of each pixel, int64 `size`, once logits (K, h, w) are interpolated bilinearly to `size`.

    Bilinear interpolation treats each class alone, so a few classes at a time give the same numbers as all at once,
    and the best so far is all that has to be remembered. Equal logits go to the smaller id.
    """
    height, width = size
    step = max(1, UPSAMPLING_BYTES // (4 * height * width))
    best = torch.full(size, -torch.inf, device=logits.device)
    mask = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, logits.shape[0], step):
        part = logits[None, first : first + step].float()
        upsampled = F.interpolate(part, size=size, mode="bilinear", align_corners=False)[0]  # (step, height, width)
        value, index = upsampled.max(dim=0)
        better = value > best
        mask = torch.where(better, index + first, mask)
        best = torch.where(better, value, best)
    return mask
