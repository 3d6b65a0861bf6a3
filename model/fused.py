"""The inference form of a SegFormer: the same function, derived from the readable one by exact rewrites.

What is rewritten, and why the numbers stay (float rounding aside):

- **NHWC throughout.** A contiguous (N, H, W, C) map is its own token tensor and a channels-last image, so patch
  embedding, LayerNorm, attention and depthwise convolution follow each other without one transpose.
- **The decoder is folded.** Bilinear upsampling is linear in its input and keeps constants, so it commutes with every
  per-pixel linear map. Each stage's projection, its slice of the fuse convolution and the BatchNorm become one linear
  map from C_i to D channels, applied at the stage's own resolution, then upsampled and summed. In B0 at 512x512 the
  fuse convolution over 4 D channels is half of all the work, and it disappears. Where a ReLU stands behind the
  projection (OpenMMLab), the projection stays and the rest is folded. Computed in float64, rounded once.
- **Normalisation of uint8 pixels** is the first thing that happens on the device. It is not folded into the weights of
  the first convolution: its zero padding is zero after normalisation, not before.

`native` computes this form with kernels of its own; here it is in plain PyTorch, for GPUs and for any other machine.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.segformer import Attention, Block, Decoder, MixFFN, Segformer, Stage


class FusedSegformer(nn.Module):
    """uint8 images to class logits at a quarter of their resolution."""

    stages: Any  # ModuleLists have no type parameter: of Stage
    scale: Tensor
    shift: Tensor

    def __init__(self, model: Segformer, mean: Sequence[float], std: Sequence[float]):
        """`mean` and `std` of the training images' RGB channels, 0 to 1. Shares no tensor with `model`."""
        super().__init__()
        self.config = model.config
        self.dtype = torch.float32
        self.stages = deepcopy(model.encoder.stages)
        self.decoder = FoldedDecoder(model.decoder)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)))
        self.register_buffer("shift", -torch.tensor(mean) / torch.tensor(std))
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, ceil(H/4), ceil(W/4), K), of uint8 images (N, H, W, 3) RGB."""
        feature_map, maps = self.normalise(images).to(self.dtype), []
        for stage in self.stages:
            feature_map = stage_map(stage, feature_map)
            maps.append(feature_map)
        return self.decoder(maps).float()

    def in_precision(self, dtype: torch.dtype) -> "FusedSegformer":
        """Itself, with weights and maps of `dtype`; pixels are normalised in float32 all the same."""
        self.dtype = dtype
        self.stages.to(dtype)
        self.decoder.to(dtype)
        return self

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (..., 3), or one value for all channels, 0 to 255, as the network wants them; float32."""
        return pixels.float() * self.scale + self.shift


class FoldedDecoder(nn.Module):
    """The all-MLP decoder with everything linear between a feature map and the ReLU in one matrix a stage."""

    projections: Any  # ModuleList of Linear, or None
    stages: Any  # ModuleList of Linear

    def __init__(self, decoder: Decoder):
        super().__init__()
        slices = decoder.fuse.weight.detach().double().flatten(1).chunk(len(decoder.projections), dim=1)[::-1]
        scale, shift = batch_norm_as_affine(decoder.norm)
        self.projections = deepcopy(decoder.projections) if decoder.projection_relu else None
        self.stages = nn.ModuleList()
        projections: Any = decoder.projections
        for projection, fuse in zip(projections, slices, strict=True):
            weight = scale[:, None] * fuse  # (D, D)
            if not decoder.projection_relu:
                shift = shift + weight @ projection.bias.detach().double()
                weight = weight @ projection.weight.detach().double()  # (D, C_i)
            self.stages.append(linear(weight))
        self.stages[0] = linear(self.stages[0].weight, shift)  # the finest stage carries the bias of all
        self.classifier = linear(decoder.classifier.weight.flatten(1), decoder.classifier.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps (N, H_i, W_i, C_i), finest first, to logits (N, H_1, W_1, K)."""
        if self.projections is not None:
            maps = [F.relu(project(one)) for project, one in zip(self.projections, maps, strict=True)]
        fused, *coarse = (stage(one) for stage, one in zip(self.stages, maps, strict=True))
        for one in coarse:
            fused += resize_nhwc(one, fused.shape[1], fused.shape[2])  # in place: this is the largest map there is
        return self.classifier(fused.relu_())


def stage_map(stage: Stage, inputs: Tensor) -> Tensor:
    """(N, H, W, C_in) to (N, H/stride, W/stride, C)."""
    tokens = stage.patches.norm(convolve(stage.patches.conv, inputs))
    blocks: Any = stage.blocks
    for block in blocks:
        tokens = transform(block, tokens)
    return stage.norm(tokens)


def transform(block: Block, tokens: Tensor) -> Tensor:
    """One transformer block, (N, H, W, C) to the same."""
    tokens = tokens + attend(block.attention, block.norm1(tokens))
    return tokens + mix(block.ffn, block.norm2(tokens))


def attend(attention: Attention, tokens: Tensor) -> Tensor:
    """Self-attention on (N, H, W, C) with a reduced map of keys and values."""
    reduced = tokens
    if attention.reduce is not None:
        _, height, width, _ = tokens.shape
        window = attention.reduce.conv.kernel_size[0]
        padded = F.pad(tokens, (0, 0, 0, max(0, window - width), 0, max(0, window - height)))
        reduced = attention.reduce.norm(convolve(attention.reduce.conv, padded))
    query, key, value = (
        attention.split_heads(layer(source).flatten(1, 2))  # (N, heads, L, C/heads)
        for layer, source in ((attention.query, tokens), (attention.key, reduced), (attention.value, reduced))
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attention.output(mixed.transpose(1, 2).flatten(2)).view_as(tokens)


def mix(ffn: MixFFN, tokens: Tensor) -> Tensor:
    """Mix-FFN on (N, H, W, C)."""
    return ffn.contract(F.gelu(convolve(ffn.depthwise, ffn.expand(tokens))))


def convolve(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """A convolution of (N, H, W, C) that stays channels last."""
    return layer(inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def resize_nhwc(inputs: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation of (N, h, w, C) to (N, height, width, C), as `segformer.resize`."""
    resized = F.interpolate(inputs.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def batch_norm_as_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64 (D) each, of a BatchNorm with its running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.detach().double() - scale * norm.running_mean.double()


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with these float32 values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().float().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().float().clone())
    return layer
