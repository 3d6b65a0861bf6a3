"""Images in, masks and statistics out: a checkpoint in its inference form, on a device.

How the logits are computed is the engine's affair: `native` is the project's own kernels (CPU), `torch` is plain
PyTorch, `compiled` is PyTorch's compiler, once for each input shape. They give the same numbers, float rounding aside.
From the logits to the mask is `upsample`'s.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import native
from model.checkpoint import Checkpoint
from model.fused import FusedSegformer
from model.native.network import NativeSegformer, fits
from model.segformer import SegformerConfig
from model.upsample import softmax_statistics, upsampled_argmax

ENGINES = ("auto", "native", "torch", "compiled")
PRECISIONS = ("auto", "float32", "bfloat16")
CPU_BATCH_PIXELS = 8 * 512 * 512  # more gains nothing there
GPU_BATCH_PIXELS = 64 * 512 * 512
ARRAYS_HELD = 5  # roughly, at once in a forward pass: each of the widest map of the network


class EngineError(ValueError):
    """An engine or precision that is not to be had here; the message says why and what to do."""


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

    def __init__(
        self, checkpoint: Checkpoint, device: str | None = None, engine: str = "auto", precision: str = "auto"
    ):
        """`device` as PyTorch names it, by default the GPU where there is one; `engine` of `ENGINES`.

        `precision` is of the matrix products: "auto" is bfloat16 where the hardware multiplies it, else float32.
        Raises `EngineError`.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.engine = choose_engine(engine, self.device, checkpoint.model.config)
        self.dtype = choose_precision(precision, self.device)
        self.config = checkpoint.model.config
        self.compiled: set[tuple[int, ...]] = set()  # input shapes
        fused = FusedSegformer(checkpoint.model, checkpoint.mean, checkpoint.std)
        self.network: Callable[[Tensor], Tensor]
        if self.engine == "native":
            self.network = NativeSegformer(fused, self.dtype)
        else:
            self.network = fused.in_precision(self.dtype).to(self.device)
        if self.engine == "compiled":
            torch._dynamo.config.recompile_limit = 1000  # one for each shape of the plan; else it stops at 8
            self.network = torch.compile(fused, dynamic=False)
        if self.device.type == "cuda":
            self.uploads, self.downloads = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        else:
            keep_freed_memory()

    def __call__(self, images: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[Segmentation]:
        """Segment `images`, uint8 (N, H, W, 3) RGB, into masks of `sizes`: N times (height, width)."""
        return self.start(images, sizes)()

    @torch.inference_mode()
    def start(self, images: np.ndarray, sizes: Sequence[tuple[int, int]]) -> Callable[[], list[Segmentation]]:
        """The same, to be waited for by calling what is returned.

        A GPU works on; start the next batch before waiting for this one, and its upload overlaps with the work.
        """
        logits = self.logits(images)
        found = []
        for one, size in zip(logits, sizes, strict=True):
            mask, pixels = upsampled_argmax(one, size)
            sure = softmax_statistics(one)
            found.append([mask, pixels, sure.won, sure.confidence, sure.entropy])
        wait = self.download(found) if self.device.type == "cuda" else lambda: found
        cells = logits.shape[1] * logits.shape[2]
        return lambda: [summarise(cells, *tensors) for tensors in wait()]

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> Tensor:
        """Logits, float32 (N, ceil(H/4), ceil(W/4), K) on the device, of uint8 images (N, H, W, 3) RGB."""
        count = len(images)
        pixels = self.upload(torch.from_numpy(images)) if self.device.type == "cuda" else torch.from_numpy(images)
        if self.engine != "compiled":
            return self.network(pixels)
        missing = whole_batch(count) - count
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels
        self.compiled.add(tuple(pixels.shape))
        return self.network(pixels)[:count]

    def is_ready_for(self, shape: tuple[int, ...]) -> bool:
        """Whether a batch of this shape needs no compilation first."""
        return self.engine != "compiled" or (whole_batch(shape[0]), *shape[1:]) in self.compiled

    def __str__(self) -> str:
        """Engine and precision: "native float32"."""
        return f"{self.engine} {str(self.dtype).removeprefix('torch.')}"

    def batch_pixels(self) -> int:
        """How many input pixels are a good batch: enough to fill the device, and half of its free memory at most."""
        if self.device.type != "cuda":
            return CPU_BATCH_PIXELS
        free, _ = torch.cuda.mem_get_info(self.device)
        config = self.config
        widest = max(config.decoder_size, config.hidden_sizes[0] * config.mlp_ratios[0], config.labels)
        held = ARRAYS_HELD * widest * self.dtype.itemsize / config.strides[0] ** 2  # bytes a pixel
        return max(1, min(GPU_BATCH_PIXELS, int(free / 2 / held)))

    def upload(self, images: Tensor) -> Tensor:
        """Images to the GPU beside its work, from pinned memory, which PyTorch keeps for the next batch."""
        with torch.cuda.stream(self.uploads):
            pixels = images.pin_memory().to(self.device, non_blocking=True)
        work = torch.cuda.current_stream(self.device)
        work.wait_stream(self.uploads)
        pixels.record_stream(work)
        return pixels

    def download(self, found: list[list[Tensor]]) -> Callable[[], list[list[Tensor]]]:
        """Start copying results to pinned memory; what is returned waits for them and gives them."""
        self.downloads.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.downloads):
            copies = []
            for tensors in found:
                copies.append([torch.empty_like(one, device="cpu", pin_memory=True) for one in tensors])
                for copy, one in zip(copies[-1], tensors, strict=True):
                    copy.copy_(one, non_blocking=True)
                    one.record_stream(self.downloads)
            done = torch.cuda.Event()
            done.record()

        def wait() -> list[list[Tensor]]:
            done.synchronize()
            return copies

        return wait


def summarise(
    cells: int, mask: Tensor, pixels: Tensor, won: Tensor, confidence: Tensor, entropy: Tensor
) -> Segmentation:
    """What is said of an image, from `upsample`'s results; the logits have `cells` positions."""
    return Segmentation(
        mask=mask.numpy(),
        pixels=pixels.numpy(),
        class_confidence=(confidence / won).float().numpy(),  # 0 / 0 is NaN: the class wins nowhere
        confidence=float(confidence.sum()) / cells,
        entropy=float(entropy) / cells,
    )


def whole_batch(images: int) -> int:
    """The batch that so many images are filled up to for a compiled network, as each shape is compiled: 2**n."""
    return 1 << (images - 1).bit_length()


def choose_engine(engine: str, device: torch.device, config: SegformerConfig) -> str:
    """The engine that `engine` means on `device`, for a network of this configuration. Raises `EngineError`."""
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r} is none of {', '.join(ENGINES)}")
    obstacle = ""
    if device.type != "cpu":
        obstacle = "runs on CPUs only"
    elif not fits(config):
        obstacle = "wants channels in multiples of 16, and this network has others"
    elif native.library() is None:
        obstacle = "was not built for this machine's processor: install a C++ compiler, then Swath again"
    if engine == "auto":
        return "native" if not obstacle else "compiled" if device.type == "cuda" else "torch"
    if engine == "native" and obstacle:
        raise EngineError(f"engine 'native' {obstacle}; or use engine 'torch'")
    return engine


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products' operands that `precision` means on `device`."""
    if precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if precision == "auto":
        on_cpu = torch.cpu._is_avx512_bf16_supported
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else on_cpu()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def keep_freed_memory() -> None:
    """Have glibc keep what is freed in the process, for all of its life.

    A forward pass frees and asks again for the same tens of megabytes; by default each time the kernel takes the pages
    back and clears them anew, which costs as much as a third of the arithmetic.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
