"""The checkpoint formats that people have: one table each, from our parameter names to theirs.

A format also fixes what no file says: the epsilons of its LayerNorms, and whether its projections have a ReLU.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where a parameter of ours comes from: part `part` of `parts` equal slices of the tensor called `key`."""

    key: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Layout:
    """One checkpoint format. In `names`, {i} is the stage from 0, {n} from 1, {j} the block, {p} the parameter."""

    title: str
    layer_norm_eps: float
    embedding_norm_eps: float
    projection_relu: bool
    names: Mapping[str, str | tuple[str, int, int]]

    def source(self, ours: str) -> Source:
        """The place of our parameter `ours` in this format."""
        part, stage, block, parameter = split_name(ours)
        entry = self.names[part]
        template, piece, pieces = (entry, 0, 1) if isinstance(entry, str) else entry
        return Source(template.format(i=stage, n=stage + 1, j=block, p=parameter), piece, pieces)

    def has(self, key: str) -> bool:
        """Whether `key` looks like one of this format."""
        entries = (entry if isinstance(entry, str) else entry[0] for entry in self.names.values())
        return any(re.fullmatch(re.sub(r"\\{[ijnp]\\}", r"\\w+", re.escape(entry)), key) for entry in entries)


def split_name(ours: str) -> tuple[str, int, int, str]:
    """`encoder.stages.2.blocks.0.ffn.expand.weight` to ("ffn.expand", 2, 0, "weight")."""
    path, _, parameter = ours.rpartition(".")
    if found := re.fullmatch(r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(.+)", path):
        return found[3], int(found[1]), int(found[2]), parameter
    if found := re.fullmatch(r"encoder\.stages\.(\d+)\.(.+)", path):
        return found[2], int(found[1]), 0, parameter
    if found := re.fullmatch(r"(decoder\.projections)\.(\d+)", path):
        return found[1], int(found[2]), 0, parameter
    return path, 0, 0, parameter


HUGGING_FACE_4 = Layout(
    "Hugging Face (transformers 4 names)",
    layer_norm_eps=1e-5,  # config.json says 1e-6, but the published implementation never uses it
    embedding_norm_eps=1e-5,
    projection_relu=False,
    names={
        "patches.conv": "segformer.encoder.patch_embeddings.{i}.proj.{p}",
        "patches.norm": "segformer.encoder.patch_embeddings.{i}.layer_norm.{p}",
        "norm1": "segformer.encoder.block.{i}.{j}.layer_norm_1.{p}",
        "attention.query": "segformer.encoder.block.{i}.{j}.attention.self.query.{p}",
        "attention.key": "segformer.encoder.block.{i}.{j}.attention.self.key.{p}",
        "attention.value": "segformer.encoder.block.{i}.{j}.attention.self.value.{p}",
        "attention.output": "segformer.encoder.block.{i}.{j}.attention.output.dense.{p}",
        "attention.reduce.conv": "segformer.encoder.block.{i}.{j}.attention.self.sr.{p}",
        "attention.reduce.norm": "segformer.encoder.block.{i}.{j}.attention.self.layer_norm.{p}",
        "norm2": "segformer.encoder.block.{i}.{j}.layer_norm_2.{p}",
        "ffn.expand": "segformer.encoder.block.{i}.{j}.mlp.dense1.{p}",
        "ffn.depthwise": "segformer.encoder.block.{i}.{j}.mlp.dwconv.dwconv.{p}",
        "ffn.contract": "segformer.encoder.block.{i}.{j}.mlp.dense2.{p}",
        "norm": "segformer.encoder.layer_norm.{i}.{p}",
        "decoder.projections": "decode_head.linear_c.{i}.proj.{p}",
        "decoder.fuse": "decode_head.linear_fuse.{p}",
        "decoder.norm": "decode_head.batch_norm.{p}",
        "decoder.classifier": "decode_head.classifier.{p}",
    },
)

HUGGING_FACE_5 = Layout(
    "Hugging Face (transformers 5 names)",
    layer_norm_eps=1e-5,
    embedding_norm_eps=1e-5,
    projection_relu=False,
    names={
        "patches.conv": "segformer.stages.{i}.patch_embeddings.proj.{p}",
        "patches.norm": "segformer.stages.{i}.patch_embeddings.layer_norm.{p}",
        "norm1": "segformer.stages.{i}.blocks.{j}.layernorm_before.{p}",
        "attention.query": "segformer.stages.{i}.blocks.{j}.attention.q_proj.{p}",
        "attention.key": "segformer.stages.{i}.blocks.{j}.attention.k_proj.{p}",
        "attention.value": "segformer.stages.{i}.blocks.{j}.attention.v_proj.{p}",
        "attention.output": "segformer.stages.{i}.blocks.{j}.attention.o_proj.{p}",
        "attention.reduce.conv": "segformer.stages.{i}.blocks.{j}.attention.sequence_reduction.sequence_reduction.{p}",
        "attention.reduce.norm": "segformer.stages.{i}.blocks.{j}.attention.sequence_reduction.layer_norm.{p}",
        "norm2": "segformer.stages.{i}.blocks.{j}.layernorm_after.{p}",
        "ffn.expand": "segformer.stages.{i}.blocks.{j}.mlp.fc1.{p}",
        "ffn.depthwise": "segformer.stages.{i}.blocks.{j}.mlp.dwconv.dwconv.{p}",
        "ffn.contract": "segformer.stages.{i}.blocks.{j}.mlp.fc2.{p}",
        "norm": "segformer.stages.{i}.layer_norm.{p}",
        "decoder.projections": "decode_head.linear_projections.{i}.proj.{p}",
        "decoder.fuse": "decode_head.linear_fuse.{p}",
        "decoder.norm": "decode_head.batch_norm.{p}",
        "decoder.classifier": "decode_head.classifier.{p}",
    },
)

NVLABS = Layout(
    "NVlabs",
    layer_norm_eps=1e-6,
    embedding_norm_eps=1e-5,
    projection_relu=False,
    names={
        "patches.conv": "backbone.patch_embed{n}.proj.{p}",
        "patches.norm": "backbone.patch_embed{n}.norm.{p}",
        "norm1": "backbone.block{n}.{j}.norm1.{p}",
        "attention.query": "backbone.block{n}.{j}.attn.q.{p}",
        "attention.key": ("backbone.block{n}.{j}.attn.kv.{p}", 0, 2),
        "attention.value": ("backbone.block{n}.{j}.attn.kv.{p}", 1, 2),
        "attention.output": "backbone.block{n}.{j}.attn.proj.{p}",
        "attention.reduce.conv": "backbone.block{n}.{j}.attn.sr.{p}",
        "attention.reduce.norm": "backbone.block{n}.{j}.attn.norm.{p}",
        "norm2": "backbone.block{n}.{j}.norm2.{p}",
        "ffn.expand": "backbone.block{n}.{j}.mlp.fc1.{p}",
        "ffn.depthwise": "backbone.block{n}.{j}.mlp.dwconv.dwconv.{p}",
        "ffn.contract": "backbone.block{n}.{j}.mlp.fc2.{p}",
        "norm": "backbone.norm{n}.{p}",
        "decoder.projections": "decode_head.linear_c{n}.proj.{p}",
        "decoder.fuse": "decode_head.linear_fuse.conv.{p}",
        "decoder.norm": "decode_head.linear_fuse.bn.{p}",
        "decoder.classifier": "decode_head.linear_pred.{p}",
    },
)

OPENMMLAB = Layout(
    "OpenMMLab (mmsegmentation)",
    layer_norm_eps=1e-6,
    embedding_norm_eps=1e-6,
    projection_relu=True,
    names={
        "patches.conv": "backbone.layers.{i}.0.projection.{p}",
        "patches.norm": "backbone.layers.{i}.0.norm.{p}",
        "norm1": "backbone.layers.{i}.1.{j}.norm1.{p}",
        "attention.query": ("backbone.layers.{i}.1.{j}.attn.attn.in_proj_{p}", 0, 3),
        "attention.key": ("backbone.layers.{i}.1.{j}.attn.attn.in_proj_{p}", 1, 3),
        "attention.value": ("backbone.layers.{i}.1.{j}.attn.attn.in_proj_{p}", 2, 3),
        "attention.output": "backbone.layers.{i}.1.{j}.attn.attn.out_proj.{p}",
        "attention.reduce.conv": "backbone.layers.{i}.1.{j}.attn.sr.{p}",
        "attention.reduce.norm": "backbone.layers.{i}.1.{j}.attn.norm.{p}",
        "norm2": "backbone.layers.{i}.1.{j}.norm2.{p}",
        "ffn.expand": "backbone.layers.{i}.1.{j}.ffn.layers.0.{p}",
        "ffn.depthwise": "backbone.layers.{i}.1.{j}.ffn.layers.1.{p}",
        "ffn.contract": "backbone.layers.{i}.1.{j}.ffn.layers.4.{p}",
        "norm": "backbone.layers.{i}.2.{p}",
        "decoder.projections": "decode_head.convs.{i}.conv.{p}",
        "decoder.fuse": "decode_head.fusion_conv.conv.{p}",
        "decoder.norm": "decode_head.fusion_conv.bn.{p}",
        "decoder.classifier": "decode_head.conv_seg.{p}",
    },
)

LAYOUTS = (HUGGING_FACE_4, HUGGING_FACE_5, NVLABS, OPENMMLAB)
