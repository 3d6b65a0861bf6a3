"""An output as samples of image, mask and row: one after the other, or any of them, as a PyTorch dataset.

The images come from where they were segmented, in that version. Where one is there no more, `ImageError` says which: a
sample that silently is another, or is not there, would be found in a training that goes wrong. Who wants to go on
without it catches the error.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, Sampler

from pipeline.ahead import ahead
from pipeline.commit import Run
from pipeline.config import StorageSettings, absolute
from pipeline.masks import decode_mask
from pipeline.originals import Originals
from pipeline.plan import PlannedImage
from pipeline.selection import Place, Wanted, opened, read, select
from pipeline.storage import Store
from pipeline.tables import workspace

KEPT_BYTES = 128 << 20  # of shards, in each process
USED = ("labels", "settings", "model_version")  # of a run's record


class Sample(NamedTuple):
    """An image, its mask, and all else that the output says of it."""

    image: np.ndarray  # uint8 (H, W, 3): RGB, upright
    mask: np.ndarray  # uint8, or uint16 with more than 256 classes, (H, W): class ids
    row: dict[str, Any]  # the row's other columns


@dataclass(frozen=True)
class Shard:
    """The chosen rows of a shard, and where their images lie."""

    run: str
    rows: pa.Table
    images: list[PlannedImage]


class SegmentedImages(Dataset[Any]):
    """The images that have a mask, in the order in which they lie: of each the newest, or those of one run.

    An index takes 4 bytes an image. A shard is read when a sample of it is asked for, and the last ones are kept; so
    neighbours cost little, and for a shuffled `DataLoader` there is `ShuffledShards`. Workers of a `DataLoader` may be
    forked or spawned; from S3 those that are spawned read with less work.

    Images may be of any size, so to import this sets `PIL.Image.MAX_IMAGE_PIXELS` to None for the whole process. A
    program that wants Pillow's limit for images from elsewhere sets it again afterwards, above the largest of these.

    >>> import numpy as np
    >>> from pipeline import SegmentedImages, ShuffledShards
    >>> from torch.utils.data import DataLoader
    >>> images = SegmentedImages(output)
    >>> image, mask, row = images[0]
    >>> image.shape == (row["height"], row["width"], 3) and mask.shape == image.shape[:2]
    True
    >>> {images.labels.names[class_id] for class_id in np.unique(mask)} == {found["name"] for found in row["classes"]}
    True
    >>> sure = SegmentedImages(output, where="confidence > 0.5", transform=lambda sample: sample.row["uri"])
    >>> loader = DataLoader(sure, batch_size=4, sampler=ShuffledShards(sure, seed=7))
    >>> sum(len(uris) for uris in loader) == len(sure)
    True
    """

    def __init__(
        self,
        url: str,
        storage: StorageSettings = StorageSettings(),  # noqa: B008  (it is frozen)
        run_id: str | None = None,
        where: str | None = None,
        limit: int | None = None,
        transform: Callable[[Sample], Any] | None = None,
    ):
        """`url` is where segment has written; `run_id`, `where` and `limit` choose as `swath export` does.

        `transform` makes of a sample what is given; for workers that are spawned it must have a name in a module.
        Raises `ConfigurationError` where no rows are chosen, or their runs have different labels.
        """
        self.url, self.storage, self.transform = absolute(url), storage, transform
        with workspace() as space:
            selection = select(space.tables, Store(self.url, storage), Wanted(run_id, where, limit))
            self.labels = selection.label_set()
            self.records = {run: {name: record[name] for name in USED} for run, record in selection.records.items()}
            self.shards: list[tuple[str, int]] = []
            counts, rows = [], [np.empty(0, np.int32)]
            for places in selection.shards():
                self.shards.append((places[0].run, places[0].shard))
                counts.append(len(places))
                rows.append(np.array([place.row for place in places], np.int32))
        self.rows = np.concatenate(rows)  # in their shards, of all shards
        self.ends = np.cumsum(counts)  # in `rows`, of each shard
        self.opened: Opened | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Raises `ImageError`, `attempts.ERRORS`, IndexError."""
        number = range(len(self))[index]
        shard = int(np.searchsorted(self.ends, number, side="right"))
        here = self.open()
        found, first = here.shard(shard), self.bounds(shard)[0]
        (values,) = found.rows.slice(number - first, 1).to_pylist()
        made = sample(here.originals, found.run, values, found.images[number - first])
        return self.transform(made) if self.transform else made

    def __iter__(self) -> Iterator[Any]:
        """Every sample in order; the next few images are fetched and decoded ahead. Raises as `__getitem__`."""
        here = self.open()

        def coming() -> Iterator[tuple[str, dict[str, Any], PlannedImage]]:
            for shard, (run, number) in enumerate(self.shards):
                images = here.originals.planned(run, number)
                for chosen in read(here.output, self.places(shard)):
                    yield run, chosen.values, images[chosen.place.row]

        made = ahead(lambda one: sample(here.originals, *one), coming())
        return map(self.transform, made) if self.transform else made

    def bounds(self, shard: int) -> tuple[int, int]:
        """The indices of a shard's samples: from the first on, up to the second."""
        return int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard])

    def places(self, shard: int) -> list[Place]:
        run, number = self.shards[shard]
        first, end = self.bounds(shard)
        return [Place(run, number, int(row), 0, 0) for row in self.rows[first:end]]

    def open(self) -> "Opened":
        """What this process reads by: clients of stores do not outlive a fork."""
        if not self.opened or self.opened.process != os.getpid():
            self.opened = Opened(self)
        return self.opened

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": None}


class Opened:
    """The output as one process reads it, and the shards that it has read last."""

    def __init__(self, dataset: SegmentedImages):
        self.process = os.getpid()
        self.dataset = dataset
        self.output = Store(dataset.url, dataset.storage)
        self.originals = Originals(self.output, dataset.records)
        self.kept: OrderedDict[int, Shard] = OrderedDict()

    def shard(self, shard: int) -> Shard:
        """The rows and images of a shard of the dataset."""
        if shard in self.kept:
            self.kept.move_to_end(shard)
            return self.kept[shard]
        run, number = self.dataset.shards[shard]
        first, end = self.dataset.bounds(shard)
        rows = self.dataset.rows[first:end]
        with opened(Run(self.output, run), number) as file:
            table = file.read().take(pa.array(rows))
        images = self.originals.planned(run, number)
        self.kept[shard] = Shard(run, table, [images[row] for row in rows])
        while len(self.kept) > 1 and sum(one.rows.nbytes for one in self.kept.values()) > KEPT_BYTES:
            self.kept.popitem(last=False)
        return self.kept[shard]


class ShuffledShards(Sampler[int]):
    """The indices of a dataset in a random order that reads each shard once: shards at random, and in each its samples.

    All of a shard were seen by the network at one size, so most images that come together are alike in theirs. Each
    pass has another order; the same seed gives the same passes.
    """

    def __init__(self, dataset: SegmentedImages, seed: int):
        self.dataset, self.seed, self.passes = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.passes))
        self.passes += 1
        for shard in rng.permutation(len(self.dataset.shards)):
            first, end = self.dataset.bounds(int(shard))
            yield from (first + rng.permutation(end - first)).tolist()


def sample(originals: Originals, run: str, values: dict[str, Any], image: PlannedImage) -> Sample:
    """A row with its image. Raises `ImageError`."""
    row = {name: value for name, value in values.items() if name != "mask"}
    pixels = originals.decode(run, row["uri"], originals.fetch(run, image), row["height"], row["width"])
    return Sample(pixels, decode_mask(values["mask"]), row)
