"""A training step is the paper's, and one that goes on from a state is the one that would have followed."""

import copy
import io

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from model.checkpoint import IMAGENET_MEAN, IMAGENET_STD, Checkpoint, huggingface_files, load_checkpoint
from model.labels import label_set
from model.layouts import HUGGING_FACE_4, NVLABS, OPENMMLAB
from model.scores import IGNORED
from model.segformer import Segformer, SegformerConfig, variant
from model.training import (
    LearningForm,
    Recipe,
    Training,
    cross_entropy,
    ema_at,
    fresh,
    parameter_groups,
    rate_at,
    with_classes,
)
from tests.model.workers import train

LABELS = label_set(["sky", "land", "water"])
RECIPE = Recipe(steps=20, batch=2, learning_rate=1e-3, warm_up=2)
CPU = torch.device("cpu")


def training(recipe: Recipe = RECIPE, weights: tuple[float, ...] = (1.0, 1.0, 1.0), seed: int = 0) -> Training:
    return Training(fresh("b0", LABELS, seed), recipe, weights, CPU)


def batch(seed: int, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 64, 64, 3)).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(rng.integers(-1, 3, (size, 64, 64)).astype(np.int16))


def weights_of(one: Training) -> list[torch.Tensor]:
    return [*one.model.state_dict().values(), *one.average.state_dict().values()]


def test_a_training_that_goes_on_from_a_state_ends_with_the_same_weights_bit_for_bit():
    whole, first = training(), training()
    for step in range(4):
        whole.learn(*batch(step))
    for step in range(2):
        first.learn(*batch(step))
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = training(seed=5)
    second.restore(torch.load(file, weights_only=True))
    for step in range(2, 4):
        second.learn(*batch(step))
    assert second.step == whole.step == 4
    assert all(torch.equal(a, b) for a, b in zip(weights_of(whole), weights_of(second), strict=True))


def test_the_learning_rate_grows_linearly_and_then_falls_to_nothing_as_a_polynomial():
    for power in (1.0, 0.9):
        recipe = Recipe(steps=1000, batch=1, learning_rate=6e-5, warm_up=99, power=power)
        for step in range(1000):
            expected = 6e-5 * (1 - step / 1000) ** power * min(1, (step + 1) / 100)
            assert rate_at(step, recipe) == pytest.approx(expected)
        assert rate_at(1000, recipe) == 0


def test_the_decoder_learns_faster_and_norms_do_not_decay():
    model = Segformer(variant("b0", 3))
    groups = parameter_groups(model, Recipe(steps=1, batch=1, learning_rate=1, decoder_factor=10, weight_decay=0.5))
    found = {id(one): group for group in groups for one in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            group = found[id(parameter)]
            assert group["factor"] == (10 if name.startswith("decoder") else 1)
            assert group["weight_decay"] == (0 if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) else 0.5)


def test_the_loss_is_the_weighted_mean_over_the_pixels_that_count():
    logits = torch.randn(2, 3, 16, 16)
    truths = torch.randint(-1, 3, (2, 64, 64))
    weights = torch.tensor([1.0, 5.0, 0.2])
    total, weight = cross_entropy(logits, truths, weights)
    upsampled = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(upsampled, truths, weights, ignore_index=IGNORED)
    assert float(total / weight) == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_of_nothing_but_ignored_pixels_teaches_nothing_and_breaks_nothing():
    one = training(Recipe(steps=5, batch=2, learning_rate=1e-3, weight_decay=0))
    before = copy.deepcopy(one.model)
    images, truths = batch(0)
    assert one.learn(images, torch.full_like(truths, IGNORED)) == 0
    for now, then in zip(one.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)


def test_averaged_weights_follow_slowly_and_batchnorm_with_them():
    one = training(Recipe(steps=50, batch=2, learning_rate=1e-3, ema=0.9))
    expected = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    for step in range(3):
        one.learn(*batch(step))
        kept = ema_at(step + 1, 0.9)
        assert kept == min(0.9, (2 + step) / (11 + step))
        for name, tensor in one.model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = kept * expected[name] + (1 - kept) * tensor
    for name, tensor in one.average.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_two_workers_learn_from_a_batch_what_one_does(tmp_path):
    torch.multiprocessing.spawn(train, (2, str(tmp_path)), nprocs=2)
    threads = torch.get_num_threads()
    train(0, 1, str(tmp_path))
    torch.set_num_threads(threads)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for name, tensor in alone["model"].items():
        assert torch.equal(first["model"][name], second["model"][name])
        assert torch.allclose(first["model"][name], tensor, rtol=1e-3, atol=2e-4), name


def test_a_network_learns_what_it_is_shown():
    one = training(Recipe(steps=30, batch=2, learning_rate=1e-3))
    images, _ = batch(0)
    truths = (images[..., 0] > 127).short()
    losses = [one.learn(images, truths) for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_form_that_learns_is_the_same_function_with_the_same_gradients():
    model = fresh("b0", LABELS, 4).model.train()
    images = torch.randn(2, 3, 70, 93)
    slope = torch.randn(2, 3, 18, 24)
    found = []
    for form in (model, LearningForm(model)):
        model.zero_grad()
        logits = form(images)
        (logits * slope).sum().backward()
        found.append((logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    greatest = max(float(one.abs().max()) for one in found[0][1])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * greatest)


def test_a_new_head_keeps_the_rows_of_classes_with_the_same_name():
    before = fresh("b0", LABELS, 1)
    after = with_classes(before, label_set(["car", "water", "sky", "tree"]), seed=2)
    old, new = before.model.decoder.classifier, after.model.decoder.classifier
    assert torch.equal(new.weight[1], old.weight[2])
    assert torch.equal(new.weight[2], old.weight[0])
    assert float(new.weight[[0, 3]].detach().std()) == pytest.approx(0.01, rel=0.3)
    again = with_classes(before, label_set(["car", "water", "sky", "tree"]), seed=2)
    assert torch.equal(again.model.decoder.classifier.weight, new.weight)
    for name, tensor in after.model.state_dict().items():
        assert "classifier" in name or torch.equal(tensor, before.model.state_dict()[name])


@pytest.mark.parametrize("layout", [HUGGING_FACE_4, NVLABS, OPENMMLAB], ids=lambda layout: layout.title)
def test_what_is_learned_from_any_format_is_the_same_network_in_transformers_and_here(tmp_path, layout):
    traits = {name: getattr(layout, name) for name in ("layer_norm_eps", "embedding_norm_eps", "projection_relu")}
    torch.manual_seed(3)
    config = SegformerConfig(**vars(variant("b0", 3)) | traits)
    checkpoint = Checkpoint(Segformer(config).eval(), LABELS, IMAGENET_MEAN, IMAGENET_STD, "")
    one = Training(with_classes(checkpoint, label_set(["a", "b", "c", "d"]), 0), RECIPE, (1.0,) * 4, CPU)
    for step in range(2):
        one.learn(*batch(step))
    for name, data in huggingface_files(one.average, label_set(["a", "b", "c", "d"])).items():
        (tmp_path / name).write_bytes(data)
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    images = torch.randn(1, 3, 70, 93)
    with torch.inference_mode():
        expected = one.average(images)
        assert torch.allclose(theirs(images).logits, expected, atol=1e-4)
        assert torch.allclose(load_checkpoint(str(tmp_path)).model(images), expected, atol=1e-5)
