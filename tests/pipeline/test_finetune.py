"""A training is what its command says, goes on as if it had never ended, and says what it could not use."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import CheckpointError, load_checkpoint, save_huggingface
from model.labels import label_set
from model.layouts import HUGGING_FACE_4, NVLABS, OPENMMLAB
from model.predictor import Predictor
from model.segformer import Segformer, variant
from model.training import with_classes
from pipeline.config import ConfigurationError
from pipeline.config_truth import FinetuneSettings
from pipeline.course import COURSE, Course, newest_state, read_course, read_result, state_name, states
from pipeline.crops import LostExampleError
from pipeline.finetune import LEASE, finetune, prepare, starting_point
from pipeline.learner import DivergedError, Place, learn
from pipeline.lease import Lease
from pipeline.storage import Store
from pipeline.teach import complaint, size
from pipeline.wire import Report

ROOT = Path(__file__).parent.parent.parent
NAMES = ["sky", "land", "water"]
PALETTE = [10, 20, 30, 200, 100, 50, 0, 0, 255]
QUICK = {"steps": 40, "batch": 2, "crop": 64, "val_every": 10, "policy": "short=64", "precision": "float32"}


class Listening:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def checking(self, done: int, total: int, left_out: int) -> None:
        pass

    def learning(self, step: int, steps: int, images: int, loss: float, best: float | None) -> None:
        pass


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A B0 that knows skies and cars."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_huggingface(Segformer(variant("b0", 2)), label_set(["sky", "car"]), str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images with palette masks: three bands, whose colours tell their classes."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images/a").mkdir(parents=True)
    (folder / "masks/a").mkdir(parents=True)
    for number in range(8):
        draw_pair(folder, f"a/{number}", 60 + number, 50, number)
    (folder / "labels.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return folder


def draw_pair(folder: Path, name: str, width: int, height: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.sort(rng.integers(0, 3, (height, 1)), axis=0).repeat(width, 1).astype(np.uint8)
    mask[0, :5] = 255
    colours = np.array(PALETTE, np.int16).reshape(3, 3)[np.minimum(mask, 2)]
    image = (colours + rng.integers(-9, 9, colours.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(image).save(folder / f"images/{name}.jpg")
    palette = Image.fromarray(mask)
    palette.putpalette(PALETTE + [0] * 759)  # whole, else Pillow writes other indices
    palette.save(folder / f"masks/{name}.png")


def command(data: Path, out: Path, checkpoint: str, **options: Any) -> FinetuneSettings:
    places = {"images": str(data / "images"), "masks": str(data / "masks"), "out": str(out), "checkpoint": checkpoint}
    return FinetuneSettings(**places | QUICK | options)


def teach_here(settings: FinetuneSettings, steps: int | None = None, seen: list[int] | None = None) -> Store:
    """The training in this process, without Ray; it stops after so many steps, if that is said."""
    out, start = Store(settings.out, settings), starting_point(settings)
    course = prepared(settings)
    network = with_classes(start, course.labels, course.recipe.seed)

    def tell(report: Report) -> bool:
        if seen is not None:
            seen.append(report.step)
        return report.step == steps

    learn(settings, course, network, Place(0, 1, "cpu", os.cpu_count() or 1, 1 << 28), tell)
    return out


def prepared(settings: FinetuneSettings, listening: Listening | None = None) -> Course:
    """What the command does before it teaches."""
    out = Store(settings.out, settings)
    with Lease(out, LEASE, "the training") as lease:
        return prepare(settings, starting_point(settings), out, lease, listening or Listening())


def weights(out: Store) -> dict[str, torch.Tensor]:
    """All that there is at the end."""
    course = read_course(out)
    assert course
    state = newest_state(out, course)
    assert state
    return {f"{part} {key}": value for part in ("model", "average") for key, value in state["training"][part].items()}


def same(first: Store, second: Store) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def log(out: Store) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(out.read("training/log.csv").decode())))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, data: Path, checkpoint: str) -> Store:
    """A training that nothing has disturbed."""
    return teach_here(command(data, tmp_path_factory.mktemp("unbroken") / "out", checkpoint))


@pytest.fixture
def copied(unbroken: Store, tmp_path: Path) -> Path:
    """A copy of it, to do things to."""
    shutil.copytree(unbroken.root, tmp_path / "out")
    return tmp_path / "out"


def test_a_command_that_is_killed_and_stopped_ends_with_the_weights_of_an_unbroken_one(
    tmp_path, data, checkpoint, unbroken
):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    places = [data / "images", data / "masks", tmp_path / "out"]
    arguments = [sys.executable, "-m", "jobs", "finetune", *map(str, places), "--checkpoint", checkpoint, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = Store(str(tmp_path / "out"), command(data, tmp_path / "out", checkpoint))
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = subprocess.Popen([*arguments, "--save-every", "0"], env=environment, cwd=tmp_path)
        time.sleep(5)  # a worker may outlive its driver for some seconds, but for less than Ray takes to start
        before = states(out)[-1:]
        while process.poll() is None and states(out)[-1:] == before:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait() == code
        assert read_result(out) is None
    teach_here(command(data, tmp_path / "out", checkpoint))
    assert same(out, unbroken)
    assert out.read("model.safetensors") == unbroken.read("model.safetensors")
    timeless = [[{**row, "seconds": ""} for row in log(one)] for one in (out, unbroken)]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == ["10", "20", "30", "40"]


def test_a_training_that_stops_after_any_step_goes_on_as_if_it_had_not(tmp_path, data, checkpoint, unbroken):
    settings, seen = command(data, tmp_path / "out", checkpoint), []
    for step in (2, 10, 21, None):
        out = teach_here(settings, step, seen)
    assert same(out, unbroken)
    assert seen == list(range(1, 41)), "no step is done twice"
    assert len(states(out)) == 2


def test_the_result_is_what_segment_and_others_load(unbroken, data):
    found = load_checkpoint(unbroken.root)
    assert list(found.labels.names) == NAMES
    assert found.labels.palette == ((10, 20, 30), (200, 100, 50), (0, 0, 255))
    image = np.array(Image.open(data / "images/a/0.jpg"))[None, :32, :32]
    assert Predictor(found)(image, [(32, 32)])[0].mask.shape == (32, 32)
    result = read_result(unbroken)
    assert result
    assert result["best"]["step"] in (10, 20, 30, 40)
    assert result["best"]["class_iou"].keys() == set(NAMES)
    scores = {row["step"]: float(row["mean_iou"]) for row in log(unbroken) if row["mean_iou"]}
    assert result["best"]["mean_iou"] == max(scores.values())


def test_a_finished_training_is_left_as_it_is(copied, data, checkpoint):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    taught = finetune(command(data, copied, checkpoint), Listening())
    assert taught.was_there
    after = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    assert after == before


def test_another_command_is_refused_with_all_that_differs(copied, data, checkpoint):
    with pytest.raises(ConfigurationError, match=r"steps was 40, is 7; seed was 0, is 3.*--overwrite"):
        finetune(command(data, copied, checkpoint, steps=7, seed=3), Listening())
    more = copied.parent / "more"
    shutil.copytree(data, more)
    draw_pair(more, "a/new", 64, 64, 99)
    with pytest.raises(ConfigurationError, match=r"pairs was 8 \(.*is 9 \("):
        finetune(command(more, copied, checkpoint), Listening())
    (more / "labels.json").write_text('["sky", "land", "sea"]')
    with pytest.raises(ConfigurationError, match="classes was 3 from"):
        finetune(command(more, copied, checkpoint), Listening())
    others = {"val_images": str(data / "images"), "val_masks": str(data / "masks")}
    with pytest.raises(ConfigurationError, match=r"validation-pairs was not given, is 8 \("):
        finetune(command(data, copied, checkpoint, **others), Listening())
    course = read_course(Store(str(copied), command(data, copied, checkpoint)))
    assert course
    (copied / COURSE).write_bytes(replace(course, command=course.command | {"validation_pairs": "8"}).data())
    with pytest.raises(ConfigurationError, match="validation-pairs was 8, is not given"):
        finetune(command(data, copied, checkpoint), Listening())


def test_what_changes_nothing_that_is_learned_may_change(copied, data, checkpoint):
    assert finetune(command(data, copied, checkpoint, save_every=5, grace=1, workers="2"), Listening()).was_there


def test_overwriting_takes_what_is_a_trainings_and_leaves_its_own_lease_and_what_is_somebodys(copied, data, checkpoint):
    (copied / "training/notes.txt").write_text("mine")
    settings = command(data, copied, checkpoint, steps=2, overwrite=True)
    out = Store(settings.out, settings)
    with Lease(out, LEASE, "the training") as lease:
        prepare(settings, starting_point(settings), out, lease, Listening())
        lease.check()
    assert {path.name for path in copied.rglob("*.*")} == {
        *("course.json", "examples.parquet", "validation.parquet", "left_out.csv", "notes.txt")
    }


def test_a_command_that_cannot_be_leaves_what_it_was_to_overwrite(copied, data, checkpoint):
    for wrong in (
        {"class_weights": ("moon=1",)},
        {"truth_map": {"0": "moon"}},
        {"val_images": "/no", "val_masks": "/no"},
    ):
        with pytest.raises(ConfigurationError):
            finetune(command(data, copied, checkpoint, overwrite=True, **wrong), Listening())
    assert load_checkpoint(str(copied))
    assert finetune(command(data, copied, checkpoint), Listening()).was_there


def test_what_a_killed_beginning_has_left_is_no_part_of_the_next(tmp_path, data, checkpoint, unbroken):
    shutil.copytree(unbroken.root, tmp_path / "out")
    for name in (COURSE, "config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / "out" / name).unlink()
    out = teach_here(command(data, tmp_path / "out", checkpoint, steps=5), 3)
    assert states(out) == [3]
    assert read_result(out) is None


def test_a_network_that_a_kill_kept_from_its_place_is_put_there(tmp_path, data, checkpoint, unbroken):
    out = teach_here(command(data, tmp_path / "out", checkpoint), 10)
    best = out.read("model.safetensors")
    out.put("model.safetensors", b"of an earlier step")
    teach_here(command(data, tmp_path / "out", checkpoint), 11)
    assert out.read("model.safetensors") == best


def test_a_state_that_is_damaged_is_passed_over(tmp_path, data, checkpoint, unbroken):
    settings = command(data, tmp_path / "out", checkpoint, save_every=0)
    out = teach_here(settings, 4)
    path = Path(out.path(state_name(4)))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    course = read_course(out)
    assert course
    state = newest_state(out, course)
    assert state
    assert state["training"]["step"] == 3
    assert same(teach_here(settings), unbroken)


def test_where_no_state_is_whole_nothing_begins_anew_unasked(tmp_path, data, checkpoint):
    settings = command(data, tmp_path / "out", checkpoint, save_every=0)
    out = teach_here(settings, 2)
    for step in states(out):
        out.put(state_name(step), b"torn")
    with pytest.raises(ConfigurationError, match=r"no state of this training is whole.*--overwrite"):
        teach_here(settings)


def test_an_example_that_has_changed_ends_it_with_its_name(tmp_path, data, checkpoint):
    shutil.copytree(data, tmp_path / "data")
    settings = command(tmp_path / "data", tmp_path / "out", checkpoint, steps=9)
    teach_here(settings, 1)
    gone = tmp_path / "data/images/a/3.jpg"
    course, start = read_course(Store(settings.out, settings)), starting_point(settings)
    assert course
    network = with_classes(start, course.labels, 0)
    gone.write_bytes(gone.read_bytes() + b" ")
    with pytest.raises(LostExampleError, match=r"a/3\.jpg: has changed") as raised:
        learn(settings, course, network, Place(0, 1, "cpu", 1, 0), lambda _: False)
    assert "--overwrite" in complaint(raised.value)


def test_a_network_that_nobody_asked_to_replace_stays(tmp_path, data, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="another network"):
        finetune(command(data, tmp_path / "out", checkpoint), Listening())
    for same in (checkpoint, f"file://{checkpoint}", f"{checkpoint}/", f"{checkpoint}/model.safetensors"):
        with pytest.raises(ConfigurationError, match="the checkpoint itself"):
            finetune(command(data, Path(checkpoint), same, overwrite=True), Listening())


def test_what_cannot_be_used_is_named_with_its_reason_and_left_out(tmp_path, data, checkpoint):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "images/a/1.jpg").write_bytes(b"This is no image.")
    Image.open(folder / "masks/a/2.png").resize((9, 9)).save(folder / "masks/a/2.png")
    Image.fromarray(np.full((50, 63), 7, np.uint8)).save(folder / "masks/a/3.png")
    Image.fromarray(np.full((50, 64), 255, np.uint8)).save(folder / "masks/a/4.png")
    (folder / "masks/a/5.png").rename(folder / "masks/a/other.png")
    listening = Listening()
    settings = command(folder, tmp_path / "out", checkpoint)
    out = Store(settings.out, settings)
    course = prepared(settings, listening)
    assert course.examples + course.validation == 3
    rows = list(csv.DictReader(io.StringIO(out.read("training/left_out.csv").decode())))
    found = {(Path(row["uri"]).parts[-3] + "/" + Path(row["uri"]).stem, row["status"]) for row in rows}
    assert found == {
        ("images/1", "unreadable"),
        ("masks/2", "size"),
        ("masks/3", "unknown"),
        ("masks/4", "ignored"),
        ("images/5", "no_truth"),
        ("masks/other", "no_image"),
    }
    said = "\n".join(listening.said)
    assert "left out 6" in said
    assert all(row["uri"] in said and row["reason"] in said for row in rows)


def test_nothing_to_learn_from_is_said_before_any_work(tmp_path, data, checkpoint):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data/masks").rglob("*.png"):
        path.write_bytes(b"")
    settings = command(tmp_path / "data", tmp_path / "out", checkpoint)
    with pytest.raises(ConfigurationError, match=r"no image can be learned from.*empty"):
        finetune(settings, Listening())
    assert read_course(Store(settings.out, settings)) is None


def test_without_names_the_classes_are_the_ids_and_255_is_ignored(tmp_path, data, checkpoint):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/labels.json").unlink()
    settings = command(tmp_path / "data", tmp_path / "out", checkpoint)
    course = prepared(settings)
    assert course.labels.names == ("class 0", "class 1", "class 2")
    assert course.labels.palette == ((10, 20, 30), (200, 100, 50), (0, 0, 255))


def test_ids_that_a_truth_map_names_are_classes_also_where_no_pixel_has_them(tmp_path, data, checkpoint):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/labels.json").unlink()
    settings = command(
        tmp_path / "data", tmp_path / "out", checkpoint, truth_map={"0": "0", "1": "1", "2": "1", "3": "4"}
    )
    assert len(prepared(settings).labels) == 5


def test_a_mark_of_16_bits_is_not_taken_for_sixty_thousand_classes(tmp_path, data, checkpoint):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/labels.json").unlink()
    mask = np.zeros((50, 61), np.uint16)
    mask[3:] = 65535
    Image.fromarray(mask).save(tmp_path / "data/masks/a/1.png")
    settings = command(tmp_path / "data", tmp_path / "out", checkpoint)
    with pytest.raises(ConfigurationError, match=r"greatest id is 65,535.*--ignore-id 65535"):
        prepared(settings)
    assert len(prepared(settings.model_copy(update={"ignore_id": (255, 65535)})).labels) == 3


def test_a_validation_that_cannot_be_is_said_before_any_work(tmp_path, data, checkpoint):
    shutil.copytree(data, tmp_path / "other")
    for path in (tmp_path / "other/masks").rglob("*.png"):
        path.write_bytes(b"")
    others = {"val_images": str(tmp_path / "other/images"), "val_masks": str(tmp_path / "other/masks")}
    with pytest.raises(ConfigurationError, match=r"other/images: no image can be learned from.*empty"):
        prepared(command(data, tmp_path / "out", checkpoint, **others))
    with pytest.raises(ConfigurationError, match="patience: there is no validation"):
        prepared(command(data, tmp_path / "out", checkpoint, holdout=0, patience=2))


def test_workers_share_what_there_is(tmp_path, data, checkpoint):
    def sized(nodes: list[dict[str, float]], **options: Any) -> tuple[int | None, int, bool]:
        scaling, threads, _ = size(command(data, tmp_path / "out", checkpoint, **options), nodes, Listening())
        return scaling.num_workers, threads, bool(scaling.use_gpu)

    here, gpus = {"CPU": 9.0, "memory": 1e10}, {"CPU": 33.0, "GPU": 4.0, "memory": 1e11}
    assert sized([here]) == (1, 8, False)
    assert sized([here], workers="2") == (2, 4, False)
    assert sized([gpus, gpus], batch=16) == (8, 8, True)
    assert sized([gpus], batch=6) == (3, 8, True)
    assert sized([here], workers="16", batch=16, ray_address="auto") == (16, 1, False), "a cluster may grow"
    with pytest.raises(ConfigurationError, match="workers: 16 are too many for this machine, which has 8 CPUs; give 8"):
        sized([here], workers="16", batch=16)


@pytest.mark.parametrize("layout", [HUGGING_FACE_4, NVLABS, OPENMMLAB], ids=lambda layout: layout.title)
def test_an_encoder_alone_has_a_new_decoder(tmp_path, data, layout):
    whole = Segformer(variant("b1", 3))
    tensors: dict[str, torch.Tensor] = {}
    for ours, tensor in whole.encoder.state_dict().items():
        source = layout.source(f"encoder.{ours}")
        before = tensors.get(source.key)
        tensors[source.key] = tensor if before is None else torch.cat([before, tensor])
    alone = {key.removeprefix("backbone."): tensor for key, tensor in tensors.items()}
    torch.save(alone | {"head.weight": torch.zeros(1000, 512)}, tmp_path / "mit_b1.pth")
    with pytest.raises(CheckpointError, match=r"an encoder alone.*swath finetune"):
        load_checkpoint(str(tmp_path / "mit_b1.pth"))
    course = prepared(command(data, tmp_path / "out", str(tmp_path / "mit_b1.pth")))
    assert course.labels.names == tuple(NAMES)
    found = starting_point(command(data, tmp_path / "out", str(tmp_path / "mit_b1.pth"))).model
    assert found.config.hidden_sizes == whole.config.hidden_sizes
    theirs = whole.encoder.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.encoder.state_dict().items())


def test_a_training_stops_when_nothing_gets_better(tmp_path, data, checkpoint):
    settings = command(
        data, tmp_path / "out", checkpoint, steps=40, val_every=1, patience=2, learning_rate=1e-12, holdout=0.5
    )
    result = read_result(teach_here(settings))
    assert result
    assert result["stopped_early"]
    assert result["steps"] == result["best"]["step"] + 2


def test_without_validation_the_last_network_is_the_result(tmp_path, data, checkpoint):
    out = teach_here(command(data, tmp_path / "out", checkpoint, holdout=0, steps=2))
    result = read_result(out)
    assert result
    assert result["best"] is None
    assert result["examples"] == 8
    last = weights(out)
    for name, tensor in load_checkpoint(out.root).model.state_dict().items():
        assert not tensor.is_floating_point() or torch.equal(tensor, last[f"average {name}"])


def test_a_loss_that_is_no_number_ends_it_with_what_to_do(tmp_path, data, checkpoint):
    settings = command(data, tmp_path / "out", checkpoint, steps=30, learning_rate=1e30, clip=0, warm_up=0)
    with pytest.raises(DivergedError, match="the loss is nan in step") as raised:
        teach_here(settings)
    assert "lower --learning-rate" in complaint(raised.value)
