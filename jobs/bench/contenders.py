"""Who takes part in the model benchmark: the reference implementation and inference engines, then our own rungs.

Each is a function from a case to a function from images to masks. What a peer wants prepared (normalised pixels, an
exported graph) is prepared outside of the time that is taken; ours begin at uint8 pixels.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import upsample
from model.checkpoint import Checkpoint, load_checkpoint
from model.fused import FusedSegformer
from model.native import library
from model.native.network import NativeSegformer


@dataclass(frozen=True)
class Case:
    """One measurement: a network, and images (N, H, W, 3) uint8 whose masks (N, H, W) are wanted."""

    weights: str  # a folder in Hugging Face's layout
    images: np.ndarray
    threads: int
    device: str

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]


Found = tuple[Any, Any]  # masks (N, H, W); logits (N, K, h, w)
Run = Callable[[], Found]


def peer(case: Case, attention: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """transformers' network, and the normalised pixels (N, 3, H, W) that it starts from."""
    import transformers

    network = transformers.SegformerForSemanticSegmentation.from_pretrained(case.weights, attn_implementation=attention)
    checkpoint = load_checkpoint(case.weights)
    pixels = (torch.from_numpy(case.images) / 255 - torch.tensor(checkpoint.mean)) / torch.tensor(checkpoint.std)
    return network.eval().to(case.device, dtype), pixels.permute(0, 3, 1, 2).contiguous().to(case.device, dtype)


class ToMask(nn.Module):
    """transformers' network and what its image processor does behind it, as one graph."""

    def __init__(self, network: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(pixel_values=pixels).logits
        full = F.interpolate(logits, size=self.size, mode="bilinear", align_corners=False)
        return full.argmax(dim=1), logits


def transformers_(case: Case, attention: str, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Run:
    network, pixels = peer(case, attention, dtype)
    to_mask: Any = ToMask(network, case.size)
    if compiled:
        torch._inductor.config.freezing = case.device == "cpu"
        to_mask = torch.compile(to_mask, dynamic=False)
    return lambda: to_mask(pixels)


def exported(case: Case) -> tuple[bytes, np.ndarray]:
    """transformers' network as an ONNX graph, and its input."""
    network, pixels = peer(case, "sdpa")
    return onnx_file(ToMask(network, case.size), pixels), pixels.numpy()


def onnx_file(network: nn.Module, example: Tensor) -> bytes:
    """A network as an ONNX graph for inputs of the example's shape."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        torch.onnx.export(network, (example,), file.name, dynamo=False, opset_version=17)
        return file.read()


def onnx_runtime(case: Case) -> Run:
    import onnxruntime

    graph, pixels = exported(case)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: tuple(session.run(None, {name: pixels}))


def openvino_network(graph: bytes, case: Case, precision: str | None) -> Any:
    import openvino

    core = openvino.Core()
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": case.threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    return core.compile_model(core.read_model(graph, b""), "CPU", options).create_infer_request()


def openvino(case: Case, precision: str | None) -> Run:
    graph, pixels = exported(case)
    request = openvino_network(graph, case, precision)

    def run() -> Found:
        results = list(request.infer([pixels]).values())
        return results[0], results[1]

    return run


def folded_openvino(case: Case) -> Run:
    """Our folded graph in OpenVINO, our upsampling behind it: would it make a better engine?"""
    fused, images = ours(case)
    request = openvino_network(onnx_file(fused, images), case, None)

    def run() -> Found:
        return to_masks(torch.from_numpy(next(iter(request.infer([case.images]).values()))), case)

    return run


def ours(case: Case) -> tuple[FusedSegformer, Tensor]:
    checkpoint = load_checkpoint(case.weights)
    fused = FusedSegformer(checkpoint.model, checkpoint.mean, checkpoint.std).to(case.device)
    return fused, torch.from_numpy(case.images).to(case.device)


def to_masks(logits: Tensor, case: Case, argmax: Callable[..., Any] = upsample.upsampled_argmax) -> Found:
    """Masks from logits (N, h, w, K)."""
    return torch.stack([argmax(one, case.size)[0] for one in logits]), logits.permute(0, 3, 1, 2)


def readable(case: Case) -> Run:
    checkpoint: Checkpoint = load_checkpoint(case.weights)
    model = checkpoint.model.to(case.device)
    pixels = (torch.from_numpy(case.images) / 255 - torch.tensor(checkpoint.mean)) / torch.tensor(checkpoint.std)
    pixels = pixels.permute(0, 3, 1, 2).contiguous().to(case.device)

    def run() -> Found:
        logits = model(pixels)
        return F.interpolate(logits, size=case.size, mode="bilinear", align_corners=False).argmax(dim=1), logits

    return run


def folded(case: Case, dtype: torch.dtype = torch.float32) -> Run:
    fused, images = ours(case)
    fused.in_precision(dtype)

    def run() -> Found:
        logits = fused(images).permute(0, 3, 1, 2)
        return F.interpolate(logits, size=case.size, mode="bilinear", align_corners=False).argmax(dim=1), logits

    return run


def folded_strips(case: Case) -> Run:
    fused, images = ours(case)
    return lambda: to_masks(fused(images), case, upsample.portable_argmax)


def folded_upsample(case: Case, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Run:
    fused, images = ours(case)
    network: Any = fused.in_precision(dtype)
    if compiled:
        torch._inductor.config.freezing = case.device == "cpu"
        network = torch.compile(network, dynamic=False)
    return lambda: to_masks(network(images), case)


def native(case: Case, dtype: torch.dtype = torch.float32) -> Run:
    fused, images = ours(case)
    network = NativeSegformer(fused, dtype)
    return lambda: to_masks(network(images), case)


def contenders(device: str) -> dict[str, Callable[[Case], Run]]:
    """By name, in the order of the ladder; the first is what the masks of all others are compared with."""
    bfloat16 = torch.bfloat16
    if device != "cpu":
        return {
            "transformers SDPA fp32": lambda case: transformers_(case, "sdpa"),
            "transformers eager bf16": lambda case: transformers_(case, "eager", bfloat16),
            "transformers SDPA bf16": lambda case: transformers_(case, "sdpa", bfloat16),
            "transformers torch.compile bf16": lambda case: transformers_(case, "sdpa", bfloat16, compiled=True),
            "ours: NHWC, folded decoder bf16": lambda case: folded(case, bfloat16),
            "+ upsample and argmax in one": lambda case: folded_upsample(case, bfloat16),
            "+ torch.compile": lambda case: folded_upsample(case, bfloat16, compiled=True),
        }
    found: dict[str, Callable[[Case], Run]] = {
        "transformers SDPA fp32": lambda case: transformers_(case, "sdpa"),
        "transformers eager fp32": lambda case: transformers_(case, "eager"),
        "transformers torch.compile fp32": lambda case: transformers_(case, "sdpa", compiled=True),
        "ONNX Runtime": onnx_runtime,
        "OpenVINO default": lambda case: openvino(case, None),
        "our folded graph in OpenVINO": folded_openvino,
        "ours: readable": readable,
        "ours: NHWC, folded decoder": folded,
        "+ argmax in strips": folded_strips,
        "+ torch.compile, frozen": lambda case: folded_upsample(case, compiled=True),
    }
    if library():
        found["+ upsample and argmax in one"] = folded_upsample
        found["+ kernels for the network"] = native
    if torch.cpu._is_avx512_bf16_supported():
        found["transformers torch.compile bf16"] = lambda case: transformers_(case, "sdpa", bfloat16, compiled=True)
        found["OpenVINO fp32"] = lambda case: openvino(case, "f32")
        found["+ bf16"] = lambda case: native(case, bfloat16)
    return found
