"""`evaluate` finds the same numbers as an implementation that knows nothing of shards, and accounts for every image."""

import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model.labels import label_set
from model.scores import OVERALL
from pipeline import evaluate as evaluating
from pipeline import evaluation
from pipeline.cluster import spread
from pipeline.compare import IMAGES
from pipeline.config import ConfigurationError, StorageSettings
from pipeline.config_truth import EvaluateSettings
from pipeline.evaluate import Evaluation, evaluate
from pipeline.pairs import Masks
from pipeline.query import ask, connect
from pipeline.seal import check_parquet, check_record
from pipeline.storage import Store
from tests.conftest import NAMES, Quiet, draw_image, spoil
from tests.model.test_scores import averaged, pooled
from tests.pipeline.outputs import write_output

Truths = dict[str, np.ndarray]
IGNORED = 255
PALETTE = np.array(label_set(NAMES).palette, np.uint8)


class Watch(Quiet):
    """Somebody watches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def evaluating(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def run(output: object, truth: object, spread: Any = None, **options: Any) -> Evaluation:
    options = {"class" if name == "classes" else name: value for name, value in options.items()}
    return evaluate(EvaluateSettings(output=str(output), truth=str(truth), **options), Watch(), spread or no_spread)


def no_spread(*_: object) -> Any:
    raise AssertionError("a little is evaluated here")


def worse(mask: np.ndarray, seed: int, classes: int = len(NAMES)) -> np.ndarray:
    """A truth of which a mask is no perfect copy; some of it is ignored."""
    rng = np.random.default_rng(seed)
    truth = np.roll(mask, seed % 3, axis=1)
    wrong = rng.random(truth.shape) < 0.05
    truth[wrong] = rng.integers(0, classes, int(wrong.sum()))
    truth[: seed % 5] = IGNORED
    return truth


def write_truth(folder: Path, truths: Truths, root: str, suffix: str = ".png") -> Path:
    for uri, truth in truths.items():
        path = (folder / uri.removeprefix(root)).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth).save(path)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truths]:
    """A folder with an output of images in folders, in a tar and in a Parquet file; and the truth of each."""
    folder = tmp_path_factory.mktemp("evaluated")
    suffixes = ["jpg", "png", "webp", "bmp"]
    for number in range(16):
        size = [(64, 48), (48, 64), (101, 37)][number % 3]
        draw_image(folder / f"in/part {number % 2}/image-{number:02d}.{suffixes[number % 4]}", *size, number)
    packed = [draw_image(folder / f"packed/{number}.png", 40, 30, number) for number in range(6)]
    with tarfile.open(folder / "in/shard.tar", "w") as tar:
        for path in packed[:3]:
            tar.add(path, f"a/{path.name}")
    table = pa.table({"image": [{"bytes": path.read_bytes(), "path": path.name} for path in packed[3:]]})
    pq.write_table(table, folder / "in/train.parquet")
    spoil(folder / "in")
    masks = write_output(str(folder / "in"), str(folder / "out"))
    truths = {uri: worse(mask, number) for number, (uri, mask) in enumerate(sorted(masks.items()))}
    for uri, truth in truths.items():
        name = uri.removeprefix(f"file://{folder}/in/")
        path = folder / "truth" / (name.removesuffix(Path(name).suffix if "#0" not in name else "") + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth).save(path)
    np.savez(folder / "masks.npz", **masks)
    return folder, truths


def pairs_of(folder: Path, truths: Truths) -> list[tuple[np.ndarray, np.ndarray]]:
    masks = np.load(folder / "masks.npz")
    return [(np.where(truth == IGNORED, -1, truth.astype(int)), masks[uri]) for uri, truth in truths.items()]


def assert_equal(record: dict, pairs: list[tuple[np.ndarray, np.ndarray]], classes: int = len(NAMES)) -> None:
    """The record has what is expected of these pairs of truth and mask."""
    for way, expected in {"pooled": pooled(pairs, classes), "averaged": averaged(pairs, classes)}.items():
        for name in OVERALL:
            assert record[way][name] == pytest.approx(expected[name], abs=1e-9), (way, name)
        for name in ("iou", "dice", "accuracy", "precision", "boundary_iou"):
            found = [row[f"{way}_{name}"] for row in record["classes"]]
            assert found == pytest.approx(expected[f"class_{name}"], abs=1e-9), (way, name)


def ask_of(output: Path, sql: str) -> list[tuple]:
    with connect(Store(str(output), StorageSettings())) as tables:
        return [tuple(row.values()) for row in ask(tables, sql).read_all().to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_numbers_equal_an_independent_implementation_wherever_images_lie(made):
    folder, truths = made
    found = run(folder / "out", folder / "truth")
    assert_equal(found.record, pairs_of(folder, truths))
    assert found.record["images"] == {"masks": 22, "compared": 22, "compared_ignored_everywhere": 0}
    assert found.left_out.counts == {"no_mask": 3}
    check_record(json.loads((Path(found.url) / "evaluation.json").read_bytes()))
    confusion = np.array(found.record["confusion"])
    assert confusion.sum() == sum((truth != IGNORED).sum() for truth in truths.values())


def test_each_image_has_a_row_with_its_own_numbers(made):
    folder, truths = made
    found = run(folder / "out", folder / "truth", name="rows")
    rows = pq.read_table(Path(found.url) / "images").to_pylist()
    assert pq.read_schema(Path(found.url) / "images/part-00000.parquet").equals(IMAGES)
    assert len(rows) == 22 + 3
    pairs = dict(zip(truths, pairs_of(folder, truths), strict=True))
    for row in rows:
        if row["status"] != "ok":
            assert row["error"].startswith("unreadable: ")
            continue
        alone = pooled([pairs[row["uri"]]], len(NAMES))
        assert [row[name] for name in OVERALL] == pytest.approx([alone[name] for name in OVERALL], abs=1e-9)
        for one in row["classes"]:
            assert one["iou"] == pytest.approx(alone["class_iou"][one["class_id"]], abs=1e-9)
    worst = "SELECT uri FROM evaluations WHERE evaluation = 'rows' AND status = 'ok' ORDER BY mean_iou LIMIT 1"
    expected = min((pooled([pair], len(NAMES))["mean_iou"], uri) for uri, pair in pairs.items())[1]
    assert ask_of(folder / "out", worst) == [(expected,)]


def test_many_workers_put_the_same_bytes_as_this_process(made, monkeypatch):
    folder, _ = made
    alone = run(folder / "out", folder / "truth", name="same")
    before = contents(Path(alone.url))
    monkeypatch.setattr(evaluating, "SPREAD", 1)
    monkeypatch.setattr(evaluation, "PART_ROWS", 7)
    settings = EvaluateSettings(output=str(folder / "out"), truth=str(folder / "truth"), name="same")
    many = evaluate(settings, Watch(), partial(spread, settings))
    after = contents(Path(many.url))
    assert sorted(name for name in after if "part" in name) == [f"images/part-0000{n}.parquet" for n in range(4)]
    rows = [pq.read_table(pa.BufferReader(after[f"images/part-0000{n}.parquet"])) for n in range(4)]
    assert pa.concat_tables(rows).equals(pq.read_table(pa.BufferReader(before["images/part-00000.parquet"])))
    for name in ("evaluation.json", "classes.parquet", "confusion.png"):
        assert before[name] == after[name]
    monkeypatch.undo()
    run(folder / "out", folder / "truth", name="same")
    assert contents(Path(alone.url)) == before  # without the parts that are no longer its


def test_an_evaluation_that_was_killed_is_not_seen_and_is_repeated(made):
    folder, _ = made
    found = run(folder / "out", folder / "truth")
    before, place = contents(Path(found.url)), Path(found.url)
    (place / "evaluation.json").unlink()
    (place / "images/part-00001.parquet").write_bytes(before["images/part-00000.parquet"])
    count = f"SELECT count(*) FROM evaluations WHERE evaluation = '{place.name}'"
    assert ask_of(folder / "out", count) == [(0,)]
    assert run(folder / "out", folder / "truth").url == found.url
    assert contents(place) == before
    assert ask_of(folder / "out", count) == [(25,)]
    for name in ("images/part-00000.parquet", "classes.parquet"):
        check_parquet(before[name])


def test_a_name_that_something_else_has_is_not_taken(made):
    folder, _ = made
    run(folder / "out", folder / "truth", name="mine")
    run(folder / "out", folder / "truth", name="mine")
    with pytest.raises(ConfigurationError, match="give another --name, or --overwrite"):
        run(folder / "out", folder / "truth", name="mine", where="width > 50")
    found = run(folder / "out", folder / "truth", name="mine", where="width > 50", overwrite=True)
    assert found.record["images"]["compared"] == 11
    assert found.left_out.counts["no_image"] == 0, "these masks are those of other images"


@pytest.fixture
def small(made: tuple[Path, Truths], tmp_path: Path) -> tuple[Path, Path]:
    """An output, and truth to spoil."""
    folder, _ = made
    return folder / "out", Path(shutil.copytree(folder / "truth", tmp_path / "truth"))


def test_what_cannot_be_compared_is_counted_named_and_has_a_row(small):
    output, truth = small
    paths = sorted(truth.glob("part 0/*.png"))
    paths[0].unlink()
    paths[1].write_bytes(b"This is no picture.")
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(paths[2])
    Image.fromarray(np.full(np.asarray(Image.open(paths[3])).shape, 77, np.uint8)).save(paths[3])
    Image.open(paths[4]).convert("RGB").save(paths[4].with_suffix(".jpg"))
    paths[4].unlink()
    shutil.copy(paths[5], paths[5].with_suffix(".tif"))
    shutil.copy(paths[6], truth / "it's [bold]an\nextra.png")
    (truth / "notes.txt").write_text("This is no mask.")
    found = run(output, truth)
    assert found.left_out.counts == {
        "no_truth": 1,
        "unreadable": 1,
        "size": 1,
        "unknown": 1,
        "unsupported": 1,
        "ambiguous": 1,
        "no_image": 1,
        "no_mask": 3,
    }
    assert found.skipped == {".txt": 1}
    first = found.record["first_left_out"]
    assert first["size"] == [f"file://{paths[2]}: it is 9x7, its image 48x64"]
    assert first["unknown"][0].startswith(f"file://{paths[3]}: ids of no class: 77 (3,072 pixels)")
    assert first["no_image"] == [f"file://{truth}/it's [bold]an\nextra.png"]
    statuses = dict(
        ask_of(
            output, f"SELECT status, count(*) FROM evaluations WHERE evaluation = '{Path(found.url).name}' GROUP BY 1"
        )
    )
    assert statuses == {"ok": 22 - 6, **found.left_out.counts}


def test_fewer_images_change_neither_names_nor_what_is_nobodys_mask(small):
    output, truth = small
    uris = [uri for (uri,) in ask_of(output, "SELECT uri FROM current WHERE status = 'ok'")]
    found = run(output, truth, where=f"uri = '{uris[0].replace(chr(39), 2 * chr(39))}'")
    assert found.record["images"]["compared"] == 1
    assert found.left_out.counts == {}


def test_a_choice_may_leave_one_of_several_images_that_share_a_mask(small):
    output, truth = small
    flat = truth / "flat"
    flat.mkdir()
    (uri,) = ask_of(output, "SELECT min(uri) FROM current WHERE status = 'ok'")[0]
    name = Path(uri).stem
    (mask,) = truth.glob(f"part 0/{name}.png")
    shutil.copy(mask, flat)
    where = f"uri = '{uri.replace(chr(39), 2 * chr(39))}'"
    assert run(output, flat, where=where, rename=["^.*/="]).record["images"]["compared"] == 1


def test_a_mask_that_may_not_be_read_is_its_images_row(small, monkeypatch):
    output, truth = small
    locked = min(truth.glob("part 0/*.png"))
    fetch = Masks.fetch

    def refuse(masks: Masks, row: Mapping[str, Any]) -> bytes:
        if row["uri"] == f"file://{locked}":
            raise PermissionError(13, "Permission denied", str(locked))
        return fetch(masks, row)

    monkeypatch.setattr(Masks, "fetch", refuse)
    found = run(output, truth)
    assert found.left_out.counts["unreadable"] == 1
    assert found.record["first_left_out"]["unreadable"][0].startswith(f"file://{locked}: ")


def test_what_an_output_has_of_its_own_is_no_ground_truth(small, tmp_path):
    output, truth = small
    shutil.copytree(output, tmp_path / "all/out")
    shutil.copytree(truth, tmp_path / "all/truth")
    run(tmp_path / "all/out", truth)
    found = run(tmp_path / "all/out", tmp_path / "all", rename=["^=truth/"])
    assert "no_image" not in found.left_out.counts


def test_where_nothing_can_be_compared_it_says_why_and_puts_nothing(small, tmp_path):
    output, truth = small
    before = contents(output)
    shutil.move(truth, tmp_path / "moved/sub")
    with pytest.raises(ConfigurationError, match=r"an image is called '.*', a mask 'sub/part 0/.*'; see --rename"):
        run(output, tmp_path / "moved")
    for path in (tmp_path / "moved/sub").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match=r"no mask of .* can be compared .* 22 unreadable, such as file://"):
        run(output, tmp_path / "moved/sub")
    with pytest.raises(ConfigurationError, match="cannot be listed"):
        run(output, tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="no class of the network"):
        run(output, tmp_path / "moved/sub", classes=["tree"])
    assert contents(output) == before


def test_truth_may_have_classes_of_its_own(made, tmp_path):
    folder, truths = made
    wet = {
        uri: np.select([truth == 2, truth == 1, truth == IGNORED], [11, 12, 99], 13) for uri, truth in truths.items()
    }
    root = f"file://{folder}/in/"
    plain = {uri: truth.astype(np.uint16) for uri, truth in wet.items() if "#" not in uri}
    write_truth(tmp_path, plain, root)
    found = run(
        folder / "out",
        tmp_path,
        classes=["wet", "land", "other"],
        mask_map={"water": "wet", "0": "other", "life": "2"},
        truth_map={"11": "wet", "12": "land", "13": "other", "99": "ignore"},
    )
    of_mask, of_truth = np.array([2, 1, 0, 3, 2]), {11: 0, 12: 1, 13: 2, 99: -1}
    masks = np.load(folder / "masks.npz")
    pairs = [(np.vectorize(of_truth.get)(truth), of_mask[masks[uri]]) for uri, truth in plain.items()]
    assert_equal(found.record, pairs, 3)
    none = [int(sum(((mask == 3) & (truth == one)).sum() for truth, mask in pairs)) for one in range(3)]
    assert found.record["confusion_with_no_class"] == none
    others = run(
        folder / "out",
        tmp_path,
        classes=["wet", "other"],
        mask_map={"water": "wet", "*": "other"},
        truth_map={"11": "wet", "*": "ignore"},
    )
    assert others.record["confusion_with_no_class"] == [0, 0]


def palette_image(truth: np.ndarray) -> Image.Image:
    """Indices with colours that belong to other classes."""
    image = Image.fromarray(truth, "P")
    image.putpalette(np.vstack([PALETTE[::-1], np.zeros((251, 3), np.uint8)]).tobytes())
    return image


def coloured(truth: np.ndarray) -> Image.Image:
    return Image.fromarray(np.vstack([PALETTE, [[1, 2, 3]]]).astype(np.uint8)[np.minimum(truth, 5)])


HUNDREDS = {"truth_map": {str(one * 100): str(one) for one in range(5)}, "ignore_id": [25500]}
HEX = {"truth_map": {"#010203": "ignore", **{f"#{bytes(c).hex()}": str(one) for one, c in enumerate(PALETTE)}}}
WAYS: dict[str, tuple[Callable[[np.ndarray], Image.Image], dict[str, Any]]] = {
    "colours": (coloured, HEX),
    "palette": (palette_image, {}),
    "16 bits": (lambda truth: Image.fromarray(truth.astype(np.uint16) * 100), HUNDREDS),
    "reduced": (lambda truth: Image.fromarray(np.where(truth == IGNORED, 0, truth + 1)), {"reduce_labels": True}),
}


def test_a_table_may_name_what_is_not_there(made, tmp_path):
    folder, truths = made
    (known, other, third, *_), rows = sorted(uri for uri in truths if "#" not in uri), ["image,mask"]
    rows += [f"{known},{folder}/truth/part 0/image-00.png", f"{other},none.png", f"{third},nowhere://x/y.png"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    found = run(folder / "out", tmp_path / "pairs.csv")
    assert_equal(found.record, pairs_of(folder, {known: truths[known]}))
    assert found.record["first_left_out"]["unreadable"] == [
        f"file://{tmp_path}/none.png: the mask of ground truth is not there",
        "nowhere://x/y.png: nowhere://: Protocol not known: nowhere",
    ]
    (tmp_path / "empty.csv").write_text("image,mask\n")
    with pytest.raises(ConfigurationError, match=r"empty.csv: names no masks"):
        run(folder / "out", tmp_path / "empty.csv")


@pytest.mark.parametrize("way", WAYS)
def test_masks_are_read_as_they_are_meant(made, tmp_path, way):
    folder, truths = made
    make, options = WAYS[way]
    plain = {uri: truth for uri, truth in truths.items() if "#" not in uri}
    for uri, truth in plain.items():
        path = tmp_path / Path(uri.removeprefix(f"file://{folder}/in/")).with_suffix(".png")
        path.parent.mkdir(exist_ok=True)
        make(truth).save(path)
    found = run(folder / "out", tmp_path, **options)
    assert found.left_out.counts == {"no_truth": 6, "no_mask": 3}
    assert_equal(found.record, pairs_of(folder, plain))


def test_names_may_be_anything(tmp_path):
    names = [
        "it's",
        'a "b"',
        "[c]*?",
        "$d_1$",
        "e%20f",
        "g#h",
        "-o",
        "ünï cødé",
        "line\nend",
        "tab\t",
        "a=b",
        "\\back",
        "DROP TABLE",
    ]
    for number, name in enumerate(names):
        draw_image(tmp_path / "in" / name / f"{name}.png", 20, 16, number)
    masks = write_output(str(tmp_path / "in"), str(tmp_path / "out's [x]"))
    for uri, mask in masks.items():
        path = tmp_path / "truth" / uri.removeprefix(f"file://{tmp_path}/in/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    found = run(tmp_path / "out's [x]", tmp_path / "truth")
    assert (found.record["images"]["compared"], found.record["pooled"]["mean_iou"]) == (len(names), 1)
    assert found.left_out.counts == {}


def test_output_and_truth_may_lie_in_an_object_store(made, bucket):
    folder, _ = made
    s3 = fsspec.filesystem("s3")
    s3.put(f"{folder}/out", f"{bucket}/masks", recursive=True)
    s3.put(f"{folder}/truth", f"{bucket}/truth", recursive=True)
    here = run(folder / "out", folder / "truth", name="here").record
    there = run(f"{bucket}/masks", f"{bucket}/truth", name="there")
    for name in ("pooled", "averaged", "classes", "confusion", "left_out"):
        assert there.record[name] == here[name]
    assert len(s3.ls(there.url)) == 4
    count = "SELECT count(*) FROM evaluations WHERE evaluation = 'there'"
    with connect(Store(f"{bucket}/masks", StorageSettings())) as tables:
        assert ask(tables, count).read_all().to_pylist() == [{"count_star()": 25}]


def test_the_view_has_the_same_columns_with_and_without_evaluations(made, tmp_path):
    folder, _ = made
    bare = tmp_path / "bare"
    shutil.copytree(folder / "out", bare, ignore=shutil.ignore_patterns("evaluations"))
    run(folder / "out", folder / "truth")
    assert ask_of(bare, "DESCRIBE evaluations") == ask_of(folder / "out", "DESCRIBE evaluations")
    assert ask_of(bare, "SELECT count(*) FROM evaluations") == [(0,)]
