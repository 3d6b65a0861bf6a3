"""Logits at a quarter of the resolution straight to a mask of any size, and the statistics of both.

Full-size logits are never held: 150 classes of a 12-megapixel photo would be 7.2 GB. What is held at once is, on a CPU
with the kernels of `native`, two columns of logits a thread; on a GPU, a block of pixels in registers; and in the
portable form, which both are tested against, as many classes as fit `STRIP_BYTES`.

Bilinear samples are PyTorch's (`align_corners=False`), and equal logits go to the smaller class.
"""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model import native

STRIP_BYTES = 64 << 20
FIXED_POINT = 2.0**32  # of the sums that `native` returns


@dataclass(frozen=True)
class Statistics:
    """Of the softmax over K classes at the logits' own resolution; on the logits' device."""

    won: Tensor  # (K,) int64: where each class is the greatest
    confidence: Tensor  # (K,) float64: sum of the greatest probability over where the class wins
    entropy: Tensor  # float64: sum over all of the entropy in nats


def upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The class of each pixel, and the pixels of each class, once float32 logits (h, w, K) are upsampled to `size`.

    The mask is (height, width), uint8 for up to 256 classes and uint16 above; the counts are int64 (K,).
    """
    kernels = native.library()
    if logits.is_cuda and has_triton():
        from model.upsample_triton import upsampled_argmax as on_gpu  # noqa: PLC0415  (Triton comes with CUDA only)

        return on_gpu(logits, size)
    if kernels and not logits.is_cuda:
        return native_argmax(kernels, logits, size)
    return portable_argmax(logits, size)


@cache
def has_triton() -> bool:
    """Whether Triton is there, and the C compiler that it wants."""
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    return compiler and importlib.util.find_spec("triton") is not None


def softmax_statistics(logits: Tensor) -> Statistics:
    """How sure the network is, from float32 logits (h, w, K)."""
    kernels = native.library()
    if kernels and not logits.is_cuda:
        return native_statistics(kernels, logits)
    return portable_statistics(logits)


def mask_dtype(classes: int) -> torch.dtype:
    """The smallest type of a mask that holds the ids of so many classes."""
    return torch.uint8 if classes <= 256 else torch.uint16


def native_argmax(kernels: Any, logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`upsampled_argmax` by the kernels."""
    mask, pixels = torch.empty(size, dtype=mask_dtype(logits.shape[2])), torch.empty(logits.shape[2], dtype=torch.int64)
    kernel = kernels.argmax_8bit if mask.dtype == torch.uint8 else kernels.argmax_16bit
    logits = logits.contiguous()
    kernel(torch.get_num_threads(), logits.data_ptr(), *logits.shape, *size, mask.data_ptr(), pixels.data_ptr())
    return mask, pixels


def portable_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`upsampled_argmax` in plain PyTorch, a few classes at a time: each is interpolated by itself in any case."""
    height, width = size
    classes = logits.shape[2]
    step = max(1, STRIP_BYTES // (4 * height * width))
    best = torch.full(size, -torch.inf, device=logits.device)
    mask = torch.zeros(size, dtype=torch.int32, device=logits.device)
    for first in range(0, classes, step):
        part = logits[:, :, first : first + step].permute(2, 0, 1).contiguous()
        upsampled = F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0]
        value, index = upsampled.max(dim=0)
        better = value > best
        mask = torch.where(better, index.int() + first, mask)
        best = torch.where(better, value, best)
    return mask.to(mask_dtype(classes)), torch.bincount(mask.flatten(), minlength=classes)


def native_statistics(kernels: Any, logits: Tensor) -> Statistics:
    """`softmax_statistics` by the kernels, whose integer sums do not depend on the order of threads."""
    height, width, classes = logits.shape
    logits = logits.contiguous()
    won, confidence, entropy = (torch.empty(n, dtype=torch.int64) for n in (classes, classes, 1))
    sums = (won.data_ptr(), confidence.data_ptr(), entropy.data_ptr())
    kernels.softmax_statistics(torch.get_num_threads(), logits.data_ptr(), height * width, classes, *sums)
    return Statistics(won, confidence.double() / FIXED_POINT, entropy[0].double() / FIXED_POINT)


def portable_statistics(logits: Tensor) -> Statistics:
    """`softmax_statistics` in plain PyTorch; never waits for a GPU."""
    log_probability = F.log_softmax(logits.flatten(0, 1), dim=1)  # (h * w, K)
    best, winner = log_probability.max(dim=1)
    zeros = torch.zeros(logits.shape[2], dtype=torch.float64, device=logits.device)
    entropy = -(log_probability.exp() * log_probability).sum(dim=1)
    return Statistics(
        won=zeros.long().index_add(0, winner, torch.ones_like(winner)),
        confidence=zeros.index_add(0, winner, best.exp().double()),
        entropy=entropy.double().sum(),
    )
