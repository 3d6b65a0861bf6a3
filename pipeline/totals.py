"""What was done, in numbers: by one shard, or by all shards of a run together."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

STAGES = ("fetch", "decode", "infer", "encode")  # of the road
SHARD_REASONS = 20  # that are told apart in a shard
REASONS = 50  # and in a sum
REASON_LENGTH = 120  # characters
OTHER = "other reasons"
# what differs from image to image is left out of a reason: quoted names, URLs, long identifiers, numbers
VARYING = [
    (re.compile(r"'[^']*'|\"[^\"]*\"|\b\w+://\S+"), "…"),
    (re.compile(r"\b(?=\w*\d)[\w-]{16,}"), "…"),
    (re.compile(r"\d+"), "N"),
]


@dataclass(frozen=True)
class Totals:
    """Counts of images, bytes, pixels and seconds; those of a shard are in the metadata of its file."""

    images: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    input_bytes: int = 0
    status_bytes: dict[str, int] = field(default_factory=dict)  # the same by what became of the images
    output_bytes: int = 0  # of the masks
    pixels: int = 0  # of the masks
    engines: dict[str, int] = field(default_factory=dict)  # images that the network saw, by engine and precision
    batches: int = 0
    batch_inputs: int = 0  # images, or windows of large ones, that the network saw in them
    batch_places: int = 0  # how many would have filled them
    out_of_memory: int = 0  # times that a batch did not fit the device's memory
    halvings: int = 0  # of batches as they did not
    quarantined: int = 0  # shards that were done apart, as they had ended their workers
    stage_seconds: dict[str, float] = field(default_factory=dict)  # at work, summed over threads
    starved_seconds: dict[str, float] = field(default_factory=dict)  # the same, waiting for something to do
    blocked_seconds: dict[str, float] = field(default_factory=dict)  # the same, waiting for the next stage to take it
    class_pixels: dict[str, int] = field(default_factory=dict)  # by class name
    class_images: dict[str, int] = field(default_factory=dict)  # images that have the class
    reasons: dict[str, int] = field(default_factory=dict)  # images without a mask, by status and why

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def busy_shares(self) -> dict[str, float]:
        """How much of its threads' time each stage was at work, 0 to 1; the busiest is what bounds the run."""
        waited = {stage: self.starved_seconds.get(stage, 0) + self.blocked_seconds.get(stage, 0) for stage in STAGES}
        busy = {stage: self.stage_seconds.get(stage, 0) for stage in STAGES}
        return {stage: busy[stage] / max(busy[stage] + waited[stage], 1e-9) for stage in STAGES}


def count_reasons(failures: Iterable[tuple[str, str | None]]) -> dict[str, int]:
    """How many of a shard's images have no mask for which reason, from their (status, error)."""
    return most_frequent(Counter(f"{status}: {generalised(error or '')}" for status, error in failures), SHARD_REASONS)


def generalised(error: str) -> str:
    """What an error has in common with those of other images."""
    for pattern, word in VARYING:
        error = pattern.sub(word, error)
    return error[:REASON_LENGTH]


def most_frequent(reasons: Mapping[str, int], most: int) -> dict[str, int]:
    """The `most` frequent reasons, and all others of a status as one."""
    ordered = sorted(reasons.items(), key=lambda item: (item[0].endswith(f": {OTHER}"), -item[1], item[0]))
    found = Counter(dict(ordered[:most]))
    for reason, images in ordered[most:]:
        found[f"{reason.partition(':')[0]}: {OTHER}"] += images
    return dict(found)


def add(parts: Iterable[Totals]) -> Totals:
    """The sum of all `parts`."""
    counts: Counter[str] = Counter()
    groups: dict[str, Counter[str]] = {}
    for part in parts:
        for name, value in vars(part).items():
            if isinstance(value, dict):
                groups.setdefault(name, Counter()).update(value)
            else:
                counts[name] += value
    groups["reasons"] = Counter(most_frequent(groups.get("reasons", {}), REASONS))
    return Totals(**counts, **{name: dict(group) for name, group in groups.items()})  # type: ignore[arg-type]
