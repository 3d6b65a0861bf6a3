"""What the network says about an image, in NumPy alone: who only reads it need not wait for PyTorch."""

from dataclasses import dataclass

import numpy as np


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

    @staticmethod
    def of(
        mask: np.ndarray, pixels: np.ndarray, won: np.ndarray, confidence: np.ndarray, entropy: np.ndarray
    ) -> "Segmentation":
        """From sums over the logits: where each class wins, (K,), its confidence there, (K,), and all entropy, ()."""
        cells = int(won.sum())
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: the class wins nowhere
            class_confidence = (confidence / won).astype(np.float32)
        return Segmentation(mask, pixels, class_confidence, float(confidence.sum()) / cells, float(entropy) / cells)
