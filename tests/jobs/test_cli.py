"""What a person types and sees: help that teaches, one line for what is wrong, tables for what was done."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset
import pytest
import yaml

from jobs import demo
from jobs.cli import JOBS, main
from jobs.display import Display
from pipeline.config import SegmentSettings
from tests.conftest import draw_image, spoil


@pytest.fixture
def swath(capfd):
    """Run the command line in this process: (exit code, what it printed, what it complained)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        out, errors = capfd.readouterr()
        return code, out, errors

    return run


def test_both_ways_to_call_it_work():
    for command in ([sys.executable, "-m", "jobs"], [str(Path(sys.executable).with_name("swath"))]):
        shown = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True).stdout
        assert all(job in shown for job in JOBS)


def test_help_and_a_mistyped_option_do_not_wait_for_pytorch_and_ray():
    code = "import sys, jobs.cli; assert not {'torch', 'ray', 'transformers', 'pyarrow.dataset'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("job", JOBS)
def test_help_explains_the_job_and_every_setting(swath, job):
    code, out, _ = swath(job, "--help")
    assert code == 0
    assert f"swath {job}" in out
    for name, info in JOBS[job].SETTINGS.model_fields.items():
        option = name.upper() if info.json_schema_extra is None else f"--{(info.alias or name).replace('_', '-')}"
        assert option in out
        assert "".join(info.description.split()) in "".join(out.split())
    if job == "segment":
        assert all(f"\n{group}:\n" in out for group in ("Input", "Model", "Run", "Workers", "Storage", "Metrics"))


def test_what_is_wrong_is_one_line_with_exit_code_2_before_any_work(swath, collection, checkpoint, tmp_path):
    output = tmp_path / "out"
    good = ["segment", collection, output, "--checkpoint", checkpoint]
    empty, settings = tmp_path / "empty", tmp_path / "settings.yaml"
    empty.mkdir()
    settings.write_text("polcy: short=64\n")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("shard_images: [1]\n")
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"nothing")
    for arguments, expected in [
        ([*good, "--shard-images", "many"], "shard_images"),
        ([*good, "--polcy", "short=64"], "--polcy"),
        ([*good, "--config", settings], f"{settings}: unknown setting 'polcy'; did you mean 'policy'?"),
        ([*good, "--config", wrong], f"{wrong}: shard_images"),
        ([*good, "--config", tmp_path / "none.yaml"], "none.yaml: cannot be read"),
        (
            ["segment", tmp_path / "nowhere", output, "--checkpoint", checkpoint],
            "nowhere: cannot be listed: no such file",
        ),
        (["segment", empty, output, "--checkpoint", checkpoint], "no images found"),
        (["segment", collection, output, "--checkpoint", broken], "not a whole safetensors file"),
        (["segment", collection, output, "--checkpoint", tmp_path / "nowhere"], "no such file or folder"),
        (["segment", collection, broken, "--checkpoint", checkpoint], "cannot be written"),
        (["segment", collection, output], "checkpoint is missing"),
        (["segment"], "is missing"),
        (["segmnet"], "segmnet"),
        ([], "JOB"),
        ([*good, "--ray-address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        ([*good, "--run-id", "x" * 101], "at most 100"),
        (["segment", "s3:/bucket/x", output, "--checkpoint", checkpoint], "two slashes"),
        (["demo", tmp_path / "demo", "--images", "0"], "images: must be from 1"),
    ]:
        code, out, errors = swath(*arguments)
        complaints = [line for line in errors.splitlines() if line.startswith("swath")]
        assert code == 2, (arguments, errors)
        assert len(complaints) == 1
        assert expected in complaints[0]
        assert "Traceback" not in out + errors
    assert not list(output.glob("segments"))


def test_no_secret_is_in_what_is_said(swath, bucket, collection, checkpoint, tmp_path):
    key = ["--storage-option", "s3.key=testkey", "--storage-option"]
    for inputs, secret in [
        ((bucket, tmp_path / "out"), "s3.secret=canary"),
        ((collection, f"{bucket}/out"), "s3.secret=canary"),
        ((collection, f"{bucket}/out"), "s3-secret=canary"),
        ((collection, "s3://user:canary@bucket/out"), "s3.x=1"),
        (("https://user:canary@example/x", tmp_path / "out"), "s3.x=1"),
    ]:
        code, out, errors = swath("segment", *inputs, "--checkpoint", checkpoint, *key, secret)
        assert code == 2
        assert len(errors.splitlines()) <= 2
        assert "canary" not in out + errors


def test_workers_that_cannot_be_are_refused_and_not_waited_for(swath, collection, checkpoint, tmp_path):
    command = ["segment", collection, tmp_path / "out", "--checkpoint", checkpoint, "--policy", "short=64"]
    for option in (["--cpus-per-worker", "4096"], ["--gpus-per-worker", "64"]):
        code, _, errors = swath(*command, *option)
        assert code == 2
        assert "fits this machine" in errors.splitlines()[-1]


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_ends_what_is_under_way_a_second_one_everything(collection, checkpoint, tmp_path, number, times):
    for image in range(60):
        draw_image(collection / f"more/{image:02d}.png", 640, 480, seed=image)
    command = [sys.executable, "-m", "jobs", "segment", collection, tmp_path / "out", "--checkpoint", checkpoint]
    command += ["--shard-images", "4", "--grace", "600", "--run-id", "r"]
    with open(tmp_path / "out.txt", "w") as out, open(tmp_path / "errors.txt", "w") as errors:
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=errors)
        deadline = time.monotonic() + 200
        while not list((tmp_path / "out").glob("segments/*/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.1)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.5)
        assert process.wait(120) == 128 + number
    said = (tmp_path / "errors.txt").read_text()
    assert "Traceback" not in said
    assert "stopping: shards under way have 600 s to end" in said
    assert (tmp_path / "out.txt").read_text() == ""
    assert not list((tmp_path / "out/runs/r").glob("lease-*.json"))
    shards = len(list((tmp_path / "out").glob("segments/*/*.parquet")))
    if times == 1:
        planned = len(json.loads((tmp_path / "out/runs/r/plan.json").read_text())["images"])
        assert shards < planned
        line = f"swath: stopped: {shards} of {planned} shards of run r are done; run the same command again to go on"
        assert said.splitlines()[-1] == line
    else:
        assert said.splitlines()[-1] == "swath: interrupted; run the same command again to go on"


def test_each_kind_of_work_says_when_it_has_ended(capfd):
    with Display() as display:
        display.indexing(0, 12)
        display.indexing(12, 12)
        display.segmenting(12, 12, 0)  # as many, and at once
        display.segmenting(12, 12, 0)
    lines = [line.strip() for line in capfd.readouterr().err.splitlines()]
    assert [line.partition("/12")[0] for line in lines] == ["reading headers 0", "reading headers 12", "segmenting 12"]


def test_damage_to_our_own_files_is_one_line(swath, collection, tmp_path):
    (tmp_path / "out/index").mkdir(parents=True)
    (tmp_path / "out/index/part-00000.parquet").write_text("damaged")
    code, _, errors = swath("index", collection, tmp_path / "out")
    assert code == 1
    assert "part-00000.parquet" in errors.splitlines()[-1]


def test_settings_from_a_file_and_from_options_are_one_thing(swath, collection, checkpoint, tmp_path):
    values = {"input": str(collection), "output": str(tmp_path / "a"), "checkpoint": checkpoint, "policy": "short=64"}
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(values | {"include": ["part 1/*"]}))
    assert set(values) < set(SegmentSettings.model_fields)
    code, out, _ = swath("plan", "--config", settings)
    assert (code, "4 images to do" in out) == (0, True)
    code, out, _ = swath("plan", collection, "--checkpoint", checkpoint, tmp_path / "b", "--policy", "short=64")
    assert (code, "12 images to do" in out) == (0, True)
    code, out, _ = swath("plan", "--config", settings, "--include", "*.png", "--include", "*.bmp")
    assert (code, "6 images to do" in out) == (0, True)


def test_index_and_plan_work_alone_and_write_no_run(swath, collection, checkpoint, tmp_path):
    spoil(collection)
    output = tmp_path / "out"
    code, out, _ = swath("index", collection, output)
    assert code == 0
    assert "15 images" in out
    assert "(skipped 2: .txt 1, not a file 1)" in out
    assert "15 headers read" in out
    assert "jpeg 4" in out
    assert "unreadable 2" in out
    code, out, _ = swath("plan", collection, output, "--checkpoint", checkpoint, "--policy", "short=64")
    assert code == 0
    assert "64x96" in out
    assert "unknown" in out
    assert "15 images to do" in out
    assert sorted(path.name for path in output.iterdir()) == ["index"]


@pytest.mark.usefixtures("on_shared_ray")
def test_a_run_shows_progress_and_closes_with_a_table_and_a_query(swath, collection, checkpoint, tmp_path):
    spoil(collection)
    command = ["segment", collection, tmp_path / "it's out", "--checkpoint", checkpoint, "--policy", "short=64"]
    code, out, errors = swath(*command)
    assert code == 0
    assert "segmenting 15/15" in errors
    assert "3 without a mask" in errors
    assert "Traceback" not in errors
    assert "ok              12  80.0%" in out
    assert "unreadable       3  20.0%" in out
    assert "images/s" in out
    query = next(line for line in out.splitlines() if line.startswith("query")).removeprefix("query").strip()
    program, *question = shlex.split(query)
    assert program == "swath"
    code, _, errors = swath(*command)
    assert code == 0
    assert "nothing new" in errors
    code, out, _ = swath(*question, "--format", "csv")
    assert code == 0
    answer = [line.partition(",")[0] for line in out.splitlines()[1:]]
    rows = pyarrow.dataset.dataset(tmp_path / "it's out/segments").to_table().to_pylist()
    assert set(answer) == {c["name"] for row in rows for c in row["classes"] or ()}


def test_the_demo_segments_its_scenes_well_and_shows_them(swath, tmp_path):
    code, out, _ = swath("demo", tmp_path / "demo", "--images", "16")
    assert code == 0
    (evaluation,) = (tmp_path / "demo/masks/evaluations").glob("*/evaluation.json")
    scores = json.loads(evaluation.read_text())["pooled"]
    assert scores["accuracy"] >= 0.95
    assert scores["mean_iou"] >= 0.80
    assert re.search(rf"^mean IoU +{scores['mean_iou']:.4f} ", out, re.MULTILINE)
    rows = pyarrow.dataset.dataset(tmp_path / "demo/masks/segments").to_table().to_pylist()
    assert len(rows) == 16 + 3
    assert len({(row["width"], row["height"]) for row in rows if row["mask"]}) >= 6
    assert len({row["format"] for row in rows if row["mask"]}) == 3
    assert "vegetation" in out
    assert (tmp_path / "demo/overview.png").stat().st_size > 10_000
    assert "16 of 19 images have a mask" in (tmp_path / "demo/report.html").read_text()
    record = json.loads(next((tmp_path / "demo/masks").glob("runs/*/run.json")).read_text())
    assert record["statuses"] == {"ok": 16, "unreadable": 3}


def test_the_demo_leaves_other_peoples_folders_alone(swath, tmp_path):
    (tmp_path / "thesis.tex").touch()
    code, _, errors = swath("demo", tmp_path)
    assert code == 2
    assert "was not made by this command; give another FOLDER" in errors
    assert (tmp_path / "thesis.tex").exists()


def test_the_shipped_weights_are_small_half_precision_and_named():
    weights = demo.WEIGHTS / "model.safetensors"
    assert weights.stat().st_size < 9_000_000
    assert json.loads((demo.WEIGHTS / "config.json").read_text())["id2label"]["5"] == "car"
