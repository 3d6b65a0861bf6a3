"""What was done, in numbers: by one shard, or by all shards of a run together."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

STAGES = ("fetch", "decode", "infer", "encode")  # of the road


@dataclass(frozen=True)
class Totals:
    """Counts of images, bytes, pixels and seconds; those of a shard are in the metadata of its file."""

    images: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    input_bytes: int = 0
    output_bytes: int = 0  # of the masks
    pixels: int = 0  # of the masks
    engines: dict[str, int] = field(default_factory=dict)  # images that the network saw, by engine and precision
    batches: int = 0
    halvings: int = 0  # of batches that were too large for the device's memory
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


def add(parts: Iterable[Totals]) -> Totals:
    """The sum of all `parts`."""
    counts: Counter[str] = Counter()
    groups: dict[str, Counter[str]] = {}
    for part in parts:
        for name, value in asdict(part).items():
            if isinstance(value, dict):
                groups.setdefault(name, Counter()).update(value)
            else:
                counts[name] += value
    return Totals(**counts, **{name: dict(group) for name, group in groups.items()})  # type: ignore[arg-type]
