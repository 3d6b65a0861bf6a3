"""What a person sees of an evaluation: numbers that say which they are, what was left out, and a picture."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from pipeline.confusion import draw_confusion
from tests.conftest import draw_image
from tests.pipeline.outputs import write_output

NAMES = ["sky $x_1$", "[b]land[/b]", "water", "it's <b>odd</b>", "life"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an output, and its truth: that of one image is missing, one is another's, one is damaged."""
    folder = tmp_path_factory.mktemp("evaluated")
    for number in range(9):
        draw_image(folder / f"in/{number} [red].jpg", 60, 40, number)
    masks = write_output(str(folder / "in"), str(folder / "out"), names=NAMES)
    (folder / "truth").mkdir()
    for number, (_, mask) in enumerate(sorted(masks.items())):
        truth = np.where(np.random.default_rng(number).random(mask.shape) < 0.1, 2, mask).astype(np.uint8)
        Image.fromarray(truth).save(folder / f"truth/{number} [red].png")
    (folder / "truth/0 [red].png").rename(folder / "truth/[bold]other.png")
    (folder / "truth/1 [red].png").write_bytes(b"This is no mask.")
    return folder


def swath(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def test_a_table_says_both_ways_and_what_was_left_out(evaluated, capfd):
    code, out, _ = swath(capfd, "evaluate", evaluated / "out", evaluated / "truth", "--name", "first")
    assert code == 0
    lines = out.splitlines()
    assert "images without a mask of ground truth: 1" in lines
    assert f"  file://{evaluated}/in/0 [red].jpg" in lines
    assert f"  file://{evaluated}/truth/[bold]other.png" in lines
    assert "masks of ground truth that cannot be read: 1" in lines
    assert "compared 7 images, 16,800 pixels  model first" in lines
    assert any(line.split() == ["pooled", "over", "pixels", "averaged", "over", "images"] for line in lines)
    (mean,) = (line.split()[-2:] for line in lines if line.startswith("mean IoU"))
    record = json.loads((evaluated / "out/evaluations/first/evaluation.json").read_text())
    assert mean == [f"{record[way]['mean_iou']:.4f}" for way in ("pooled", "averaged")]
    assert any(line.startswith("[b]land[/b]") for line in lines)
    assert str(evaluated / "out/evaluations/first/confusion.png") in out


def test_the_query_that_is_shown_gives_the_worst_images_first(evaluated, capfd):
    swath(capfd, "evaluate", evaluated / "out", evaluated / "truth", "--name", "worst")
    sql = "SELECT uri, mean_iou FROM evaluations WHERE evaluation = 'worst' AND status = 'ok' ORDER BY 2"
    code, out, _ = swath(capfd, "query", evaluated / "out", sql, "--format", "json")
    shares = [row["mean_iou"] for row in json.loads(out)]
    assert (code, len(shares)) == (0, 7)
    assert shares == sorted(shares)


def test_json_is_one_object_with_everything(evaluated, capfd):
    code, out, _ = swath(capfd, "evaluate", evaluated / "out", evaluated / "truth", "--name", "json", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["left_out"] == {"unreadable": 1, "no_truth": 1, "no_image": 1}
    assert found["first_left_out"]["no_image"] == [f"file://{evaluated}/truth/[bold]other.png"]
    assert [row["name"] for row in found["classes"]] == NAMES
    correct = sum(found["confusion"][one][one] for one in range(5)) / found["pixels"]
    assert found["pooled"]["accuracy"] == pytest.approx(correct)


def test_evaluations_disturb_no_other_job(evaluated, tmp_path, capfd):
    output = tmp_path / "in/masks"  # in its own collection
    shutil.copytree(evaluated / "in", tmp_path / "in")
    write_output(str(tmp_path / "in"), str(output), names=NAMES)
    assert swath(capfd, "evaluate", output, evaluated / "truth")[0] == 0
    assert swath(capfd, "verify", output)[0] == 0
    assert swath(capfd, "export", output, tmp_path / "png", "--format", "png")[0] == 0
    code, out, _ = swath(capfd, "evaluate", output, tmp_path / "png/masks", "--json")
    assert (code, json.loads(out)["pooled"]["mean_iou"], json.loads(out)["left_out"]) == (0, 1, {})
    code, _, errors = swath(capfd, "index", tmp_path / "in", output)
    assert code == 0
    assert "confusion.png" not in errors
    assert swath(capfd, "query", output, "SELECT count(*) FROM current", "--format", "csv")[1].endswith("9\n")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--truth-map", "7=wter"], "7=wter: no class has this name or id; did you mean 'water'?"),
        (["--truth-map", "seven"], "truth_map: expected KEY=VALUE"),
        (["--ignore-id", "x"], "ignore_id: "),
        (["--rename", "("], "rename: expected FROM=TO"),
        (["--mask-map", "sky=water"], "mask_map: sky=water: no class is called 'sky'"),
        (["--class", "a", "--class", "a"], "class: 'a' is named twice"),
        (["--name", "../x"], "name: use letters, digits, - and _ only"),
        (["--where", "nothing = 1"], "where 'nothing = 1'"),
        (["--run-id", "none"], "no such run"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_work(evaluated, capfd, options, why):
    code, out, errors = swath(capfd, "evaluate", evaluated / "out", evaluated / "truth", *options)
    assert (code, out) == (2, "")
    assert errors.count("\n") == 1
    assert errors.startswith("swath: error: ")
    assert why in errors


@pytest.mark.parametrize("classes", [1, 2, 8, 150])
def test_the_picture_shows_every_class(tmp_path, classes):
    names = tuple(f"${'_^{'[one % 3]} class {one}\n" for one in range(classes))
    confusion = np.zeros((classes, classes + 1), np.int64)
    confusion[np.arange(classes), np.arange(classes)] = 900
    confusion[:, -1] = 100
    (tmp_path / "confusion.png").write_bytes(draw_confusion(confusion, names))
    with Image.open(tmp_path / "confusion.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) >= 14 * classes
    is_dark_blue = (pixels[..., 2] > pixels[..., 0] + 60) & (pixels.sum(-1) < 300)  # the diagonal and the scale's end
    assert is_dark_blue.sum() >= classes * 12**2
    assert is_dark_blue.mean() < 0.5


def test_the_picture_of_an_evaluation_is_drawn(evaluated, capfd):
    swath(capfd, "evaluate", evaluated / "out", evaluated / "truth", "--name", "drawn")
    with Image.open(evaluated / "out/evaluations/drawn/confusion.png") as image:
        assert image.size[0] > 400
        assert image.size[1] > 400
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
