"""Workers that die, for the tests; by themselves, so that a process that has one does not import what tests need."""

import ctypes
import os

import pipeline.decoders
import pipeline.road
import pipeline.segment
from model.checkpoint import Checkpoint
from model.predictor import Predictor
from pipeline.decode import DecodeError
from pipeline.plan import PlannedImage
from pipeline.road import Input

KILL = b"a decoder's bug"  # after the end of an image
decode = pipeline.road.decode


class Mortal(pipeline.segment.Segmenter):
    """A worker whose decoder crashes with some images."""

    def __init__(self, *arguments: object):
        pipeline.road.decode = self.decode
        super().__init__(*arguments)

    def decode(self, data: bytes, *arguments: object) -> object:
        if data.endswith(KILL):
            ctypes.string_at(0)  # a real crash: this thread does nothing more
        return decode(data, *arguments)


class MortalDecoder(pipeline.decoders.Decoder):
    """A decoder that crashes with the same images."""

    def decode(self, image: PlannedImage) -> Input | None:
        if self.source.fetch(image).endswith(KILL):
            ctypes.string_at(0)
        return super().decode(image)


class Stillborn(pipeline.segment.Segmenter):
    """A worker that dies whenever it loads."""

    def __init__(self, *arguments: object):
        pipeline.segment.LOADS = 1
        super().__init__(*arguments)

    def load(self, checkpoint: Checkpoint) -> Predictor:
        os._exit(3)


class Idle(pipeline.segment.Segmenter):
    """A worker that cannot decode."""

    def __init__(self, *arguments: object):
        pipeline.road.decode = self.decode
        super().__init__(*arguments)

    def decode(self, *arguments: object) -> object:
        raise DecodeError("unreadable", "the worker had to decode")
