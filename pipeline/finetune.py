"""A whole training, driven from one process: which examples there are, what is learned from them, and by whom.

    prepare      list the pairs, look them through, decide what follows: once, as OUT keeps it
    teach        have Ray Train's workers learn; what has died goes on from the newest state
    conclude     say which step is the best

Ray Train starts the workers, connects them, and starts them again; states, logs and networks are this project's own, as
they go where everything goes here, through `Store`. The driver hears from the first worker through one small actor,
which is also where a worker hears that it is to stop: Train's own callbacks run in Train's process, not in this one.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch

from model.augmentation import Augmentation
from model.checkpoint import Checkpoint, CheckpointError
from model.labels import label_set
from model.segformer import VARIANTS
from model.training import Recipe, fresh, with_classes
from pipeline.classes import Classes, class_weights, find_classes
from pipeline.cluster import ray_session
from pipeline.config import ConfigurationError, FinetuneSettings, scale_range
from pipeline.course import (
    EXAMPLES,
    MODEL,
    RESULT,
    VALIDATION,
    Course,
    UnfinishedError,
    begin,
    check_same,
    clear,
    command_of,
    read_course,
    states,
)
from pipeline.examples import EXAMPLES as EXAMPLE
from pipeline.examples import IN_ORDER, Checked, LeftOut, Listed, check_pairs, held_out, list_pairs, rows, share
from pipeline.filesystems import public_url
from pipeline.learner import DivergedError, Place, learn
from pipeline.lease import Lease
from pipeline.run import read_checkpoint
from pipeline.stopping import Request, StoppedError, until_asked_to_end
from pipeline.storage import Store
from pipeline.tables import Workspace, workspace
from pipeline.truth import Rules, truth_rules
from pipeline.wire import Wire

FRESH = "new:"
LEASE = "training/lease"
LOOKED_EVERY = 0.5  # seconds
FAILURES = 3  # times that workers are started again
FASTEST, SLOWEST, STEPS_BY = 1e-3, 6e-5, 2.0  # learning rates: a short training is to get somewhere, too
EPOCHS, LEAST_STEPS = 20, 300  # by default
LONGEST_WARM_UP, WARM_UP = 1500, 20  # steps as in the paper, and the share of all steps where those are few
MOST_BETWEEN, VALIDATIONS = 2000, 10  # steps from one validation to the next, and how many there are
IGNORED_ID = 255  # where nobody says which classes there are
NAMED = 20  # things that cannot be used, in messages


class Listener(Protocol):
    """Whoever watches."""

    def say(self, text: str) -> None:
        """One line about what happens next."""

    def checking(self, done: int, total: int, left_out: int) -> None:
        """Pairs that are looked through, of all; how many of them cannot be used."""

    def learning(self, step: int, steps: int, images: int, loss: float, best: float | None) -> None:
        """Steps that are done, of all; images in one, its loss, and the best mean IoU so far."""


@dataclass(frozen=True)
class Taught:
    """What `finetune` did."""

    result: dict[str, Any]
    was_there: bool  # already, from before


def finetune(settings: FinetuneSettings, listener: Listener) -> Taught:
    """Teach a network, or go on with it.

    `ConfigurationError`, `CheckpointError` and `HeldError` come before any work, `StoppedError` after a state has been
    put, `UnfinishedError` after what could be done.
    """
    check(settings)
    checkpoint = starting_point(settings)
    out = Store(settings.out, settings)
    out.check_writable()
    with Lease(out, LEASE, f"the training in {out.url}") as lease:
        course = prepare(settings, checkpoint, out, listener)
        if (result := out_result(out)) is None:
            teach(settings, course, checkpoint, out, lease, listener)
            result = out_result(out)
            assert result, "whoever ends a training puts its result"
            return Taught(result, was_there=False)
    return Taught(result, was_there=True)


def out_result(out: Store) -> dict[str, Any] | None:
    """The result of the training in `out`; None while it has none."""
    try:
        found: dict[str, Any] = json.loads(out.read(RESULT))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found


def check(settings: FinetuneSettings) -> None:
    """Raise `ConfigurationError` for settings that do not go together."""
    if (settings.val_images is None) != (settings.val_masks is None):
        raise ConfigurationError("val_images and val_masks come together")
    if settings.workers != "auto" and settings.batch % int(settings.workers):
        raise ConfigurationError(f"batch: {settings.batch} crops cannot be shared by {settings.workers} workers")
    if settings.checkpoint.rstrip("/") == settings.out.rstrip("/"):
        raise ConfigurationError("out: is the checkpoint itself, which would be lost; give another place")


def starting_point(settings: FinetuneSettings) -> Checkpoint:
    """The network to begin with, of whatever classes it has. Raises `CheckpointError`."""
    if not settings.checkpoint.startswith(FRESH):
        return read_checkpoint(settings)
    name = settings.checkpoint.removeprefix(FRESH)
    if name not in VARIANTS:
        raise CheckpointError(f"{settings.checkpoint}: no such network; there are {FRESH}{f', {FRESH}'.join(VARIANTS)}")
    return fresh(name, label_set(["a", "b"]), settings.seed)


def prepare(settings: FinetuneSettings, checkpoint: Checkpoint, out: Store, listener: Listener) -> Course:
    """The course that was begun in `out`, if it is of the same command, or a new one."""
    before = None if settings.overwrite else read_course(out)
    if not before and not settings.overwrite and (there := set(MODEL) & set(out.names(""))):
        raise ConfigurationError(
            f"{out.url}: has {min(there)} of another network; give another OUT, or --overwrite to replace it"
        )
    listener.say(f"listing {public_url(settings.images)} and {public_url(settings.masks)}")
    classes = find_classes(settings.labels, settings.masks, settings.truth_map, checkpoint.labels, settings)
    ignore_ids = settings.ignore_id or (None if classes.names else (IGNORED_ID,))
    rules = truth_rules(classes.for_rules(), classes.palette, ignore_ids, settings.reduce_labels, settings.truth_map)
    with contextlib.ExitStack() as spaces:
        sides = [list_side(spaces, settings, settings.images, settings.masks)]
        if settings.val_images and settings.val_masks:
            sides.append(list_side(spaces, settings, settings.val_images, settings.val_masks))
        command = command_of(settings, digests(settings, checkpoint, classes, [listed for _, listed in sides]))
        if before:
            check_same(out, before, command)
            return before
        if settings.overwrite:
            clear(out)
        checked = [look_through(space, listed, rules, settings, listener) for space, listed in sides]
    return new_course(settings, checkpoint, classes, ignore_ids, command, checked, out, listener)


def list_side(
    spaces: contextlib.ExitStack, settings: FinetuneSettings, images: str, masks: str
) -> tuple[Workspace, Listed]:
    space = spaces.enter_context(workspace())
    return space, list_pairs(space.tables, images, masks, settings, settings)


def digests(
    settings: FinetuneSettings, checkpoint: Checkpoint, classes: Classes, sides: list[Listed]
) -> dict[str, Any]:
    """What the content of a command's files is, which may change while their names stay."""
    named = json.dumps([classes.names, classes.palette]).encode()
    weights = [Path(one).read_bytes() for one in settings.class_weights if Path(one).is_file()]
    found = {
        "checkpoint": f"{public_url(settings.checkpoint)} ({checkpoint.digest[:12]})",
        "classes": f"{len(classes.names) or 'any'} from {classes.source} ({hashlib.sha256(named).hexdigest()[:12]})",
        "weight_files": hashlib.sha256(b"".join(weights)).hexdigest()[:12] if weights else None,
    }
    names = ("pairs", "validation_pairs")
    return found | {name: f"{side.pairs:,} ({side.digest[:12]})" for name, side in zip(names, sides, strict=False)}


def look_through(
    space: Workspace, listed: Listed, rules: Rules, settings: FinetuneSettings, listener: Listener
) -> Checked:
    """Check all pairs of one side."""
    pairs = rows(space.tables, IN_ORDER)
    found = check_pairs(pairs, listed.pairs, rules, settings.max_pixels, settings, listener)
    found.left_out[:0] = listed.left_out
    return found


def new_course(
    settings: FinetuneSettings,
    checkpoint: Checkpoint,
    classes: Classes,
    ignore_ids: tuple[int, ...] | None,
    command: dict[str, Any],
    checked: list[Checked],
    out: Store,
    listener: Listener,
) -> Course:
    """Decide what follows from a command and what there is to learn from, and put it."""
    left_out = [one for side in checked for one in side.left_out]
    tell_left_out(left_out, listener)
    learned, validation = shared_out(checked, settings)
    if not learned:
        raise ConfigurationError(
            f"{public_url(settings.images)}: no image can be learned from; of {len(left_out):,} that are left out the "
            f"first: {left_out[0].uri}: {left_out[0].reason}"
            if left_out
            else f"{public_url(settings.images)}: no image can be learned from"
        )
    pixels = checked[0].pixels
    palette = [] if settings.truth_map else checked[0].palette[int(settings.reduce_labels) :]
    labels = classes.label_set(np.sum([side.pixels for side in checked], axis=0), palette)
    if len(labels) < 2:
        raise ConfigurationError("the masks have one class only, so there is nothing to tell apart; see --labels")
    tell_classes(labels.names, classes.source, pixels, checkpoint, listener)
    steps = settings.steps or max(LEAST_STEPS, math.ceil(EPOCHS * len(learned) / settings.batch))
    recipe = Recipe(
        steps=steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate or min(FASTEST, max(SLOWEST, STEPS_BY / steps)),
        decoder_factor=settings.decoder_factor,
        warm_up=min(LONGEST_WARM_UP, steps // WARM_UP) if settings.warm_up is None else settings.warm_up,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        ema=settings.ema,
        seed=settings.seed,
    )
    course = Course(
        command=command,
        labels=labels,
        recipe=recipe,
        augmentation=Augmentation(settings.crop, scale_range(settings.scales), colour=settings.colour),
        class_weights=class_weights(settings.class_weights, labels, pixels),
        ignore_ids=ignore_ids,
        precision=settings.precision,
        val_every=settings.val_every or max(1, min(MOST_BETWEEN, steps // VALIDATIONS)),
        examples=len(learned),
        validation=len(validation),
        left_out=len(left_out),
    )
    tables = {
        name: pa.Table.from_pylist(some, EXAMPLE) for name, some in ((EXAMPLES, learned), (VALIDATION, validation))
    }
    begin(out, course, tables, left_out)
    return course


def shared_out(checked: list[Checked], settings: FinetuneSettings) -> tuple[list[dict], list[dict]]:
    """The examples to learn from, and those to validate on: others, or a part of the same."""
    examples = checked[0].examples
    if len(checked) > 1:
        learned, validation = examples, checked[1].examples
    else:
        chosen = held_out([one["name"] for one in examples], settings.holdout)
        learned = [one for one, is_out in zip(examples, chosen, strict=True) if not is_out]
        validation = [one for one, is_out in zip(examples, chosen, strict=True) if is_out]
    return learned, sorted(validation, key=lambda one: share(one["name"]))[: settings.val_limit]


def tell_left_out(left_out: list[LeftOut], listener: Listener) -> None:
    """Name what cannot be used."""
    if not left_out:
        return
    counts = Counter(one.status for one in left_out)
    kinds = ", ".join(f"{status} {count:,}" for status, count in counts.most_common())
    listener.say(f"left out {len(left_out):,} ({kinds}); all are in OUT/training/left_out.csv")
    for one in left_out[:NAMED]:
        listener.say(f"  {one.uri}: {one.reason}")
    if len(left_out) > NAMED:
        listener.say(f"  and {len(left_out) - NAMED:,} more")


def tell_classes(
    names: tuple[str, ...], source: str, pixels: np.ndarray, checkpoint: Checkpoint, listener: Listener
) -> None:
    """Say which classes there are, and what becomes of the head."""
    kept = sum(name in checkpoint.labels.names for name in names)
    some = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
    listener.say(f"{len(names):,} classes from {source}: {some}; of the head {kept:,} rows are kept, by name")
    if absent := [name for name, count in zip(names, pixels, strict=False) if not count]:
        listener.say(f"no pixel is of {', '.join(absent[:NAMED])}, which so cannot be learned")
    if checkpoint.model.config.projection_relu:
        listener.say("learned without the ReLU behind OpenMMLab's projections, which Hugging Face's layout cannot say")


def work(config: dict[str, Any]) -> None:
    """What Ray Train has each worker do."""
    wire, (settings, course, checkpoint) = config["wire"], ray.get(config["job"])
    if ray.get(wire.look.remote())[1]:  # what cannot succeed is not tried again
        return
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    place = Place(context.get_world_rank(), context.get_world_size(), str(device), config["threads"])
    try:
        learn(settings, course, checkpoint, place, lambda report: ray.get(wire.report.remote(report)))
    except (DivergedError, ConfigurationError, torch.OutOfMemoryError) as error:
        ray.get(wire.fail.remote(complaint(error)))
        raise


def complaint(error: Exception) -> str:
    """One line about what no other try would mend."""
    if isinstance(error, DivergedError):
        return f"{error}; give a lower --learning-rate, or a longer --warm-up, and --overwrite to begin anew"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory is too small; give a smaller --batch or --crop, and --overwrite to begin anew"
    return str(error)


def teach(
    settings: FinetuneSettings, course: Course, checkpoint: Checkpoint, out: Store, lease: Lease, listener: Listener
) -> None:
    """Have workers learn until there is a result. Raises `StoppedError`, `UnfinishedError`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait in loops take the CPU from those that load
    network = with_classes(checkpoint, course.labels, course.recipe.seed)
    with ray_session(settings), until_asked_to_end() as request, tempfile.TemporaryDirectory() as scratch:
        wire: Any = ray.remote(num_cpus=0)(Wire).remote()
        scaling, threads = size(settings)
        job = ray.put((settings, course, network))
        trainer = ray.train.torch.TorchTrainer(
            work,
            train_loop_config={"wire": wire, "job": job, "threads": threads},
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name="swath", storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=FAILURES)
            ),
        )
        before = states(out)
        goes_on = f"from step {before[-1]:,}" if before else "from the beginning"
        listener.say(
            f"learning {course.recipe.steps:,} steps of {course.recipe.batch} crops from {course.examples:,} images, "
            f"{goes_on}; {course.validation:,} for validation"
        )
        error = follow(trainer, wire, course, request, lease, settings.grace, listener)
        _, failure = ray.get(wire.look.remote())
    lease.check()
    if out_result(out):
        return
    if request.number:
        done = states(out)
        raise StoppedError(
            request.number,
            f"stopped: step {done[-1] if done else 0:,} of {course.recipe.steps:,} is kept; "
            "run the same command again to go on",
        )
    if failure:
        raise UnfinishedError(failure)
    raise UnfinishedError(f"the workers failed {FAILURES + 1} times ({error}); run the same command again to go on")


def follow(
    trainer: Any, wire: Any, course: Course, request: Request, lease: Lease, grace: float, listener: Listener
) -> str:
    """Wait for the end, tell how far it is, and pass on that an end was asked for; what went wrong, if anything."""
    errors: list[str] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # whatever Ray Train makes of what workers raise
            errors.append(one_line(error))

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    asked = 0.0
    while thread.is_alive():
        thread.join(LOOKED_EVERY)
        report, _ = ray.get(wire.look.remote())
        if report:
            listener.learning(report.step, course.recipe.steps, course.recipe.batch, report.loss, report.best)
        if request.number and not asked:
            asked = time.monotonic()
            listener.say(f"stopping: the step under way has {grace:g} s to end; once more to stop at once")
            ray.get(wire.stop.remote())
        if lease.lost or (asked and time.monotonic() - asked > grace):
            break
    return errors[0] if errors else ""


def one_line(error: Exception) -> str:
    """The last line of an error's text, where Ray has the cause."""
    return " ".join(str(error).strip().split("\n")[-1].split())[:300]


def size(settings: FinetuneSettings) -> tuple["ray.train.ScalingConfig", int]:
    """How many workers there are and what each has, and its threads."""
    resources = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = int(resources.get("GPU", 0))
    workers = int(settings.workers) if settings.workers != "auto" else max(1, gpus)
    if settings.batch % workers:
        workers = next(count for count in range(workers, 0, -1) if settings.batch % count == 0)
    if gpus:
        room = min((node["CPU"] - 1) // node["GPU"] for node in nodes if node.get("GPU"))
    else:
        beside = -(-workers // len(nodes))
        room = min(node["CPU"] - 1 for node in nodes) // beside
    cpus = max(1, int(room))
    needed = {"CPU": cpus} | ({"GPU": 1} if gpus else {})
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=needed), cpus
