"""`verify` proves what is whole, sees whatever is not, and is never stopped by it."""

import json
import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.labels import label_set
from pipeline import verify as verifying
from pipeline.changes import RETURNS
from pipeline.cluster import spread
from pipeline.commit import Run
from pipeline.config import ConfigurationError, VerifySettings
from pipeline.index import SCHEMA as INDEX_SCHEMA
from pipeline.index import add_part
from pipeline.masks import decode_mask, encode_mask
from pipeline.proof import histogram
from pipeline.schema import SUMMARY_KEY, encode_shard
from pipeline.seal import NAME, sealed, write_sealed
from pipeline.storage import Store
from pipeline.verify import Report, verify
from tests.conftest import NAMES, Finished, Quiet

LABELS = label_set(NAMES)


@pytest.fixture
def output(finished: Finished, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished.output, tmp_path / "out"))


def check(output: object) -> Report:
    return verify(VerifySettings(output=str(output)), Quiet(), no_spread)


def no_spread(*_: object) -> Any:
    raise AssertionError("a small output is proven here")


def found(output: Path) -> str:
    """The first thing that is wrong."""
    findings = check(output).findings
    assert findings.count, "nothing was seen"
    assert all("\n" not in line for line in findings.first)
    return "\n".join(findings.first)


def test_a_finished_output_is_proven(output):
    report = check(output)
    assert (report.findings.first, report.findings.count) == ([], 0)
    pixels = json.loads((output / "runs/first/run.json").read_text())["pixels"]
    assert report.checked == {
        "index parts": 1,
        "indexed images": 15,
        "runs": 1,
        "plan files": 1,
        "shards": 5,
        "rows": 15,
        "masks": 11,
        "mask pixels": pixels,
    }


def test_a_return_is_to_a_run_that_has_a_row_of_the_image(output):
    uri = pq.read_table(output / "segments", columns=["uri"])["uri"][0].as_py()
    (output / "returns").mkdir()
    part = output / "returns/part-00000.parquet"
    for uris, run_id, expected in [
        ([uri], "first", ""),
        ([uri], "other", f"{uri}: has returned to its row in run other, where there is none"),
        ([uri, "nobody's"], "first", "nobody's: has returned to its row in run first, where there is none"),
    ]:
        rows = [{"uri": uri, "run_id": run_id, "noticed": datetime.now(UTC)} for uri in uris]
        part.write_bytes(write_sealed(pa.Table.from_pylist(rows, RETURNS)))
        report = check(output)
        assert (report.findings.first, report.checked["return parts"]) == ([expected] * bool(expected), 1)
    part.rename(output / "returns/part-00001.parquet")
    assert "returns/part-00000.parquet: is not there, but later ones are" in found(output)
    (output / "returns/.part-00001.parquet.f00").write_bytes(b"of a process that was killed")
    (output / "returns/part-00001.parquet").write_bytes(write_sealed(pa.table({"uri": [uri]})))
    assert "returns/part-00001.parquet: its columns are not those of the returns" in check(output).findings.first


def test_on_s3_and_on_all_machines_the_same_is_proven(finished, bucket, monkeypatch):
    filesystem = fsspec.filesystem("s3")
    filesystem.put(f"{finished.output}/", f"{bucket}/out/", recursive=True)
    name = next(path for path in filesystem.find(f"{bucket}/out/segments"))
    data = filesystem.cat(name)
    filesystem.pipe(name, data[:-200] + b"x" + data[-199:])
    monkeypatch.setattr(verifying, "SPREAD", 0)
    settings = VerifySettings(output=f"{bucket}/out")
    report = verify(settings, Quiet(), partial(spread, settings))
    assert report.checked["rows"] < 15
    assert len(report.findings.first) == 1
    assert name.rpartition("/")[2] in report.findings.first[0]
    filesystem.pipe(name, data)
    monkeypatch.setattr(verifying, "SPREAD", 100)
    report = check(f"{bucket}/out")
    assert (report.findings.count, report.checked["rows"]) == (0, 15)


def test_no_damage_to_any_file_goes_unseen_or_stops_it(output):
    files = sorted(path for path in output.rglob("*") if path.is_file())
    rng = random.Random(7)
    for number in range(40):
        path = files[number % len(files)]
        whole = path.read_bytes()
        path.write_bytes(damaged := damage(whole, rng))
        assert damaged == whole or check(output).findings.count, (number, path)
        path.write_bytes(whole)
    assert not check(output).findings.count


def damage(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes(100) + data[at + 100 :]
        case 2:
            return rng.randbytes(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def shard_with(output: Path, status: str, rows: int = 2) -> Path:
    """The file of a shard that has several rows, one of them with this status, first."""
    for path in sorted(output.glob("segments/run=first/*.parquet")):
        statuses = pq.read_table(path, columns=["status"], partitioning=None)["status"].to_pylist()
        if len(statuses) >= rows and status in statuses:
            return path
    raise AssertionError(f"no shard has a row that is {status}")


def rewrite(path: Path, change: Callable[[list[dict], dict[bytes, bytes]], object]) -> None:
    """Change rows or metadata of a shard and seal it again, as somebody would on purpose, or a bug of ours."""
    table = pq.read_table(path, partitioning=None)
    rows, metadata = table.to_pylist(), {k: v for k, v in table.schema.metadata.items() if k.startswith(b"swath.")}
    change(rows, metadata)
    metadata = {key: value for key, value in metadata.items() if key not in (b"swath.sha256", b"swath.schema")}
    path.write_bytes(encode_shard(rows, metadata))


def first(rows: list[dict], status: str = "ok") -> dict:
    return next(row for row in rows if row["status"] == status)


def repaint(row: dict, class_id: int) -> None:
    mask = decode_mask(row["mask"]).copy()
    mask[0, 0] = class_id
    row["mask"] = encode_mask(mask, LABELS)


WRONG_ROWS = {
    "is not the image that the plan has": lambda rows: rows.reverse(),
    "3 rows for 4 images": lambda rows: rows.pop(),
    "5 rows for 4 images": lambda rows: rows.append(rows[0]),
    "has the status 'fine'": lambda rows: first(rows).update(status="fine"),
    "is not the image": lambda rows: first(rows).update(etag="0"),
    "says it is of model x": lambda rows: first(rows).update(model_version="x"),
    "and run x": lambda rows: first(rows).update(run_id="x"),
    "is ok and has an error": lambda rows: first(rows).update(error="none"),
    "has the confidence 1.5": lambda rows: first(rows).update(confidence=1.5),
    "has the confidence nan": lambda rows: first(rows).update(confidence=float("nan")),
    "has the entropy -1.0": lambda rows: first(rows).update(entropy=-1.0),
    "was seen at None": lambda rows: first(rows).update(bucket=None),
    "has no mask or no classes": lambda rows: first(rows).update(mask=None),
    "pixels for an image of 7x": lambda rows: first(rows).update(width=7),
    "cannot be decoded": lambda rows: first(rows).update(mask=first(rows)["mask"][:60]),
    "cannot be decoded (Unidentified": lambda rows: first(rows).update(mask=b"no PNG"),
    "has the class id 200": lambda rows: repaint(first(rows), 200),
    "other classes than its mask": lambda rows: repaint(first(rows), (decode_mask(first(rows)["mask"])[0, 0] + 1) % 5),
    "has classes by wrong names": lambda rows: first(rows)["classes"][0].update(name="x"),
    "has other classes": lambda rows: first(rows)["classes"].reverse(),
    "has fractions": lambda rows: first(rows)["classes"][0].update(fraction=0.0),
    "has a class whose confidence": lambda rows: first(rows)["classes"][0].update(confidence=-0.5),
    "other input_bytes than its rows": lambda rows: first(rows).update(bytes=5),
    "other statuses than its rows": lambda rows: first(rows).update(status="changed"),
}


@pytest.mark.parametrize("expected", WRONG_ROWS)
def test_a_row_that_says_something_wrong_is_seen(output, expected):
    rewrite(shard_with(output, "ok", 4), lambda rows, _: WRONG_ROWS[expected](rows))
    assert expected in found(output)


WRONG_FAILURES = {
    "no reason of one line": {"error": None},
    "has no mask, and no reason": {"error": "two\nlines"},
    "has a mask or its statistics": {"confidence": 0.5},
    "other reasons than its rows": {"error": "bad luck"},
}


@pytest.mark.parametrize("expected", WRONG_FAILURES)
def test_a_failure_that_says_something_wrong_is_seen(output, expected):
    path = shard_with(output, "unreadable", 1)
    rewrite(path, lambda rows, _: first(rows, "unreadable").update(WRONG_FAILURES[expected]))
    assert expected in found(output)


def test_metadata_that_says_something_wrong_is_seen(output):
    path = shard_with(output, "ok")
    whole = path.read_bytes()
    for key, value, expected in [
        (b"swath.run_id", b"second", "another run's"),
        (b"swath.labels", b"a\nb\nc\nd\ne", "its labels are not those"),
        (SUMMARY_KEY, b'{"images": 7}', "other images than its rows: 7"),
        (SUMMARY_KEY, b"[]", "cannot be read"),
        (SUMMARY_KEY, b"{", "cannot be read"),
    ]:
        rewrite(path, lambda _, metadata, key=key, value=value: metadata.update({key: value}))
        assert expected in found(output)
        path.write_bytes(whole)


def change_json(path: Path, seal: bool = True, **values: object) -> None:
    record = json.loads(path.read_text()) | values
    record.pop(NAME, None)
    path.write_text(json.dumps(sealed(record) if seal else record))


def test_a_record_that_disagrees_with_its_plan_and_shards_is_seen(output):
    path = output / "runs/first/run.json"
    whole = path.read_bytes()
    for values, expected in [
        ({"pixels": 1}, "its pixels are not the sum of its shards: 1"),
        ({"statuses": {"ok": 15}}, "its statuses are not the sum"),
        ({"class_pixels": {}}, "its class_pixels are not the sum"),
        ({"reasons": {"missing: x": "one"}}, "its reasons are not the sum"),
        ({"images": 14}, "its images is not that of the plan"),
        ({"files": []}, "its files is not that of the plan"),
        ({"labels": NAMES[:2]}, "its labels are not those"),
        ({"labels": 3}, "its labels are no names"),
        ({"settings": []}, "its policy is not that"),
        ({"run_id": "second"}, "its run_id is not"),
    ]:
        change_json(path, **values)
        assert expected in found(output)
        path.write_bytes(whole)
    change_json(path, seal=False)
    assert "has no checksum" in found(output)


def test_a_plan_that_is_another_is_seen(output):
    path = output / "runs/first/plan.json"
    whole = path.read_bytes()
    contents = json.loads(whole)
    for values, expected in [
        ({"images": contents["images"][::-1]}, "images, not"),
        ({"images": [10**30] * 5}, "its counts are not those of shards"),
        ({"images": "many"}, "cannot be read (ValidationError"),
        ({"parts": ["/etc/passwd"]}, "its files are not those of a plan of this run"),
        ({"parts": []}, "its files are not those of a plan of this run"),
        ({"origin": contents["origin"] | {"model_version": "x"}}, "of model"),
        ({"work": contents["work"][::-1]}, "its plan_sha256 is not that"),
    ]:
        path.write_text(json.dumps(contents | values))
        assert expected in found(output)
    path.write_bytes(b"[" * 100_000)
    assert "plan.json: cannot be read" in found(output)
    path.unlink()
    assert "plan.json: is not there" in found(output)


def test_what_is_missing_or_there_besides_is_seen(output):
    segments = output / "segments/run=first"
    (segments / ".shard-000001.parquet.0123456789abcdef").touch()  # by a process that was killed
    assert not check(output).findings.count
    for name in (
        "run=first/shard-000099.parquet",
        "run=first/shard-1.parquet",
        "run=first/folder/x",
        "x",
        "run=other/x",
    ):
        path = output / "segments" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert name.removesuffix("/x") in found(output)
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    assert not check(output).findings.count
    shard = segments / "shard-000001.parquet"
    data = shard.read_bytes()
    shard.unlink()
    assert "shard-000001.parquet: is not there, but the run is finished" in found(output)
    shard.write_bytes(data)
    (output / "runs/first/run.json").unlink()
    assert "run first: is not finished; to go on: swath segment file://" in found(output)
    assert check(output).findings.count == 1  # what it has not done is not lost


def clone(output: Path, retries: str) -> None:
    """A second run that is whole in itself and has the same images, or says that it retries the first."""
    shutil.copytree(output / "segments/run=first", output / "segments/run=second")
    shutil.copytree(output / "runs/first", output / "runs/second")

    def rename(rows: list[dict], metadata: dict[bytes, bytes]) -> None:
        metadata[b"swath.run_id"] = b"second"
        for row in rows:
            row["run_id"] = "second"

    for path in output.glob("segments/run=second/*.parquet"):
        rewrite(path, rename)
    contents = json.loads((output / "runs/second/plan.json").read_text())
    contents["parts"] = [name.replace("first", "second") for name in contents["parts"]]
    contents["origin"]["retries"] = retries
    (output / "runs/second/plan.json").write_text(json.dumps(contents))
    store = Store(str(output), VerifySettings(output=str(output)))
    run = Run(store, "second")
    files = [run.shard_name(shard) for shard in run.done()]
    values = {"run_id": "second", "retries": retries, "files": files, "plan_sha256": run.plan_digest()}
    change_json(output / "runs/second/run.json", **values)


@pytest.mark.parametrize(
    ("retries", "expected", "count"),
    [
        ("", "2 rows of model", 15),
        ("first", "done again by run second, but it has not failed in run first", 11),
        ("nowhere", "done again by run second, but it has not failed in run nowhere", 15),
    ],
)
def test_what_is_there_twice_is_seen_unless_it_failed_and_was_retried(output, retries, expected, count):
    clone(output, retries)
    assert expected in found(output)
    assert check(output).findings.count == count


def test_an_indexed_image_without_a_row_is_seen(output):
    store = Store(str(output), VerifySettings(output=str(output)))
    known = pq.read_table(output / "index/part-00000.parquet").slice(0, 1).to_pylist()[0]
    for etag in ("1", "2"):  # of its versions the last counts
        add_part(store, [pa.Table.from_pylist([known | {"uri": "file:///new.jpg", "etag": etag}], INDEX_SCHEMA)])
        assert "file:///new.jpg: indexed, but has no row" in found(output)
        assert check(output).findings.count == 1
    (output / "index/part-00001.parquet").unlink()
    assert "index/part-00001.parquet: is not there" in found(output)


def test_an_output_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="neither runs nor an index are here"):
        check(tmp_path)


def test_masks_of_many_classes_and_of_many_pixels_are_counted():
    labels = label_set([str(number) for number in range(300)])
    mask = np.random.default_rng(1).integers(0, 300, (1100, 1000)).astype(np.uint16)
    counts = histogram(encode_mask(mask, labels), 1000, 1100, 300)
    assert (counts == np.bincount(mask.ravel(), minlength=300)).all()
    assert "class id 299" in histogram(encode_mask(mask, labels), 1000, 1100, 299)
