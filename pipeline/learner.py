"""What a worker of a training does: step after step, with a validation and a state now and then.

It knows nothing of Ray: whoever starts it says which of how many workers it is, and hears how far it has come. The
first worker alone writes. What it writes at which time changes nothing in what is learned, and a worker that takes over
goes on from the newest state as if there had been no other.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import distributed

from model.checkpoint import Checkpoint, huggingface_files
from model.predictor import Predictor, choose_precision, keep_freed_memory, use_threads
from model.scores import Scores
from model.training import Training, rate_at
from pipeline.ahead import ahead
from pipeline.config_truth import FinetuneSettings
from pipeline.course import (
    EXAMPLES,
    LOG,
    RESULT,
    SCORES,
    VALIDATION,
    Course,
    log_csv,
    newest_state,
    put_state,
    read_table,
)
from pipeline.crops import Crops, Examples
from pipeline.decode import resize
from pipeline.policy import parse_policy
from pipeline.storage import Store
from pipeline.truth import truth_rules
from pipeline.wire import Report

LOGGED_EVERY = 10  # steps
SAVED_EVERY, SAVING_SHARE = 60, 20  # seconds from one state to the next, or so many times as long as to put it takes
VALIDATION_SHARE = 8  # of the memory for images, that those for validation may take besides


class DivergedError(Exception):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Place:
    """Which worker this is, of how many, and what it may use."""

    worker: int
    workers: int
    device: str
    threads: int
    memory: int  # bytes of decoded images that it may keep


Tell = Callable[[Report], bool]  # whether to stop


def learn(settings: FinetuneSettings, course: Course, checkpoint: Checkpoint, place: Place, tell: Tell) -> bool:
    """Do the training, or what is left of it; whether it came to its end, and was not asked to stop before.

    `checkpoint` has the course's classes already. Raises `DivergedError`, and what a store that fails raises.
    """
    torch.set_num_threads(place.threads)
    keep_freed_memory()
    return Learner(settings, course, checkpoint, place, tell).run()


class Learner:
    """A worker and what it holds."""

    def __init__(self, settings: FinetuneSettings, course: Course, checkpoint: Checkpoint, place: Place, tell: Tell):
        self.settings, self.course, self.checkpoint, self.place, self.tell = settings, course, checkpoint, place, tell
        self.out = Store(settings.out, settings)
        self.policy = parse_policy(settings.policy)
        rules = truth_rules(
            course.labels.names,
            course.labels.palette,
            course.ignore_ids,
            settings.reduce_labels,
            settings.truth_map,
        )
        self.examples, self.validation = (
            Examples(read_table(self.out, name), rules, settings, settings.max_pixels, memory)
            for name, memory in ((EXAMPLES, place.memory), (VALIDATION, place.memory // VALIDATION_SHARE))
        )
        self.crops = Crops(
            self.examples, self.policy, course.augmentation, checkpoint.mean, course.recipe.batch, course.recipe.seed
        )
        state, device = newest_state(self.out, course), torch.device(place.device)
        dtype = getattr(torch, state["precision"]) if state else choose_precision(course.precision, device)
        self.training = Training(checkpoint, course.recipe, course.class_weights, device, dtype)
        self.log: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.without_better = 0  # validations
        self.seconds = 0.0  # of earlier stretches
        self.losses: list[float] = []  # since the last line of the log
        if state:
            self.training.restore(state["training"])
            self.log, self.best, self.losses = state["log"], state["best"], state["losses"]
            self.without_better, self.seconds = state["without_better"], state["seconds"]
        self.began = time.monotonic()
        self.saved, self.saving = time.monotonic(), 0.0
        self.saved_step = -1  # of which this worker has put the state

    def run(self) -> bool:
        """Until the last step, until nothing gets better, or until asked to stop."""
        last = self.course.recipe.steps
        if self.best and self.best["step"] == self.training.step:
            self.put_model()  # its state was put before, and a kill may have come between the two
        is_over = self.is_patient_no_more()
        first = self.training.step
        place = self.place
        end = first if is_over else last
        for images, truths in self.crops.steps(first, end, place.worker, place.workers, place.threads):
            loss = self.training.learn(images, truths)
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} in step {self.training.step}")
            self.losses.append(loss)
            is_over = self.after_step(loss)
            if self.is_told_to_stop(loss) or is_over:
                break
        is_over = is_over or self.training.step == last
        if place.worker == 0:
            if self.saved_step != self.training.step:
                self.save()
            if is_over:
                self.finish()
        return is_over

    def after_step(self, loss: float) -> bool:
        """Validate, log and save what is due; whether the training is over before its last step."""
        step, last = self.training.step, self.course.recipe.steps
        scores: Scores | None = None
        if len(self.validation) and (step % self.course.val_every == 0 or step == last):
            scores = self.validate()
        if scores or step % LOGGED_EVERY == 0 or step == last:
            self.note(scores)
        if scores:
            self.judge(scores)
        elif step == last:
            self.put_model()
        if self.place.worker == 0 and time.monotonic() - self.saved >= self.pause():
            self.save()
        return self.is_patient_no_more()

    def pause(self) -> float:
        """Seconds from one state to the next."""
        every = self.settings.save_every
        return max(SAVED_EVERY, SAVING_SHARE * self.saving) if every is None else every

    def note(self, scores: Scores | None) -> None:
        """A line of the log."""
        step, recipe = self.training.step, self.course.recipe
        row = {
            "step": step,
            "epoch": round(step * recipe.batch / len(self.examples), 3),
            "loss": float(np.mean(self.losses)) if self.losses else 0.0,
            "learning_rate": rate_at(step - 1, recipe),
            "seconds": round(self.seconds + time.monotonic() - self.began, 1),
        }
        if scores:
            row |= summary(scores)
        self.log.append(row)
        self.losses = []

    def judge(self, scores: Scores) -> None:
        """Keep the network where it is the best so far."""
        found = summary(scores)
        if self.best and found["mean_iou"] <= self.best["mean_iou"]:
            self.without_better += 1
            return
        classes = scores.pooled().class_iou
        names = self.course.labels.names
        self.best = {"step": self.training.step, **found} | {
            "class_iou": {name: None if np.isnan(iou) else float(iou) for name, iou in zip(names, classes, strict=True)}
        }
        self.without_better = 0
        if self.place.worker == 0:
            self.save()  # first, so that what it says of the best network is true of the one that is there
        self.put_model()

    def put_model(self) -> None:
        """Put the averaged network where people find it."""
        if self.place.worker == 0:
            labels, mean, std = self.course.labels, self.checkpoint.mean, self.checkpoint.std
            for name, data in huggingface_files(self.training.average, labels, mean, std).items():
                self.out.put(name, data)  # the weights last, and alone in being another's than before

    def is_patient_no_more(self) -> bool:
        return bool(self.settings.patience and self.without_better >= self.settings.patience)

    def validate(self) -> Scores:
        """The scores of the averaged weights on all validation images, each worker having done its part."""
        self.training.agree()
        average = copy.deepcopy(self.training.average).cpu()
        engine = "auto" if self.place.device == "cpu" else "torch"  # to compile for each validation would take longer
        predictor = Predictor(replace(self.checkpoint, model=average), self.place.device, engine, "float32")
        own = range(self.place.worker, len(self.validation), self.place.workers)
        scores = Scores.empty(len(self.course.labels))
        lanes = predictor.lanes
        for truth, mask in ahead(partial(self.predict, predictor), own, 2 * lanes, lanes, predictor.enter_lane):
            scores.add(truth, mask)
        use_threads(self.place.threads)
        if self.place.workers > 1:
            others: list[Any] = [None] * self.place.workers
            distributed.all_gather_object(others, scores)
            scores = Scores.empty(len(self.course.labels))
            for one in others:
                scores.merge(one)
        return scores

    def predict(self, predictor: Predictor, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The truth of a validation image, and its mask as segment would make it."""
        image, truth = self.validation[index]
        height, width = image.shape[:2]
        tiling = self.policy.native
        if tiling and self.policy.windows(height, width) > 1:
            return truth, predictor.through_windows([image], tiling, 1)[0].mask
        return truth, predictor(resize(image, *self.policy.size(height, width))[None], [(height, width)])[0].mask

    def is_told_to_stop(self, loss: float) -> bool:
        """Tell how far this is, and hear whether to go on, which all workers must hear in the same step."""
        told = False
        if self.place.worker == 0:
            told = self.tell(Report(self.training.step, loss, self.best["mean_iou"] if self.best else None))
        if self.place.workers == 1:
            return told
        flag = torch.tensor(int(told), device=self.place.device)
        distributed.broadcast(flag, 0)
        return bool(flag.item())

    def save(self) -> None:
        """Put all that is needed to go on."""
        began = time.monotonic()
        state = {
            "course": self.course.digest(),
            "training": self.training.state(),
            "precision": str(self.training.dtype).removeprefix("torch."),
            "log": self.log,
            "best": self.best,
            "losses": self.losses,
            "without_better": self.without_better,
            "seconds": self.seconds + time.monotonic() - self.began,
        }
        put_state(self.out, self.training.step, state)
        self.out.put(LOG, log_csv(self.log))
        self.saved, self.saved_step = time.monotonic(), self.training.step
        self.saving = self.saved - began

    def finish(self) -> None:
        """Put the result, after which there is nothing left to do."""
        result = {
            "steps": self.training.step,
            "stopped_early": self.training.step < self.course.recipe.steps,
            "best": self.best,
            "seconds": round(self.seconds + time.monotonic() - self.began, 1),
            "examples": self.course.examples,
            "validation": self.course.validation,
            "left_out": self.course.left_out,
        }
        self.out.put(RESULT, json.dumps(result, indent=2).encode())


def summary(scores: Scores) -> dict[str, float]:
    """What a line of the log says of scores: those over all pixels."""
    pooled = scores.pooled()
    return {name: float(getattr(pooled, name)) for name in SCORES}
