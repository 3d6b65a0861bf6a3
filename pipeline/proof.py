"""The proof of a shard: its file is, to the last bit, what was written; its rows are the plan's images in the plan's
order; its masks are what its numbers say.

Nothing here trusts what it reads: whatever is damaged becomes a finding, never an exception. A file is parsed only when
its seal is whole, as parsers of damaged binary files can end a process.
"""

import io
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.attempts import reason
from pipeline.commit import PlanFiles, Run
from pipeline.config import VerifySettings
from pipeline.masks import decode_mask
from pipeline.pillow import Image
from pipeline.plan import PlannedImage
from pipeline.seal import SealError, check_parquet
from pipeline.storage import Store
from pipeline.totals import Totals, count_reasons

FINDINGS = 20  # that are kept; all are counted
ROWS = 64  # that are in memory at once, decoded
BLOCK = 1 << 20  # pixels that are counted at once, as NumPy makes eight bytes of each
ROUNDING = 1e-5  # of means that are float32
SUMMED = (  # what a footer says of its rows
    "images",
    "statuses",
    "input_bytes",
    "output_bytes",
    "pixels",
    "class_pixels",
    "class_images",
    "reasons",
)
BUCKET = re.compile(r"\d+x\d+")
KEYS = pa.schema([("run", pa.string()), ("uri", pa.string()), ("etag", pa.string()), ("is_ok", pa.bool_())])


@dataclass
class Findings:
    """What is wrong: the first in words, and how many there are."""

    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, what: str, count: int = 1) -> None:
        self.count += count
        if len(self.first) < FINDINGS:
            self.first.append(" ".join(f"{where}: {what}".split()))

    def take(self, other: "Findings") -> None:
        self.count += other.count
        self.first = (self.first + other.first)[:FINDINGS]


@dataclass(frozen=True)
class Facts:
    """What is known of a run without its shards."""

    id: str
    model_version: str
    retries: str  # the run whose images it does again, or nothing
    is_finished: bool
    images: list[int] = field(repr=False)  # planned, by shard
    plan_is_whole: bool
    labels: tuple[str, ...] | None  # of the record; None where there is none that can be read


@dataclass
class Proof:
    """What was found in one shard."""

    run: str
    images: int  # planned
    keys: pa.Table  # KEYS: its rows, or, where they cannot be read, the planned images, so that none seems lost besides
    totals: Totals | None = None  # of the rows; None where they cannot be read
    findings: Findings = field(default_factory=Findings)


class Shards:
    """Shards to proofs, wherever Ray puts the work. Many threads may use it."""

    def __init__(self, settings: VerifySettings, runs: dict[str, Facts]):
        self.settings, self.runs = settings, runs
        self.store = Store(settings.output, settings)
        self.plans: dict[str, PlanFiles] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Shards"], tuple[VerifySettings, dict[str, Facts]]]:
        return Shards, (self.settings, self.runs)  # connections stay where they are

    def __call__(self, shards: list[tuple[str, int]]) -> list[Proof]:
        """The proof of each of these (run, shard)."""
        return [self.prove(self.runs[run], shard) for run, shard in shards]

    def prove(self, facts: Facts, shard: int) -> Proof:
        run = Run(self.store, facts.id)
        name = run.shard_name(shard)
        findings = Findings()
        planned = self.planned(run, facts, shard, findings)
        rows = [{"run": run.id, "uri": one.uri, "etag": one.etag} for one in planned or ()]
        proof = Proof(run.id, facts.images[shard], pa.Table.from_pylist(rows, KEYS), findings=findings)
        try:
            data = self.store.read(name)
            check_parquet(data)
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            read_rows(name, file, facts, planned, proof)
        except FileNotFoundError:
            findings.add(name, "is not there")
        except SealError as error:
            findings.add(name, str(error))
        except Exception as error:  # whatever a file of that name may hold
            findings.add(name, f"cannot be read ({type(error).__name__}: {reason(error)})")
        return proof

    def planned(self, run: Run, facts: Facts, shard: int, findings: Findings) -> list[PlannedImage] | None:
        """What the plan says about a shard; None where it is damaged."""
        if not facts.plan_is_whole:
            return None
        try:
            with self.lock:
                if run.id not in self.plans:
                    self.plans[run.id] = PlanFiles(run)
            planned = self.plans[run.id].images(shard)
        except Exception as error:
            findings.add(run.plan_name, f"shard {shard} cannot be read ({type(error).__name__}: {reason(error)})")
            return None
        if len(planned) != facts.images[shard]:
            findings.add(run.plan_name, f"shard {shard} has {len(planned)} images, not {facts.images[shard]}")
        return planned


def read_rows(name: str, file: pq.ParquetFile, facts: Facts, planned: list[PlannedImage] | None, proof: Proof) -> None:
    """Add to `proof` what is in a shard's file."""
    findings, metadata = proof.findings, file.schema_arrow.metadata or {}
    if not file.schema_arrow.equals(schema.SEGMENTS):
        findings.add(name, "its columns are not those of the segments table")
        return
    if metadata.get(b"swath.schema") != str(schema.VERSION).encode() or metadata.get(b"swath.run_id") != (
        facts.id.encode()
    ):
        findings.add(name, "its metadata is another schema's or another run's")
    labels = tuple(metadata.get(b"swath.labels", b"").decode().split("\n"))
    if facts.labels is not None and labels != facts.labels:
        findings.add(name, "its labels are not those of the run record")
    tally = Tally(facts, labels)
    expected = itertools.chain(planned or (), itertools.repeat(None))
    keys = []
    for batch in file.iter_batches(ROWS):
        keys.append(batch.select(["uri", "etag", "status"]))
        for row, image in zip(batch.to_pylist(), expected, strict=False):
            where = f"{name}: {row['uri']}"
            if image and (row["uri"], row["etag"], row["bytes"]) != (image.uri, image.etag, image.bytes):
                findings.add(where, f"is not the image that the plan has here, which is {image.uri} {image.etag}")
            for what in tally.count(row):
                findings.add(where, what)
    found = pa.Table.from_batches(keys, keys[0].schema if keys else None)
    if planned is not None and len(found) != len(planned):
        findings.add(name, f"has {len(found):,} rows for {len(planned):,} images")
    is_ok = pa.array([status == "ok" for status in found["status"].to_pylist()], pa.bool_())
    run = pa.array([facts.id] * len(found), pa.string())
    proof.keys = pa.table([run, found["uri"], found["etag"], is_ok], schema=KEYS)
    proof.totals = tally.totals()
    told = json.loads(metadata[schema.SUMMARY_KEY])
    for part in differing(asdict(proof.totals), told):
        findings.add(name, f"its footer says other {part} than its rows: {told.get(part)}")


def differing(found: dict[str, Any], told: dict[str, Any]) -> list[str]:
    return [part for part in SUMMED if told.get(part) != found[part]]


class Tally:
    """Rows of one shard, counted and checked one after the other."""

    def __init__(self, facts: Facts, labels: tuple[str, ...]):
        self.facts, self.labels = facts, labels
        self.statuses: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.failures: list[tuple[str, str | None]] = []
        self.pixels: Counter[str] = Counter()
        self.images: Counter[str] = Counter()

    def count(self, row: dict[str, Any]) -> Iterator[str]:
        """What is wrong with a row."""
        status, error = row["status"], row["error"]
        self.statuses[status] += 1
        self.bytes["input"] += row["bytes"]
        if status not in schema.STATUSES:
            yield f"has the status {status!r}"
        if (row["model_version"], row["run_id"]) != (self.facts.model_version, self.facts.id):
            yield f"says it is of model {row['model_version']} and run {row['run_id']}"
        if status == "ok":
            yield from self.check_mask(row)
            return
        self.failures.append((status, error))
        if not error or len(error.splitlines()) > 1:
            yield "has no mask, and no reason of one line"
        if any(row[name] is not None for name in ("mask", "classes", "confidence", "entropy")):
            yield f"is {status} and has a mask or its statistics all the same"

    def check_mask(self, row: dict[str, Any]) -> Iterator[str]:
        if row["error"] is not None:
            yield "is ok and has an error"
        if not BUCKET.fullmatch(row["bucket"] or ""):
            yield f"is ok and was seen at {row['bucket']}"
        if not is_share(row["confidence"]):
            yield f"has the confidence {row['confidence']}"
        if not (row["entropy"] is not None and row["entropy"] >= -ROUNDING):
            yield f"has the entropy {row['entropy']}"
        png, classes = row["mask"], row["classes"]
        if png is None or classes is None:
            yield "is ok and has no mask or no classes"
            return
        self.bytes["output"] += len(png)
        counts = histogram(png, row["width"], row["height"], len(self.labels))
        if isinstance(counts, str):
            yield counts
            return
        for class_id in np.flatnonzero(counts):
            self.pixels[self.labels[class_id]] += int(counts[class_id])
            self.images[self.labels[class_id]] += 1
        yield from self.check_classes(classes, counts)

    def check_classes(self, classes: Sequence[dict[str, Any]], counts: np.ndarray) -> Iterator[str]:
        """`counts` are the mask's pixels by class id."""
        present = np.flatnonzero(counts)
        ordered = present[np.argsort(-counts[present], kind="stable")]
        if [(one["class_id"], one["pixels"]) for one in classes] != [(int(i), int(counts[i])) for i in ordered]:
            yield "has other classes than its mask"
            return
        if any(one["name"] != self.labels[one["class_id"]] for one in classes):
            yield "has classes by wrong names"
        total = counts.sum()
        if any(not abs(one["fraction"] - one["pixels"] / total) < ROUNDING for one in classes) or not (
            abs(sum(one["fraction"] for one in classes) - 1) < ROUNDING
        ):
            yield "has fractions that are not its mask's"
        if not all(one["confidence"] is None or is_share(one["confidence"]) for one in classes):
            yield "has a class whose confidence is not from 0 to 1"

    def totals(self) -> Totals:
        """What a footer has to say of these rows."""
        return Totals(
            images=self.statuses.total(),
            statuses=dict(self.statuses),
            input_bytes=self.bytes["input"],
            output_bytes=self.bytes["output"],
            pixels=self.pixels.total(),
            class_pixels=dict(self.pixels),
            class_images=dict(self.images),
            reasons=count_reasons(self.failures),
        )


def is_share(value: float | None) -> bool:
    return value is not None and 0 < value <= 1 + ROUNDING


def histogram(png: bytes, width: int | None, height: int | None, labels: int) -> np.ndarray | str:
    """How many pixels of a mask each class id has, or what is wrong with it."""
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            if image.size != (width, height):  # before it is decoded, as it may be of any size
                return f"has a mask of {image.size[0]}x{image.size[1]} pixels for an image of {width}x{height}"
        mask = decode_mask(png)
    except Exception as error:  # Pillow has many
        return f"has a mask that cannot be decoded ({type(error).__name__}: {reason(error)})"
    if mask.shape != (height, width):
        return "has a mask of several channels"
    pixels, ids = mask.ravel(), max(labels, 1 << 8 * mask.itemsize)
    blocks = (pixels[start : start + BLOCK] for start in range(0, len(pixels), BLOCK))
    counts = sum((np.bincount(block, minlength=ids) for block in blocks), np.zeros(ids, np.int64))
    if counts[labels:].any():
        return f"has the class id {np.flatnonzero(counts)[-1]} in its mask, of {labels} classes"
    return counts[:labels]
