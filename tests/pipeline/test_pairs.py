"""Each image is paired with the one mask that has its name or that a table names for it, and the rest is told."""

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import ConfigurationError, StorageSettings
from pipeline.config_truth import TruthSettings
from pipeline.pairs import (
    MASK_COLUMNS,
    Masks,
    add,
    create,
    list_files,
    match_by_name,
    name_images,
    pair,
    renamed,
    require_some,
)
from pipeline.reader import Reader
from pipeline.tables import Workspace, workspace

STORAGE = StorageSettings()


@pytest.fixture
def space() -> Iterator[Workspace]:
    with workspace() as made:
        yield made


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((2, 3), seed, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, names: Iterable[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return folder


def write_tar(path: Path, names: Iterable[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            data = png(number)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def images_of(space: Workspace, uris: Iterable[str], *inputs: Path | str) -> None:
    space.tables.register("uris", pa.table({"uri": pa.array(list(uris), pa.string())}))
    name_images(space.tables, "SELECT uri, true AS asked FROM uris", list(map(str, inputs)), STORAGE)


def names_of(space: Workspace) -> list[str]:
    return [name for (name,) in space.tables.execute("SELECT name FROM images ORDER BY uri").fetchall()]


def paired(space: Workspace, truth: Path | str, **options: object) -> dict[str, str]:
    """The name of the mask of each image that has one."""
    pair(space.tables, str(truth), TruthSettings(**options), STORAGE)
    rows = space.tables.execute(
        "SELECT i.name, p.mask FROM pairs p JOIN images i ON i.uri = p.image WHERE status = 'paired'"
    ).fetchall()
    return {name: mask.rpartition("/")[2] for name, mask in rows}


def others(space: Workspace) -> list[tuple[str, str]]:
    rows = space.tables.execute("SELECT coalesce(image, mask), status FROM pairs WHERE status <> 'paired'").fetchall()
    return sorted((uri.rpartition("/")[2], status) for uri, status in rows)


def test_a_mask_has_the_name_of_its_image_with_any_suffix_or_two(space, tmp_path):
    root = "s3://bucket/photos"
    images_of(space, [f"{root}/{name}" for name in ("a/x.jpg", "b/x.JPEG", "c.png", "D.jpg", "e.v2.jpg")], root)
    masks = write(tmp_path, ["a/x.png", "b/x.tif", "c.png.png", "d.png", "e.v2.bmp", "y.png", "notes.txt"])
    assert paired(space, masks) == {
        "a/x.jpg": "x.png",
        "b/x.JPEG": "x.tif",
        "c.png": "c.png.png",
        "e.v2.jpg": "e.v2.bmp",
    }
    assert others(space) == [("D.jpg", "no_truth"), ("d.png", "no_image"), ("y.png", "no_image")]


def test_images_among_the_masks_are_nobodys_mask(space, tmp_path):
    both = write(tmp_path, ["0.jpg", "0.png", "1.jpg", "1.png"])
    images_of(space, [f"file://{both}/{name}" for name in ("0.jpg", "1.jpg")], both)
    assert paired(space, both) == {"0.jpg": "0.png", "1.jpg": "1.png"}
    assert others(space) == []
    images_of(space, [f"file://{path}" for path in both.iterdir()], both)
    with pytest.raises(ConfigurationError, match="has the images themselves, and no masks"):
        paired(space, both)


def test_an_accent_is_the_same_however_it_is_composed(space, tmp_path):
    images_of(space, ["file:///in/caf\u00e9.jpg"], "/in")
    assert paired(space, write(tmp_path, ["cafe\u0301.png"])) == {"caf\u00e9.jpg": "cafe\u0301.png"}


def test_the_root_of_inputs_is_theirs_also_where_one_name_begins_another(space):
    images_of(
        space, [f"file:///in/{name}" for name in ("a/1.png", "a/c/1.png", "a-b/1.png")], "/in/a/c", "/in/a-b", "/in/a"
    )
    assert sorted(names_of(space)) == ["a-b/1.png", "a/1.png", "a/c/1.png"]


def test_what_has_two_masks_or_shares_one_is_told_and_not_chosen(space, tmp_path):
    images_of(space, [f"file:///in/{name}" for name in ("a.jpg", "b.jpg", "b.webp", "c.jpg")], "/in")
    assert paired(space, write(tmp_path, ["a.png", "a.tif", "b.png", "c.png"])) == {"c.jpg": "c.png"}
    assert others(space) == [("a.jpg", "ambiguous"), ("b.jpg", "ambiguous"), ("b.webp", "ambiguous")]
    errors = dict(space.tables.execute("SELECT image, error FROM pairs WHERE status = 'ambiguous'").fetchall())
    assert errors["file:///in/a.jpg"] == f"2 masks have its name: file://{tmp_path}/a.png and file://{tmp_path}/a.tif"
    assert errors["file:///in/b.jpg"] == "2 images have the name of this mask: file:///in/b.jpg and file:///in/b.webp"


def test_names_are_changed_by_regular_expressions_in_turn(space, tmp_path):
    images_of(space, ["file:///in/ulm/ulm_1_leftImg8bit.png", "file:///in/it's=odd.jpg"], "/in")
    masks = write(tmp_path, ["ulm/ulm_1_gtFine_labelIds.png", "ulm/ulm_1_gtFine_color.png", "seg-odd.png"])
    renames = ("_leftImg8bit$=_gtFine_labelIds", r"^it's\=(\w+)$=seg-\1")
    assert paired(space, masks, rename=renames) == {
        "ulm/ulm_1_leftImg8bit.png": "ulm_1_gtFine_labelIds.png",
        "it's=odd.jpg": "seg-odd.png",
    }
    assert others(space) == [("ulm_1_gtFine_color.png", "no_image")]
    paired(space, f"{masks}/*/*_labelIds.png", rename=renames)
    assert others(space) == [("it's=odd.jpg", "no_truth")]


def test_a_bad_expression_is_refused(space, tmp_path):
    images_of(space, ["file:///in/a.jpg"], "/in")
    with pytest.raises(ConfigurationError, match=r"rename: '\(=x' has no regular expression before ="):
        paired(space, write(tmp_path, ["a.png"]), rename="(=x")


@pytest.mark.parametrize(
    ("inputs", "uris", "names"),
    [
        (["/in"], ["file:///in/a/x.jpg", "file:///in/a/y.jpg"], ["a/x.jpg", "a/y.jpg"]),
        (["/in/2026-*/*.jpg"], ["file:///in/2026-1/x.jpg"], ["2026-1/x.jpg"]),
        (["/in/a", "/in/b"], ["file:///in/a/x.jpg", "file:///in/b/x.jpg"], ["a/x.jpg", "b/x.jpg"]),
        (["/list.csv"], ["s3://b/in/a/x.jpg", "s3://b/in/c/y.jpg"], ["a/x.jpg", "c/y.jpg"]),
        (["/in", "/list.csv"], ["file:///in/x.jpg", "s3://b/y.jpg"], ["x.jpg", "y.jpg"]),
        (["/in/one.jpg"], ["file:///in/one.jpg"], ["one.jpg"]),
        (["/in/t.tar"], ["file:///in/t.tar#a/x.jpg"], ["a/x.jpg"]),
        (["/in"], ["file:///in/t.tar#a/x.jpg"], ["t.tar#a/x.jpg"]),
        (["/größe/'q'"], ["file:///größe/'q'/ñ.jpg"], ["ñ.jpg"]),
        ([], ["s3://b/x.jpg"], ["x.jpg"]),
    ],
)
def test_names_are_below_what_the_collection_was(space, inputs, uris, names):
    images_of(space, uris, *inputs)
    assert names_of(space) == names


def test_masks_in_tar_and_parquet_files_are_found_and_read(space, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "0.tar", ["s/a.seg.png", "s/b.seg.png", "s/a.json"])
    images_of(space, ["s3://b/in/0.tar#s/a.jpg", "s3://b/in/0.tar#s/b.jpg"], "s3://b/in")
    assert paired(space, shards, rename="$=.seg") == {"0.tar#s/a.jpg": "a.seg.png", "0.tar#s/b.jpg": "b.seg.png"}
    (row,) = fetched(space, "WHERE uri LIKE '%b.seg.png'")
    assert Masks(Reader(STORAGE)).fetch(row) == png(1)

    table = pa.table({"image": [{"bytes": b"x"}] * 3, "label": [*({"bytes": png(one)} for one in (7, 8)), None]})
    pq.write_table(table, tmp_path / "train.parquet")
    images_of(space, [f"file://{tmp_path}/train.parquet#00000000{one}" for one in range(3)], tmp_path / "train.parquet")
    assert len(paired(space, tmp_path / "train.parquet")) == 2
    assert others(space) == [("train.parquet#000000002", "no_truth")]
    assert [Masks(Reader(STORAGE)).fetch(row) for row in fetched(space, "ORDER BY uri")] == [png(7), png(8)]


def fetched(space: Workspace, which: str) -> list[dict]:
    return space.tables.sql(f"FROM masks {which}").to_arrow_table().to_pylist()


def test_tables_name_the_mask_of_each_image(space, tmp_path):
    masks = write(tmp_path / "m", ["1.png", "2.png", "3.png", "4.png"])
    uris = [f"s3://b/in/{name}.jpg" for name in ("a", "b", "c", "d")]
    rows = [
        {"image": uris[0], "mask": "m/1.png"},
        {"image": "b.jpg", "mask": str(masks / "2.png")},
        {"image": "b.jpg", "mask": f"file://{masks}/3.png"},
        {"image": uris[2], "mask": "./other/../m/1.png"},
        {"image": uris[3], "mask": None},
        {"image": "s3://b/in/other.jpg", "mask": "m/4.png"},
    ]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    for suffix in ("csv", "jsonl", "parquet"):
        images_of(space, uris, "s3://b/in")
        assert paired(space, tmp_path / f"pairs.{suffix}") == {"a.jpg": "1.png", "c.jpg": "1.png"}
        assert others(space) == [("4.png", "no_image"), ("b.jpg", "ambiguous"), ("d.jpg", "no_truth")]


def test_a_table_whose_columns_are_not_known_is_refused_until_they_are_named(space, tmp_path):
    write(tmp_path, ["a.png"])
    (tmp_path / "pairs.csv").write_text("photo,drawn\na.jpg,a.png\n")
    images_of(space, ["file:///in/a.jpg"], "/in")
    with pytest.raises(ConfigurationError, match=r"It has photo, drawn; see --truth-image-column"):
        paired(space, tmp_path / "pairs.csv")
    columns = {"truth_image_column": "photo", "truth_mask_column": "drawn"}
    assert paired(space, tmp_path / "pairs.csv", **columns) == {"a.jpg": "a.png"}


def test_where_nothing_fits_both_sides_are_shown(space, tmp_path):
    images_of(space, ["file:///in/left/a.jpg"], "/in")
    paired(space, write(tmp_path, ["right/b.png"]))
    with pytest.raises(ConfigurationError, match=r"is called 'left/a.jpg', a mask 'right/b.png'; see --rename"):
        require_some(space.tables, "/out", str(tmp_path))
    with pytest.raises(ConfigurationError, match="no images found"):
        paired(space, write(tmp_path / "empty", []))
    with pytest.raises(ConfigurationError, match="cannot be listed"):
        paired(space, tmp_path / "nowhere")


def test_files_of_a_folder_are_images_too(space, tmp_path):
    folder = write(tmp_path / "in", ["a/x.jpg", "b.png"])
    list_files(space.tables, "images", str(folder), STORAGE, MASK_COLUMNS)
    space.tables.execute("ALTER TABLE images ADD COLUMN asked BOOLEAN DEFAULT true")
    assert paired(space, write(tmp_path / "masks", ["a/x.png", "b.png"])) == {"a/x.jpg": "x.png", "b.png": "b.png"}


@settings(deadline=None, max_examples=15)
@given(st.sets(st.text(st.characters(exclude_characters="/\0#", exclude_categories=("Cs",)), min_size=1, max_size=12)))
def test_any_name_finds_its_own_mask(names):
    expected = {f"s3://b/in/{name}/{name}.jpg": f"s3://t/{name}/{name}.png" for name in [*names, "z"]}
    with workspace() as made:
        images_of(made, [*expected, "s3://b/in/none.jpg"], "s3://b/in")
        create(made.tables, "masks")
        masks = list(expected.values())
        add(made.tables, "masks", {"uri": masks, "name": [uri.removeprefix("s3://t/") for uri in masks]})
        match_by_name(made.tables, renamed(made.tables, ()))
        assert dict(made.tables.execute("SELECT image, mask FROM pairs WHERE status = 'paired'").fetchall()) == expected
