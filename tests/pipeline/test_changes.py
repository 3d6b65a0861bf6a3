"""What is new, has changed, was done by another model, has gone or has returned is told apart."""

import tempfile
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import changes as logs
from pipeline import index
from pipeline.changes import BACK_FOLDER, RETURNS, Changes, earlier_runs, leave_out, note_changes
from pipeline.commit import PlanFiles, Run
from pipeline.config import StorageSettings
from pipeline.plan import Origin, make_plan
from pipeline.policy import parse_policy
from pipeline.schema import encode_shard
from pipeline.storage import Store
from pipeline.tables import Workspace, workspace
from pipeline.views import views

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


@dataclass
class Nights:
    """Nights over an output, without the work of a run."""

    output: Store

    def __call__(self, *images: str, origin: Origin = ORIGIN, is_finished: bool = False) -> tuple[Changes, list[str]]:
        """Look at a collection as the next night would, and begin a run over what there is to do, or finish it too."""
        with workspace() as space:
            collection(space, *images)
            changes = leave_out(space.tables, self.output, origin, earlier_runs(self.output))
            todo = [uri for (uri,) in space.tables.sql("SELECT uri FROM images ORDER BY 1").fetchall()]
            note_changes(space.tables, self.output)
            if todo:
                plan = make_plan(space.tables, space.folder, parse_policy("short=32"), None, 10**6)
                run = Run(self.output, f"run-{len(self.output.names('runs'))}")
                run.begin(replace(plan, changes=changes.todo), origin)
                if is_finished:
                    self.finish(run)
        return changes, todo

    def finish(self, run: Run) -> None:
        """Put rows that say no more than what they are of, and the record."""
        contents, plan = run.contents(), PlanFiles(run)
        version = contents.origin.model_version
        for shard in range(len(contents.images)):
            same = {"bytes": 9, "status": "ok", "model_version": version, "run_id": run.id}
            rows = [{"uri": image.uri, "etag": image.etag} | same for image in plan.images(shard)]
            run.put_shard(shard, encode_shard(rows, {}))
        run.commit({"run_id": run.id, "model_version": version, "finished": datetime.now(UTC).isoformat()})

    def current(self) -> dict[str, tuple[str, str]]:
        """Etag and model of each image in the view `current`."""
        with duckdb.connect() as tables:
            tables.execute(views(self.output))
            rows = tables.sql("SELECT uri, etag, model_version FROM current").fetchall()
        found = {uri: (etag, model) for uri, etag, model in rows}
        assert len(found) == len(rows), "no image is current twice"
        return found


@pytest.fixture
def night(tmp_path: Path) -> Nights:
    return Nights(Store(str(tmp_path / "out"), StorageSettings()))


def test_each_night_does_what_is_new_changed_or_another_models(night):
    assert night("a 1", "b 1") == (Changes(2, 0, 0, 0, 0, 0, ()), ["a", "b"])
    assert night("a 1", "b 1") == (Changes(0, 0, 0, 0, 0, 0, ()), [])
    assert night("a 1", "b 2", "c 1") == (Changes(1, 1, 0, 0, 0, 0, ()), ["b", "c"])
    assert night("a 1", "b 2", "c 1", "d 1", origin=OTHER_MODEL) == (
        Changes(1, 0, 3, 0, 0, 0, ()),
        ["a", "b", "c", "d"],
    )
    assert night("a 1", "b 1", "c 1", "d 1") == (Changes(0, 0, 1, 0, 0, 0, ()), ["d"])


def test_an_image_that_has_gone_is_told_of_once_and_again_when_it_is_back(night):
    night("a 1", "b 1", "c 1")
    assert night("a 1", "c 1")[0] == Changes(0, 0, 0, 1, 0, 0, ("b",))
    assert night("a 1", "c 1")[0] == Changes(0, 0, 0, 0, 0, 0, ())
    assert night("a 1", "b 1", "c 1") == (Changes(0, 0, 0, 0, 1, 0, ()), [])
    assert night("a 1")[0] == Changes(0, 0, 0, 2, 0, 0, ("b", "c"))
    assert night("a 1", "b 2", "c 1") == (Changes(0, 1, 0, 0, 2, 0, ()), ["b"])
    assert len(night.output.names("deletions")) == 4


def test_what_another_collection_has_is_not_gone(night):
    night("x 1", origin=OTHER_INPUT)
    assert night("a 1")[0] == Changes(1, 0, 0, 0, 0, 0, ())
    assert night("x 1", "a 1", origin=OTHER_INPUT) == (Changes(0, 0, 0, 0, 0, 0, ()), [])


def test_images_in_a_file_that_cannot_be_opened_are_not_gone_and_those_it_has_lost_are(night):
    night("t#a 1 t", "t#b 1 t", "c 1")
    assert night("t 2", "c 1")[0].gone == 0, "the row of t itself says that it could not be opened"
    assert night("t#a 2 t", "c 1")[0].examples == ("t#b",)
    assert night("c 1")[0].examples == ("t", "t#a")


def test_an_image_that_is_put_back_is_current_again_without_a_second_row_and_told_of_once(night):
    night("a 1", "b 1", is_finished=True)
    night("a 2", "b 1", is_finished=True)
    assert night.current() == {"a": ("2", "model a"), "b": ("1", "model a")}
    assert night("a 1", "b 1") == (Changes(0, 0, 0, 0, 0, 1, ()), [])
    assert night.current() == {"a": ("1", "model a"), "b": ("1", "model a")}
    assert night("a 1", "b 1") == (Changes(0, 0, 0, 0, 0, 0, ()), [])
    assert night("a 2", "b 1")[0].returned == 1, "and so it goes to and fro"
    assert night.current()["a"] == ("2", "model a")
    assert night("a 3", "b 1", is_finished=True) == (Changes(0, 1, 0, 0, 0, 0, ()), ["a"])
    assert night.current()["a"] == ("3", "model a"), "a row that came later is newer than any return"
    assert len(night.output.names(BACK_FOLDER)) == 2


def test_a_model_that_is_used_again_has_its_rows_current_again(night):
    night("a 1", "b 1", is_finished=True)
    night("a 1", "b 1", origin=OTHER_MODEL, is_finished=True)
    assert night("a 1", "b 1", "c 1", is_finished=True) == (Changes(1, 0, 0, 0, 0, 2, ()), ["c"])
    assert night.current() == dict.fromkeys("abc", ("1", "model a"))
    assert night("a 1", "b 1", "c 1", origin=OTHER_MODEL, is_finished=True)[0] == Changes(0, 0, 1, 0, 0, 2, ())


def test_an_image_that_goes_and_is_there_again_as_it_was_before_it_changed_is_told_of_as_both(night):
    night("a 1", "b 1", is_finished=True)
    night("a 2", "b 1", is_finished=True)
    night("b 1")
    assert night("a 1", "b 1")[0] == Changes(0, 0, 0, 0, 1, 1, ())
    assert night.current()["a"] == ("1", "model a")


def test_what_an_unfinished_run_will_have_is_no_return_yet(night):
    night("a 1")
    night("a 2", is_finished=True)
    assert night("a 1")[0].returned == 0
    assert night.current() == {"a": ("2", "model a")}
    night.finish(Run(night.output, "run-0"))
    assert night.current() == {"a": ("1", "model a")}, "and then it is the newest by itself"
    assert night("a 1")[0].returned == 0


def test_very_many_returns_are_kept_in_several_parts(night, monkeypatch):
    images = [f"{number:04d}" for number in range(5000)]
    for etag in "12":
        night(*(f"{image} {etag}" for image in images), is_finished=True)
    monkeypatch.setattr(logs, "BATCH", 1000)  # DuckDB gives some 2,000 at once at the least
    monkeypatch.setattr(logs, "BATCHES", 1)
    assert night(*(f"{image} 1" for image in images))[0].returned == 5000
    parts = night.output.names(BACK_FOLDER)
    assert parts == [f"part-{number:05d}.parquet" for number in range(len(parts))]
    assert len(parts) > 1
    tables = [pq.read_table(night.output.open(f"{BACK_FOLDER}/{name}")) for name in parts]
    assert all(table.schema.equals(RETURNS) for table in tables)
    assert [uri for table in tables for uri in table["uri"].to_pylist()] == images
    assert set(night.current().values()) == {("1", "model a")}


@dataclass
class Truth:
    """What must be current, by what was seen in which order, with no row and no log."""

    done: set[tuple[str, str, str]] = field(default_factory=set)  # URI, etag and model of rows that are there
    planned: dict[tuple[str, ...], set[str]] = field(default_factory=dict)  # by collection
    newest: dict[str, tuple[str, str]] = field(default_factory=dict)  # etag and model
    gone: set[str] = field(default_factory=set)

    def look(self, images: dict[str, str], origin: Origin) -> int:
        """See a collection; how many images have returned."""
        self.gone = (self.gone | self.planned.get(origin.input, set())) - set(images)
        version = origin.model_version
        returned = {
            uri
            for uri, etag in images.items()
            if (uri, etag, version) in self.done and self.newest[uri] != (etag, version)
        }
        self.newest |= {uri: (images[uri], version) for uri in returned}
        return len(returned)

    def finish(self, images: dict[str, str], version: str) -> None:
        """Have the rows of a run."""
        self.done |= {(uri, etag, version) for uri, etag in images.items()}
        self.newest |= {uri: (etag, version) for uri, etag in images.items()}

    @property
    def current(self) -> dict[str, tuple[str, str]]:
        return {uri: found for uri, found in self.newest.items() if uri not in self.gone}


LISTINGS = st.fixed_dictionaries(dict.fromkeys("abc", st.sampled_from(["1", "2", "2", None])))
ORIGINS = st.sampled_from([ORIGIN, ORIGIN, OTHER_MODEL, OTHER_INPUT])


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(LISTINGS, ORIGINS, st.booleans(), st.integers(0, 3)), min_size=3, max_size=8))
def test_after_any_nights_the_row_of_what_each_image_is_now_is_current(steps):
    """Images are put, overwritten, restored and deleted, models change, other collections have the same images, and
    runs are finished at once, later or never.
    """
    truth, open_runs = Truth(), {}
    with tempfile.TemporaryDirectory() as folder:
        night = Nights(Store(folder, StorageSettings()))
        for listing, origin, is_finished, goes_on in steps:
            if run := list(open_runs)[goes_on : goes_on + 1]:
                night.finish(Run(night.output, run[0]))
                truth.finish(*open_runs.pop(run[0]))
            images = {uri: etag for uri, etag in listing.items() if etag}
            returned = truth.look(images, origin)
            changes, todo = night(*(f"{uri} {etag}" for uri, etag in images.items()), origin=origin)
            assert changes.returned == returned
            truth.planned.setdefault(origin.input, set()).update(todo)
            planned = {uri: images[uri] for uri in todo}, origin.model_version
            if todo and is_finished:
                night.finish(Run(night.output, night.output.names("runs")[-1]))
                truth.finish(*planned)
            elif todo:
                open_runs[night.output.names("runs")[-1]] = planned
            if truth.done:
                assert night.current() == truth.current
        rows = pq.read_table(f"{folder}/segments").to_pylist() if truth.done else []
        found = [(row["uri"], row["etag"], row["model_version"]) for row in rows]
        assert sorted(found) == sorted(truth.done), "no version has a second row"


def test_a_message_says_what_there_is_and_names_a_few_that_have_gone():
    assert str(Changes(0, 0, 0, 0, 0, 0, ())) == "nothing new"
    assert str(Changes(1200, 3, 0, 0, 0, 0, ())) == "1,200 new, 3 changed"
    assert str(Changes(0, 0, 2, 4, 1, 3, ("a", "b", "c"))) == (
        "2 done by another model, 4 gone, 1 there again, 3 returned to a version that was done before "
        "(gone: a, b, c, ...)"
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
