"""SegFormer (Xie et al. 2021, arXiv:2105.15203), top down, in plain PyTorch: the readable form.

This file is the paper and nothing else. It trains, and it is what every faster form must equal. The quirks of
published checkpoints live in `checkpoint.py`, images and masks in `predictor.py`.

Shape legend
    N      images in a batch
    H, W   height and width of the feature map at hand; the input image is (N, 3, H, W)
    L      tokens: H * W
    C      channels
    R      sequence-reduction ratio of a stage
    D      decoder channels
    K      classes

What bounds it: for B0 at 512x512 the forward pass is about 8.4 GFLOP; the decoder's fuse convolution, over 4 D
channels at a quarter of the resolution, is half of that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class SegformerConfig:
    """Hyper-parameters of one network; each tuple has one value a stage (paper, table 6)."""

    labels: int  # K
    depths: tuple[int, ...]
    hidden_sizes: tuple[int, ...]
    decoder_size: int  # D
    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)  # R
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    kernels: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    layer_norm_eps: float = 1e-5  # of the block and stage norms; the paper's code has 1e-6, Hugging Face 1e-5
    embedding_norm_eps: float = 1e-5  # of the patch-embedding and reduction norms; OpenMMLab has 1e-6
    projection_relu: bool = False  # OpenMMLab's decoder has a ReLU behind each stage's projection


VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    # name: (depths, hidden sizes, decoder size)          parameters with 150 classes
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),  #       3.75 M
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),  #     13.7 M
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),  #     27.5 M
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),  #    47.3 M
    "b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),  #    64.1 M
    "b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768),  #    84.7 M
}


def variant(name: str, labels: int, layer_norm_eps: float = 1e-5) -> SegformerConfig:
    """The configuration of `name` ("b0" to "b5") with `labels` classes; KeyError for any other name."""
    depths, hidden_sizes, decoder_size = VARIANTS[name]
    return SegformerConfig(labels, depths, hidden_sizes, decoder_size, layer_norm_eps=layer_norm_eps)


class Segformer(nn.Module):
    """Image to class logits at a quarter of its resolution.

    A hierarchical encoder gives four maps, at 1/4, 1/8, 1/16 and 1/32 of the input; an all-MLP decoder merges
    them. There is no position embedding and no fixed size anywhere, so any input size works, odd ones included.
    """

    def __init__(self, config: SegformerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K, ceil(H/4), ceil(W/4)) of normalised float images (N, 3, H, W)."""
        return self.decoder(self.encoder(images))


class Encoder(nn.Module):
    """The Mix Transformer: four stages, each at half the resolution of the one before and with more channels."""

    def __init__(self, config: SegformerConfig):
        super().__init__()
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.depths)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The four feature maps, each (N, C, H, W), finest first."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps


class Stage(nn.Module):
    """Cut the map into overlapping patches, let the tokens attend to each other, give a map back."""

    def __init__(self, config: SegformerConfig, index: int):
        super().__init__()
        size = config.hidden_sizes[index]
        channels = config.hidden_sizes[index - 1] if index else 3
        kernel, stride, eps = config.kernels[index], config.strides[index], config.embedding_norm_eps
        self.patches = PatchEmbeddings(kernel, stride, channels, size, eps)
        self.blocks = nn.ModuleList(Block(config, index) for _ in range(config.depths[index]))
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H/stride, W/stride)."""
        tokens, height, width = self.patches(inputs)
        for block in self.blocks:
            tokens = block(tokens, height, width)
        return to_map(self.norm(tokens), height, width)


class PatchEmbeddings(nn.Module):
    """Overlapping patches as tokens: a strided convolution, then LayerNorm on each token (paper, section 3.1).

    Why overlap: ViT's patches of 16x16 do not, so what lies on both sides of a cut is never seen together, and a
    network trained at 224 pixels meets patches of another content at 1024. A kernel wider than its stride (7 over
    4, then 3 over 2) makes each token share pixels with its neighbours and keeps local continuity at any size.

    Why a stride at all: attention between pixels of a 512x512 image would compare 262,144 tokens with each other,
    6.9e10 pairs in every map; after the first stride of 4 there are 16,384 tokens, after the last 256.

    Why LayerNorm and not BatchNorm: it normalises each token over its own channels. A batch of one full-size
    image, or of images of many sizes, has no dependable batch statistics; and training and inference then agree.
    """

    def __init__(self, kernel: int, stride: int, channels: int, hidden_state: int, eps: float = 1e-5):
        """`kernel` and `stride` in pixels of the input map, `channels` into `hidden_state` channels."""
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden_state, kernel_size=kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(hidden_state, eps=eps)

    def forward(self, inputs: Tensor) -> tuple[Tensor, int, int]:
        """(N, channels, H, W) to tokens (N, H'*W', hidden_state) with the new height H' and width W'."""
        patches = self.conv(inputs)
        _, _, height, width = patches.shape
        return self.norm(to_tokens(patches)), height, width


class Block(nn.Module):
    """One transformer block: attention, then Mix-FFN, each on normalised tokens and added to what came in."""

    def __init__(self, config: SegformerConfig, index: int):
        super().__init__()
        size = config.hidden_sizes[index]
        self.norm1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attention = Attention(size, config.heads[index], config.reductions[index], config.embedding_norm_eps)
        self.norm2 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.ffn = MixFFN(size, size * config.mlp_ratios[index])

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        tokens = tokens + self.attention(self.norm1(tokens), height, width)
        return tokens + self.ffn(self.norm2(tokens), height, width)


class Attention(nn.Module):
    """Self-attention in which the keys and values come from a map reduced R times in each direction (section 3.2).

    Plain attention compares every token with every other: L**2 pairs, quadratic in the number of pixels. In the
    first stage of a 512x512 image that is 16,384**2 = 2.7e8 pairs a head, and 16 times as many at 1024x1024.
    With R = 8 only 256 keys are left: 4.2e6 pairs, 64 (R**2) times fewer. Every query still sees the whole image,
    through keys that each stand for an 8x8 window. R is 8, 4, 2, 1, so each stage has as many keys as the last.
    """

    def __init__(self, size: int, heads: int, reduction: int, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)
        self.reduce = SequenceReduction(size, reduction, eps) if reduction > 1 else None

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        reduced = self.reduce(tokens, height, width) if self.reduce else tokens  # (N, L/R**2, C)
        query = self.split_heads(self.query(tokens))
        key = self.split_heads(self.key(reduced))
        value = self.split_heads(self.value(reduced))
        mixed = F.scaled_dot_product_attention(query, key, value)  # (N, heads, L, C/heads)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(N, L, C) to (N, heads, L, C/heads)."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class SequenceReduction(nn.Module):
    """One token for every RxR window: a convolution whose stride is its kernel, then LayerNorm.

    What is left over at the right and bottom edge of an odd-sized map is dropped, as in every published
    implementation. A map smaller than one window, where those fail, is padded with zeros to one window.
    """

    def __init__(self, size: int, reduction: int, eps: float = 1e-5):
        super().__init__()
        self.conv = nn.Conv2d(size, size, kernel_size=reduction, stride=reduction)
        self.norm = nn.LayerNorm(size, eps=eps)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(N, L, C) to (N, L/R**2, C)."""
        window = self.conv.kernel_size[0]
        feature_map = to_map(tokens, height, width)
        if height < window or width < window:
            feature_map = F.pad(feature_map, (0, max(0, window - width), 0, max(0, window - height)))
        return self.norm(to_tokens(self.conv(feature_map)))


class MixFFN(nn.Module):
    """The feed-forward network with a depthwise 3x3 convolution inside (section 3.1).

    The convolution takes the place of position embeddings. A learned embedding belongs to one resolution and must
    be interpolated for any other, which costs accuracy. The zero padding of a 3x3 convolution already tells a
    token how near the edge it is, and its neighbours tell it what lies where; nine weights a channel are enough.
    """

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.expand = nn.Linear(size, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.contract = nn.Linear(hidden, size)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        mixed = self.depthwise(to_map(self.expand(tokens), height, width))
        return self.contract(F.gelu(to_tokens(mixed)))


class Decoder(nn.Module):
    """The all-MLP decoder (section 3.2): every stage to D channels, all to 1/4 resolution, merged by one more MLP.

    It can be this light because attention already gave the last stage a receptive field of the whole image.
    """

    def __init__(self, config: SegformerConfig):
        super().__init__()
        size = config.decoder_size
        self.projection_relu = config.projection_relu
        self.projections = nn.ModuleList(nn.Linear(channels, size) for channels in config.hidden_sizes)
        self.fuse = nn.Conv2d(size * len(config.hidden_sizes), size, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(size)
        self.classifier = nn.Conv2d(size, config.labels, kernel_size=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps (N, C_i, H_i, W_i), finest first, to logits (N, K, H_1, W_1)."""
        height, width = maps[0].shape[2:]
        projected = []
        for feature_map, projection in zip(maps, self.projections, strict=True):
            tokens = projection(to_tokens(feature_map))  # (N, H_i * W_i, D)
            tokens = F.relu(tokens) if self.projection_relu else tokens
            projected.append(resize(to_map(tokens, *feature_map.shape[2:]), height, width))
        fused = self.fuse(torch.cat(projected[::-1], dim=1))  # the published order: stage 4, 3, 2, 1
        return self.classifier(F.relu(self.norm(fused)))


def to_tokens(feature_map: Tensor) -> Tensor:
    """(N, C, H, W) to tokens (N, L, C)."""
    return feature_map.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (N, L, C) to a map (N, C, H, W) with channels last in memory, where both are the same numbers in place."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def resize(feature_map: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation of (N, C, h, w) to (N, C, height, width), pixel centres aligned as the paper's code."""
    return F.interpolate(feature_map, size=(height, width), mode="bilinear", align_corners=False)


def initialise(module: nn.Module) -> None:
    """The initial weights of the paper's code: truncated normal for linears, He (fan out) for convolutions."""
    match module:
        case nn.Linear():
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        case nn.Conv2d():
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
