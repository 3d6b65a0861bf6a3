"""The inference form, computed by the kernels: packs the weights once, then calls one kernel a layer.

A structure here is the C++ one of the same name in `layers.h`; matrices are packed into panels that the products read
in order. A packed network holds what its structures point to.
"""

from ctypes import CDLL, Array, Structure, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import segformer
from model.fused import FusedSegformer
from model.native import library
from model.segformer import SegformerConfig

CHANNELS = 16  # floats in the widest register: the kernels want all channels to be a multiple of it
STAGES = 5  # at most
LOG2E = 1.4426950408889634


class Linear(Structure):
    _fields_ = [("panels", c_void_p), ("bias", c_void_p), ("inputs", c_int64), ("outputs", c_int64)]


class Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float)]


class PatchEmbeddings(Structure):
    _fields_ = [
        *(("conv", Linear), ("norm", Norm)),
        *((name, c_int64) for name in ("kernel", "stride", "channels")),
        ("pixels", c_void_p),
    ]


class Attention(Structure):
    _fields_ = [
        *(("norm", Norm), ("query", Linear), ("reduce", Linear), ("reduced_norm", Norm), ("key_value", Linear)),
        *(("output", Linear), ("heads", c_int64), ("reduction", c_int64)),
    ]


class MixFFN(Structure):
    _fields_ = [("norm", Norm), ("expand", Linear), ("taps", c_void_p), ("taps_bias", c_void_p), ("contract", Linear)]


class Decoder(Structure):
    _fields_ = [("finest", Linear), ("classifier", Linear)]


class Map(Structure):
    _fields_ = [("data", c_void_p), ("height", c_int64), ("width", c_int64)]


def fits(config: SegformerConfig) -> bool:
    """Whether the kernels can compute a network of this configuration; they can for every published one."""
    narrow = any(size % CHANNELS for size in (*config.hidden_sizes, config.decoder_size))
    odd = any(size // heads % 2 for size, heads in zip(config.hidden_sizes, config.heads, strict=True))
    return not narrow and not odd and len(config.depths) <= STAGES


class NativeSegformer:
    """uint8 images to class logits at a quarter of their resolution, on the CPU."""

    def __init__(self, network: FusedSegformer, dtype: torch.dtype = torch.float32):
        """`dtype` is of the products' operands, float32 or bfloat16; sums and everything else are float32."""
        kernels = library()
        assert kernels is not None
        assert fits(network.config)
        self.kernels: CDLL = kernels
        self.config = network.config
        self.bfloat16 = int(dtype == torch.bfloat16)
        self.kept: list[Tensor] = []
        self.embeddings = [self.patch_embeddings(stage.patches) for stage in network.stages]
        self.embeddings[0].pixels = self.keep(network.normalise(torch.arange(256)[:, None]).T)
        self.blocks = [[self.block(block) for block in stage.blocks] for stage in network.stages]
        self.norms = [self.norm(stage.norm) for stage in network.stages]
        decoder = network.decoder
        self.projections = [self.linear(one.weight, one.bias) for one in decoder.projections or ()]
        finest, *coarse = (self.linear(one.weight, one.bias) for one in decoder.stages)
        self.coarse = coarse
        self.decoder = Decoder(finest, self.linear(decoder.classifier.weight, decoder.classifier.bias))

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, ceil(H/4), ceil(W/4), K), of contiguous uint8 images (N, H, W, 3) RGB."""
        maps = []
        feature_map = images.contiguous()
        for stage in range(len(self.blocks)):
            feature_map = self.stage_map(stage, feature_map)
            maps.append(feature_map)
        return self.decode(maps)

    def stage_map(self, stage: int, inputs: Tensor) -> Tensor:
        """(N, H, W, C_in), uint8 pixels or a float32 map, to the stage's float32 map (N, H/stride, W/stride, C)."""
        embeddings, kernels, mode = self.embeddings[stage], self.kernels, self.mode()
        n, height, width, _ = inputs.shape
        pad = embeddings.kernel // 2
        height, width = ((side + 2 * pad - embeddings.kernel) // embeddings.stride + 1 for side in (height, width))
        tokens = torch.empty(n, height, width, embeddings.conv.outputs)
        embed = kernels.embed_map if stage else kernels.embed_pixels
        embed(*mode, byref(embeddings), address(inputs), *inputs.shape[:3], address(tokens))
        spare, shape = torch.empty_like(tokens), (n, height, width)
        for attention, ffn in self.blocks[stage]:
            kernels.attend_to_all(*mode, byref(attention), address(tokens), *shape)
            kernels.mix(*mode, byref(ffn), address(tokens), *shape, address(spare))
            tokens, spare = spare, tokens
        rows = (n * height * width, embeddings.conv.outputs)
        kernels.layer_norm(mode[1], byref(self.norms[stage]), address(tokens), *rows)
        return tokens

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Four maps (N, H_i, W_i, C_i), finest first, to logits (N, H_1, W_1, K)."""
        if self.projections:
            maps = [self.project(layer, one, relu=True) for layer, one in zip(self.projections, maps, strict=True)]
        finest, *rest = maps
        coarse = [self.project(layer, one) for layer, one in zip(self.coarse, rest, strict=True)]
        table: Array[Map] = (Map * len(coarse))(*(Map(one.data_ptr(), *one.shape[1:3]) for one in coarse))
        n, height, width, _ = finest.shape
        logits = torch.empty(n, height, width, self.decoder.classifier.outputs)
        shape = (address(finest), n, height, width)
        self.kernels.decode_maps(*self.mode(), byref(self.decoder), *shape, table, len(coarse), address(logits))
        return logits

    def project(self, layer: Linear, inputs: Tensor, relu: bool = False) -> Tensor:
        """A linear layer on a map, (N, H, W, C) to (N, H, W, D)."""
        outputs = torch.empty(*inputs.shape[:3], layer.outputs)
        rows = inputs.shape[:3].numel()
        self.kernels.project(*self.mode(), byref(layer), address(inputs), rows, int(relu), address(outputs))
        return outputs

    def mode(self) -> tuple[int, int]:
        """The first two arguments of a kernel: precision and threads."""
        return self.bfloat16, torch.get_num_threads()

    def patch_embeddings(self, layer: segformer.PatchEmbeddings) -> PatchEmbeddings:
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        lines = layer.conv.weight.permute(0, 2, 3, 1).flatten(2)  # (out, kernel y, kernel x and channel)
        conv = self.linear(F.pad(lines, (0, lines.shape[2] % 2 * self.bfloat16)).flatten(1), layer.conv.bias)
        return PatchEmbeddings(conv, self.norm(layer.norm), kernel, stride, layer.conv.in_channels)

    def block(self, block: segformer.Block) -> tuple[Attention, MixFFN]:
        attention, ffn = block.attention, block.ffn
        scale = LOG2E / (attention.query.in_features // attention.heads) ** 0.5
        packed = Attention(
            norm=self.norm(block.norm1),
            query=self.linear(attention.query.weight.double() * scale, attention.query.bias.double() * scale),
            key_value=self.linear(
                torch.cat([attention.key.weight, attention.value.weight]),
                torch.cat([attention.key.bias, attention.value.bias]),
            ),
            output=self.linear(attention.output.weight, attention.output.bias),
            heads=attention.heads,
            reduction=1,
        )
        if attention.reduce is not None:
            conv = attention.reduce.conv
            packed.reduction = conv.kernel_size[0]
            packed.reduce = self.linear(conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
            packed.reduced_norm = self.norm(attention.reduce.norm)
        return packed, MixFFN(
            norm=self.norm(block.norm2),
            expand=self.linear(ffn.expand.weight, ffn.expand.bias),
            taps=self.keep(ffn.depthwise.weight.flatten(1).T),
            taps_bias=self.keep(ffn.depthwise.bias),
            contract=self.linear(ffn.contract.weight, ffn.contract.bias),
        )

    def norm(self, layer: nn.LayerNorm) -> Norm:
        return Norm(self.keep(layer.weight), self.keep(layer.bias), layer.eps)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack `weight` (outputs, inputs) and keep it with its bias."""
        outputs, inputs = weight.shape
        weight = weight.float().contiguous()
        panels = torch.empty(self.kernels.panel_bytes(self.bfloat16, outputs, inputs), dtype=torch.uint8)
        self.kernels.pack_panels(self.bfloat16, address(weight), outputs, inputs, address(panels))
        self.kept.append(panels)
        return Linear(panels.data_ptr(), self.keep(bias), inputs, outputs)

    def keep(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 copy that lives as long as the network; None for nothing."""
        if tensor is None:
            return None
        self.kept.append(tensor.detach().float().contiguous().clone())
        return address(self.kept[-1])


def address(tensor: Tensor) -> int:
    """Where a contiguous tensor lies."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()
