"""Images in, masks and statistics out: a checkpoint in its inference form, on a device.

How the logits are computed is the engine's affair: `native` is the project's own kernels (CPU), `torch` is plain
PyTorch, `compiled` is PyTorch's compiler, once for each input shape. They give the same numbers, float rounding aside.
From the logits to the mask is `upsample`'s.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from model import native
from model.checkpoint import Checkpoint
from model.fused import FusedSegformer
from model.looks import averaged
from model.mosaic import Mosaic, strip_bytes, strip_pixels
from model.native.network import NativeSegformer, fits
from model.segformer import SegformerConfig
from model.segmentation import Segmentation
from model.upsample import has_triton, softmax_statistics, upsampled_argmax
from model.windows import CELL, Tiling, padded

ENGINES = ("auto", "native", "torch", "compiled")
PRECISIONS = ("auto", "float32", "bfloat16")
CPU_BATCH_PIXELS = 512 * 512  # more gains nothing there, and is memory in each lane
GPU_BATCH_PIXELS = 64 * 512 * 512
PORTABLE_MASK = 36  # bytes a pixel of a mask that is made without the kernels
PIXEL = 3  # bytes, RGB
ARRAYS_HELD = 5  # roughly, at once in a forward pass: each of the widest map of the network


class EngineError(ValueError):
    """An engine or precision that is not to be had here; the message says why and what to do."""


class Predictor:
    """A checkpoint on a device.

    `lanes` threads may call it at once, each after `enter_lane`. On a CPU a lane is a thread, as two
    images side by side take less time than two threads on one after the other, which wait for each other in every
    layer. A GPU has two, so that the copies of one batch overlap with the work on another.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | None = None,
        engine: str = "auto",
        precision: str = "auto",
        share: float = 1,
    ):
        """`device` is "cpu" or "cuda", by default the GPU where there is one; `engine` is one of `ENGINES`.

        `precision` is of the matrix products: "auto" is bfloat16 where the hardware multiplies it, else float32.
        `share`, up to 1, is how much of a GPU this predictor may fill. Raises `EngineError`.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() and engine != "native" else "cpu"
        self.device = torch.device(device)
        self.engine = choose_engine(engine, self.device, checkpoint.model.config)
        self.dtype = choose_precision(precision, self.device)
        self.config = checkpoint.model.config
        self.compiled: set[tuple[int, ...]] = set()  # input shapes
        self.starting = threading.Lock() if self.device.type == "cuda" or self.engine == "compiled" else nullcontext()
        fused = FusedSegformer(checkpoint.model, checkpoint.mean, checkpoint.std)
        self.network: Callable[[Tensor], Tensor]
        if self.engine == "native":
            self.network = NativeSegformer(fused, self.dtype)
        else:
            self.network = fused.in_precision(self.dtype).to(self.device)
        if self.engine == "compiled":
            allow_compilations()
            self.network = torch.compile(fused, dynamic=False)
        threads = torch.get_num_threads()
        if self.device.type == "cuda":
            self.uploads, self.downloads = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
            self.lanes, self.lane_threads = 2, 1
            self.batch_pixels = int(share * gpu_batch_pixels(self.config, self.dtype, self.device))
        else:
            keep_freed_memory()
            self.lanes, self.lane_threads = (1, threads) if self.engine == "compiled" else (threads, 1)
            self.batch_pixels = CPU_BATCH_PIXELS

    def __call__(self, images: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[Segmentation]:
        """Segment `images`, uint8 (N, H, W, 3) RGB, into masks of `sizes`: N times (height, width)."""
        height, width = images.shape[1:3]
        return self.at_scales([images], (height, width), sizes)

    @torch.inference_mode()
    def at_scales(
        self,
        views: Sequence[np.ndarray],
        bucket: tuple[int, int],
        sizes: Sequence[tuple[int, int]],
        flip: bool = False,
    ) -> list[Segmentation]:
        """Segment N images that the network sees at one or more sizes, and with `flip` mirrored too (`model.looks`).

        `views` are uint8 (N, H, W, 3) RGB, sides in multiples of 32, each of the same images; `bucket` is the (height,
        width) at whose logits they are averaged; masks have the `sizes`, N times (height, width).
        """
        with self.starting:  # on a GPU that is all that happens here; PyTorch's compiler works for one thread at a time
            found = []
            for one, size in zip(averaged(self.logits, views, flip, bucket), sizes, strict=True):
                mask, pixels = upsampled_argmax(one, size)
                sure = softmax_statistics(one)
                found.append([mask, pixels, sure.won, sure.confidence, sure.entropy])
            wait = self.download(found)
        return [Segmentation.of(*(tensor.numpy() for tensor in tensors)) for tensors in wait()]

    @torch.inference_mode()
    def through_windows(
        self, images: Sequence[np.ndarray], tiling: Tiling, batch: int, flip: bool = False
    ) -> list[Segmentation]:
        """Segment `images`, uint8 (H, W, 3) RGB, each at its own size, so many windows at a time.

        Their windows must have one size: that of the tiling, or less along a side that is shorter in all images. With
        `flip` each is seen mirrored too, before it goes into its place.
        """
        mosaics = [Mosaic(image, tiling, self.config.labels, self.device) for image in images]
        windows = [(mosaic, place) for mosaic in mosaics for place in mosaic.windows()]
        for first in range(0, len(windows), batch):
            some = windows[first : first + batch]
            views = np.stack([mosaic.view(place) for mosaic, place in some])
            height, width = views.shape[1:3]
            with self.starting:
                logits = averaged(self.logits, [views], flip, (height, width))
                parts = [(mosaic, mosaic.add(place, one)) for (mosaic, place), one in zip(some, logits, strict=True)]
                finished = [(mosaic, tensors) for mosaic, tensors in parts if tensors]
                wait = self.download([tensors for _, tensors in finished])
            for (mosaic, _), tensors in zip(finished, wait(), strict=True):
                mosaic.put(*tensors)
        return [mosaic.segmentation() for mosaic in mosaics]

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

    def enter_lane(self) -> None:
        """Prepare the calling thread, one of `lanes`: PyTorch keeps some of its settings for each thread."""
        use_threads(self.lane_threads)
        if self.engine == "compiled":
            allow_compilations()

    def activations(self, pixels: int, mask_pixels: int, looks: int = 1) -> int:
        """The most bytes that a lane holds on the host while it works on a batch of so many input and mask pixels.

        Of several looks the pixels are those of the largest, or of the bucket, if that is larger.
        """
        mirrored = PIXEL * pixels if looks > 1 else 0
        if self.device.type != "cpu":
            return mirrored
        masks = 0 if native.library() else PORTABLE_MASK * mask_pixels
        average = 4 * self.config.labels / CELL**2 if looks > 1 else 0  # what the looks before it have said
        return int(pixels * (activation_bytes(self.config, torch.float32) + average)) + mirrored + masks

    def activations_through_windows(
        self, sizes: Sequence[tuple[int, int]], tiling: Tiling, batch: int, looks: int = 1
    ) -> int:
        """The same for images of these (height, width) that go through windows."""
        seen = (min(padded(height), tiling.window) * min(padded(width), tiling.window) for height, width in sizes)
        pixels = batch * max(seen)
        masks = max(strip_pixels(*size, tiling) for size in sizes)
        strip = (
            max(strip_bytes(*size, tiling, self.config.labels) for size in sizes) if self.device.type == "cpu" else 0
        )
        return self.activations(pixels, masks, looks) + PIXEL * pixels + 2 * masks + strip

    def __str__(self) -> str:
        """Engine and precision: "native float32"."""
        return f"{self.engine} {str(self.dtype).removeprefix('torch.')}"

    def full_batch(self, images: int) -> int:
        """The largest batch of up to `images` that is not filled up: a power of two where it is compiled."""
        return 1 << (images.bit_length() - 1) if self.engine == "compiled" else images

    def upload(self, images: Tensor) -> Tensor:
        """Images to the GPU beside its work, from pinned memory, which PyTorch keeps for the next batch."""
        with torch.cuda.stream(self.uploads):
            pixels = images.pin_memory().to(self.device, non_blocking=True)
        work = torch.cuda.current_stream(self.device)
        work.wait_stream(self.uploads)
        pixels.record_stream(work)
        return pixels

    def download(self, found: list[list[Tensor]]) -> Callable[[], list[list[Tensor]]]:
        """Start copying results from a GPU to pinned memory; what is returned waits for them and gives them."""
        if self.device.type != "cuda" or not found:
            return lambda: found
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


def gpu_batch_pixels(config: SegformerConfig, dtype: torch.dtype, device: torch.device) -> int:
    """How many input pixels are a good batch: enough to fill a GPU, and half of its free memory at most."""
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(GPU_BATCH_PIXELS, int(free / 2 / activation_bytes(config, dtype))))


def activation_bytes(config: SegformerConfig, dtype: torch.dtype) -> float:
    """The most bytes a pixel of the input that a forward pass holds at once."""
    widest = max(config.decoder_size, config.hidden_sizes[0] * config.mlp_ratios[0], config.labels)
    return ARRAYS_HELD * widest * dtype.itemsize / config.strides[0] ** 2


def whole_batch(images: int) -> int:
    """The batch that so many images are filled up to for a compiled network, as each shape is compiled: 2**n."""
    return 1 << (images - 1).bit_length()


def choose_engine(engine: str, device: torch.device, config: SegformerConfig) -> str:
    """The engine that `engine` means on `device`, for a network of this configuration. Raises `EngineError`."""
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r} is none of {', '.join(ENGINES)}")
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device {device.type!r} is neither cpu nor cuda")
    obstacle = ""
    if device.type != "cpu":
        obstacle = "runs on CPUs only"
    elif not fits(config):
        obstacle = "wants channels in multiples of 16, and this network has others"
    elif native.library() is None:
        obstacle = "is not built here (x86-64 with AVX2 and g++ when Swath is installed)"
    if engine == "auto":
        return "native" if not obstacle else "compiled" if device.type == "cuda" and has_triton() else "torch"
    if engine == "native" and obstacle:
        raise EngineError(f"engine 'native' {obstacle}; use engine 'auto'")
    return engine


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products' operands that `precision` means on `device`."""
    if precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if precision == "auto":
        on_cpu = torch.cpu._is_avx512_bf16_supported
        fast = torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else on_cpu()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def use_threads(threads: int) -> None:
    """Have PyTorch compute with so many threads what the calling one asks of it."""
    torch.set_num_threads(threads)
    torch.get_num_threads()  # else it takes, when it first computes, the number that any thread has set last


def allow_compilations() -> None:
    """In this thread, one for each shape of the plan; by default PyTorch compiles 8, and runs the rest as they are."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000


def keep_freed_memory() -> None:
    """Have glibc keep what is freed in the process, for all of its life.

    A forward pass frees and asks again for the same tens of megabytes; by default each time the kernel takes the pages
    back and clears them anew, which costs as much as a third of the arithmetic.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(m_arena_max, 4)  # else each of the worker's threads keeps what it has freed to itself
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
