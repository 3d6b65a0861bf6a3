"""A step of a training that several processes share, in a file of its own, as each of them imports it."""

from pathlib import Path

import numpy as np
import torch
from torch import distributed

from model.labels import label_set
from model.training import Recipe, Training, fresh

STEPS, BATCH = 2, 4


def train(worker: int, workers: int, folder: str) -> None:
    """Do some steps with a part of each batch, and keep the losses and the weights.

    BatchNorm takes its running statistics, as those of a batch are each worker's own on a CPU.
    """
    torch.set_num_threads(1)
    if workers > 1:
        address = f"file://{folder}/meeting"
        distributed.init_process_group("gloo", init_method=address, rank=worker, world_size=workers)
    recipe = Recipe(steps=10, batch=BATCH, learning_rate=1e-3)
    one = Training(fresh("b0", label_set(["a", "b", "c"]), 0), recipe, (1.0, 3.0, 0.5), torch.device("cpu"))
    one.model.decoder.norm.eval()
    own = slice(worker * BATCH // workers, (worker + 1) * BATCH // workers)
    losses = []
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        images = torch.from_numpy(rng.integers(0, 256, (BATCH, 64, 64, 3)).astype(np.uint8))
        truths = torch.from_numpy(rng.integers(-1, 3, (BATCH, 64, 64)).astype(np.int16))
        truths[0, 9:] = -1  # the workers' parts do not count the same
        losses.append(one.learn(images[own], truths[own]))
    torch.save({"losses": losses, "model": one.model.state_dict()}, Path(folder) / f"{workers}-{worker}.pt")
    if workers > 1:
        distributed.destroy_process_group()
