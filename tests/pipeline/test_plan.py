"""Every image is in exactly one shard, every shard holds one bucket, and the plan is the same each time."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import index
from pipeline.plan import (
    SHARD_PIXELS,
    Origin,
    batch_size,
    encode_plan,
    make_plan,
    planned_images,
    read_origin,
    shard_slices,
    summarise,
    without,
)
from pipeline.policy import parse_policy

SIZES = st.one_of(st.none(), st.tuples(st.integers(1, 5000), st.integers(1, 5000)))


def images_of(sizes: list[tuple[int, int] | None]) -> pa.Table:
    rows = [
        {"uri": f"s3://b/{number:04d}", "etag": f"e{number}", "bytes": 9, "format": "jpeg"}
        | ({"height": size[0], "width": size[1]} if size else {"error": "broken"})
        for number, size in enumerate(sizes)
    ]
    return pa.Table.from_pylist(rows, index.SCHEMA)


@settings(max_examples=60, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=120), st.integers(1, 9))
def test_a_plan_holds_every_image_once_in_shards_of_one_bucket(sizes, shard_images):
    policy = parse_policy("short=64")
    images = images_of(sizes)
    plan = make_plan(images, policy, shard_images)
    assert sorted(plan["uri"].to_pylist()) == images["uri"].to_pylist()
    shards = [plan.slice(start, stop - start) for start, stop in shard_slices(plan)]
    assert [set(shard["shard"].to_pylist()) for shard in shards] == [{number} for number in range(len(shards))]
    for shard in shards:
        assert len(shard) <= shard_images
        (bucket,) = set(shard["bucket"].to_pylist())
        for image in planned_images(shard):
            known = image.height and image.width
            assert bucket == ("{}x{}".format(*policy.size(image.height, image.width)) if known else None)


def test_a_shard_of_large_images_has_fewer():
    sizes = [(480, 640)] * 1000 + [(3000, 4000)] * 300 + [(30_000, 40_000)] * 3
    plan = make_plan(images_of(sizes), parse_policy("short=512"), 512)
    shards = [plan.slice(start, stop - start) for start, stop in shard_slices(plan)]
    for shard in shards:
        pixels = [image.width * image.height for image in planned_images(shard)]
        assert sum(pixels[:-1]) < SHARD_PIXELS
        assert len(pixels) <= 512
    assert len(shards) < 12


@given(st.permutations(range(30)))
def test_the_order_of_the_index_does_not_change_the_plan(order):
    images = images_of([(40 + number % 7, 60) for number in range(30)])
    policy, origin = parse_policy("short=32"), Origin("in", (), (), "short=32", "v")
    expected = encode_plan(make_plan(images, policy, 4), origin)
    assert encode_plan(make_plan(images.take(pa.array(order)), policy, 4), origin) == expected


def test_a_plan_file_has_one_row_group_a_shard_and_remembers_its_origin():
    plan = make_plan(images_of([(50, 50)] * 10 + [None]), parse_policy("short=32"), 4)
    file = pq.ParquetFile(io.BytesIO(encode_plan(plan, Origin("s3://in", ("*.jpg",), (), "short=32", "abc"))))
    assert file.num_row_groups == 4
    assert [len(file.read_row_group(number)) for number in range(4)] == [1, 4, 4, 2]
    assert read_origin(file) == Origin("s3://in", ("*.jpg",), (), "short=32", "abc")


def test_what_is_done_is_not_planned_and_what_changed_is():
    images = images_of([(50, 50)] * 3)
    done = pa.table({"uri": ["s3://b/0000", "s3://b/0001"], "etag": ["e0", "older"]})
    assert sorted(without(images, done)["uri"].to_pylist()) == ["s3://b/0001", "s3://b/0002"]


def test_the_summary_counts_images_and_the_fill_of_batches():
    plan = make_plan(images_of([(512, 512)] * 20 + [None] * 2), parse_policy("short=512"), 16)
    square, unknown = summarise(plan, batch_pixels=8 * 512 * 512, max_pixels=10**9)
    assert (square.name, square.images, square.shards, square.batch) == ("512x512", 20, 2, 8)
    assert square.fill == 20 / 24
    assert (unknown.name, unknown.images, unknown.mask_bytes) == ("unknown", 2, 0)
    assert batch_size(4096, 4096, 1) == 1
