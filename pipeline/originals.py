"""The images that an output's rows are of: fetched again, in the version that was segmented, and decoded as it was.

An output has no images, only where they lie. One may have gone since, or be another now; then there is no image of
which the mask is, and that is an `ImageError`. What the store fails to give is no image's fault, and raised as it is.
"""

import io
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.commit import PlanFiles, Run
from pipeline.containers import ContainerError, Images
from pipeline.decode import DecodeError, Header, decode, read_header
from pipeline.plan import PlannedImage
from pipeline.reader import ChangedError
from pipeline.storage import Store

ANOTHER = "the image is another one than was segmented"


class ImageError(Exception):
    """An image that is there no more as it was: its `uri`, `status` (`missing`, `changed` or `unreadable`), and why.

    From a worker of a `DataLoader` it comes as words alone, in which its URI is.
    """

    def __init__(self, why: str, uri: str = "", status: str = ""):
        super().__init__(f"{uri}: {why}" if uri else why)
        self.why, self.uri, self.status = why, uri, status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.why, self.uri, self.status)


class Originals:
    """The images of an output's runs. Many threads may use one."""

    def __init__(self, output: Store, records: Mapping[str, dict[str, Any]]):
        """`records` are those of the runs, by id, which say how images were read."""
        self.output, self.records = output, records
        self.images: dict[str | None, Images] = {}  # by the column that a Parquet file has them in
        self.plan: tuple[str, PlanFiles] | None = None
        self.lock = threading.Lock()

    def planned(self, run: str, shard: int) -> list[PlannedImage]:
        """Where the images of a shard lie, in the order of its rows."""
        with self.lock:
            if not self.plan or self.plan[0] != run:
                self.plan = run, PlanFiles(Run(self.output, run))
            plan = self.plan[1]
        return plan.images(shard)

    def fetch(self, run: str, image: PlannedImage) -> bytes:
        """The encoded image. Raises `ImageError`, or one of `attempts.ERRORS`."""
        column = self.records[run]["settings"]["image_column"]
        with self.lock:
            images = self.images.setdefault(column, Images(self.output.reader, column))
        try:
            return images.fetch(image)
        except FileNotFoundError:
            raise ImageError("the image is gone since it was segmented", image.uri, "missing") from None
        except ChangedError:
            raise ImageError(ANOTHER, image.uri, "changed") from None
        except ContainerError as error:
            raise ImageError(str(error), image.uri, "unreadable") from None

    def decode(
        self, run: str, uri: str, data: bytes, height: int, width: int, enough: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Upright RGB, uint8 (height, width, 3), of which the mask is. Raises `ImageError`.

        Where a smaller (height, width) is `enough` it may be one, but not smaller than that.
        """
        allow_truncated = self.records[run]["settings"]["allow_truncated"]
        try:
            found = decode(data, height * width, lambda *_: enough, allow_truncated)
        except DecodeError as error:
            raise ImageError(f"{ANOTHER}: {error}", uri, "changed") from None
        check_size(uri, (found.height, found.width), (height, width))
        return found.pixels

    def is_whole(self, run: str, data: bytes) -> bool:
        """Whether no part of an image is lost, which only runs that allow it have to find out."""
        settings = self.records[run]["settings"]
        if not settings["allow_truncated"]:
            return True
        try:
            decode(data, settings["max_pixels"])
        except DecodeError:
            return False
        return True


def header_of(uri: str, data: bytes, height: int, width: int) -> Header:
    """The header of an encoded image that has this size when it is upright. Raises `ImageError`."""
    try:
        header = read_header(io.BytesIO(data))
    except DecodeError as error:
        raise ImageError(f"{ANOTHER}: {error}", uri, "changed") from None
    check_size(uri, (header.height, header.width), (height, width))
    return header


def check_size(uri: str, found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    """Raise `ImageError` where an image's (height, width) is not its mask's: some stores know of no versions."""
    if found != wanted:
        sizes = f"it is {found[1]}x{found[0]}, its mask {wanted[1]}x{wanted[0]}"
        raise ImageError(f"{ANOTHER}: {sizes}", uri, "changed")
