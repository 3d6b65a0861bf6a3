"""Checkpoints that people have, read into our network: Hugging Face (old and new key names), NVlabs, OpenMMLab.

How each format names things is in `layouts.py`; what is here serves them all. Everything is read through fsspec, so
a checkpoint may lie in a folder, in a bucket or on the hub (`hf://owner/name`). Pickles are opened with
`weights_only=True`: a checkpoint can never run code. Whatever is wrong with a file is one `CheckpointError` that
says which keys are missing or have another shape.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import fsspec
import safetensors.torch
import torch
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from torch import Tensor

from model.labels import LabelSet, label_set
from model.layouts import HUGGING_FACE_4, LAYOUTS, OPENMMLAB, Layout
from model.segformer import VARIANTS, Segformer, SegformerConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
CONFIG_KEYS = {  # our name: Hugging Face's
    "depths": "depths",
    "hidden_sizes": "hidden_sizes",
    "decoder_size": "decoder_hidden_size",
    "heads": "num_attention_heads",
    "reductions": "sr_ratios",
    "mlp_ratios": "mlp_ratios",
    "kernels": "patch_sizes",
    "strides": "strides",
}
UNTAUGHT = label_set(["untaught (0)", "untaught (1)"])  # of a head that has learned nothing
B0 = SegformerConfig(labels=2, depths=(2, 2, 2, 2), hidden_sizes=(32, 64, 160, 256), decoder_size=256)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line and names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A network ready for inference, and what belongs to it."""

    model: Segformer  # float32, on the CPU, in eval mode
    labels: LabelSet
    mean: tuple[float, ...]  # of the training images' RGB channels, 0 to 1
    std: tuple[float, ...]
    digest: str  # SHA-256 of weights, configuration and normalisation: equal digests give equal logits


def load_checkpoint(
    url: str, storage_options: Mapping[str, Any] | None = None, decoder_seed: int | None = None
) -> Checkpoint:
    """Read the checkpoint at `url`: a Hugging Face folder, or one weight file, at any URL that fsspec knows.

    Raises `CheckpointError`. Label names and normalisation come from `config.json` and `preprocessor_config.json`
    beside the weights, or from the metadata of an OpenMMLab file; without them, "class 0" and so on, and ImageNet's.
    An encoder alone, as those that were trained on ImageNet come, is refused unless there is a `decoder_seed`: with one
    it has a random decoder, which is a function of the seed, and the classes `UNTAUGHT`.
    """
    files = find_files(url, storage_options or {})
    state, metadata = read_tensors(files)
    settings, preprocessing = files.read_json("config.json"), files.read_json("preprocessor_config.json")
    try:
        return assemble(files.shown, state, metadata, settings, preprocessing, decoder_seed)
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        complaint = f"its parts do not fit together ({one_line(error)}); is it a SegFormer?"
        raise CheckpointError(f"{files.shown}: {complaint}") from None


def assemble(
    url: str,
    state: dict[str, Tensor],
    metadata: Mapping[str, Any],
    settings: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    decoder_seed: int | None,
) -> Checkpoint:
    """The network from the tensors of a file, and what lay beside it."""
    state = with_backbone(state)
    layout = recognise(state, url)
    is_whole = has_decoder(state, layout)
    if layout is OPENMMLAB:
        state = fold_openmmlab_decoder(state)
    config = read_config(settings, layout, url) if settings else infer_config(state, layout, url)
    if is_whole:
        model = Segformer(config)
        fill(model, state, layout, url)
        labels = read_labels(settings, metadata, config.labels)
    elif decoder_seed is None:
        raise CheckpointError(f"{url}: an encoder alone, which knows no classes yet; `swath finetune` teaches it yours")
    else:
        labels = UNTAUGHT
        model = random_network(replace(config, labels=len(labels), projection_relu=False), decoder_seed)
        fill(model, state, layout, url, "encoder.")
    mean = tuple(map(float, preprocessing.get("image_mean") or IMAGENET_MEAN))
    std = tuple(map(float, preprocessing.get("image_std") or IMAGENET_STD))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise CheckpointError(f"{url}: preprocessor_config.json gives mean {mean} and std {std}, not three of each")
    return Checkpoint(model.eval(), labels, mean, std, digest_of(model, mean, std))


def with_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of a whole checkpoint: files of an encoder alone do not say that it is the backbone."""
    renamed = {f"backbone.{key}": tensor for key, tensor in state.items()}
    is_bare = any(layout.has(key) for layout in LAYOUTS for key in renamed)
    return renamed if is_bare else state


def has_decoder(state: Mapping[str, Tensor], layout: Layout) -> bool:
    """Whether a checkpoint has any part of a decoder, so that what it lacks of one is missing."""
    keys = (name if isinstance(name, str) else name[0] for ours, name in layout.names.items() if "decoder" in ours)
    beginnings = {key.partition(".")[0] for key in keys}
    return any(key.partition(".")[0] in beginnings for key in state)


def random_network(config: SegformerConfig, seed: int) -> Segformer:
    """A network of random weights, which are a function of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Segformer(config)


def save_huggingface(model: Segformer, labels: LabelSet, folder: str, dtype: torch.dtype = torch.float32) -> None:
    """Write `folder` in Hugging Face's layout (old key names, which every version of transformers reads)."""
    filesystem = fsspec.filesystem("file")
    filesystem.makedirs(folder, exist_ok=True)
    for name, data in huggingface_files(model, labels, dtype=dtype).items():
        filesystem.pipe_file(f"{folder}/{name}", data)


def huggingface_files(
    model: Segformer,
    labels: LabelSet,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> dict[str, bytes]:
    """The files of a folder in Hugging Face's layout by name, the weights last; the same network gives the same bytes.

    The layout has no place for what another has: see `in_huggingface_terms`.
    """
    config = model.config
    names = {ours: HUGGING_FACE_4.source(ours).key for ours in model.state_dict()}
    tensors = {
        names[ours]: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for ours, tensor in model.state_dict().items()
    }
    settings = {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        **{theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()},
        "num_encoder_blocks": len(config.depths),
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: index for index, name in enumerate(labels.names)},
        "palette": labels.palette,
    }
    preprocessing = {"image_mean": mean, "image_std": std, "do_normalize": True, "do_rescale": True}
    preprocessing |= {"image_processor_type": "SegformerImageProcessor", "do_resize": True, "do_reduce_labels": False}
    return {
        "config.json": json.dumps(settings, indent=2).encode(),
        "preprocessor_config.json": json.dumps(preprocessing, indent=2).encode(),
        "model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"}),
    }


def in_huggingface_terms(config: SegformerConfig) -> SegformerConfig:
    """The same network as far as Hugging Face's layout can say it: with that layout's epsilons, which no file of it
    says, and without the ReLU that OpenMMLab has behind its projections.
    """
    return replace(config, **traits(HUGGING_FACE_4))


def model_version(digest: str, mask_settings: Mapping[str, Any]) -> str:
    """Twelve hex digits that change whenever the weights or a setting that changes a mask does."""
    text = json.dumps({"weights": digest, **mask_settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Files:
    """The weight file of a checkpoint and what lies beside it."""

    filesystem: fsspec.AbstractFileSystem
    folder: str
    weights: str
    shown: str  # the URL for messages, without what may be secret

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in `name` beside the weights; empty when there is no such file."""
        try:
            found = json.loads(self.filesystem.cat_file(f"{self.folder}/{name}"))
        except (FileNotFoundError, PermissionError):  # S3 says "denied" of what is not there, unless one may list
            return {}
        except ValueError as error:
            raise CheckpointError(f"{self.shown}: {name} is not valid JSON ({error}); download it again") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.shown}: {name} is not a JSON object; download it again")
        return found


def find_files(url: str, storage_options: Mapping[str, Any]) -> Files:
    shown = url.partition("?")[0] if "://" in url else url  # a signed address has its secret in the query
    try:
        filesystem, path = url_to_fs(url, **storage_options)
        if filesystem.isfile(path):
            return Files(filesystem, path.rpartition("/")[0], path, shown)
        names = [entry.rpartition("/")[2] for entry in filesystem.ls(path, detail=False)]
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: no such file or folder; give a Hugging Face folder or a weight file") from None
    except PermissionError:  # of which S3 itself says no more
        raise CheckpointError(f"{shown}: access denied; check the credentials and what they allow") from None
    except Exception as error:  # every file system has errors of its own
        raise CheckpointError(f"{shown}: cannot be opened ({one_line(error)})") from None
    found = [name for name in WEIGHT_FILES if name in names]
    found += sorted(name for name in names if name.endswith(WEIGHT_SUFFIXES) and name not in WEIGHT_FILES)
    if not found:
        expected = ", ".join([*WEIGHT_FILES, "*.pth"])
        raise CheckpointError(f"{shown}: no weights in this folder; expected one of {expected}")
    if found[0] not in WEIGHT_FILES and len(found) > 1:
        raise CheckpointError(f"{shown}: several weight files ({', '.join(found[:5])}); name one of them")
    return Files(filesystem, path.rstrip("/"), f"{path.rstrip('/')}/{found[0]}", shown)


def read_tensors(files: Files) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weight file by name, as float32 where they are floats, and an OpenMMLab file's metadata."""
    name = files.weights.rpartition("/")[2].partition("?")[0]
    try:
        data = files.filesystem.cat_file(files.weights)
    except Exception as error:
        raise CheckpointError(f"{files.shown}: {name} cannot be read ({one_line(error)})") from None
    try:
        if name.endswith(".safetensors"):
            loaded: Any = safetensors.torch.load(data)
        else:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except SafetensorError as error:
        reason = f"is not a whole safetensors file ({len(data):,} bytes: {one_line(error)}); download it again"
        raise CheckpointError(f"{files.shown}: {name} {reason}") from None
    except Exception as error:  # torch.load documents no set of errors for damaged or foreign files
        reason = f"is not a whole PyTorch file of tensors ({len(data):,} bytes: {one_line(error)})"
        remedy = "download it again, or save its state_dict alone"
        raise CheckpointError(f"{files.shown}: {name} {reason}; {remedy}") from None
    metadata: dict[str, Any] = {}
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        metadata = loaded["meta"] if isinstance(loaded.get("meta"), dict) else {}
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{files.shown}: {name} holds a {type(loaded).__name__}, not a dictionary of tensors")
    tensors = {str(key).removeprefix("module."): value for key, value in loaded.items() if isinstance(value, Tensor)}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}, metadata


def recognise(state: Mapping[str, Tensor], url: str) -> Layout:
    """The layout that most keys of `state` belong to: a damaged file is still recognised, and its gaps named."""

    def hits(layout: Layout) -> int:
        return sum(map(layout.has, state))

    best = max(LAYOUTS, key=hits)
    if not hits(best):
        seen = ", ".join(list(state)[:3]) or "no tensors"
        formats = ", ".join(layout.title for layout in LAYOUTS)
        raise CheckpointError(f"{url}: not a SegFormer segmentation checkpoint (keys: {seen}); known: {formats}")
    return best


def read_config(settings: Mapping[str, Any], layout: Layout, url: str) -> SegformerConfig:
    """The hyper-parameters in Hugging Face's config.json, which leaves out what equals its defaults (B0)."""
    if settings.get("model_type", "segformer") != "segformer":
        raise CheckpointError(f"{url}: config.json is of a {settings['model_type']!r} model, not of a segformer")
    values = {ours: settings.get(theirs, getattr(B0, ours)) for ours, theirs in CONFIG_KEYS.items()}
    labels = len(settings.get("id2label") or ()) or int(settings.get("num_labels", B0.labels))
    try:
        tuples: dict[str, Any] = {
            key: int(value) if key == "decoder_size" else tuple(map(int, value)) for key, value in values.items()
        }
        config = SegformerConfig(labels=labels, **tuples, **traits(layout))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{url}: config.json does not describe a SegFormer ({one_line(error)})") from None
    if any(size % heads for size, heads in zip(config.hidden_sizes, config.heads, strict=False)):
        raise CheckpointError(f"{url}: config.json gives hidden sizes that its attention heads do not divide")
    if len({len(value) for value in tuples.values() if isinstance(value, tuple)}) != 1:
        raise CheckpointError(f"{url}: config.json gives {CONFIG_KEYS['depths']} and the other lists unequal lengths")
    return config


def infer_config(state: Mapping[str, Tensor], layout: Layout, url: str) -> SegformerConfig:
    """The hyper-parameters that the shapes of the tensors imply; the heads are those of every published variant."""

    def shape(ours: str) -> tuple[int, ...]:
        key = layout.source(ours).key
        if key not in state:
            raise CheckpointError(f"{url}: incomplete {layout.title} checkpoint; missing {key}")
        return tuple(state[key].shape)

    def depth(stage: int) -> int:
        names = (layout.source(f"encoder.stages.{stage}.blocks.{block}.norm1.weight").key for block in range(1000))
        return next(block for block, name in enumerate(names) if name not in state)

    stages = range(4)
    depths = tuple(depth(i) for i in stages)
    if depths not in {published for published, _, _ in VARIANTS.values()}:
        raise CheckpointError(
            f"{url}: {depths} blocks are those of no published SegFormer; is it whole? Else add config.json"
        )
    embeddings = [shape(f"encoder.stages.{i}.patches.conv.weight") for i in stages]
    hidden_sizes = tuple(size[0] for size in embeddings)
    expansions = [shape(f"encoder.stages.{i}.blocks.0.ffn.expand.weight")[0] for i in stages]
    reducers = [layout.source(f"encoder.stages.{i}.blocks.0.attention.reduce.conv.weight").key for i in stages]
    if has_decoder(state, layout):
        labels, decoder_size = shape("decoder.classifier.weight")[0], shape("decoder.fuse.weight")[0]
    else:  # the one that its variant has
        labels, decoder_size = len(UNTAUGHT), next(size for *known, size in VARIANTS.values() if known[0] == depths)
    return SegformerConfig(
        labels=labels,
        depths=depths,
        hidden_sizes=hidden_sizes,
        decoder_size=decoder_size,
        reductions=tuple(int(state[key].shape[-1]) if key in state else 1 for key in reducers),
        mlp_ratios=tuple(wide // size for wide, size in zip(expansions, hidden_sizes, strict=True)),
        kernels=tuple(size[-1] for size in embeddings),
        **traits(layout),
    )


def traits(layout: Layout) -> dict[str, Any]:
    """What a format fixes about the network and no file says."""
    return {key: getattr(layout, key) for key in ("layer_norm_eps", "embedding_norm_eps", "projection_relu")}


def fold_openmmlab_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenMMLab's decoder in the paper's terms: a BatchNorm is part of each projection, the stages run 4 to 1.

    Its projections are bias-free 1x1 convolutions with a BatchNorm, folded here in float64 into one linear map.
    """
    folded = dict(state)
    for stage in range(4):
        block = f"decode_head.convs.{stage}"
        keys = [f"{block}.conv.weight", *(f"{block}.bn.{p}" for p in ("weight", "bias", "running_mean", "running_var"))]
        if not all(key in state for key in keys):
            continue  # `fill` will name what is missing
        weight, gamma, beta, mean, variance = (state[key].double() for key in keys)
        scale = gamma / torch.sqrt(variance + 1e-5)
        folded[f"{block}.conv.weight"] = (weight.flatten(1) * scale[:, None]).float()
        folded[f"{block}.conv.bias"] = (beta - mean * scale).float()
    fuse = "decode_head.fusion_conv.conv.weight"
    if fuse in state:
        folded[fuse] = torch.cat(state[fuse].chunk(4, dim=1)[::-1], dim=1)
    return folded


def fill(model: Segformer, state: Mapping[str, Tensor], layout: Layout, url: str, part: str = "") -> None:
    """Copy every tensor into its place, of those whose names begin with `part`, or raise naming each that is missing or
    of another shape.
    """
    missing, odd, filled, used = [], [], {}, set()
    for ours, parameter in model.state_dict().items():
        if not ours.startswith(part) or ours.endswith("num_batches_tracked"):  # a counter that some exporters leave out
            continue
        source = layout.source(ours)
        if source.key not in state:
            missing.append(source.key)
            continue
        used.add(source.key)
        tensor = state[source.key]
        if source.parts > 1 and tensor.shape[0] == parameter.shape[0] * source.parts:
            tensor = tensor.chunk(source.parts)[source.part]
        if {tensor.dim(), parameter.dim()} == {2, 4} and tensor.shape[2:].numel() == parameter.shape[2:].numel() == 1:
            tensor = tensor.reshape(*tensor.shape[:2], *parameter.shape[2:])  # a 1x1 convolution is a linear map
        if tensor.shape != parameter.shape:
            odd.append(f"{source.key} {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
            continue
        filled[ours] = tensor
    spare = [key for key in state if key not in used and layout.has(key) and not key.endswith("num_batches_tracked")]
    if missing or odd or spare:
        complaints = [f"missing {some(missing)}"] if missing else []
        complaints += [f"without a place {some(spare)}"] if spare else []
        complaints += [f"shape of {some(odd)}"] if odd else []
        raise CheckpointError(f"{url}: {layout.title} checkpoint does not fit its network; {'; '.join(complaints)}")
    model.load_state_dict(filled, strict=False)


def read_labels(settings: Mapping[str, Any], metadata: Mapping[str, Any], labels: int) -> LabelSet:
    """Names and colours from config.json or OpenMMLab's metadata, for the ids that have one."""
    named = {int(key): str(value) for key, value in (settings.get("id2label") or {}).items()}
    palette = settings.get("palette")
    if not named:
        dataset = metadata.get("dataset_meta") or {}
        named = dict(enumerate(metadata.get("CLASSES") or dataset.get("classes") or ()))
        palette = metadata.get("PALETTE") or dataset.get("palette")
    colours = [(int(r), int(g), int(b)) for r, g, b in palette] if palette and len(palette) == labels else None
    return label_set([str(named.get(index, f"class {index}")) for index in range(labels)], colours)


def digest_of(model: Segformer, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    digest = hashlib.sha256(json.dumps([asdict(model.config), mean, std], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def some(items: list[str], shown: int = 5) -> str:
    """The first few of `items`, and how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
