"""The inference form is the same function as the readable one, whoever computes it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.demo import WEIGHTS
from jobs.scenes.street import draw_scene
from model import native
from model.checkpoint import IMAGENET_MEAN, IMAGENET_STD, load_checkpoint
from model.fused import FusedSegformer
from model.native.network import NativeSegformer, fits
from model.segformer import Segformer, SegformerConfig, variant
from model.upsample import upsampled_argmax
from tests.model.reference import unsettle

SMALL = SegformerConfig(
    labels=19, depths=(1, 2, 1, 1), hidden_sizes=(32, 64, 96, 128), decoder_size=64, heads=(1, 2, 3, 4)
)
SIZES = [(512, 512), (480, 640), (33, 47), (65, 129), (20, 20), (7, 300), (1, 1)]


def random_network(config: SegformerConfig) -> Segformer:
    """A network in which no weight, bias or statistic is trivial."""
    torch.manual_seed(config.labels)
    model = Segformer(config).eval()
    unsettle(model, model.decoder.norm)
    return model


def random_images(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def readable_logits(model: Segformer, images: Tensor) -> Tensor:
    """Logits (N, h, w, K) of the readable form."""
    normalised = (images / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return model(normalised.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def engines(model: Segformer, dtype: torch.dtype = torch.float32) -> dict:
    fused = FusedSegformer(model, IMAGENET_MEAN, IMAGENET_STD)
    packed = NativeSegformer(fused, dtype)
    return {"native": packed, "torch": fused.in_precision(dtype)}


@pytest.fixture(scope="module", params=["b0", "b2", "small", "relu"])
def model(request):
    configs = {"small": SMALL, "relu": replace(SMALL, projection_relu=True, layer_norm_eps=1e-6)}
    return random_network(configs.get(request.param) or variant(request.param, labels=150))


def test_this_machine_has_the_kernels_so_that_the_tests_below_test_them():
    assert native.library() is not None


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@torch.inference_mode()
def test_every_engine_gives_the_logits_of_the_readable_form(model, size):
    images = random_images(size)
    expected = readable_logits(model, images)
    for name, network in engines(model).items():
        logits = network(images)
        assert logits.shape == expected.shape, name
        assert torch.allclose(logits, expected, atol=1e-4, rtol=0), name


@pytest.mark.parametrize("threads", [1, 2, 5])
@torch.inference_mode()
def test_the_number_of_threads_changes_no_bit(threads):
    images, before = random_images((96, 160)), torch.get_num_threads()
    network = engines(random_network(SMALL))["native"]
    expected = network(images)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(network(images), expected)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_an_image_has_the_same_bits_alone_and_in_a_batch():
    images = random_images((64, 96), count=5)
    network = engines(random_network(SMALL))["native"]
    assert torch.equal(torch.cat([network(one[None]) for one in images]), network(images))


@pytest.mark.parametrize("name", ["native", "torch"])
@torch.inference_mode()
def test_bfloat16_changes_few_pixels_of_a_trained_networks_masks(name):
    checkpoint = load_checkpoint(str(WEIGHTS))
    same = []
    for seed in range(3):
        scene = draw_scene(1_000_000 + seed, 704, 512)
        images = torch.from_numpy(scene.image)[None]
        expected, _ = upsampled_argmax(readable_logits(checkpoint.model, images)[0], (512, 704))
        mask, _ = upsampled_argmax(engines(checkpoint.model, torch.bfloat16)[name](images)[0], (512, 704))
        same.append((mask == expected).float().mean().item())
    assert np.mean(same) > 0.995


def test_folding_leaves_the_readable_form_as_it_was():
    model = random_network(SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engines(model, torch.bfloat16)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_published_variant_fits_the_kernels_and_odd_channels_do_not():
    assert all(fits(variant(name, labels=7)) for name in ("b0", "b1", "b2", "b3", "b4", "b5"))
    assert not fits(replace(SMALL, hidden_sizes=(24, 48, 96, 120)))
    assert not fits(replace(SMALL, heads=(32, 2, 3, 4)))
