"""What samples mean: from any depth to bytes, and transparency to a background.

unsigned integers    keep their high byte; of fewer than 8 bits, the greatest becomes 255
floats from 0 to 1   times 255
other floats, and    stretched over the image: the least finite value becomes 0 and the greatest 255, the
signed integers      infinite ones too; NaN becomes 0
"""

from collections.abc import Iterator

import numpy as np

BACKGROUND = 255  # what transparent pixels lie on: white
BAND = 1 << 17  # pixels that are converted at a time, as intermediate results take many times their bytes


def bands(height: int, width: int) -> Iterator[slice]:
    """Rows from top to bottom, as many at a time as `BAND` allows."""
    rows = max(1, BAND // max(1, width))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def limits(samples: np.ndarray) -> tuple[float, float]:
    """The values of samples (H, W, S) that become 0 and 255; of unsigned integers nobody asks."""
    if samples.dtype.kind not in "if":
        return 0.0, 1.0
    low, high = np.inf, -np.inf
    for rows in bands(*samples.shape[:2]):
        finite = samples[rows][np.isfinite(samples[rows])]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    is_unit = samples.dtype.kind == "f" and low >= 0 and high <= 1
    return (0.0, 1.0) if is_unit or low > high else (low, high)


def to_bytes(samples: np.ndarray, bits: int, low_high: tuple[float, float]) -> np.ndarray:
    """uint8 of samples of the same shape, which have so many bits and these limits."""
    if samples.dtype.kind == "b":
        return samples * np.uint8(255)
    if samples.dtype.kind == "u":
        scaled = samples >> (bits - 8) if bits >= 8 else samples * np.float32(255 / (2**bits - 1))
        return scaled.astype(np.uint8)
    low, high = low_high
    share = np.clip(samples.astype(np.float64), low, high) - low
    return np.rint(np.nan_to_num(share) * (255 / max(high - low, np.finfo(float).tiny))).astype(np.uint8)


def over_background(colour: np.ndarray, alpha: np.ndarray, is_premultiplied: bool = False) -> np.ndarray:
    """uint8 colour (..., 3) under uint8 alpha (...), 255 where it covers, on the background."""
    alpha = alpha[..., None].astype(np.uint16)
    weighted = colour * np.uint16(255) if is_premultiplied else colour * alpha
    return np.minimum((weighted.astype(np.uint32) + BACKGROUND * (255 - alpha) + 127) // 255, 255).astype(np.uint8)
