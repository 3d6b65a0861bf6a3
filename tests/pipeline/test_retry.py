"""What failed is tried again, once, by the settings that it had; what did not is left alone."""

import json
import shutil
from pathlib import Path

import duckdb
import pytest
import torch

from model.checkpoint import save_huggingface
from model.labels import label_set
from model.segformer import Segformer, variant
from pipeline.commit import Run, choose, unfinished
from pipeline.config import ConfigurationError, RetrySettings, SegmentSettings, StorageSettings, VerifySettings
from pipeline.policy import ONE_LOOK, Looks
from pipeline.retry import plan_again, retry, settings_of
from pipeline.run import segment
from pipeline.storage import Store
from pipeline.tables import workspace
from pipeline.verify import verify
from pipeline.views import views
from tests.conftest import NAMES, Finished, Quiet
from tests.pipeline.test_verify import no_spread


class Listener(Quiet):
    def __init__(self) -> None:
        self.said = ""

    def say(self, text: str) -> None:
        self.said += text + "\n"


@pytest.fixture
def output(finished: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.output, tmp_path / "out"))


def statuses(output: Path) -> list[str]:
    """Of the newest row of each image."""
    with duckdb.connect() as sql:
        sql.execute(views(Store(str(output), StorageSettings())))
        return sorted(status for (status,) in sql.sql("SELECT status FROM current").fetchall())


def test_a_retry_mends_what_was_missing_and_does_nothing_else(finished, output):
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert statuses(output) == ["missing"] + 11 * ["ok"] + 3 * ["unreadable"]
    finished.bring_back()
    try:
        result = retry(RetrySettings(run=str(output)), Listener())
    finally:
        finished.missing.unlink()
    assert result.is_new
    assert result.record["statuses"] == {"ok": 1}
    assert result.record["retries"] == "first"
    assert result.record["settings"] == json.loads((output / "runs/first/run.json").read_text())["settings"]
    assert {path: path.read_bytes() for path in before} == before
    assert statuses(output) == 12 * ["ok"] + 3 * ["unreadable"]
    report = verify(VerifySettings(output=str(output)), Quiet(), no_spread)
    assert (report.findings.first, report.checked["rows"]) == ([], 16)

    listener = Listener()
    assert retry(RetrySettings(run=f"{output}/runs/first"), listener).record is None
    assert "1 images of run first are failed or missing, 1 of which are ok by now, or another retry's" in listener.said
    assert "nothing to try again" in listener.said
    assert choose(str(output), StorageSettings()).id == result.record["run_id"]  # which has nothing left to retry
    assert retry(RetrySettings(run=str(output)), Listener()).record is None

    settings = SegmentSettings(
        input=str(finished.collection), output=str(output), checkpoint=finished.checkpoint, policy="short=64"
    )
    assert segment(settings, listener := Listener()).record is None
    assert "nothing new" in listener.said

    (output / "runs" / result.record["run_id"] / "run.json").unlink()  # as if it had been stopped just before
    assert unfinished(choose(f"{output}/runs/first", settings).store, origin_of(output, "first")) is None
    again = retry(RetrySettings(run=f"{output}/runs/first"), listener := Listener())
    assert "was not finished, so it goes on" in listener.said
    assert (again.record["run_id"], again.record["statuses"]) == (result.record["run_id"], {"ok": 1})


def origin_of(output: Path, run_id: str):
    return choose(f"{output}/runs/{run_id}", StorageSettings()).contents().origin


def test_what_is_unreadable_is_tried_again_when_asked(output):
    settings = RetrySettings(run=f"{output}/runs/first", unreadable=True)
    run = choose(settings.run, settings)
    job = settings_of(run, run.record(), settings)
    with workspace() as space:
        plan = plan_again(run, ("failed", "missing", "unreadable"), job, Listener(), space)
        names = {uri.rpartition("/")[2] for (uri,) in space.tables.execute("SELECT uri FROM images").fetchall()}
    assert plan.images == 4
    assert names == {"image-04.jpg", "empty.jpg", "text.jpg", "truncated.jpg"}


def test_a_retry_looks_as_often_as_the_run_did(output):
    run = choose(f"{output}/runs/first", StorageSettings())
    record, settings = run.record(), RetrySettings(run=f"{output}/runs/first")
    before = settings_of(run, record, settings)
    assert before.looks == ONE_LOOK
    asked = SegmentSettings(**before.model_dump() | {"flip": True, "scales": "0.5,1,1.5"})
    found = settings_of(
        run, json.loads(json.dumps(record | {"settings": asked.mask_settings() | {"batch_pixels": 9}})), settings
    )
    assert found.looks == asked.looks == Looks(True, (0.5, 1.0, 1.5))
    assert found.mask_settings() == asked.mask_settings()


def test_a_retry_that_could_not_be_right_is_refused(output, tmp_path):
    torch.manual_seed(8)
    save_huggingface(Segformer(variant("b0", labels=len(NAMES))), label_set(NAMES), str(tmp_path / "other"))
    with pytest.raises(ConfigurationError, match=r"with it the model version is .* and that of run first is"):
        retry(RetrySettings(run=f"{output}/runs/first", checkpoint=str(tmp_path / "other")), Listener())
    record = output / "runs/first/run.json"
    for damaged in ("{}", '{"settings": 1}'):
        record.write_text(damaged)
        with pytest.raises(ConfigurationError, match="finish it" if damaged == "{}" else "is damaged"):
            retry(RetrySettings(run=f"{output}/runs/first"), Listener())
    record.unlink()
    with pytest.raises(ConfigurationError, match=r"is not finished.*finish it: swath segment .* --run-id first"):
        retry(RetrySettings(run=f"{output}/runs/first"), Listener())


def test_a_plan_of_before_there_were_retries_is_read(output):
    path = output / "runs/first/plan.json"
    contents = json.loads(path.read_text())
    del contents["origin"]["retries"]
    path.write_text(json.dumps(contents))
    run = Run(choose(str(output), StorageSettings()).store, "first")
    assert run.contents().origin.retries == ""
