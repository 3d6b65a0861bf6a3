"""An output as samples: each image with its own mask and row, upright, from any process, or an error that says why."""

import doctest
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import pipeline
from pipeline import ImageError, Sample, SegmentedImages, ShuffledShards, StorageSettings, dataset
from pipeline.decode import decode
from pipeline.masks import decode_mask
from tests.conftest import NAMES, draw_image
from tests.pipeline.outputs import Small, small_output, write_output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_output(tmp_path_factory.mktemp("small"))


def rows_of(output: Path) -> dict[str, dict]:
    """The rows that have a mask, by URI, read without the code under test."""
    rows = pq.read_table(output / "segments", partitioning=None).to_pylist()
    return {row["uri"]: row for row in rows if row["status"] == "ok"}


def is_right(sample: Sample, rows: dict[str, dict]) -> bool:
    expected = rows[sample.row["uri"]].copy()
    data = Path(expected["uri"].removeprefix("file://")).read_bytes()
    mask = decode_mask(expected.pop("mask"))
    return (
        np.array_equal(sample.image, decode(data, 10**8).pixels)
        and np.array_equal(sample.mask, mask)
        and sample.image.shape[:2] == mask.shape
        and sample.row == expected
    )


def size_of(sample: Sample) -> tuple[str, int, int]:
    """A transform that workers can be sent."""
    return sample.row["uri"], *sample.mask.shape


def test_every_sample_is_an_image_with_its_own_mask_and_row_in_order_and_at_random(small):
    images, rows = SegmentedImages(str(small.output)), rows_of(small.output)
    assert len(images) == len(rows) == 12
    in_order = list(images)
    assert [sample.row["uri"] for sample in in_order] == [images[i].row["uri"] for i in range(12)]
    assert {sample.row["uri"] for sample in in_order} == set(rows)
    assert all(is_right(sample, rows) for sample in in_order)
    assert all(is_right(images[i], rows) for i in np.random.default_rng(0).permutation(12).tolist())
    assert images[-1].row == images[11].row
    assert images.labels.names == tuple(NAMES)
    with pytest.raises(IndexError):
        images[12]


def test_the_example_in_the_docstring_runs(small):
    found = doctest.DocTestFinder().find(SegmentedImages, globs={"output": str(small.output)})
    runner = doctest.DocTestRunner()
    tried = sum(runner.run(test).attempted for test in found)
    assert (tried, runner.failures) == (10, 0)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_get_every_sample_once_however_they_are_started(small, start):
    images = SegmentedImages(str(small.output), transform=size_of)
    first = images[0]  # what this process has open must not get into the others
    sampler = ShuffledShards(images, seed=3)
    loader = DataLoader(
        images, batch_size=2, sampler=sampler, num_workers=2, multiprocessing_context=start, collate_fn=list
    )
    found = [one for batch in loader for one in batch]
    assert first in found
    assert sorted(found) == sorted((uri, row["height"], row["width"]) for uri, row in rows_of(small.output).items())


def test_workers_that_are_forked_read_from_s3_what_this_process_reads(bucket, tmp_path):
    filesystem = fsspec.filesystem("s3")
    for number in range(6):
        draw_image(tmp_path / f"in/{number}.jpg", 40 + number, 30, number)
    filesystem.put(f"{tmp_path}/in/", f"{bucket}/in/", recursive=True)
    masks = write_output(f"{bucket}/in", f"{bucket}/out")
    images = SegmentedImages(f"{bucket}/out", storage=StorageSettings(retry_seconds=5))
    for sample in images:
        data = (tmp_path / "in" / sample.row["uri"].rpartition("/")[2]).read_bytes()
        assert np.array_equal(sample.image, decode(data, 10**8).pixels)
        assert np.array_equal(sample.mask, masks[sample.row["uri"]])
    images.transform = size_of
    loader = DataLoader(
        images, batch_size=2, num_workers=2, multiprocessing_context="fork", collate_fn=list, timeout=60
    )
    found = [one for batch in loader for one in batch]
    assert sorted(found) == sorted((uri, *mask.shape) for uri, mask in masks.items())


def test_a_shuffled_pass_reads_each_shard_once_and_every_pass_is_another(small, monkeypatch):
    monkeypatch.setattr(dataset, "KEPT_BYTES", 0)  # one shard at a time
    images = SegmentedImages(str(small.output), transform=size_of)
    sampler = ShuffledShards(images, seed=3)
    passes = [list(sampler) for _ in range(3)]
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert list(ShuffledShards(images, seed=3)) == passes[0] != list(ShuffledShards(images, seed=4))
    read, seen = dataset.opened, []
    monkeypatch.setattr(dataset, "opened", lambda run, shard: seen.append(shard) or read(run, shard))
    for index in passes[0]:
        images[index]
    assert len(seen) == len(set(seen)) == len(images.shards)


def test_an_image_is_upright_as_its_mask_is(tmp_path):
    (tmp_path / "in").mkdir()
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / f"in/{turn}.jpg", exif=exif)
    write_output(str(tmp_path / "in"), str(tmp_path / "out"))
    for image, mask, row in SegmentedImages(str(tmp_path / "out")):
        turned = int(row["uri"][-5]) >= 5
        assert image.shape[:2] == mask.shape == ((50, 30) if turned else (30, 50))


def test_an_image_that_is_there_no_more_is_an_error_that_names_it_and_the_others_are_given(tmp_path):
    for number in range(6):
        draw_image(tmp_path / f"in/{number}.jpg", 60, 40, number)
    write_output(str(tmp_path / "in"), str(tmp_path / "out"))
    (tmp_path / "in/1.jpg").unlink()
    draw_image(tmp_path / "in/2.jpg", 60, 40, 9)
    images, why = SegmentedImages(str(tmp_path / "out")), {}
    for index in range(len(images)):
        try:
            assert images[index].row["uri"][-5] not in "12"
        except ImageError as error:
            why[error.uri[-5]] = error.status
    assert why == {"1": "missing", "2": "changed"}
    with pytest.raises(ImageError, match=r"/in/1\.jpg: the image is gone since it was segmented"):
        list(images)
    with pytest.raises(ImageError, match=r"(?s)in DataLoader worker.*/in/1\.jpg: the image is gone"):
        list(DataLoader(images, num_workers=1, collate_fn=list))


def test_an_image_of_another_size_is_found_where_the_store_knows_no_versions(tmp_path):
    draw_image(tmp_path / "in/1.jpg", 60, 40)
    manifest = tmp_path / "in.csv"
    manifest.write_text(f"uri,etag,size\nfile://{tmp_path}/in/1.jpg,,\n")
    write_output(str(manifest), str(tmp_path / "out"))
    images = SegmentedImages(str(tmp_path / "out"))
    assert images[0].image.shape == (40, 60, 3)
    draw_image(tmp_path / "in/1.jpg", 40, 60)
    with pytest.raises(ImageError, match="another one than was segmented"):
        images[0]


def test_masks_of_more_than_256_classes_have_16_bits(tmp_path):
    draw_image(tmp_path / "in/1.jpg", 60, 40)
    masks = write_output(str(tmp_path / "in"), str(tmp_path / "out"), names=[f"class {i}" for i in range(300)])
    ((_, mask, row),) = SegmentedImages(str(tmp_path / "out"))
    assert mask.dtype == np.uint16
    assert np.array_equal(mask, masks[row["uri"]])


def test_a_dataset_is_pickled_without_what_it_has_open_and_its_index_is_small(small):
    images = SegmentedImages(str(small.output))
    images[0]
    again = pickle.loads(pickle.dumps(images))
    assert again[3].row == images[3].row
    assert images.rows.itemsize == 4


def test_to_import_the_package_costs_nothing():
    code = "import sys, pipeline; assert not {'torch', 'ray', 'numpy', 'pyarrow', 'duckdb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys; from pipeline import StorageSettings; assert not {'torch', 'pyarrow', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pipeline.nothing  # noqa: B018


def test_tensors_are_made_of_samples_without_a_copy(small):
    image, mask, _ = SegmentedImages(str(small.output))[0]
    assert torch.from_numpy(image).shape == image.shape
    assert torch.from_numpy(mask).dtype == torch.uint8
