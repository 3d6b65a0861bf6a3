"""`upsample.upsampled_argmax` as one Triton kernel: each program has a block of pixels and walks over the classes.

What bounds it: a pixel reads four neighbouring logits of every class, which stay in the cache because 16 pixels and
more share them, so from memory come the logits once (K floats for every 16 pixels) and out goes one byte a pixel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_PIXELS, BLOCK_CLASSES = 64, 32


def upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The mask of `size`, and the pixels of each class, of float32 logits (h, w, K); see `upsample`."""
    height, width = size
    logits = logits.contiguous()
    classes = logits.shape[2]
    dtype = torch.uint8 if classes <= 256 else torch.int32  # Triton has no unsigned 16 bits everywhere
    mask = torch.empty(size, dtype=dtype, device=logits.device)
    pixels = torch.zeros(classes, dtype=torch.int64, device=logits.device)
    bins = triton.next_power_of_2(max(classes, 16))
    grid = (triton.cdiv(height * width, BLOCK_PIXELS),)
    blocks = {"BLOCK_PIXELS": BLOCK_PIXELS, "BLOCK_CLASSES": BLOCK_CLASSES}
    with torch.cuda.device_of(logits):  # a launch goes to the current device
        argmax_kernel[grid](logits, mask, pixels, *logits.shape, height, width, bins, **blocks)
    return mask if classes <= 256 else mask.to(torch.uint16), pixels


@triton.jit(do_not_specialize=["h", "w", "classes", "height", "width"])  # a 1 would become a constant without a type
def argmax_kernel(
    logits,
    mask,
    pixels,
    h,
    w,
    classes,
    height,
    width,
    bins: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,  # noqa: N803  (Triton's way to write constants)
    BLOCK_CLASSES: tl.constexpr,  # noqa: N803
):
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = index < height * width
    y_low, y_high, y_weight = sample(index // width, height, h)
    x_low, x_high, x_weight = sample(index % width, width, w)
    best = tl.full((BLOCK_PIXELS,), -float("inf"), tl.float32)
    winner = tl.zeros((BLOCK_PIXELS,), tl.int32)
    for first in range(0, classes, BLOCK_CLASSES):
        c = first + tl.arange(0, BLOCK_CLASSES)
        known = (c < classes)[None, :] & inside[:, None]
        above_left = tl.load(logits + ((y_low * w + x_low) * classes)[:, None] + c[None, :], known, 0.0)
        above_right = tl.load(logits + ((y_low * w + x_high) * classes)[:, None] + c[None, :], known, 0.0)
        below_left = tl.load(logits + ((y_high * w + x_low) * classes)[:, None] + c[None, :], known, 0.0)
        below_right = tl.load(logits + ((y_high * w + x_high) * classes)[:, None] + c[None, :], known, 0.0)
        left = above_left + (below_left - above_left) * y_weight[:, None]
        right = above_right + (below_right - above_right) * y_weight[:, None]
        value = tl.where(known, left + (right - left) * x_weight[:, None], -float("inf"))
        value, place = tl.max(value, axis=1, return_indices=True)
        winner = tl.where(value > best, first + place, winner)
        best = tl.maximum(value, best)
    tl.store(mask + index, winner, inside)
    counts = tl.histogram(winner, bins) - tl.where(tl.arange(0, bins) == 0, tl.sum((~inside).to(tl.int32)), 0)
    tl.atomic_add(pixels + tl.arange(0, bins), counts.to(tl.int64), counts > 0)


@triton.jit
def sample(position, to, source):
    """The two inputs that a bilinear sample lies between, and the weight of the second (align_corners=False)."""
    centre = (position.to(tl.float32) + 0.5) * (source.to(tl.float32) / to.to(tl.float32)) - 0.5
    centre = tl.maximum(centre, 0.0)
    low = tl.minimum(centre.to(tl.int32), source - 1)
    return low, tl.minimum(low + 1, source - 1), centre - low.to(tl.float32)
