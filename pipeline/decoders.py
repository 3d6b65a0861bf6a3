"""The CPU stage that may stand in front of the workers, for GPU hosts with few CPUs: actors that fetch and decode.

A worker asks for one image after the other and gets the network's input, or nothing: then it sees to the image itself,
as it would without decoders. So whatever can go wrong (the store fails, the image is damaged, is not what was planned,
or ends the decoder's process) is dealt with in one place, the road, and what is written is the same.
"""

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import ray.exceptions

from model.predictor import use_threads
from pipeline.attempts import ERRORS
from pipeline.config import SegmentSettings
from pipeline.containers import ContainerError, Images, kind_of
from pipeline.decode import DecodeError
from pipeline.plan import PlannedImage
from pipeline.policy import parse_policy
from pipeline.reader import ChangedError, Reader
from pipeline.road import Input, Load, input_bytes, network_input
from pipeline.stages import Gate

THREADS = 8  # of a decoder: most of them wait for the store
PATIENCE = 60.0  # seconds: longer than a store may be silent
REST = 30.0  # seconds for which a decoder that has failed, or has no place yet, is not asked


class UnplannedError(Exception):
    """The image has another size than planned."""


class Decoder:
    """A Ray actor of one CPU, which gives workers what their networks want to see."""

    def __init__(self, settings: SegmentSettings, memory: int):
        """`memory`: bytes that images may take at once while they are decoded."""
        settings = settings.model_copy(update={"retry_seconds": 0.0})  # the worker tries again, and counts
        self.settings, self.policy = settings, parse_policy(settings.policy)
        self.source, self.gate = Images(Reader(settings), settings.image_column), Gate(memory)

    def decode(self, image: PlannedImage) -> Input | None:
        """The image as `road.network_input` gives it; None for the worker to see to it itself."""
        use_threads(1)
        with suppress(*ERRORS, ChangedError, ContainerError, DecodeError, UnplannedError), ExitStack() as room:

            def make_room(height: int, width: int) -> None:
                if (height, width) != (image.height, image.width):
                    raise UnplannedError
                inputs = input_bytes(height, width, self.policy, self.settings.looks)
                room.enter_context(self.gate.hold(Load.of(image, height * width, inputs, 1).decoding + inputs))

            return network_input(self.source.fetch(image), self.policy, self.settings, make_room)
        return None


class Decoders:
    """The decoders of a run, as a worker sees them."""

    def __init__(self, actors: Sequence[Any]):
        self.actors, self.turn = actors, itertools.count()
        self.resting = [0.0] * len(actors)  # until when, by the monotonic clock

    def __call__(self, image: PlannedImage) -> Input | None:
        """What the next decoder makes of the image; None for the worker to see to it itself.

        It does where images are rows of Parquet, of which one who reads them in order reads each page once.
        """
        if not self.actors or kind_of(image.file or "") == "parquet":
            return None
        number = next(self.turn) % len(self.actors)
        if time.monotonic() < self.resting[number]:
            return None
        try:
            found: Input | None = ray.get(self.actors[number].decode.remote(image), timeout=PATIENCE)
        except ray.exceptions.RayError:
            self.resting[number] = time.monotonic() + REST
            return None
        return found and replace(found, pixels=tuple(map(np.array, found.pixels)))  # not the object store's memory


def start_decoders(settings: SegmentSettings, memory: int) -> tuple[Any, ...]:
    """As many as the settings say; they end when nobody knows them any more."""
    options: dict[str, Any] = {"num_cpus": 1, "max_restarts": -1, "max_concurrency": THREADS}
    actor: Any = ray.remote(**options)(Decoder)
    return tuple(actor.remote(settings, memory) for _ in range(settings.decoders))
