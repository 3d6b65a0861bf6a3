"""Drawn scenes: the same everywhere, of the sizes that were asked for, and of as many kinds as there are."""

import hashlib
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import read_command
from jobs.demo import WEIGHTS
from jobs.scenes import draw, ship
from jobs.scenes.draw import KINDS, TRAINING_SEEDS, Drawing
from model.checkpoint import load_checkpoint
from model.labels import label_set
from pipeline.masks import decode_mask, palette

ROOT = Path(__file__).parents[2]
STREETS = "8f8866b495e6ed192dc796aa7c3432f3336468a593affbbe5210f4c952c13162"


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jobs.scenes.draw", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.fixture(scope="module")
def harbours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "harbours"
    done = command(folder, "--scenes", 24, "--seed", 7, "--short", "48:192", "--aspect", "0.5:2", "--kind", "harbour")
    assert done.returncode == 0, done.stderr
    assert "24/24" in done.stderr
    return folder


def test_every_image_has_its_mask_with_ids_a_palette_and_names(harbours):
    names = sorted(path.stem for path in (harbours / "images").iterdir())
    assert names == [f"scene-{seed:07d}" for seed in range(7, 31)]
    assert sorted(path.name for path in (harbours / "masks").iterdir()) == [f"{name}.png" for name in names]
    labels = json.loads((harbours / "labels.json").read_text())
    assert labels == {str(number): name for number, name in enumerate(KINDS["harbour"].classes)}
    for name in names:
        png = (harbours / "masks" / f"{name}.png").read_bytes()
        mask = decode_mask(png)
        assert Image.open(harbours / "images" / f"{name}.jpg").size == mask.shape[::-1]
        assert mask.max() < len(labels)
        assert tuple(palette(png)) == KINDS["harbour"].palette


def test_sizes_fill_the_ranges_evenly_in_octaves():
    drawing = Drawing("street", 1, 0, (128.0, 512.0), (0.5, 2.0), "jpg")
    sides = np.array([drawing.size(seed) for seed in range(2000)])
    short, aspect = sides.min(axis=1), sides[:, 0] / sides[:, 1]
    assert 128 <= short.min() < 132
    assert 500 < short.max() <= 512
    assert 0.49 < aspect.min() < 0.51
    assert 1.95 < aspect.max() < 2.02
    assert 0.45 < (short < 256).mean() < 0.55
    assert abs(np.corrcoef(np.log(short), np.log(aspect))[0, 1]) < 0.08


def test_a_scene_depends_on_neither_how_many_there_are_nor_on_what_was_in_the_folder(harbours, tmp_path):
    options = ("--short", "48:192", "--aspect", "0.5:2", "--kind", "harbour")
    assert command(tmp_path / "some", "--scenes", 3, "--seed", 9, *options, "--format", "png").returncode == 0
    assert command(tmp_path / "some", "--scenes", 2, "--seed", 9, *options).returncode == 0  # over its own
    some, all_of_them = files(tmp_path / "some"), files(harbours)
    assert len(some) == 2 * 2 + 1 + 1
    assert all(all_of_them[name] == data for name, data in some.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--short", "560:128"), "0 < MIN <= MAX"),
        (("--short", "large"), "'large'"),
        (("--short", "4:8"), "at least 16"),
        (("--scenes", "0"), "--scenes"),
        (("--seed", "-1"), "-1"),
        (("--kind", "forest"), "forest"),
        ((), "was not made by this command"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["draw", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        draw.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_streets_are_what_they_have_always_been():
    """The demo's numbers and its network rest on these pixels."""
    digest = hashlib.sha256()
    large = [(0, 640, 480), (1, 480, 640), (2, 800, 600), (7, 375, 500), (1000003, 128, 128), (9, 333, 171)]
    for seed, width, height in large + [(seed, 96, 64) for seed in range(40)]:
        scene = KINDS["street"].draw(seed, width, height)
        digest.update(scene.image.tobytes())
        digest.update(scene.mask.tobytes())
    assert digest.hexdigest() == STREETS


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_is_common_and_larger_scenes_show_the_same(kind):
    classes = len(KINDS[kind].classes)
    seen = np.zeros(classes)
    for seed in range(30):
        small, large = KINDS[kind].draw(seed, 96, 72).mask, KINDS[kind].draw(seed, 288, 216).mask
        seen += np.bincount(small.ravel(), minlength=classes)
        assert (large[1::3, 1::3] == small).mean() > 0.94
    assert (seen / seen.sum()).min() > 0.004


def test_no_class_of_a_harbour_is_told_by_its_colour():
    """With one guess for each of 4,096 colours, learnt from these very pixels, most classes are missed."""
    scenes = [KINDS["harbour"].draw(seed, 128, 96) for seed in range(40)]
    colours = np.concatenate([(scene.image.reshape(-1, 3) >> 4) @ (256, 16, 1) for scene in scenes])
    truth = np.concatenate([scene.mask.ravel() for scene in scenes])
    counts = np.zeros((4096, len(KINDS["harbour"].classes)), np.int64)
    np.add.at(counts, (colours, truth), 1)
    guess = counts.argmax(axis=1)[colours]
    ious = [((guess == c) & (truth == c)).sum() / ((guess == c) | (truth == c)).sum() for c in range(counts.shape[1])]
    assert np.mean(ious) < 0.45


def recipe():
    """The commands of `make weights`, as words without their program, and without what finds that one is done."""
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", "weights"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    commands = (line.rpartition("||")[2].split(maxsplit=1) for line in printed.splitlines() if ".weights" in line)
    return [shlex.split(words) for _, words in commands]


def test_the_demos_weights_are_made_by_finetune_from_drawn_scenes_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    drawing, *teaching, shipping = recipe()
    assert drawing[:3] == ["-m", "jobs.scenes.draw", ".weights/scenes"]
    assert not {"--seed", "--kind"} & set(drawing)
    assert TRAINING_SEEDS > 48  # of the demo's scenes
    jobs, _, settings = zip(*map(read_command, teaching), strict=True)
    assert set(jobs) == {"finetune"}
    assert settings[0].checkpoint == "new:b0"
    for before, after in itertools.pairwise(settings):
        assert before.out.endswith(after.checkpoint)
    assert all(one.images.endswith(".weights/scenes/images") for one in settings)
    assert shipping[1:] == ["jobs.scenes.ship", ".weights/large", "jobs/scenes/weights"]
    assert settings[-1].out.endswith(shipping[2])


def test_what_is_shipped_is_half_as_large_and_the_same_network(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ship", str(WEIGHTS), str(tmp_path / "out")])
    ship.main()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 8e6
    shipped, known = load_checkpoint(str(tmp_path / "out")), load_checkpoint(str(WEIGHTS))
    assert shipped.digest == known.digest
    assert shipped.labels == known.labels == label_set(list(KINDS["street"].classes), list(KINDS["street"].palette))
