"""What is new, has changed, was done by another model or has gone is told apart."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import index
from pipeline.changes import Changes, earlier_runs, leave_out, note_deletions
from pipeline.commit import Run
from pipeline.config import StorageSettings
from pipeline.plan import Origin, make_plan
from pipeline.policy import parse_policy
from pipeline.storage import Store
from pipeline.tables import Workspace, workspace

ORIGIN = Origin(("s3://in",), (), (), "short=32", "model a")
OTHER_MODEL = Origin(("s3://in",), (), (), "short=32", "model b")
OTHER_INPUT = Origin(("s3://elsewhere",), (), (), "short=32", "model a")


def collection(space: Workspace, *images: str) -> None:
    """Fill the table `images` from words like "uri etag" or "uri etag file"."""
    rows = []
    for image in images:
        uri, etag, *file = image.split()
        rows.append({"uri": uri, "etag": etag, "bytes": 9, "width": 9, "height": 9, "file": file[0] if file else None})
    space.tables.register("given", pa.Table.from_pylist(rows, index.SCHEMA))
    space.tables.execute("CREATE TABLE images AS FROM given")


@pytest.fixture
def night(tmp_path: Path):
    """Look at a collection as the next night would, and begin a run over what there is to do."""
    output = Store(str(tmp_path / "out"), StorageSettings())

    def look(*images: str, origin: Origin = ORIGIN) -> tuple[Changes, list[str]]:
        with workspace() as space:
            collection(space, *images)
            changes = leave_out(space.tables, output, origin, earlier_runs(output))
            todo = [uri for (uri,) in space.tables.sql("SELECT uri FROM images ORDER BY 1").fetchall()]
            note_deletions(space.tables, output)
            if todo:
                plan = make_plan(space.tables, space.folder, parse_policy("short=32"), None, 10**6)
                Run(output, f"run-{len(output.names('runs'))}").begin(replace(plan, changes=changes.todo), origin)
        return changes, todo

    look.output = output
    return look


def test_each_night_does_what_is_new_changed_or_another_models(night):
    assert night("a 1", "b 1") == (Changes(2, 0, 0, 0, 0, ()), ["a", "b"])
    assert night("a 1", "b 1") == (Changes(0, 0, 0, 0, 0, ()), [])
    assert night("a 1", "b 2", "c 1") == (Changes(1, 1, 0, 0, 0, ()), ["b", "c"])
    assert night("a 1", "b 2", "c 1", "d 1", origin=OTHER_MODEL) == (Changes(1, 0, 3, 0, 0, ()), ["a", "b", "c", "d"])
    assert night("a 1", "b 1", "c 1", "d 1") == (Changes(0, 0, 1, 0, 0, ()), ["d"])


def test_an_image_that_has_gone_is_told_of_once_and_again_when_it_is_back(night):
    night("a 1", "b 1", "c 1")
    assert night("a 1", "c 1")[0] == Changes(0, 0, 0, 1, 0, ("b",))
    assert night("a 1", "c 1")[0] == Changes(0, 0, 0, 0, 0, ())
    assert night("a 1", "b 1", "c 1") == (Changes(0, 0, 0, 0, 1, ()), [])
    assert night("a 1")[0] == Changes(0, 0, 0, 2, 0, ("b", "c"))
    assert night("a 1", "b 2", "c 1") == (Changes(0, 1, 0, 0, 2, ()), ["b"])
    assert len(night.output.names("deletions")) == 4


def test_what_another_collection_has_is_not_gone(night):
    night("x 1", origin=OTHER_INPUT)
    assert night("a 1")[0] == Changes(1, 0, 0, 0, 0, ())
    assert night("x 1", "a 1", origin=OTHER_INPUT) == (Changes(0, 0, 0, 0, 0, ()), [])


def test_images_in_a_file_that_cannot_be_opened_are_not_gone_and_those_it_has_lost_are(night):
    night("t#a 1 t", "t#b 1 t", "c 1")
    assert night("t 2", "c 1")[0].gone == 0, "the row of t itself says that it could not be opened"
    assert night("t#a 2 t", "c 1")[0].examples == ("t#b",)
    assert night("c 1")[0].examples == ("t", "t#a")


def test_a_message_says_what_there_is_and_names_a_few_that_have_gone():
    assert str(Changes(0, 0, 0, 0, 0, ())) == "nothing new"
    assert str(Changes(1200, 3, 0, 0, 0, ())) == "1,200 new, 3 changed"
    assert str(Changes(0, 0, 2, 4, 1, ("a", "b", "c"))) == (
        "2 done by another model, 4 gone, 1 there again (gone: a, b, c, ...)"
    )


def test_a_plan_of_before_there_were_changes_is_read(night):
    night("a 1")
    (run,) = earlier_runs(night.output)
    assert run.contents.changes == {"new": 1, "changed": 0, "other_model": 0}
    name = Path(night.output.uri(run.run.plan_name).removeprefix("file://"))
    text = name.read_text()
    name.write_text(text.replace(',"changes":{"new":1,"changed":0,"other_model":0}', ""))
    assert name.read_text() != text
    assert earlier_runs(night.output)[0].contents.changes == {}
