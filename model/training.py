"""Teaching a SegFormer, in plain PyTorch: one step, and all that there is to keep between two of them.

The recipe is the paper's (section 4.1, and its code): AdamW with a weight decay of 0.01 but none on norms, the decoder
at ten times the encoder's learning rate, a linear warm-up and then a polynomial decay to nothing, cross entropy of the
logits upsampled to the crop. It leaves out what drops at random, paths in the encoder and channels before the head.
Around it stand an exponential average of the weights, which is what is validated and
saved, and a bound on the gradient's norm, without which a short warm-up at a high rate may diverge.

No random state is carried from step to step, so a training that is cut off after any step goes on from `state` as if
nothing had happened: on CPUs bit for bit, with the same number of threads on the same machine; on GPUs as far as their
kernels add in the same order.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from model.checkpoint import IMAGENET_MEAN, IMAGENET_STD, Checkpoint, in_huggingface_terms, random_network
from model.labels import LabelSet
from model.scores import IGNORED
from model.segformer import Segformer, resize, to_map, to_tokens, variant

NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
HEAD_SPREAD = 0.01  # standard deviation of a new head's weights, as in the paper's code


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a training."""

    steps: int
    batch: int  # crops a step, of all workers together
    learning_rate: float  # of the encoder, after the warm-up
    decoder_factor: float = 10.0  # the decoder's learning rate over the encoder's
    warm_up: int = 0  # steps
    power: float = 1.0  # of the polynomial decay
    weight_decay: float = 0.01
    clip: float = 1.0  # the greatest norm of all gradients together; 0 for no bound
    ema: float = 0.999  # of the averaged weights how much stays in a step, once it is past the first ones
    seed: int = 0


class Training:
    """A network that learns, on a device, and its averaged weights.

    Under `torch.distributed` each process has its part of every batch and all hold the same weights; the loss is that
    of the whole batch, so many workers learn what one would, but for rounding, and for the statistics of BatchNorm,
    which on CPUs are each worker's own (GPUs share them).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        class_weights: tuple[float, ...],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        """`class_weights` has one weight for each class of the checkpoint; `dtype` is of the matrix products."""
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self.model = checkpoint.model.to(device).train()
        self.workers = distributed.get_world_size() if distributed.is_initialized() else 1
        if self.workers > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = average_of(self.model)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.model, recipe), fused=True)
        form = LearningForm(self.model)
        self.network = nn.parallel.DistributedDataParallel(form) if self.workers > 1 else form
        self.class_weights = torch.tensor(class_weights, device=device)
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (checkpoint.mean, checkpoint.std)
        )
        self.step = 0  # that are done

    def learn(self, images: Tensor, truths: Tensor) -> float:
        """One step with crops uint8 (N, H, W, 3) RGB and their truths, int16 (N, H, W); the loss of the whole batch."""
        rate = rate_at(self.step, self.recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # channels last in memory
        wanted = truths.to(self.device, non_blocking=True).long()
        with torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext():
            logits = self.network((pixels - self.mean) / self.std)
        total, weight = cross_entropy(logits.float(), wanted, self.class_weights)
        if self.workers > 1:  # the share of each worker counts as much as it has pixels that count
            distributed.all_reduce(weight)
        loss = total / weight.clamp(min=1e-6)
        self.optimiser.zero_grad()
        (loss * self.workers).backward()  # gradients are averaged over the workers, and the loss is their sum
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, foreach=True)
        self.optimiser.step()
        self.step += 1
        follow(self.average, self.model, ema_at(self.step, self.recipe.ema))
        loss = loss.detach()
        if self.workers > 1:
            distributed.all_reduce(loss)
        return float(loss)

    def agree(self) -> None:
        """Give every worker the first one's averaged statistics of BatchNorm, which on CPUs are each worker's own."""
        if self.workers > 1:
            for buffer in self.average.buffers():
                distributed.broadcast(buffer, 0)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on: tensors, numbers and text, which `torch.load` reads as weights only."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]


class LearningForm(nn.Module):
    """A network as it learns: the same function of the same parameters, by less work.

    From the tokens of a stage to BatchNorm all is linear, and upsampling commutes with what is linear in each pixel. So
    a stage's projection and its slice of the fuse convolution are multiplied with each other, which is a product of two
    small matrices, and applied at once at the stage's own resolution. The fuse convolution over four times D channels
    at a quarter of the image's resolution, half of the work of a B0, is gone, and its gradients are the same.
    """

    def __init__(self, model: Segformer):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """As that of the network."""
        decoder, maps = self.model.decoder, self.model.encoder(images)
        if decoder.projection_relu:
            return decoder(maps)
        slices = decoder.fuse.weight.flatten(1).chunk(len(maps), dim=1)[::-1]  # (D, D) each; stage 4 is the first
        fused: Tensor | None = None
        for feature_map, projection, piece in zip(maps, decoder.projections, slices, strict=True):
            assert isinstance(projection, nn.Linear)
            with torch.autocast(images.device.type, enabled=False):  # rounded once, as one matrix
                weight, bias = piece @ projection.weight, piece @ projection.bias
            tokens = F.linear(to_tokens(feature_map), weight, bias)
            part = to_map(tokens, *feature_map.shape[2:])
            fused = part if fused is None else fused + resize(part, *fused.shape[2:])
        return decoder.classifier(F.relu(decoder.norm(fused)))


def with_classes(checkpoint: Checkpoint, labels: LabelSet, seed: int) -> Checkpoint:
    """A checkpoint's network for other classes, with the traits of the layout that it will be saved in.

    Of the new head, the rows of classes that have the same name as before are those of before, and the others small
    random numbers, which are a function of `seed`.
    """
    config = replace(in_huggingface_terms(checkpoint.model.config), labels=len(labels))
    state = checkpoint.model.state_dict()
    head = state["decoder.classifier.weight"]
    random = torch.Generator().manual_seed(seed)
    weight = HEAD_SPREAD * torch.randn(len(labels), *head.shape[1:], generator=random)
    bias = torch.zeros(len(labels))
    for at, name in enumerate(labels.names):
        if name in checkpoint.labels.names:
            before = checkpoint.labels.names.index(name)
            weight[at], bias[at] = head[before], state["decoder.classifier.bias"][before]
    model = Segformer(config)
    model.load_state_dict(state | {"decoder.classifier.weight": weight, "decoder.classifier.bias": bias})
    return replace(checkpoint, model=model.eval(), labels=labels)


def fresh(name: str, labels: LabelSet, seed: int) -> Checkpoint:
    """A network of random weights, which are a function of `seed`; KeyError for another name than "b0" to "b5"."""
    model = random_network(variant(name, len(labels)), seed)
    return Checkpoint(model.eval(), labels, IMAGENET_MEAN, IMAGENET_STD, f"new:{name}")


def average_of(model: Segformer) -> Segformer:
    """A network that begins as `model` and learns nothing by itself."""
    average = Segformer(model.config).to(next(model.parameters()).device)
    average.load_state_dict(model.state_dict())
    return average.eval().requires_grad_(False)


@torch.no_grad()
def follow(average: Segformer, model: Segformer, kept: float) -> None:
    """Move the averaged weights, and the running statistics of BatchNorm, towards those of `model`."""
    ours, theirs = list(average.state_dict().values()), list(model.state_dict().values())
    floats = [index for index, tensor in enumerate(ours) if tensor.is_floating_point()]
    torch._foreach_lerp_([ours[i] for i in floats], [theirs[i] for i in floats], 1 - kept)
    for index in set(range(len(ours))) - set(floats):  # BatchNorm's counter
        ours[index].copy_(theirs[index])


def ema_at(step: int, most: float) -> float:
    """How much of the average stays after `step` steps: less at first, so that it forgets where it began."""
    return min(most, (1 + step) / (10 + step))


def rate_at(step: int, recipe: Recipe) -> float:
    """The encoder's learning rate in the step after `step` ones: linear warm-up, then polynomial decay to 0 at the
    last. As in the paper's code the decay runs from the start, also under the warm-up.
    """
    decay = (1 - step / recipe.steps) ** recipe.power
    return recipe.learning_rate * decay * min(1.0, (step + 1) / (recipe.warm_up + 1))


def cross_entropy(logits: Tensor, truths: Tensor, class_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of cross entropies over pixels that count, times their classes' weights, and the sum of these weights.

    `logits` are float32 (N, K, h, w) and are upsampled to the truths' (N, H, W), int64 ids or IGNORED.
    """
    upsampled = F.interpolate(logits, size=truths.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(upsampled, truths, class_weights, ignore_index=IGNORED, reduction="sum")
    pixels = torch.bincount(truths[truths != IGNORED], minlength=len(class_weights))
    return total, (pixels * class_weights).sum()


def parameter_groups(model: Segformer, recipe: Recipe) -> list[dict[str, Any]]:
    """Four groups: encoder and decoder, each with weight decay and without: norms have none, as in the paper's code."""
    norms = {
        id(parameter) for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    }
    groups = []
    for part, factor in ((model.encoder, 1.0), (model.decoder, recipe.decoder_factor)):
        for is_norm, decay in ((False, recipe.weight_decay), (True, 0.0)):
            chosen = [parameter for parameter in part.parameters() if (id(parameter) in norms) == is_norm]
            groups.append({"params": chosen, "factor": factor, "weight_decay": decay})
    return groups
