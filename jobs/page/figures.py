"""What an output holds, in numbers: a handful of queries, each one scan of a few columns, whatever the number of rows.

Distributions are counted into narrow bins by DuckDB, and quantiles are read off these, so that no value of a single
image comes here. No query reads a mask.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from pipeline.totals import generalised

BIN = 0.001  # of shares and confidence, and of entropy in nats
SIZES, BUCKETS, REASONS, CLASSES = 10, 12, 15, 150  # that are told apart
ROWS = 10_000  # of an answer that is counted as it comes
NO_REASON = "no reason given"

# grouped in one scan; of what is not a number there is no bin
GROUPS = ("status", "model_version", "confidence_bin", "entropy_bin", "bucket", "format", "octave")
IMAGES = f"""
    SELECT grouping_id({", ".join(GROUPS)}), {", ".join(GROUPS)}, count(*), sum(bytes)::BIGINT,
      sum(CASE WHEN status = 'ok' THEN width::BIGINT * height END)::BIGINT, sum(confidence), sum(entropy)
    FROM (
      SELECT status, model_version, bucket, format, bytes, width, height, confidence, entropy,
        try_cast(floor(confidence / {BIN}) AS INTEGER) AS confidence_bin,
        try_cast(floor(entropy / {BIN}) AS INTEGER) AS entropy_bin,
        floor(log2(nullif(width::BIGINT * height, 0) / 1e6))::INTEGER AS octave
      FROM current)
    GROUP BY GROUPING SETS ({", ".join(f"({name})" for name in GROUPS)})"""  # noqa: S608  (constants)
SHAPES = f"""
    SELECT width, height, count(*) AS images, count(*) OVER () AS shapes FROM current
    WHERE width > 0 AND height > 0 GROUP BY ALL ORDER BY images DESC, width, height LIMIT {SIZES}"""  # noqa: S608
FAILED = "SELECT status, error, count(*), min(uri) FROM failures GROUP BY status, error"
SHARES = f"""
    SELECT name, try_cast(floor(fraction / {BIN}) AS INTEGER), count(*), sum(pixels)::BIGINT, min(class_id),
      sum(confidence) FILTER (isfinite(confidence)), count(*) FILTER (isfinite(confidence))
    FROM class_stats GROUP BY ALL"""  # noqa: S608


@dataclass(frozen=True)
class Histogram:
    """How often values fall into bins of one width: bin `i` is from `i * step` to `(i + 1) * step`."""

    counts: Mapping[int, int]
    step: float = BIN

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def quantile(self, share: float) -> float:
        """The value below which `share` (0 to 1) of all lie, as if they lay evenly in their bin; 0 where none are."""
        wanted, before = share * self.total, 0
        for number in sorted(self.counts):
            if before + (count := self.counts[number]) >= wanted:
                return (number + (wanted - before) / count) * self.step
            before += count
        return 0.0

    def bars(self, low: float, top: float, bars: int) -> list[int]:
        """The same in so many bins from `low` to `top`; what lies outside is in the first or last one."""
        found = [0] * bars
        for number, count in self.counts.items():
            place = ((number + 0.5) * self.step - low) / (top - low) * bars
            found[max(0, min(bars - 1, int(place)))] += count
        return found


@dataclass(frozen=True)
class Distribution:
    """A number that each image has."""

    histogram: Histogram
    mean: float


@dataclass(frozen=True)
class Count:
    """Images of one kind, with the bytes of their files and the pixels of their masks."""

    name: Any
    images: int
    bytes: int = 0
    pixels: int = 0


@dataclass(frozen=True)
class Failure:
    """Images without a mask for one reason, and one of them."""

    status: str
    reason: str
    images: int
    uri: str
    error: str


@dataclass(frozen=True)
class ClassFigures:
    """One class over all images. `shares` is of the images that have it, `confidence` the mean over these."""

    name: str
    class_id: int
    images: int
    pixels: int
    confidence: float | None
    shares: Histogram


@dataclass(frozen=True)
class Figures:
    """All there is to say of the rows of an output, most frequent first."""

    statuses: list[Count]
    models: list[Count]
    failures: list[Failure]
    classes: list[ClassFigures]  # most pixels first
    confidence: Distribution
    entropy: Distribution
    buckets: list[Count]
    formats: list[Count]
    octaves: list[Count]  # by size in megapixels: from 2**name to 2**(name + 1), smallest first
    shapes: list[Count]  # by (width, height)
    shapes_in_all: int

    @property
    def images(self) -> int:
        return sum(one.images for one in self.statuses)

    @property
    def masks(self) -> int:
        return sum(one.images for one in self.statuses if one.name == "ok")

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.statuses)

    @property
    def pixels(self) -> int:
        return sum(one.pixels for one in self.statuses)


def read_figures(tables: duckdb.DuckDBPyConnection) -> Figures:
    """The figures of the view `current`."""
    groups: dict[str, list[tuple]] = {name: [] for name in GROUPS}
    of = {(1 << len(GROUPS)) - 1 - (1 << len(GROUPS) - 1 - place): name for place, name in enumerate(GROUPS)}
    for which, *rest in tables.sql(IMAGES).fetchall():
        value = rest[GROUPS.index(of[which])]
        if value is not None:
            groups[of[which]].append((value, *rest[len(GROUPS) :]))
    counts = {
        name: sorted((Count(row[0], row[1], row[2] or 0, row[3] or 0) for row in rows), key=by_count)
        for name, rows in groups.items()
    }
    shapes = tables.sql(SHAPES).fetchall()
    return Figures(
        statuses=counts["status"],
        models=counts["model_version"],
        failures=read_failures(tables),
        classes=read_classes(tables),
        confidence=distribution(groups["confidence_bin"], 4),
        entropy=distribution(groups["entropy_bin"], 5),
        buckets=counts["bucket"],
        formats=counts["format"],
        octaves=sorted(counts["octave"], key=lambda one: one.name),
        shapes=[Count((width, height), images) for width, height, images, _ in shapes],
        shapes_in_all=shapes[0][3] if shapes else 0,
    )


def by_count(one: Count) -> tuple[int, str]:
    """To sort most frequent first, and equal ones always alike."""
    return -one.images, str(one.name)


def distribution(rows: Sequence[tuple], column: int) -> Distribution:
    """From rows of (bin, images, ..., sum of the values at `column`)."""
    images = sum(row[1] for row in rows)
    return Distribution(
        Histogram({row[0]: row[1] for row in rows}), sum(row[column] for row in rows) / images if images else 0.0
    )


def read_failures(tables: duckdb.DuckDBPyConnection) -> list[Failure]:
    """Why images have no mask, by what the errors of several have in common."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    answer = tables.execute(FAILED)
    while rows := answer.fetchmany(ROWS):
        for status, error, images, uri in rows:
            kind = status, generalised(error or NO_REASON)
            counts[kind] += images
            examples[kind] = min(examples.get(kind, (uri, error or "")), (uri, error or ""))
    ordered = sorted(counts, key=lambda kind: (-counts[kind], kind))
    found = [Failure(*kind, counts[kind], *examples[kind]) for kind in ordered[:REASONS]]
    if rest := ordered[REASONS:]:
        images = sum(counts[kind] for kind in rest)
        found.append(Failure("", f"{len(rest):,} other reasons", images, *examples[rest[0]]))
    return found


def read_classes(tables: duckdb.DuckDBPyConnection) -> list[ClassFigures]:
    """Every class that a mask has, by name, as class ids mean other things to other networks."""
    found: dict[str, list[tuple]] = {}
    answer = tables.execute(SHARES)
    while rows := answer.fetchmany(ROWS):
        for name, *rest in rows:
            found.setdefault(name, []).append(tuple(rest))
    classes = []
    for name, bins in found.items():
        images = sum(row[1] for row in bins)
        sure = sum(row[5] for row in bins)
        classes.append(
            ClassFigures(
                name=name,
                class_id=min(row[3] for row in bins),
                images=images,
                pixels=sum(row[2] for row in bins),
                confidence=sum(row[4] or 0 for row in bins) / sure if sure else None,
                shares=Histogram({row[0]: row[1] for row in bins if row[0] is not None}),
            )
        )
    return sorted(classes, key=lambda one: (-one.pixels, one.name))
