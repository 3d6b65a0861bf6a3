"""Every question of infra/queries.sql against the same computed in plain Python, from the files themselves."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bench.outputs import write_output, write_run
from pipeline.changes import DELETIONS
from pipeline.config import StorageSettings
from pipeline.query import Question, ask, connect, questions
from pipeline.schema import encode_table
from pipeline.seal import write_sealed
from pipeline.storage import Store

TEXT = (Path(__file__).parents[2] / "infra/queries.sql").read_text()
SETTINGS, *QUESTIONS = questions(TEXT)
LABELS = ("sky", "it's", "<script>", 'a "road"')
SHARE, DOLLARS = 0.5, 1.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """An output as Python sees it."""

    rows: list[Row]  # of finished runs
    runs: dict[str, Row]  # oldest first
    gone: dict[str, datetime]

    def newest(self, model: str | None = None) -> dict[str, Row]:
        """Of each URI that is there the row of the run finished last (of a model)."""
        place = list(self.runs).index
        rows = [row for row in self.rows if model in (None, row["model_version"])]
        return {row["uri"]: row for row in sorted(rows, key=lambda row: place(row["run_id"]))}

    @property
    def current(self) -> list[Row]:
        return [row for uri, row in self.newest().items() if uri not in self.gone]

    @property
    def ok(self) -> list[Row]:
        return [row for row in self.current if row["status"] == "ok"]

    def stats(self) -> dict[str, list[tuple[Row, Row]]]:
        """By name of class, (image, class)."""
        found = defaultdict(list)
        for row in self.ok:
            for one in row["classes"]:
                found[one["name"]].append((row, one))
        return found

    def most_common(self) -> str:
        sums = {name: sum(one["pixels"] for _, one in pairs) for name, pairs in self.stats().items()}
        return min(sums, key=lambda name: (-sums[name], name))

    def share(self, rows: list[Row]) -> float:
        """Of the pixels of these images, how much is the most common class."""
        wanted = self.most_common()
        pixels = sum(one["pixels"] for row in rows for one in row["classes"] if one["name"] == wanted)
        return pixels / sum(map(area, rows))

    def both(self) -> list[tuple[Row, Row]]:
        """Images as the model before and the newest one have seen them; not those that are another image since."""
        models = list(dict.fromkeys(run["model_version"] for run in reversed(self.runs.values())))
        now, before = (self.newest(model) for model in models[:2])
        pairs = [(before[uri], row) for uri, row in now.items() if uri in before]
        pairs = [(old, new) for old, new in pairs if old["etag"] == new["etag"]]
        return [pair for pair in pairs if pair[0]["status"] == pair[1]["status"] == "ok"]


def area(row: Row) -> int:
    return row["width"] * row["height"]


def prefix(row: Row) -> str:
    return row["uri"].rpartition("/")[0]


def by(key: Callable[[Row], Any], rows: list[Row]) -> dict[Any, list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def classes(facts: Facts) -> list[tuple]:
    pixels = sum(map(area, facts.ok))
    found = []
    for name, pairs in facts.stats().items():
        ones = [one for _, one in pairs]
        total = sum(one["pixels"] for one in ones)
        sure = [one for one in ones if one["confidence"] is not None]
        weight = sum(one["pixels"] for one in sure)
        confidence = sum(one["confidence"] * one["pixels"] for one in sure) / weight
        found.append((name, len(ones), total, total / pixels, confidence))
    return sorted(found, key=lambda row: (-row[2], row[0]))


def over_time(facts: Facts) -> list[tuple]:
    groups = by(lambda row: row["run_id"], facts.ok)
    return [
        (run["finished"], run_id, facts.most_common(), facts.share(groups[run_id]))
        for run_id, run in facts.runs.items()
        if run_id in groups
    ]


def by_prefix(facts: Facts) -> list[tuple]:
    groups = by(prefix, facts.ok)
    found = [(key, len(rows), facts.most_common(), facts.share(rows)) for key, rows in groups.items()]
    return sorted(found, key=lambda row: (-row[3], row[0]))


def over_a_share(facts: Facts) -> list[tuple]:
    name = facts.most_common()
    found = [
        (row["uri"], name, one["fraction"], one["confidence"])
        for row, one in facts.stats()[name]
        if one["fraction"] > SHARE
    ]
    return sorted(found, key=lambda row: (-row[2], row[0]))


def least_sure(facts: Facts) -> list[tuple]:
    found = [(row["uri"], row["confidence"], row["entropy"]) for row in facts.ok]
    return sorted(found, key=lambda row: (row[1], row[0]))[:100]


def least_sure_classes(facts: Facts) -> list[tuple]:
    found = []
    for name, pairs in facts.stats().items():
        sure = [one["confidence"] for _, one in pairs if one["confidence"] is not None]
        found.append((name, len(pairs), mean(sure), quantiles(sure, n=10, method="inclusive")[0]))
    return sorted(found, key=lambda row: (row[2], row[0]))


def greatest_share(facts: Facts) -> list[tuple]:
    best = {
        name: min(pairs, key=lambda pair: (-pair[1]["fraction"], pair[0]["uri"]))
        for name, pairs in facts.stats().items()
    }
    found = [(name, one["fraction"], row["uri"]) for name, (row, one) in best.items()]
    return sorted(found, key=lambda row: (-row[1], row[0]))


def why_failed(facts: Facts) -> list[tuple]:
    failed = [row for row in facts.current if row["status"] != "ok"]
    groups = by(lambda row: (row["status"], re.sub(r"\d+", "N", re.sub(r"'[^']*'", "…", row["error"]))), failed)
    found = [(*key, len(rows), min(row["uri"] for row in rows)) for key, rows in groups.items()]
    return sorted(found, key=lambda row: (-row[2], row[0], row[1]))


def where_failed(facts: Facts) -> list[tuple]:
    found = []
    for key, rows in by(prefix, facts.current).items():
        failed = sum(row["status"] != "ok" for row in rows)
        found += [(key, len(rows), failed, failed / len(rows))] if failed else []
    return sorted(found, key=lambda row: (-row[3], row[0]))


def changed_classes(facts: Facts) -> list[tuple]:
    sums: tuple[Counter, Counter] = (Counter(), Counter())
    for pair in facts.both():
        for counter, row in zip(sums, pair, strict=True):
            counter.update({one["name"]: one["pixels"] for one in row["classes"]})
    total = sum(area(now) for _, now in facts.both())
    found = [(name, *(counter[name] / total for counter in sums)) for name in sums[0] | sums[1]]
    return sorted(((*row, row[2] - row[1]) for row in found), key=lambda row: (-abs(row[3]), row[0]))


def changed_images(facts: Facts) -> list[tuple]:
    found = []
    for before, now in facts.both():
        shares = [{one["name"]: one["fraction"] for one in row["classes"]} for row in (before, now)]
        moved = sum(abs(shares[1].get(name, 0) - shares[0].get(name, 0)) for name in LABELS)
        found.append((now["uri"], moved / 2))
    return sorted(found, key=lambda row: (-row[1], row[0]))[:100]


def together(facts: Facts) -> list[tuple]:
    pairs = Counter(pair for row in facts.ok for pair in combinations(sorted(one["name"] for one in row["classes"]), 2))
    return sorted(((*pair, images) for pair, images in pairs.items()), key=lambda row: (-row[2], row[0], row[1]))[:50]


def resolutions(facts: Facts) -> list[tuple]:
    found = []
    for bucket, rows in by(lambda row: row["bucket"], facts.ok).items():
        widths = [row["width"] for row in rows]
        found.append((bucket, len(rows), min(widths), max(widths), mean(row["confidence"] for row in rows)))
    return sorted(found, key=lambda row: (-row[1], row[0]))


def speed(facts: Facts) -> list[tuple]:
    found = []
    for run_id, run in facts.runs.items():
        price = run["seconds"] / 3600 * DOLLARS
        numbers: tuple = (
            run["images"] / run["seconds"],
            run["input_bytes"] / run["seconds"],
            price,
            price / run["images"] * 1e6,
        )
        if run["shards_done_before"]:
            numbers = (None,) * 4
        found.append((run_id, run["model_version"], run["finished"], run["images"], *numbers))
    return found


def same_file(facts: Facts) -> list[tuple]:
    groups = by(lambda row: (row["etag"], row["bytes"]), facts.current)
    found = [
        (*key, len(rows), min(row["uri"] for row in rows), max(row["uri"] for row in rows))
        for key, rows in groups.items()
        if len(rows) > 1
    ]
    return sorted(found, key=lambda row: (-row[2], row[3]))


def gone(facts: Facts) -> list[tuple]:
    newest = facts.newest()
    found = []
    for uri, noticed in facts.gone.items():
        classes = newest.get(uri, {}).get("classes")
        found.append((uri, noticed, classes and [one["name"] for one in classes[:3]]))
    return sorted(found, key=lambda row: (-row[1].timestamp(), row[0]))[:100]


EXPECTED = (
    classes,
    over_time,
    by_prefix,
    over_a_share,
    least_sure,
    least_sure_classes,
    greatest_share,
    why_failed,
    where_failed,
    changed_classes,
    changed_images,
    together,
    resolutions,
    speed,
    same_file,
    gone,
)
CASES = list(zip(QUESTIONS, EXPECTED, strict=True))


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Three nights, the last of a new model; one that was interrupted, one that goes on; images that have gone."""
    folder = tmp_path_factory.mktemp("it's [an] output")
    write_output(folder, 1500, runs=3, labels=LABELS, prefix="s3://photos/it's")
    change(folder / "segments/run=night-3/shard-000000.parquet")
    write_run(folder, "unfinished", 50, 4, LABELS, "s3://photos/it's", {})
    (folder / "runs/unfinished/run.json").unlink()
    record = folder / "runs/night-2/run.json"
    record.write_text(record.read_text().replace('"shards_done_before": 0', '"shards_done_before": 1'))
    noticed = datetime(2026, 2, 1, 12, tzinfo=UTC)
    uris = sorted(row["uri"] for row in read_rows(folder))[5:200:20]
    (folder / "deletions").mkdir()
    for number, (some, is_gone) in enumerate([(uris, True), (uris[:2], False)]):
        rows = [{"uri": uri, "is_gone": is_gone, "noticed": noticed.replace(day=number + 1)} for uri in some]
        data = write_sealed(pa.Table.from_pylist(rows, DELETIONS))
        (folder / f"deletions/part-{number:05d}.parquet").write_bytes(data)
    return folder


def change(path: Path) -> None:
    """Give some images of a shard another etag, as if they had been replaced."""
    table = pq.ParquetFile(path).read()
    etags = [f"other-{etag}" if at % 3 == 0 else etag for at, etag in enumerate(table["etag"].to_pylist())]
    table = table.set_column(1, table.schema.field("etag"), [etags])
    path.write_bytes(encode_table(table, {}))


def read_rows(folder: Path) -> list[Row]:
    return [
        row for path in sorted(folder.glob("segments/*/*.parquet")) for row in pq.ParquetFile(path).read().to_pylist()
    ]


@pytest.fixture(scope="module")
def facts(output) -> Facts:
    runs = [json.loads(path.read_text()) for path in output.glob("runs/*/run.json")]
    for run in runs:
        run["finished"] = datetime.fromisoformat(run["finished"]).replace(tzinfo=None)
    runs.sort(key=lambda run: run["finished"])
    gone: dict[str, datetime] = {}
    for path in sorted(output.glob("deletions/*")):
        for row in pq.ParquetFile(path).read().to_pylist():
            gone[row["uri"]] = row["noticed"].replace(tzinfo=None)
            if not row["is_gone"]:
                del gone[row["uri"]]
    known = {run["run_id"]: run for run in runs}
    return Facts([row for row in read_rows(output) if row["run_id"] in known], known, gone)


@pytest.fixture(scope="module")
def tables(output):
    with connect(Store(str(output), StorageSettings())) as tables:
        ask(tables, SETTINGS.sql)
        yield tables


@pytest.mark.parametrize(("question", "expected"), CASES, ids=[expected.__name__ for expected in EXPECTED])
def test_a_question_has_the_answer_that_python_finds(question: Question, expected, tables, facts):
    answer = [tuple(row.values()) for row in ask(tables, question.sql).read_all().to_pylist()]
    computed = expected(facts)
    assert computed, "a question without an answer tests nothing"
    assert len(answer) == len(computed)
    for found, wanted in zip(answer, computed, strict=True):
        assert len(found) == len(wanted)
        assert all(map(is_same, found, wanted)), (found, wanted)


def is_same(found: object, wanted: object) -> bool:
    if isinstance(wanted, float):
        return found is not None and math.isclose(float(found), wanted, rel_tol=1e-6, abs_tol=1e-12)
    return found == wanted


def test_every_question_says_what_it_asks():
    assert len(QUESTIONS) >= 12
    assert all(question.title.rstrip(")").endswith(("?", ".")) for question in QUESTIONS)
