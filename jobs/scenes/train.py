"""Trains the network that the demo ships: SegFormer B0 on scenes drawn as it goes, at many scales.

    python -m jobs.scenes.train OUT

Seeds from `TRAINING_SEEDS` on are for training; the demo draws smaller ones, so its scenes are held out. It begins
with small crops, which are cheap, and goes on with large ones, which show enough of a street to tell a grey sky from
a grey pavement at full size. The varied scale of the scenes is what makes the network work at every size.
"""

import argparse
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from jobs.scenes.draw import TRAINING_SEEDS
from jobs.scenes.street import CLASSES, PALETTE, draw_scene
from model.checkpoint import IMAGENET_MEAN, IMAGENET_STD, load_checkpoint, save_huggingface
from model.labels import label_set
from model.segformer import Segformer, variant

CROPS_PER_SCENE = 2
WARM_UP = 150  # steps


@dataclass(frozen=True)
class Phase:
    """A stretch of training; each begins with the averaged weights of the one before."""

    steps: int
    scenes: int  # a step
    crop: int  # pixels, height and width
    short_sides: tuple[int, int]  # of the scenes that crops are cut from, in pixels; log-uniform
    learning_rate: float
    first_seed: int


PHASES = (
    Phase(3000, scenes=4, crop=128, short_sides=(128, 560), learning_rate=1e-3, first_seed=TRAINING_SEEDS),
    Phase(900, scenes=2, crop=256, short_sides=(256, 600), learning_rate=4e-4, first_seed=2 * TRAINING_SEEDS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's SegFormer B0 on synthetic street scenes.")
    parser.add_argument("out", help="folder to write, in Hugging Face's layout")
    parser.add_argument(
        "--from-phase", type=int, default=1, help="go on with the weights in OUT (default: from scratch)"
    )
    arguments = parser.parse_args()
    for number, phase in enumerate(PHASES, start=1):
        if number >= arguments.from_phase:
            print(f"phase {number} of {len(PHASES)}", flush=True)
            torch.manual_seed(number)
            model = Segformer(variant("b0", len(CLASSES))) if number == 1 else load_checkpoint(arguments.out).model
            train(model, phase, arguments.out)


def train(model: Segformer, phase: Phase, out: str) -> None:
    """Train `model`, and write its averaged weights to `out`, in float16."""
    model.train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    optimiser = torch.optim.AdamW(parameter_groups(model), lr=phase.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, phase.steps))
    crops = DataLoader(Crops(phase), batch_size=phase.scenes, num_workers=1, prefetch_factor=8)
    started = time.monotonic()
    for step, (images, masks) in enumerate(crops, start=1):
        logits = model(normalise(images.flatten(0, 1)))
        upsampled = F.interpolate(logits, size=(phase.crop, phase.crop), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(upsampled, masks.flatten(0, 1).long())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        if step % 50 == 0 or step == phase.steps:
            pace = (time.monotonic() - started) / step
            print(f"step {step}/{phase.steps}  loss {loss.item():.3f}  {pace:.2f} s a step", flush=True)
    assert isinstance(average.module, Segformer)
    save_huggingface(average.module, label_set(list(CLASSES), list(PALETTE)), out, dtype=torch.float16)


class Crops(Dataset):
    """Entry `i`: crops of scene `first_seed + i`, uint8 (CROPS_PER_SCENE, crop, crop, 3), and of its mask."""

    def __init__(self, phase: Phase):
        self.phase = phase

    def __len__(self) -> int:
        return self.phase.steps * self.phase.scenes

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        seed, crop = self.phase.first_seed + index, self.phase.crop
        rng = np.random.default_rng(seed + 1)
        short = math.exp(rng.uniform(*np.log(self.phase.short_sides)))
        aspect = rng.uniform(0.75, 1.8)  # width to height
        scene = draw_scene(seed, round(short * max(1, aspect)), round(short * max(1, 1 / aspect)))
        images, masks = [], []
        for _ in range(CROPS_PER_SCENE):
            height, width = scene.mask.shape
            y, x = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
            turn = slice(None, None, -1 if rng.random() < 0.5 else 1)
            images.append(scene.image[y : y + crop, x : x + crop][:, turn])
            masks.append(scene.mask[y : y + crop, x : x + crop][:, turn])
        return np.stack(images), np.stack(masks)


def parameter_groups(model: Segformer) -> list[dict]:
    """Weight decay for matrices and kernels only, as the paper's recipe has it."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at `step`: linear warm-up, then linear decay to nothing (poly, power 1)."""
    return min((step + 1) / WARM_UP, 1 - step / steps)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, 3) to normalised float (N, 3, H, W)."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    main()
