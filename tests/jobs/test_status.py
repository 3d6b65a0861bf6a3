"""What `status`, `verify` and `retry` print, and the exit codes that a script decides by."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from jobs.cli import main
from tests.conftest import Finished


@pytest.fixture
def swath(capfd):
    """Run the command line in this process: (exit code, what it printed, what it complained)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, errors = capfd.readouterr()
        return code, out, errors

    return run


@pytest.fixture
def output(finished: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.output, tmp_path / "out"))


def test_a_complete_run_is_told_with_what_became_of_its_images(swath, output):
    code, out, errors = swath("status", output)
    assert code == 0
    assert errors == "run first, which was begun last\n"
    for expected in (
        f"{output}/runs/first",
        "15 of 15 done, 100.0%",
        "5 of 5 done, 0 left",
        "finished",
        "missing          1   6.7%",
        "unreadable: the file is empty (N bytes)",
        f"swath retry {output}/runs/first",
    ):
        assert expected in out
    code, out, errors = swath("status", f"{output}/runs/first/", "--json")
    found = json.loads(out)
    assert (code, errors) == (0, "")
    assert found["complete"] is True
    assert found["totals"]["statuses"] == {"ok": 11, "unreadable": 3, "missing": 1}
    assert sum(found["totals"]["reasons"].values()) == 4


def test_a_run_that_is_under_way_is_told_from_what_is_there(swath, finished, output):
    (output / "runs/first/run.json").unlink()
    shards = sorted(output.glob("segments/run=first/*.parquet"))
    shards[0].unlink()
    shards[1].write_bytes(b"damaged")
    code, out, _ = swath("status", output)
    assert code == 1
    assert "4 of 5 done, 1 left" in out
    assert f"damaged  segments/run=first/{shards[1].name}: " in out
    command = f"swath segment file://{finished.collection} {output} --run-id first --policy short=64 --checkpoint ..."
    assert f"to go on:  {command}" in out
    code, out, _ = swath("status", output, "--json")
    assert (code, json.loads(out)["complete"], json.loads(out)["shards_done"]) == (1, False, 4)


def test_the_command_to_go_on_repeats_no_secret_of_a_url(swath, output):
    (output / "runs/first/run.json").unlink()
    plan = json.loads((output / "runs/first/plan.json").read_text())
    plan["origin"]["input"] = ["https://me:SECRET@host/list?token=SECRET", "https://SECRET@host/other"]
    (output / "runs/first/plan.json").write_text(json.dumps(plan))
    _, out, errors = swath("status", output)
    assert f"swath segment https://host/list https://host/other {output} --run-id first" in out
    assert "SECRET" not in out + errors
    assert "SECRET" not in swath("status", output, "--json")[1]


def test_a_finished_run_that_lost_a_shard_is_not_complete(swath, output):
    next(output.glob("segments/run=first/*.parquet")).unlink()
    code, out, _ = swath("status", output)
    assert code == 1
    assert "see swath verify" in out


def test_of_several_runs_the_one_begun_last_is_told_unless_one_is_named(swath, output):
    for number, run_id in enumerate(("z", "b", "m")):
        shutil.copytree(output / "runs/first", output / "runs" / run_id)
        os.utime(output / "runs" / run_id / "plan.json", (2e9 - number, 2e9 - number))
    (output / "runs/begun").mkdir()
    assert swath("status", output)[2].startswith("run z, ")
    code, _, errors = swath("status", output / "runs/c")
    assert (code, errors) == (
        2,
        f"swath: error: {output}/runs/c: no such run; there are: b, begun, first, m, z\n",
    )
    code, _, errors = swath("status", output / "runs/begun")
    assert (code, "nothing is planned yet" in errors) == (2, True)
    code, _, errors = swath("status", output / "index")
    assert (code, "no run is here; give OUTPUT/runs/ID" in errors) == (2, True)
    (output / "runs/m/plan.json").write_text("{}")
    code, _, errors = swath("status", output / "runs/m")
    assert (code, "damaged (KeyError: 'origin')" in errors) == (2, True)


def test_on_s3_it_is_the_same(swath, finished, bucket):
    filesystem = fsspec.filesystem("s3")
    filesystem.put(f"{finished.output}/", f"{bucket}/out/", recursive=True)
    code, out, errors = swath("status", f"{bucket}/out/")
    assert (code, errors) == (0, "run first, which was begun last\n")
    assert f"run      {bucket}/out/runs/first" in out
    filesystem.rm(f"{bucket}/out/runs/first/run.json")
    code, out, _ = swath("status", f"{bucket}/out/runs/first")
    assert code == 1
    assert f" {bucket}/out --run-id first" in out


def test_verify_says_what_it_has_read_and_what_is_wrong(swath, output):
    code, out, _ = swath("verify", output)
    assert code == 0
    assert "runs 1, plan files 1, shards 5, rows 15, masks 11" in out
    assert f"{output} is proven" in out
    path = next(output.glob("segments/run=first/*.parquet"))
    path.write_bytes(path.read_bytes()[:-100])
    (output / "segments/[bold]stray").touch()
    code, out, _ = swath("verify", output)
    assert code == 1
    assert f"wrong    segments/run=first/{path.name}: is no whole Parquet file" in out
    assert "wrong    segments/[bold]stray: belongs to no run" in out
    assert "is not proven; wrong: 2" in out
    assert swath("verify", output / "nowhere")[0] == 2


def test_a_retry_that_cannot_be_is_one_line(swath, output):
    record = json.loads((output / "runs/first/run.json").read_text())
    code, _, errors = swath("retry", output / "runs/nowhere")
    assert (code, "there are: first" in errors) == (2, True)
    record["settings"]["policy"] = "short=96"
    (output / "runs/first/run.json").write_text(json.dumps(record))
    code, _, errors = swath("retry", output)
    assert (code, "with it the model version is" in errors) == (2, True)
