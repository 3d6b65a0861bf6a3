"""What others read is what the output has: every pixel, whatever images are called and wherever they are by now."""

import csv
import io
import json
import shutil
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from pipeline import export_huggingface
from pipeline.config import ConfigurationError, ExportSettings
from pipeline.decode import decode
from pipeline.export import Exported, export
from pipeline.export_coco import write_coco
from pipeline.export_huggingface import write_huggingface
from pipeline.export_png import write_png
from pipeline.masks import decode_mask
from pipeline.names import LONGEST, LONGEST_NAME, common_root, plain_name, safe_name
from pipeline.query import SharedFile
from pipeline.storage import Store
from tests.conftest import NAMES, draw_image
from tests.pipeline.gallery import gallery
from tests.pipeline.outputs import Small, blobs, small_output, write_output

LATER = "2026-02-01T00:00:00+00:00"
WRITERS = {"png": write_png, "coco": write_coco, "huggingface": write_huggingface}


class Counting:
    """Whoever watches, and remembers."""

    told: tuple[int, int] = (0, 0)

    def exporting(self, done: int, total: int) -> None:
        assert done == self.told[0] + 1 or not self.told[0]
        self.told = (done, total)


def exported(output: object, dest: object, kind: str, **options: object) -> Exported:
    watcher = Counting()
    settings = ExportSettings(output=str(output), dest=str(dest), format=kind, **options)
    done = export(settings, WRITERS[kind], watcher)
    assert done.was_there or watcher.told[0] == watcher.told[1] == done.images + done.left_out.total()
    return done


def masks_of(output: Path) -> dict[str, np.ndarray]:
    """The masks of an output by URI, read without any of the code that exports."""
    rows = pq.read_table(output / "segments", columns=["uri", "status", "mask"]).to_pylist()
    return {row["uri"]: decode_mask(row["mask"]) for row in rows if row["status"] == "ok"}


def pixels_of(png: Path | bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        return np.asarray(image)


def exported_pngs(dest: Path) -> dict[str, np.ndarray]:
    with (dest / "masks.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["file"] for row in rows}) == len(rows)
    return {row["uri"]: pixels_of(dest / row["file"]) for row in rows}


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """Load a folder with the `datasets` library, which reaches no network: features, and (uri, image, mask, mode)."""

    def refuse(*_: object) -> None:
        raise AssertionError("something is downloaded")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def load(folder: Path) -> tuple[dict[str, str], list[tuple[str, np.ndarray, np.ndarray, str]]]:
        with monkeypatch.context() as patch:
            patch.setattr("socket.socket.connect", refuse)
            found = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        features = {name: type(kind).__name__ for name, kind in found.features.items()}
        return features, [
            (row["uri"], np.asarray(row["image"].convert("RGB")), np.asarray(row["label"]), row["label"].mode)
            for row in found
        ]

    return load


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[uri], expected[uri]) for uri in expected)


def box(mask: np.ndarray) -> list[int]:
    """Left, top, width and height of what is true."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def check_coco(path: Path, masks: dict[str, np.ndarray], names: list[str]) -> COCO:
    coco = COCO(str(path))
    assert {image["coco_url"] for image in coco.loadImgs(coco.getImgIds())} == set(masks)
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == names
    assert [one["class_id"] for one in coco.loadCats(coco.getCatIds())] == list(range(len(names)))
    for image in coco.loadImgs(coco.getImgIds()):
        mask = masks[image["coco_url"]]
        assert (image["height"], image["width"]) == mask.shape
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=False))
        assert [one["category_id"] - 1 for one in found] == np.unique(mask).tolist()
        for one in found:
            expected = mask == one["category_id"] - 1
            assert np.array_equal(coco.annToMask(one), expected)
            assert one["area"] == expected.sum()
            assert one["bbox"] == box(expected)
    assert len(coco.getAnnIds()) == len(coco.anns) == len(coco.dataset["annotations"])
    return coco


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_output(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def masks(small: Small) -> dict[str, np.ndarray]:
    return masks_of(small.output)


def test_png_masks_are_the_bytes_of_the_output_beside_a_table_of_whose_they_are(small, masks, tmp_path):
    assert exported(small.output, tmp_path / "png", "png").images == 12
    assert same(exported_pngs(tmp_path / "png"), masks)
    stored = {row["mask"] for row in pq.read_table(small.output / "segments").to_pylist() if row["mask"]}
    files = [path.read_bytes() for path in (tmp_path / "png/masks").iterdir()]
    assert (set(files), len(files)) == (stored, 12)
    assert (tmp_path / "png/masks/image-01.png.png").exists()
    labels = json.loads((tmp_path / "png/labels.json").read_text())
    assert [(one["id"], one["name"]) for one in labels] == list(enumerate(NAMES))
    with Image.open(tmp_path / "png/masks/image-01.png.png") as image:
        assert image.getpalette()[:15] == [part for one in labels for part in one["color"]]


def test_what_a_real_run_has_written_is_exported(finished, tmp_path):
    for kind in WRITERS:
        assert exported(finished.output, tmp_path / kind, kind).images == 11
    assert same(exported_pngs(tmp_path / "png"), masks_of(finished.output))


def test_the_outputs_of_these_tests_have_the_records_of_real_runs(small, finished):
    records = [next(output.glob("runs/*/run.json")).read_text() for output in (small.output, finished.output)]
    drawn, real = map(json.loads, records)
    assert drawn.keys() == real.keys()
    assert (drawn["images"], drawn["statuses"]) == (15, {"ok": 12, "unreadable": 3})


def test_coco_annotations_have_the_pixels_areas_and_boxes_of_the_masks(small, masks, tmp_path):
    assert exported(small.output, tmp_path / "coco", "coco").images == 12
    coco = check_coco(tmp_path / "coco/instances.json", masks, NAMES)
    images = coco.loadImgs(coco.getImgIds())
    assert {image["file_name"] for image in images} == {uri.rpartition("/")[2] for uri in masks}
    assert all((small.collection / image["file_name"]).exists() for image in images)


def test_a_hugging_face_dataset_has_equal_images_and_masks(small, masks, tmp_path, loaded):
    assert exported(small.output, tmp_path / "hf", "huggingface").images == 12
    kinds, rows = loaded(tmp_path / "hf")
    assert (kinds["image"], kinds["label"], kinds["uri"]) == ("Image", "Image", "Value")
    assert same({uri: mask for uri, _, mask, _ in rows}, masks)
    for uri, image, _, _ in rows:
        data = Path(uri.removeprefix("file://")).read_bytes()
        assert np.array_equal(image, decode(data, 10**8).pixels), uri
    assert json.loads((tmp_path / "hf/id2label.json").read_text()) == {str(i): name for i, name in enumerate(NAMES)}
    card = (tmp_path / "hf/README.md").read_text()
    assert "<b>" not in card
    assert "it&#39;s &#60;b&#62;odd" in card


def test_every_format_and_orientation_is_shown_upright_to_a_reader_that_has_pillow_alone(tmp_path, loaded):
    pictures = {f"{number:03d}": picture for number, picture in enumerate(gallery())}
    (tmp_path / "in").mkdir()
    for name, picture in pictures.items():
        (tmp_path / f"in/{name}.{picture.format.replace('jpeg2000', 'jp2').replace('mpo', 'jpg')}").write_bytes(
            picture.data
        )
    turned = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    draw_image(tmp_path / "in/xmp.jpg", 40, 30)
    with Image.open(tmp_path / "in/xmp.jpg") as image:
        image.save(tmp_path / "in/xmp.jpg", xmp=turned)  # which the network does not see, and Pillow does
    masks = write_output(str(tmp_path / "in"), str(tmp_path / "out"), shard_images=64)
    assert len(masks) == len(pictures) + 1
    assert exported(tmp_path / "out", tmp_path / "hf", "huggingface").left_out.total() == 0
    _, rows = loaded(tmp_path / "hf")
    assert same({uri: mask for uri, _, mask, _ in rows}, masks)
    for uri, image, mask, _ in rows:
        name = uri.rpartition("/")[2].partition(".")[0]
        assert image.shape[:2] == mask.shape, name
        if name in pictures and pictures[name].format in ("tiff", "jpeg2000", "heif", "avif"):
            assert np.abs(image.astype(int) - pictures[name].pixels).max() <= pictures[name].tolerance, name


def test_masks_of_more_than_256_classes_stay_what_they_are(tmp_path, loaded):
    for number in range(5):
        draw_image(tmp_path / f"in/{number}.jpg", 90 + number, 70)
    names = [f"class {number}" for number in range(300)]
    masks = write_output(str(tmp_path / "in"), str(tmp_path / "out"), names=names)
    assert {mask.dtype for mask in masks.values()} == {np.dtype(np.uint16)}
    for kind in WRITERS:
        exported(tmp_path / "out", tmp_path / kind, kind)
    assert same(exported_pngs(tmp_path / "png"), masks)
    check_coco(tmp_path / "coco/instances.json", masks, names)
    _, rows = loaded(tmp_path / "huggingface")
    assert same({uri: mask for uri, _, mask, _ in rows}, masks)
    assert {mode for *_, mode in rows} == {"I;16"}


ODD = [
    "a.jpg",
    "a.png",
    "a.jpg.png/b.jpg",
    "<script>alert(1)</script>.jpg",
    "per%2Fcent%.jpg",
    "hash#tag.jpg",
    "quo'te\".jpg",
    "ünïcode 雪/\u202egpj.jpg",
    "new\nline, comma.jpg",
    "=cmd|x.jpg",
    "..a/..b.jpg",
    "back\\..\\slash.jpg",
    f"{'long' * 60}/{'n' * 240}.jpg",
    f"{'long' * 60}/{'n' * 239}m.jpg",
]


def test_odd_names_lead_nowhere_else_and_never_to_the_same_file(tmp_path, loaded):
    for number, name in enumerate(ODD):
        draw_image(tmp_path / "plain.jpg", 40 + number, 30)
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "plain.jpg", tmp_path / "in" / name)
    masks = write_output(str(tmp_path / "in"), str(tmp_path / "out"))
    assert len(masks) == len(ODD)
    for kind in WRITERS:
        assert exported(tmp_path / "out", tmp_path / kind, kind).images == len(ODD)
    assert same(exported_pngs(tmp_path / "png"), masks)
    coco = check_coco(tmp_path / "coco/instances.json", masks, NAMES)
    found = {image["file_name"] for image in coco.loadImgs(coco.getImgIds())}
    assert found == set(ODD) - {"back\\..\\slash.jpg"} | {"%~/back%5C..%5Cslash.jpg"}
    _, rows = loaded(tmp_path / "huggingface")
    assert same({uri: mask for uri, _, mask, _ in rows}, masks)


PARTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", ".", "..", "a.jpg", "a.jpg.png", "%", "%~", "%2F", "CON", "x" * 300, "雪" * 200]),
)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=5).map("/".join), min_size=2, max_size=2, unique=True))
def test_whatever_images_are_called_their_files_are_apart_and_below_the_destination(names):
    uris = [f"s3://bucket/{name}" for name in names]
    found = [safe_name(uri, "s3://bucket/", ".png") for uri in uris]
    for name in found:
        parts = name.split("/")
        assert all(part not in ("", ".", "..") and len(part.encode()) <= LONGEST for part in parts)
        assert len(name.encode()) <= LONGEST_NAME
        assert name.isprintable()
        assert name.endswith(".png")
        assert not any(part.lower().endswith(".png") for part in parts[:-1])
    assert found[0] != found[1]
    assert not found[1].startswith(f"{found[0]}/")
    plain = [plain_name(uri, "s3://bucket/") for uri in uris]
    assert all(part not in ("", ".", "..") for name in plain for part in name.split("/"))
    assert plain[0] != plain[1]


def test_no_image_is_called_as_another_is_whose_name_would_lead_elsewhere():
    names = ["/x", "%2F/x", "%~/%2F/x", "%~/%25~/%252F/x", "..", "%2E%2E", "%~/%2E%2E", "a\\b", "a%5Cb", "%~/a%5Cb"]
    assert len({plain_name(f"s3://b/{name}", "s3://b/") for name in names}) == len(names)
    assert plain_name("s3://b/%2F/100%.jpg", "s3://b/") == "%2F/100%.jpg"


def test_a_common_root_is_a_folder():
    assert common_root("s3://b/x/a.jpg", "s3://b/x/y/b.jpg") == "s3://b/x/"
    assert common_root("s3://bucket-1/a.jpg", "s3://bucket-2/a.jpg") == "s3://"
    assert common_root("file:///a.jpg", "s3://b/a.jpg") == ""
    assert safe_name("s3://b/../a.jpg", "", ".png") == "s3%3A/%2F/b/%2E%2E/a.jpg.png"


def test_images_in_tars_and_parquet_files_are_exported_too(tmp_path, loaded):
    for number in range(6):
        draw_image(tmp_path / f"plain/{number}.jpg", 40 + number, 30, number)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/a.tar", "w") as tar:
        for number in range(3):
            tar.add(tmp_path / f"plain/{number}.jpg", f"../x/{number}.jpg")
    data = [(tmp_path / f"plain/{number}.jpg").read_bytes() for number in range(3, 6)]
    pq.write_table(pa.table({"image": data}), tmp_path / "in/b.parquet")
    masks = write_output(str(tmp_path / "in"), str(tmp_path / "out"))
    assert len(masks) == 6
    for kind in WRITERS:
        exported(tmp_path / "out", tmp_path / kind, kind)
    assert same(exported_pngs(tmp_path / "png"), masks)
    assert (tmp_path / "png/masks/b.parquet%23000000000.png").exists()
    _, rows = loaded(tmp_path / "huggingface")
    assert same({uri: mask for uri, _, mask, _ in rows}, masks)
    assert {image.shape[1] for _, image, _, _ in rows} == set(range(40, 46))


def test_images_that_have_gone_or_changed_are_listed_and_the_rest_is_exported(tmp_path, loaded):
    for number in range(12):
        draw_image(tmp_path / f"in/{number:02d}.jpg", 60, 40, number)
    masks = write_output(str(tmp_path / "in"), str(tmp_path / "out"))
    (tmp_path / "in/03.jpg").unlink()
    draw_image(tmp_path / "in/04.jpg", 60, 40, 99)
    draw_image(tmp_path / "in/05.jpg", 64, 40, 99)
    done = exported(tmp_path / "out", tmp_path / "hf", "huggingface")
    assert (done.images, done.left_out) == (9, Counter(changed=2, missing=1))
    rows = [row for path in (tmp_path / "hf/left_out").iterdir() for row in csv.DictReader(path.open(newline=""))]
    assert {(Path(row["uri"]).name, row["status"]) for row in rows} == {
        ("03.jpg", "missing"),
        ("04.jpg", "changed"),
        ("05.jpg", "changed"),
    }
    _, found = loaded(tmp_path / "hf")
    assert {Path(uri).name for uri, *_ in found} == {Path(uri).name for uri in masks} - {"03.jpg", "04.jpg", "05.jpg"}
    assert "2 changed, 1 missing" in (tmp_path / "hf/README.md").read_text()
    assert exported(tmp_path / "out", tmp_path / "coco", "coco").images == 12, "masks are there all the same"


def test_of_each_image_the_newest_mask_is_exported_or_those_of_one_run(tmp_path):
    for number in range(4):
        draw_image(tmp_path / f"in/{number}.jpg", 60, 40, number)
    old = write_output(str(tmp_path / "in"), str(tmp_path / "out"), "a")
    draw_image(tmp_path / "in/1.jpg", 64, 44, 9)
    draw_image(tmp_path / "in/4.jpg", 60, 40, 9)
    again = blobs(3)
    (tmp_path / "in/0.jpg").unlink()
    new = write_output(str(tmp_path / "in"), str(tmp_path / "out"), "b", draw=again, finished=LATER)
    exported(tmp_path / "out", tmp_path / "now", "png")
    assert same(exported_pngs(tmp_path / "now"), old | new)
    exported(tmp_path / "out", tmp_path / "a", "png", run_id="a")
    assert same(exported_pngs(tmp_path / "a"), old)
    exported(tmp_path / "out", tmp_path / "some", "png", where="uri LIKE '%/1.jpg' OR uri LIKE '%/4.jpg' -- odd")
    assert same(exported_pngs(tmp_path / "some"), {uri: new[uri] for uri in new if uri[-5] in "14"})
    exported(tmp_path / "out", tmp_path / "two", "png", limit=2)
    assert {uri[-5] for uri in exported_pngs(tmp_path / "two")} == {"0", "1"}


def test_what_cannot_be_exported_is_refused_in_one_line(small, tmp_path):
    output = shutil.copytree(small.output, tmp_path / "out")

    def refusal(dest: object = tmp_path / "new", **options: object) -> str:
        with pytest.raises(ConfigurationError) as caught:
            exported(output, dest, "png", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "in the output itself" in refusal(output / "masks")
    assert "no such run" in refusal(run_id="x'; DROP")
    assert "where 'nothing > 1': Binder Error: Referenced column \"nothing\"" in refusal(where="nothing > 1")
    assert "where \"regexp_matches(uri, '(')\": Invalid Input Error: missing ): (" in refusal(
        where="regexp_matches(uri, '(')"
    )
    assert "No files found" in refusal(where=f"uri IN (SELECT uri FROM '{tmp_path}/none.csv')")
    assert "no image has a mask where confidence > 1" in refusal(where="confidence > 1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    assert "files that are no export" in refusal(tmp_path / "full", overwrite=True)
    draw_image(tmp_path / "in/new.jpg", 40, 30)
    write_output(str(tmp_path / "in"), str(output), "other", names=["some", "thing"])
    assert "runs first and other have other labels, so their masks mean other things; choose one with" in refusal()
    (output / "runs/first/run.json").unlink()
    assert "run first is not finished" in refusal(run_id="first")
    (output / "runs/other/run.json").unlink()
    assert "no run is finished" in refusal()
    shutil.rmtree(output / "segments")
    assert "no segments are here" in refusal()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", WRITERS)
def test_an_output_in_the_destination_is_never_touched_wherever_symbolic_links_lead(small, tmp_path, kind):
    dest, aside = tmp_path / "dest", tmp_path / "aside"
    exported(small.output, dest, kind)
    output = Path(shutil.copytree(small.output, dest / "masks/out"))
    aside.symlink_to(output)
    for url in (output, aside):
        with pytest.raises(ConfigurationError, match="the output is in it; give a place beside the output"):
            exported(url, dest, kind, overwrite=True)
        assert contents(output) == contents(small.output)
    for place in (aside, aside / "new"):
        with pytest.raises(ConfigurationError, match="is in the output itself"):
            exported(output, place, kind)


class KilledError(Exception):
    """What ends an export in its midst."""


def killed_after(images: int) -> Counting:
    class Killer(Counting):
        def exporting(self, done: int, total: int) -> None:
            if done > images:
                raise KilledError

    return Killer()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_killed_export_is_repeated_and_gives_what_an_undisturbed_one_gives(small, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(export_huggingface, "PART_BYTES", 10_000)
    exported(small.output, tmp_path / "whole", kind)
    settings = ExportSettings(output=str(small.output), dest=str(tmp_path / "dest"), format=kind)
    for images in (0, 3, 7):
        with pytest.raises(KilledError):
            export(settings, WRITERS[kind], killed_after(images))
    parts = [(path, path.stat().st_mtime_ns) for path in (tmp_path / "dest/data").glob("*")]
    assert (len(parts) > 1) == (kind == "huggingface")
    assert exported(small.output, tmp_path / "dest", kind) == exported_whole(tmp_path / "whole")
    assert contents(tmp_path / "dest") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == before for path, before in parts), "what was there is not done again"
    assert exported(small.output, tmp_path / "dest", kind).was_there


def exported_whole(dest: Path) -> Exported:
    mark = json.loads((dest / "swath-export.json").read_text())
    return Exported(mark["images"], Counter(mark["left_out"]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_of_other_rows_is_replaced_only_when_asked_and_nothing_else_ever_is(small, masks, tmp_path):
    dest = tmp_path / "dest"
    (dest / ".git").mkdir(parents=True)
    exported(small.output, dest, "huggingface", limit=3)
    (dest / "notes.txt").write_text("mine")
    for options in ({"limit": 4}, {"kind": "png"}):
        with pytest.raises(ConfigurationError, match="--overwrite"):
            exported(small.output, dest, **{"kind": "huggingface"} | options)
    assert len(list((dest / "data").iterdir())) == 1
    exported(small.output, dest, "png", overwrite=True)
    assert same(exported_pngs(dest), masks)
    assert {path.name for path in dest.iterdir() if list(path.rglob("*")) or path.is_file()} == {
        "labels.json",
        "masks",
        "masks.csv",
        "notes.txt",
        "swath-export.json",
    }


@pytest.mark.parametrize("kind", WRITERS)
def test_a_replacement_removes_what_the_other_export_has_written_and_no_file_of_anybody_else(small, tmp_path, kind):
    dest, new = tmp_path / "dest", "coco" if kind == "png" else "png"
    exported(small.output, dest, kind)
    written = set(contents(dest))
    mine = {"data/mine.csv", "data/train-mine.parquet", "left_out/why.txt", "masks/mine.txt", "masks.csv.bak"}
    mine |= {"labels.json.orig", "README.md.orig", "notes/masks/a.png"} | ({"README.md"} - written)
    for name in mine:
        (dest / name).parent.mkdir(parents=True, exist_ok=True)
        (dest / name).write_text("mine")
    exported(small.output, dest, new, overwrite=True)
    exported(small.output, tmp_path / "new", new)
    assert contents(dest) == contents(tmp_path / "new") | dict.fromkeys(mine, b"mine")


def test_a_replacement_does_not_write_over_a_file_of_somebody_else(small, tmp_path):
    exported(small.output, tmp_path, "png")
    (tmp_path / "README.md").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigurationError, match=r"README\.md is not of the export that is replaced.*move it"):
        exported(small.output, tmp_path, "huggingface", overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", WRITERS)
def test_a_replacement_that_is_killed_while_it_removes_files_is_never_taken_for_an_export(
    small, tmp_path, kind, monkeypatch
):
    dest, delete = tmp_path / "dest", Store.delete
    exported(small.output, dest, kind, limit=3)
    exported(small.output, tmp_path / "whole", kind, limit=5)

    def killed(store: Store, name: str) -> None:
        if not name.startswith("."):
            raise KilledError
        delete(store, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", killed)
        with pytest.raises(KilledError):
            exported(small.output, dest, kind, limit=5, overwrite=True)
    for limit in (3, 5):
        with pytest.raises(ConfigurationError, match=r"half replaced.*--overwrite"):
            exported(small.output, dest, kind, limit=limit)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", lambda *_: None)
        with pytest.raises(ConfigurationError, match="cannot be removed"):
            exported(small.output, dest, kind, limit=5, overwrite=True)
    assert exported(small.output, dest, kind, limit=5, overwrite=True).images == 5
    assert contents(dest) == contents(tmp_path / "whole")


@pytest.mark.parametrize("mark", ["[]", "{}", '{"format": ["png"]}', '{"format": "of the future"}', "nothing"])
def test_what_another_program_calls_a_marker_is_none(small, tmp_path, mark):
    (tmp_path / "swath-export.json").write_text(mark)
    with pytest.raises(ConfigurationError, match="files that are no export"):
        exported(small.output, tmp_path, "png", overwrite=True)


def test_a_dataset_is_cut_into_files_of_a_bounded_size(small, masks, tmp_path, loaded, monkeypatch):
    monkeypatch.setattr(export_huggingface, "PART_BYTES", 10_000)
    monkeypatch.setattr(export_huggingface, "GROUP_ROWS", 2)
    exported(small.output, tmp_path / "hf", "huggingface")
    names = sorted(path.name for path in (tmp_path / "hf/data").iterdir())
    assert names == [f"train-{number:05d}-of-{len(names):05d}.parquet" for number in range(len(names))]
    assert 3 < len(names) < 12
    files = [pq.ParquetFile(tmp_path / "hf/data" / name) for name in names]
    assert max(file.metadata.row_group(0).num_rows for file in files) == 2
    assert same({uri: mask for uri, _, mask, _ in loaded(tmp_path / "hf")[1]}, masks)


def test_a_damaged_shard_stops_the_export_and_says_which(small, tmp_path):
    output = Path(shutil.copytree(small.output, tmp_path / "out"))
    path = max(output.glob("segments/*/*.parquet"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    mask = sorted(pq.read_table(path, partitioning=None)["mask"].to_pylist())[1]  # of which there are no statistics
    at = data.index(mask) + len(mask) // 2
    data[at : at + 10] = bytes(10)
    path.write_bytes(data)
    with pytest.raises(OSError, match=f"{path.name} is damaged .*; see swath verify"):
        exported(output, tmp_path / "png", "png")


@pytest.mark.parametrize("where", [None, "confidence > 0", "regexp_matches(uri, '(')"])
def test_a_shard_that_cannot_be_read_is_not_blamed_on_the_condition(small, tmp_path, where):
    output = Path(shutil.copytree(small.output, tmp_path / "out"))
    for path in sorted(output.glob("segments/*/*.parquet"))[:2]:  # DuckDB asks the first for the columns of all
        data = path.read_bytes()
        path.write_bytes(data[:-20])
        with pytest.raises(OSError, match=r"out cannot be read \(.*shard-.*\); see swath verify"):
            exported(output, tmp_path / "png", "png", where=where)
        path.write_bytes(data)


def test_what_the_store_says_is_the_reason_and_not_where_python_was(small, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("the store says no")

    monkeypatch.setattr(Store, "is_local", False)  # so that DuckDB has it read
    monkeypatch.setattr(SharedFile, "fetch", refuse)
    with pytest.raises(OSError, match=r"cannot be read \(PermissionError: the store says no\)"):
        exported(small.output, tmp_path / "png", "png", where="confidence > 0")


@pytest.mark.parametrize("kind", WRITERS)
def test_from_s3_to_s3_the_same_is_exported(small, masks, bucket, tmp_path, kind, loaded):
    filesystem = fsspec.filesystem("s3")
    filesystem.put(f"{small.output}/", f"{bucket}/out/", recursive=True)
    assert exported(f"{bucket}/out", f"{bucket}/{kind}", kind).images == 12
    filesystem.get(f"{bucket}/{kind}/", str(tmp_path / "copy"), recursive=True)
    if kind == "png":
        assert same(exported_pngs(tmp_path / "copy"), masks)
    elif kind == "coco":
        check_coco(tmp_path / "copy/instances.json", masks, NAMES)
    else:
        assert same({uri: mask for uri, _, mask, _ in loaded(tmp_path / "copy")[1]}, masks)
    assert exported(f"{bucket}/out", f"{bucket}/{kind}", kind).was_there
    with pytest.raises(ConfigurationError, match="--overwrite"):
        exported(f"{bucket}/out", f"{bucket}/{kind}", kind, limit=5)
    exported(f"{bucket}/out", f"{bucket}/{kind}", kind, limit=5, overwrite=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_export_of_eight_times_the_images_does_not_hold_more(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(export_huggingface, "PART_BYTES", 400_000)
    monkeypatch.setattr(export_huggingface, "GROUP_BYTES", 100_000)
    for module in ("plan", "commit"):  # of a plan a whole file is in memory
        monkeypatch.setattr(f"pipeline.{module}.PART_SHARDS", 2)
    rng = np.random.default_rng(0)
    peaks, sizes = [], []
    for images in (50, 400):
        folder = tmp_path / f"{images}"
        for number in range(images):
            path = folder / f"in/{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)).save(path)
        write_output(str(folder / "in"), str(folder / "out"), shard_images=16)
        tracemalloc.start()
        exported(folder / "out", folder / "dest", kind)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(sum(path.stat().st_size for path in (folder / "dest").rglob("*") if path.is_file()))
    assert peaks[1] < 1.5 * peaks[0]  # what is no more in use waits for the collector
    assert sizes[1] > 6 * sizes[0]
