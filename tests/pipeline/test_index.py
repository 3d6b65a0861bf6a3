"""The index knows every image by its header, skips what is none, and reads nothing twice."""

import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from pipeline import index
from pipeline.config import ConfigurationError, IndexSettings
from pipeline.index import Index, read_index, update_index
from pipeline.storage import Store
from pipeline.tables import workspace
from tests.conftest import draw_image, spoil


@dataclass
class Updated:
    """An index, and the table of its images."""

    index: Index
    images: list[dict]


class Silent:
    """Whoever watches and says nothing."""

    def listing(self, found: int) -> None:
        pass

    def indexing(self, done: int, total: int) -> None:
        pass


def update(*sources, output, progress=None, spread=map, **options: object) -> Updated:
    settings = IndexSettings(input=[str(source) for source in sources], output=str(output), **options)
    with workspace() as space:
        found = update_index(settings, Store(str(output), settings), space.tables, progress or Silent(), spread)
        return Updated(found, space.tables.sql("FROM images ORDER BY uri").to_arrow_table().to_pylist())


def test_sizes_and_formats_come_from_headers(collection, tmp_path):
    images = update(collection, output=tmp_path / "out").images
    assert len(images) == 12
    for row in images:
        with Image.open(row["uri"].removeprefix("file://")) as image:
            assert (row["width"], row["height"]) == image.size
            assert row["format"] == image.format.lower()


def test_what_is_no_image_by_name_is_counted_and_what_is_broken_has_a_reason(collection, tmp_path):
    spoil(collection)
    found = update(collection, output=tmp_path / "out")
    assert found.index.skipped == Counter({".txt": 1, "not a file": 1})
    broken = {row["uri"].rpartition("/")[2]: row["error"] for row in found.images if row["error"]}
    assert "empty" in broken.pop("empty.jpg")
    assert "not an image" in broken.pop("text.jpg")
    assert broken == {}  # a truncated file has a whole header


def test_only_new_and_changed_images_are_opened(collection, tmp_path):
    assert update(collection, output=tmp_path / "out").index.opened == 12
    assert update(collection, output=tmp_path / "out").index.opened == 0
    draw_image(collection / "new.png", 70, 60)
    draw_image(collection / "part 0/image-00.jpg", 99, 98, seed=77)
    again = update(collection, output=tmp_path / "out")
    assert (again.index.opened, len(again.images)) == (2, 13)
    sizes = {row["uri"].rpartition("/")[2]: row["width"] for row in again.images}
    assert (sizes["new.png"], sizes["image-00.jpg"]) == (70, 99)
    (collection / "new.png").unlink()
    assert len(update(collection, output=tmp_path / "out").images) == 12
    settings = IndexSettings(input=("x",), output=str(tmp_path / "out"))
    assert len(read_index(Store(str(tmp_path / "out"), settings)).read_all()) == 14  # every version ever seen


def test_an_index_that_is_interrupted_keeps_what_it_has_read(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 2)
    monkeypatch.setattr(index, "PART_IMAGES", 6)

    class Interrupting(Silent):
        def indexing(self, done: int, total: int) -> None:
            if done == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(collection, output=tmp_path / "out", progress=Interrupting())
    again = update(collection, output=tmp_path / "out")
    assert (again.index.opened, len(again.images)) == (2, 12)


def test_what_would_never_end_is_no_image(collection, tmp_path):
    os.mkfifo(collection / "pipe.jpg")
    (collection / "loop.jpg").symlink_to(collection / "loop.jpg")
    found = update(collection, output=tmp_path / "out")
    assert len(found.images) == 12
    assert found.index.skipped["not a file"] == 2


def test_an_image_behind_a_symbolic_link_is_an_image(collection, tmp_path):
    (collection / "link.png").symlink_to(draw_image(tmp_path / "elsewhere/x.png", 31, 17))
    rows = update(collection, output=tmp_path / "out").images
    assert [(row["width"], row["height"]) for row in rows if row["uri"].endswith("link.png")] == [(31, 17)]
    draw_image(tmp_path / "elsewhere/x.png", 18, 32)
    assert update(collection, output=tmp_path / "out").index.opened == 1


def test_patterns_choose_by_name(collection, tmp_path):
    (collection / "raw").mkdir()
    (collection / "part 0/image-00.jpg").rename(collection / "raw/0001")
    found = update(collection, output=tmp_path / "out", include="raw/*")
    assert [row["uri"].rpartition("/")[2] for row in found.images] == ["0001"]
    assert len(update(collection, output=tmp_path / "out", exclude=["part 1/*", "*.bmp"]).images) == 5


def test_an_output_inside_its_collection_is_not_part_of_it(collection):
    draw_image(collection / "out/segments/preview.png", 9, 9)
    assert len(update(collection, output=collection / "out").images) == 12


def test_a_header_behind_a_large_profile_is_found(tmp_path):
    pixels = np.zeros((30, 40, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in/x.jpg", icc_profile=bytes(200_000))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(tmp_path / "in/y.tif")
    rows = update(tmp_path / "in", output=tmp_path / "out").images
    assert [(row["width"], row["height"]) for row in rows] == [(40, 30), (400, 300)]


def test_a_single_file_is_a_collection_of_one(collection, tmp_path):
    assert len(update(collection / "part 0/image-00.jpg", output=tmp_path / "out").images) == 1


def test_nothing_to_index_stops_with_one_line(tmp_path):
    with pytest.raises(ConfigurationError, match="no such"):
        update(tmp_path / "nowhere", output=tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").touch()
    with pytest.raises(ConfigurationError, match=r"no images found \(skipped 1: .txt 1\)"):
        update(tmp_path / "in", output=tmp_path / "out")
