"""Every image is in exactly one shard, every shard holds one bucket, and the plan is the same each time."""

from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import index, plan
from pipeline.commit import PlanFiles, Run
from pipeline.config import StorageSettings
from pipeline.plan import (
    SHARD_PIXELS,
    Origin,
    Plan,
    make_plan,
    most_work_first,
    planned_images,
    shard_size,
)
from pipeline.policy import ONE_LOOK, Looks, parse_policy
from pipeline.storage import Store

SIZES = st.one_of(st.none(), st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
ORIGIN = Origin(("s3://in",), ("*.jpg",), (), "short=32", "abc")


def images_of(sizes: list[tuple[int, int] | None]) -> pa.Table:
    rows = [
        {"uri": f"s3://b/{number:06d}", "etag": f"e{number}", "bytes": 9, "format": "jpeg"}
        | ({"height": size[0], "width": size[1]} if size else {"error": "broken"})
        for number, size in enumerate(sizes)
    ]
    return pa.Table.from_pylist(rows, index.SCHEMA)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Make a plan of a table of images, and read its shards back."""

    def make(
        images: pa.Table, policy: str, size: int | None, max_pixels: int = 10**9, looks: Looks = ONE_LOOK
    ) -> tuple[Plan, list[pa.Table]]:
        with duckdb.connect() as tables:
            tables.register("given", images)
            tables.execute("CREATE TABLE images AS FROM given")
            made = make_plan(tables, tmp_path_factory.mktemp("plan"), parse_policy(policy), size, max_pixels, looks)
        return made, list(shards_of(made))

    return make


def shards_of(made: Plan) -> Iterator[pa.Table]:
    for part in made.parts:
        with pq.ParquetFile(part) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)


@settings(max_examples=60, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=120), st.integers(1, 40))
def test_a_plan_holds_every_image_once_in_shards_of_one_bucket(planned, sizes, shard_images):
    images = images_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "PART_SHARDS", 3)
        made, shards = planned(images, "short=64", shard_images)
    policy = parse_policy("short=64")
    assert sorted(uri for shard in shards for uri in shard["uri"].to_pylist()) == images["uri"].to_pylist()
    assert [len(shard) for shard in shards] == [shard.images for shard in made.shards]
    assert len(made.parts) == -(-len(shards) // 3)
    for shard, told in zip(shards, made.shards, strict=True):
        assert len(shard) <= shard_images
        for image in planned_images(shard):
            known = image.height and image.width
            assert told.bucket == ("{}x{}".format(*policy.size(image.height, image.width)) if known else None)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_where_a_batch_of_rows_ends_changes_nothing(rows):
    rng = np.random.default_rng(1)
    bucket = np.sort(rng.integers(1, 6, 1000)) * 32
    table = pa.table(
        {
            "bucket_h": bucket,
            "bucket_w": bucket,
            "places": rng.integers(SHARD_PIXELS // 100, SHARD_PIXELS // 10, 1000),
            **dict.fromkeys(("windows", "work", "mask_pixels", "bytes"), np.ones(1000, int)),
            **dict.fromkeys(plan.SCHEMA.names[3:], pa.nulls(1000)),
            "uri": [f"{number:04d}" for number in range(1000)],
            "etag": ["e"] * 1000,
        }
    )
    table = table.select(plan.ROWS.names)
    whole = [shard["uri"].to_pylist() for shard in plan.cut(table.to_reader(1000), 16)]
    assert [shard["uri"].to_pylist() for shard in plan.cut(table.to_reader(rows), 16)] == whole
    assert [uri for shard in whole for uri in shard] == table["uri"].to_pylist()
    assert len(whole) > 40


def test_a_shard_of_large_images_has_fewer(planned):
    sizes = [(480, 640)] * 1000 + [(3000, 4000)] * 300 + [(30_000, 40_000)] * 3
    _, shards = planned(images_of(sizes), "short=512", 512, max_pixels=10**10)
    for shard in shards:
        pixels = [image.width * image.height for image in planned_images(shard)]
        assert len(pixels) <= 512
        assert sum(pixels[:-1]) < 1.25 * SHARD_PIXELS
    assert len(shards) < 12
    assert len(planned(images_of([(100, 100)] * 600), "exact=2048x2048", 512)[1]) == 5  # the network's work counts too


def test_several_looks_are_more_work_and_so_smaller_shards_of_the_same_buckets(planned):
    images, looks = images_of([(480, 640)] * 1000), Looks(True, (0.75, 1.0, 1.25))
    (once, _), (more, _) = (planned(images, "short=512", 1000, looks=looks) for looks in (ONE_LOOK, looks))
    assert looks.work == 6.25
    assert {shard.bucket for shard in once.shards + more.shards} == {"512x672"}
    assert once.images == more.images == sum(shard.windows for shard in more.shards) == 1000
    inputs, decoding = 512 * 672, 480 * 640 // plan.DECODING
    assert {shard.work // shard.images for shard in once.shards} == {inputs + decoding}
    assert {shard.work // shard.images for shard in more.shards} == {int(6.25 * inputs) + decoding}
    assert len(more.shards) > 3 * len(once.shards)
    assert [bucket.batch for bucket in plan.summarise(more.shards, 10 * inputs, looks)] == [6]  # 10 / 1.25**2


def test_shards_are_sized_by_the_collection_in_whole_batches():
    assert [shard_size(images) for images in (1, 2_000, 20_000, 10**6, 10**9)] == [64, 64, 256, 1024, 1024]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(30)))
def test_the_order_of_the_index_does_not_change_a_byte_of_the_plan(planned, order):
    images = images_of([(40 + number % 7, 60) for number in range(30)])
    expected, _ = planned(images, "short=32", 4)
    found, _ = planned(images.take(pa.array(order)), "short=32", 4)
    assert found.digest() == expected.digest()
    assert [part.read_bytes() for part in found.parts] == [part.read_bytes() for part in expected.parts]


def test_an_image_that_was_indexed_twice_is_planned_once(planned):
    images = images_of([(50, 50)] * 5)
    _, shards = planned(pa.concat_tables([images, images.slice(2, 2)]), "short=32", 16)
    assert shards[0]["uri"].to_pylist() == images["uri"].to_pylist()


def test_the_work_of_a_long_tail_is_done_before_that_of_the_short():
    work = [100, 90, 8000, 120, 7900, 5]
    assert most_work_first(range(6), work) == [2, 4, 0, 1, 3, 5]
    assert most_work_first([1, 5, 4], work) == [4, 1, 5]


def test_a_run_has_the_plan_that_was_put_first(planned, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.plan.PART_SHARDS", 2)
    monkeypatch.setattr("pipeline.commit.PART_SHARDS", 2)
    run = Run(Store(str(tmp_path), StorageSettings()), "night")
    made, shards = planned(images_of([(50, 50)] * 10 + [None]), "short=32", 4)
    assert run.contents() is None
    run.begin(made, ORIGIN)
    other, _ = planned(images_of([(70, 50)]), "short=32", 4)
    with pytest.raises(FileExistsError):
        run.begin(other, ORIGIN)
    contents = run.contents()
    assert contents.origin == ORIGIN
    assert contents.images == [1, 4, 4, 2]
    assert len(contents.parts) == 2
    files = PlanFiles(run)
    for shard in (3, 0, 2, 1):
        assert files.images(shard) == planned_images(shards[shard])
