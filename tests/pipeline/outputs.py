"""Outputs as a run leaves them, but without its network: real collections, indexed and planned, with drawn masks."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.labels import LabelSet, label_set
from model.segmentation import Segmentation
from pipeline.commit import PlanFiles, Run
from pipeline.config import PlanSettings, StorageSettings
from pipeline.containers import Images
from pipeline.decode import DecodeError, decode
from pipeline.index import update_index
from pipeline.masks import encode_mask
from pipeline.plan import Origin, PlannedImage, make_plan
from pipeline.policy import parse_policy
from pipeline.reader import Reader
from pipeline.schema import SUMMARY_KEY, VERSION, Outcome, encode_shard, row
from pipeline.seal import sealed
from pipeline.storage import Store
from pipeline.tables import workspace
from pipeline.totals import Totals, add, count_reasons
from tests.conftest import NAMES, Quiet, draw_image, spoil

Draw = Callable[[int, int, int], np.ndarray]  # height, width, seed


def blobs(classes: int) -> Draw:
    """Masks of areas of different classes, as ragged as those of a network."""

    def draw(height: int, width: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, classes, (-(-height // 7), -(-width // 5)))
        mask = np.kron(coarse, np.ones((7, 5), int))[:height, :width]
        flipped = rng.random(mask.shape) < 0.02
        mask[flipped] = rng.integers(0, classes, int(flipped.sum()))
        return mask.astype(np.uint8 if classes <= 256 else np.uint16)

    return draw


@dataclass(frozen=True)
class Small:
    """An output, and the collection that it is of."""

    output: Path
    collection: Path


def small_output(folder: Path) -> Small:
    """Twelve masks of images of three sizes and four formats, and three files that are no images."""
    for number in range(12):
        suffix = ["jpg", "png", "webp", "bmp"][number % 4]
        draw_image(folder / f"in/image-{number:02d}.{suffix}", *[(64, 48), (48, 64), (101, 37)][number % 3], number)
    spoil(folder / "in")
    write_output(str(folder / "in"), str(folder / "out"))
    return Small(folder / "out", folder / "in")


def write_output(
    collection: str | list[str],
    output: str,
    run_id: str = "first",
    names: list[str] = NAMES,
    draw: Draw | None = None,
    shard_images: int = 4,
    finished: str = "2026-01-01T00:00:00+00:00",
    **options: object,
) -> dict[str, np.ndarray]:
    """Index a collection, plan a run over it and finish that with drawn masks; the masks by URI."""
    settings = PlanSettings(input=collection, output=output, checkpoint="none", policy="short=64", **options)
    store, labels = Store(output, StorageSettings()), label_set(names)
    origin = Origin(settings.input, settings.include, settings.exclude, settings.policy, run_id)
    run, draw = Run(store, run_id), draw or blobs(len(names))
    with workspace() as space:
        update_index(settings, store, space.tables, Quiet(), map)
        plan = make_plan(space.tables, space.folder, parse_policy(settings.policy), shard_images, settings.max_pixels)
        run.begin(plan, origin)
    source, planned, masks = Images(Reader(settings), settings.image_column), PlanFiles(run), {}
    for shard in range(len(plan.shards)):
        images = planned.images(shard)
        outcomes = []
        for image in images:
            found = look(source, image, settings)
            if found.status == "ok":
                mask = masks[image.uri] = draw(found.height, found.width, seed_of(image.uri))
                pixels = np.bincount(mask.ravel(), minlength=len(names))
                won = np.full(len(names), 0.5, np.float32)
                segmentation = Segmentation(mask, pixels, won, (1 + seed_of(image.uri) % 100) / 100, 1.0)
                found = replace(found, segmentation=segmentation, mask=encode_mask(mask, labels), bucket="64x64")
            outcomes.append(found)
        rows = [row(image, found, labels, run_id, run_id) for image, found in zip(images, outcomes, strict=True)]
        metadata = {b"swath.run_id": run_id.encode(), b"swath.labels": "\n".join(names).encode()}
        run.put_shard(shard, encode_shard(rows, metadata | {SUMMARY_KEY: summary(images, outcomes, labels).encode()}))
    run.commit(sealed(record(run, settings, origin, names, finished)))
    return masks


def summary(images: list[PlannedImage], outcomes: list[Outcome], labels: LabelSet) -> Totals:
    """What a shard's footer says of its rows."""
    ok = [found.segmentation for found in outcomes if found.segmentation]
    pixels, present = Counter[str](), Counter[str]()
    for found in ok:
        some = {name: int(n) for name, n in zip(labels.names, found.pixels, strict=True) if n}
        pixels.update(some)
        present.update(some.keys())
    sizes = Counter[str]()
    for image, outcome in zip(images, outcomes, strict=True):
        sizes[outcome.status] += image.bytes
    return Totals(
        images=len(images),
        statuses=dict(Counter(found.status for found in outcomes)),
        input_bytes=sizes.total(),
        status_bytes=dict(sizes),
        output_bytes=sum(len(found.mask or b"") for found in outcomes),
        pixels=pixels.total(),
        engines={"drawn": len(ok)},
        class_pixels=dict(pixels),
        class_images=dict(present),
        reasons=count_reasons((found.status, found.error) for found in outcomes if found.status != "ok"),
    )


def record(run: Run, settings: PlanSettings, origin: Origin, names: list[str], finished: str) -> dict[str, Any]:
    """A run's record, as `pipeline.run.commit` makes it."""
    shards, contents = run.done(), run.contents()
    assert contents
    totals = add(run.totals(shards))
    return {
        "schema": VERSION,
        "run_id": run.id,
        "submission_id": None,
        "input": origin.input,
        "checkpoint": settings.checkpoint,
        "model_version": origin.model_version,
        "retries": origin.retries,
        "changes": contents.changes,
        "settings": settings.mask_settings() | {"batch_pixels": "by device"},
        "labels": names,
        "started": finished,
        "finished": finished,
        "seconds": 1.0,
        "shards_done_before": 0,
        "worker_memory": {"peak": 0, "bound": 0},
        "store_retries": {},
        **asdict(totals),
        "busy_shares": totals.busy_shares(),
        "files": [run.shard_name(shard) for shard in shards],
        "plan_sha256": run.plan_digest(),
        "versions": {},
    }


def look(source: Images, image: PlannedImage, settings: PlanSettings) -> Outcome:
    """What becomes of an image before the network sees it."""
    try:
        found = decode(source.fetch(image), settings.max_pixels, allow_truncated=settings.allow_truncated)
    except DecodeError as error:
        return Outcome(error.status, str(error))
    return Outcome("ok", width=found.width, height=found.height)


def seed_of(uri: str) -> int:
    return int.from_bytes(hashlib.sha256(uri.encode()).digest()[:4], "big")
