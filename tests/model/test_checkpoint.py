"""Checkpoints of every format load to the same numbers, and a bad one says what is wrong with it."""

import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch.nn import functional as F

from model.checkpoint import CheckpointError, load_checkpoint, model_version, save_huggingface
from model.labels import label_set
from model.layouts import HUGGING_FACE_4, HUGGING_FACE_5
from model.segformer import Segformer, resize, variant
from tests.model.reference import reference

IMAGES = torch.randn(1, 3, 70, 93, generator=torch.Generator().manual_seed(1))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found = model(IMAGES)
    return getattr(found, "logits", found)


def randomised(labels: int = 5, **traits: object) -> Segformer:
    torch.manual_seed(11)
    config = variant("b0", labels)
    model = Segformer(type(config)(**(vars(config) | traits))).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand_like(tensor))
    return model


def test_a_huggingface_folder_brings_names_and_normalisation(tmp_path):
    network = reference("b0", labels=3)
    network.config.id2label = {0: "road", 1: "sky", 2: "tree"}
    network.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint.labels.names == ("road", "sky", "tree")
    assert (checkpoint.mean, checkpoint.std) == ((0.5,) * 3, (0.25,) * 3)
    assert torch.allclose(logits_of(checkpoint.model), logits_of(network), atol=1e-5)


@pytest.mark.parametrize("layout", [HUGGING_FACE_4, HUGGING_FACE_5], ids=["old", "new"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_old_and_new_huggingface_names_load_with_and_without_their_config(tmp_path, layout, name):
    model = randomised()
    tensors = {layout.source(ours).key: tensor for ours, tensor in model.state_dict().items()}
    if name.endswith("safetensors"):
        safetensors.torch.save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name)
    for url in (tmp_path, tmp_path / name, f"file://{tmp_path}"):
        assert torch.equal(logits_of(load_checkpoint(str(url)).model), logits_of(model))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "segformer", "num_labels": 5}))
    assert torch.equal(logits_of(load_checkpoint(str(tmp_path)).model), logits_of(model))


def test_what_we_save_is_read_by_transformers_and_by_us(tmp_path):
    model = randomised()
    save_huggingface(model, label_set(["a", "b", "c", "d", "e"], [(9, 9, 9)] * 5), str(tmp_path))
    network = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert network.config.id2label[3] == "d"
    assert torch.allclose(logits_of(network), logits_of(model), atol=1e-5)
    again = load_checkpoint(str(tmp_path))
    assert torch.equal(logits_of(again.model), logits_of(model))
    assert again.labels.palette == ((9, 9, 9),) * 5


def test_an_nvlabs_file_loads_with_its_own_epsilon_and_merged_keys_and_values(tmp_path):
    """Its names are written out here by hand, from the published code."""
    model = randomised(layer_norm_eps=1e-6)
    with torch.no_grad():  # small activations, so that the epsilon shows in the numbers
        for stage in model.encoder.stages:
            stage.patches.norm.weight.mul_(1e-3)
            stage.patches.norm.bias.mul_(1e-3)
    state = {"decode_head.conv_seg.weight": torch.zeros(1)}  # in published files, and used by nobody
    rules = [
        (r"encoder\.stages\.(\d)\.patches\.conv\.", r"backbone.patch_embed\1.proj."),
        (r"encoder\.stages\.(\d)\.patches\.norm\.", r"backbone.patch_embed\1.norm."),
        (r"encoder\.stages\.(\d)\.norm\.", r"backbone.norm\1."),
        (r"encoder\.stages\.(\d)\.blocks\.(\d+)\.", r"backbone.block\1.\2."),
        (r"attention\.query", "attn.q"),
        (r"attention\.output", "attn.proj"),
        (r"attention\.reduce\.conv", "attn.sr"),
        (r"attention\.reduce\.norm", "attn.norm"),
        (r"ffn\.expand", "mlp.fc1"),
        (r"ffn\.depthwise", "mlp.dwconv.dwconv"),
        (r"ffn\.contract", "mlp.fc2"),
        (r"decoder\.projections\.(\d)", r"decode_head.linear_c\1.proj"),
        (r"decoder\.fuse", "decode_head.linear_fuse.conv"),
        (r"decoder\.norm", "decode_head.linear_fuse.bn"),
        (r"decoder\.classifier", "decode_head.linear_pred"),
    ]
    ours = model.state_dict()
    for name, parameter in ours.items():
        if ".attention.value." in name:
            continue
        key, tensor = name, parameter
        for pattern, theirs in rules:
            key = re.sub(pattern, theirs, key)
        key = re.sub(r"(patch_embed|backbone\.norm|block|linear_c)(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}", key)
        if ".attention.key." in name:
            key = key.replace("attention.key", "attn.kv")
            tensor = torch.cat([tensor, ours[name.replace(".key.", ".value.")]])
        state[key] = tensor
    path = tmp_path / "segformer.b0.pth"
    meta = {"CLASSES": ["a", "b", "c", "d", "e"], "PALETTE": [[i, i, i] for i in range(5)]}
    torch.save({"state_dict": state, "meta": meta}, path)
    checkpoint = load_checkpoint(str(path))
    assert torch.equal(logits_of(checkpoint.model), logits_of(model))
    assert not torch.equal(logits_of(checkpoint.model), logits_of(with_eps(model, 1e-5)))
    assert checkpoint.labels.names == ("a", "b", "c", "d", "e")
    assert checkpoint.labels.palette[3] == (3, 3, 3)


def with_eps(model: Segformer, eps: float) -> Segformer:
    other = Segformer(type(model.config)(**(vars(model.config) | {"layer_norm_eps": eps}))).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_an_openmmlab_file_loads_to_the_numbers_of_its_own_decoder(tmp_path):
    """OpenMMLab's decoder is computed here as its code does: convolution, BatchNorm, ReLU, stages 1 to 4."""
    model = randomised(layer_norm_eps=1e-6, embedding_norm_eps=1e-6, projection_relu=True)
    rules = [
        (r"encoder\.stages\.(\d)\.patches\.conv", r"backbone.layers.\1.0.projection"),
        (r"encoder\.stages\.(\d)\.patches\.norm", r"backbone.layers.\1.0.norm"),
        (r"encoder\.stages\.(\d)\.norm", r"backbone.layers.\1.2"),
        (r"encoder\.stages\.(\d)\.blocks\.(\d+)", r"backbone.layers.\1.1.\2"),
        (r"attention\.query\.", "attn.attn.in_proj_"),
        (r"attention\.output", "attn.attn.out_proj"),
        (r"attention\.reduce\.conv", "attn.sr"),
        (r"attention\.reduce\.norm", "attn.norm"),
        (r"ffn\.expand", "ffn.layers.0"),
        (r"ffn\.depthwise", "ffn.layers.1"),
        (r"ffn\.contract", "ffn.layers.4"),
        (r"decoder\.fuse", "decode_head.fusion_conv.conv"),
        (r"decoder\.norm", "decode_head.fusion_conv.bn"),
        (r"decoder\.classifier", "decode_head.conv_seg"),
    ]
    ours, state = model.state_dict(), {}
    for name, parameter in ours.items():
        if "attention.key" in name or "attention.value" in name or "projections" in name:
            continue
        key, tensor = name, parameter
        for pattern, theirs in rules:
            key = re.sub(pattern, theirs, key)
        if "attention.query" in name:
            others = [ours[name.replace("query", other)] for other in ("key", "value")]
            tensor = torch.cat([tensor, *others])
        elif re.search(r"ffn\.(expand|contract)\.weight", name):
            tensor = tensor[:, :, None, None]
        state[key] = tensor
    for stage, channels in enumerate(model.config.hidden_sizes):
        block = f"decode_head.convs.{stage}"
        state[f"{block}.conv.weight"] = torch.randn(256, channels, 1, 1) * 0.1
        state[f"{block}.bn.weight"], state[f"{block}.bn.bias"] = torch.rand(256) + 0.5, torch.randn(256)
        state[f"{block}.bn.running_mean"], state[f"{block}.bn.running_var"] = torch.randn(256), torch.rand(256) + 0.5
    path = tmp_path / "segformer_mit-b0.pth"
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": tuple("abcde")}}}, path)

    def normalised(x: torch.Tensor, norm: str) -> torch.Tensor:
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"])

    with torch.inference_mode():
        maps = model.encoder(IMAGES)
        projected = []
        for stage, feature_map in enumerate(maps):
            block = f"decode_head.convs.{stage}"
            x = F.relu(normalised(F.conv2d(feature_map, state[f"{block}.conv.weight"]), f"{block}.bn"))
            projected.append(resize(x, *maps[0].shape[2:]))
        fused = F.conv2d(torch.cat(projected, dim=1), state["decode_head.fusion_conv.conv.weight"])
        fused = F.relu(normalised(fused, "decode_head.fusion_conv.bn"))
        expected = F.conv2d(fused, state["decode_head.conv_seg.weight"], state["decode_head.conv_seg.bias"])
    checkpoint = load_checkpoint(str(path))
    assert torch.allclose(logits_of(checkpoint.model), expected, atol=1e-4)
    assert checkpoint.labels.names == tuple("abcde")


# ---------------------------------------------------------------------------------------------- what goes wrong


def saved(tmp_path: Path) -> dict[str, torch.Tensor]:
    save_huggingface(randomised(), label_set(list("abcde")), str(tmp_path))
    return safetensors.torch.load_file(tmp_path / "model.safetensors")


def complaint(url: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(url))
    message = str(caught.value)
    assert "\n" not in message
    assert str(url) in message
    return message


def test_a_missing_key_is_named(tmp_path):
    tensors = saved(tmp_path)
    del tensors["segformer.encoder.block.1.0.mlp.dense1.weight"], tensors["decode_head.classifier.bias"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    message = complaint(tmp_path)
    assert "segformer.encoder.block.1.0.mlp.dense1.weight" in message
    assert "decode_head.classifier.bias" in message
    (tmp_path / "config.json").unlink()
    assert "segformer.encoder.block.1.0.mlp.dense1.weight" in complaint(tmp_path)


def test_a_block_that_is_missing_whole_is_not_taken_for_a_smaller_network(tmp_path):
    tensors = {key: tensor for key, tensor in saved(tmp_path).items() if "block.3.1." not in key}
    path = tmp_path / "alone" / "model.safetensors"
    path.parent.mkdir()
    safetensors.torch.save_file(tensors, path)
    assert "(2, 2, 2, 1) blocks" in complaint(path)


def test_a_preprocessor_that_makes_no_sense_is_refused(tmp_path):
    saved(tmp_path)
    for values in (
        {"image_mean": 0.5},
        {"image_mean": [0.5]},
        {"image_std": [0, 0, 0]},
        {"image_std": ["a", "b", "c"]},
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        assert complaint(tmp_path)


def test_the_secret_of_a_signed_address_is_not_repeated():
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint("http://127.0.0.1:1/model.safetensors?signature=TOPSECRET")
    assert "TOPSECRET" not in str(caught.value)


def test_an_odd_shape_is_named_with_what_was_expected(tmp_path):
    tensors = saved(tmp_path)
    tensors["decode_head.classifier.weight"] = torch.zeros(7, 256, 1, 1)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    message = complaint(tmp_path)
    assert "decode_head.classifier.weight (7, 256, 1, 1), expected (5, 256, 1, 1)" in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "some.pth"])
@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.999])
def test_a_truncated_file_says_so(tmp_path, name, keep):
    tensors = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / name
    safetensors.torch.save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    assert "not a whole" in complaint(tmp_path)


def test_other_networks_and_other_things_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    assert "not a SegFormer" in complaint(tmp_path / "resnet.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "list" in complaint(tmp_path / "list.pth")
    assert "no such file" in complaint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no weights" in complaint(tmp_path / "empty")
    assert "cannot be opened" in complaint("nix://nowhere")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb2.pth")
    for name in ("bomb.pth", "bomb2.pth"):
        complaint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_broken_or_foreign_config_is_refused(tmp_path):
    saved(tmp_path)
    config = tmp_path / "config.json"
    good = json.loads(config.read_text())
    for text, expected in [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({"model_type": "bert"}), "'bert'"),
        (json.dumps(good | {"depths": "many"}), "does not describe"),
        (json.dumps(good | {"depths": [2, 2]}), "unequal lengths"),
        (json.dumps(good | {"hidden_sizes": [32, 64, 160, 512]}), "expected"),
        (json.dumps(good | {"depths": [2, 2, 2, 1]}), "without a place segformer.encoder.block.3.1."),
        (json.dumps(good | {"num_attention_heads": [3, 3, 3, 3]}), "do not divide"),
        (json.dumps(good | {"hidden_sizes": [-32, 64, 160, 256]}), "do not fit together"),
        (json.dumps(good | {"id2label": ["a"]}), "expected (1, 256, 1, 1)"),
        (json.dumps({"num_labels": "many"}), "do not fit together"),
        (json.dumps(good | {"palette": [1, 2, 3, 4, 5]}), "do not fit together"),
    ]:
        config.write_text(text)
        assert expected in complaint(tmp_path)


def test_the_digest_changes_with_one_weight_and_the_version_with_one_setting(tmp_path):
    tensors = saved(tmp_path)
    digest = load_checkpoint(str(tmp_path)).digest
    assert load_checkpoint(str(tmp_path)).digest == digest
    tensors["decode_head.classifier.bias"][0] += 1
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert load_checkpoint(str(tmp_path)).digest != digest
    assert model_version(digest, {"policy": "short=512"}) != model_version(digest, {"policy": "short=256"})


def test_classes_of_one_name_are_told_apart_by_their_ids():
    assert label_set(["door", "sky", "door", "door"]).names == ("door", "sky", "door (2)", "door (3)")
