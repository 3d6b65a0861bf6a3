"""The network equals the reference implementation, whatever the size of the image."""

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from model.checkpoint import IMAGENET_MEAN, IMAGENET_STD, load_checkpoint
from model.predictor import Predictor
from model.segformer import VARIANTS, PatchEmbeddings, Segformer, variant
from model.upsample import upsampled_argmax
from tests.model.reference import reference

SIZES = [(512, 512), (480, 640), (375, 500), (33, 47)]


@pytest.fixture(scope="module", params=["b0", "b2"])
def pair(request, tmp_path_factory):
    """A reference network, and ours loaded from the files that it saves."""
    network = reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    network.save_pretrained(folder)
    return network, load_checkpoint(str(folder)).model


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_logits_and_masks_equal_those_of_transformers(pair, size):
    network, ours = pair
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected, logits = network(pixel_values=images), ours(images)
    assert logits.shape == expected.logits.shape
    assert torch.allclose(logits, expected.logits, atol=1e-4, rtol=0)
    target = (size[0] * 2 + 1, size[1] - 5)
    processor = transformers.SegformerImageProcessor()
    masks = processor.post_process_semantic_segmentation(expected, target_sizes=[target])
    mask, _ = upsampled_argmax(logits[0].permute(1, 2, 0), target)
    upsampled = F.interpolate(expected.logits, target, mode="bilinear", align_corners=False)[0]
    first, second = upsampled.topk(2, dim=0).values
    clear = first - second > 2e-4  # two classes that come nearer than twice the rounding may change places
    assert torch.equal(mask[clear].long(), masks[0][clear])
    assert (mask == masks[0]).float().mean() >= 0.9999


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_masks_of_images_equal_those_of_transformers(tmp_path, engine):
    network = reference("b0")
    network.save_pretrained(tmp_path)
    images = np.random.default_rng(4).integers(0, 256, (2, 512, 480, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(images) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    with torch.inference_mode():
        expected = network(pixel_values=pixels.permute(0, 3, 1, 2))
    sizes = [(1021, 777), (300, 200)]
    masks = transformers.SegformerImageProcessor().post_process_semantic_segmentation(expected, target_sizes=sizes)
    predict = Predictor(load_checkpoint(str(tmp_path)), device="cpu", engine=engine, precision="float32")
    for found, mask in zip(predict(images, sizes), masks, strict=True):
        assert (found.mask == mask.numpy()).mean() >= 0.9999


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_reference_number_of_parameters(name):
    with torch.device("meta"):
        ours = Segformer(variant(name, labels=150))
        theirs = transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(
                depths=VARIANTS[name][0],
                hidden_sizes=VARIANTS[name][1],
                decoder_hidden_size=VARIANTS[name][2],
                num_labels=150,
            )
        )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (31, 33), (65, 129)])
def test_any_input_size_gives_logits_at_a_quarter_of_it(size):
    model = Segformer(variant("b0", labels=3)).eval()
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 3, -(-size[0] // 4), -(-size[1] // 4))
    assert logits.isfinite().all()


def test_patch_embeddings_give_normalised_tokens_and_the_new_size():
    embed = PatchEmbeddings(7, 4, 3, 32)
    tokens, height, width = embed(torch.randn(2, 3, 64, 50))
    assert (height, width) == (16, 13)
    assert tokens.shape == (2, 16 * 13, 32)
    assert torch.allclose(tokens.mean(dim=2), torch.zeros(2, 16 * 13), atol=1e-5)


def test_every_parameter_learns():
    model = Segformer(variant("b0", labels=4)).train()
    model(torch.randn(2, 3, 96, 64)).square().mean().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
