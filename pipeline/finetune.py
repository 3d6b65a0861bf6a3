"""A whole training, as one command asks for it.

prepare      list the pairs, look them through, decide what follows: once, as OUT keeps it
teach        have workers learn (teach.py); what has died goes on from the newest state
"""

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from model.augmentation import Augmentation
from model.checkpoint import UNTAUGHT, Checkpoint, CheckpointError
from model.labels import LabelSet, label_set
from model.segformer import VARIANTS
from model.training import Recipe, fresh
from pipeline import teach
from pipeline.classes import Classes, class_weights, find_classes, read_weight_files
from pipeline.config import ConfigurationError
from pipeline.config_truth import FinetuneSettings, scale_range
from pipeline.course import (
    EXAMPLES,
    LEFT_OUT,
    MODEL,
    VALIDATION,
    Course,
    begin,
    check_same,
    clear,
    command_of,
    read_course,
    read_result,
)
from pipeline.examples import EXAMPLE, IN_ORDER, Checked, LeftOut, Listed, check_pairs, list_pairs, rows, shared_out
from pipeline.filesystems import public_url
from pipeline.lease import Lease
from pipeline.run import read_checkpoint
from pipeline.storage import Store
from pipeline.tables import Workspace, workspace
from pipeline.truth import Rules, truth_rules

FRESH = "new:"  # a checkpoint of random weights
LEASE = "training/lease"
FASTEST, SLOWEST, STEPS_BY = 1e-3, 6e-5, 2.0  # learning rates: a short training is to get somewhere, too
EPOCHS, LEAST_STEPS = 30, 300  # by default
LONGEST_WARM_UP, WARM_UP = 1500, 20  # steps as in the paper, and the share of all steps where those are few
MOST_BETWEEN, VALIDATIONS = 2000, 10  # steps from one validation to the next, and how many there are
IGNORED_ID = 255  # where nobody says which classes there are
NAMED = 20  # things that cannot be used, in messages


class Listener(teach.Listener, Protocol):
    """Whoever watches."""

    def checking(self, done: int, total: int, left_out: int) -> None:
        """Pairs that are looked through, of all; how many of them cannot be used."""


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
        course = prepare(settings, checkpoint, out, lease, listener)
        if result := read_result(out):
            return Taught(result, was_there=True)
        teach.teach(settings, course, checkpoint, out, lease, listener)
        result = read_result(out)
        assert result, "whoever ends a training puts its result"
        return Taught(result, was_there=False)


def check(settings: FinetuneSettings) -> None:
    """Raise `ConfigurationError` for settings that do not go together."""
    if (settings.val_images is None) != (settings.val_masks is None):
        raise ConfigurationError("val_images and val_masks come together")
    if settings.workers != "auto" and settings.batch % int(settings.workers):
        raise ConfigurationError(f"batch: {settings.batch} crops cannot be shared by {settings.workers} workers")
    start, out = (
        os.path.realpath(url.removeprefix("file://")) if "://" not in url.removeprefix("file://") else url.rstrip("/")
        for url in (settings.checkpoint, settings.out)
    )
    if out in (start, start.rpartition("/")[0]):
        raise ConfigurationError("out: is the checkpoint itself, which would be lost; give another place")


def starting_point(settings: FinetuneSettings) -> Checkpoint:
    """The network to begin with, of whatever classes it has. Raises `CheckpointError`."""
    if not settings.checkpoint.startswith(FRESH):
        return read_checkpoint(settings, decoder_seed=settings.seed)
    name = settings.checkpoint.removeprefix(FRESH)
    if name not in VARIANTS:
        raise CheckpointError(f"{settings.checkpoint}: no such network; there are {FRESH}{f', {FRESH}'.join(VARIANTS)}")
    return fresh(name, UNTAUGHT, settings.seed)


def prepare(settings: FinetuneSettings, checkpoint: Checkpoint, out: Store, lease: Lease, listener: Listener) -> Course:
    """The course that was begun in `out`, if it is of the same command, or a new one, which is put there."""
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
        if classes.names:  # else they are known when all masks are read
            class_weights(settings.class_weights, label_set(list(classes.names)), np.ones(len(classes.names)))
        checked = [look_through(space, listed, rules, settings, listener) for space, listed in sides]
    left_out = [one for side in checked for one in side.left_out]
    tell_left_out(left_out, listener)
    learned, validation = sort_out(checked, settings)
    palette = [] if settings.truth_map else checked[0].palette[int(settings.reduce_labels) :]
    labels = classes.label_set(np.sum([side.pixels for side in checked], axis=0), palette)
    tell_classes(labels.names, classes.source, checked[0].pixels, checkpoint, listener)
    course = new_course(settings, command, labels, ignore_ids, checked[0].pixels, learned, validation, left_out)
    lease.check()
    clear(out)
    tables = {
        name: pa.Table.from_pylist(some, EXAMPLE) for name, some in ((EXAMPLES, learned), (VALIDATION, validation))
    }
    begin(out, course, tables, left_out)
    if left_out:
        listener.say(f"all that is left out, and why: {public_url(out.uri(LEFT_OUT))}")
    return course


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
    weights = read_weight_files(settings.class_weights)
    found = {
        "checkpoint": f"{public_url(settings.checkpoint)} ({checkpoint.digest[:12]})",
        "classes": f"{len(classes.names) or 'any'} from {classes.source} ({hashlib.sha256(named).hexdigest()[:12]})",
        "weight_files": hashlib.sha256(weights).hexdigest()[:12] if weights else None,
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


def sort_out(checked: list[Checked], settings: FinetuneSettings) -> tuple[list[dict], list[dict]]:
    """The examples to learn from, and those to validate on. Raises `ConfigurationError` where there are none."""
    for side, url in zip(checked, (settings.images, settings.val_images), strict=False):
        if not side.examples:
            first = f"; of {len(side.left_out):,} that are left out the first: " if side.left_out else ""
            why = f"{side.left_out[0].uri}: {side.left_out[0].reason}" if side.left_out else ""
            raise ConfigurationError(f"{public_url(url or '')}: no image can be learned from{first}{why}")
    learned, validation = shared_out(checked, settings.holdout, settings.val_limit)
    if settings.patience and not validation:
        raise ConfigurationError("patience: there is no validation to get better; see --holdout and --val-images")
    return learned, validation


def new_course(
    settings: FinetuneSettings,
    command: dict[str, Any],
    labels: LabelSet,
    ignore_ids: tuple[int, ...] | None,
    pixels: np.ndarray,
    learned: list[dict],
    validation: list[dict],
    left_out: list[LeftOut],
) -> Course:
    """All that follows from a command and what there is to learn from; `pixels` are those of each class."""
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
    return Course(
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


def tell_left_out(left_out: list[LeftOut], listener: Listener) -> None:
    """Name what cannot be used."""
    if not left_out:
        return
    counts = Counter(one.status for one in left_out)
    kinds = ", ".join(f"{status} {count:,}" for status, count in counts.most_common())
    listener.say(f"left out {len(left_out):,} ({kinds})")
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
