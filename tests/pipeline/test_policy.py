"""The policy puts any image into a bucket that the network likes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.policy import MAX_ASPECT, ONE_LOOK, Looks, parse_policy

SIDE = st.integers(1, 40_000)


@given(SIDE, SIDE, st.sampled_from([32, 256, 512, 1024]))
def test_the_short_side_is_exact_and_the_long_one_close_to_the_aspect(height, width, short):
    found = parse_policy(f"short={short}").size(height, width)
    assert min(found) == short
    assert all(side % 32 == 0 for side in found)
    assert (found[0] <= found[1]) == (height <= width) or found[0] == found[1]
    wanted = min(short * max(height, width) / min(height, width), short * MAX_ASPECT)
    assert abs(max(found) - wanted) <= max(16, 16 * wanted / short)


@given(SIDE, SIDE)
def test_turning_an_image_turns_its_bucket(height, width):
    policy = parse_policy("short=512")
    assert policy.size(height, width) == policy.size(width, height)[::-1]


def test_exact_sizes_are_exact_and_examples_are_as_documented():
    assert parse_policy("exact=512x1024").size(3000, 17) == (512, 1024)
    assert parse_policy("short=512").size(480, 640) == (512, 672)
    assert parse_policy("short=512").size(10, 100_000) == (512, 4096)
    assert parse_policy("short=512").size(500, 1500) == (512, 1536)


@given(SIDE, SIDE, st.sampled_from(["native", "native=64+32", "native=512+384"]))
def test_a_native_input_is_the_image_rounded_up_or_a_window(height, width, text):
    policy = parse_policy(text)
    window = policy.native.window
    for side, found in zip((height, width), policy.size(height, width), strict=True):
        assert found % 32 == 0
        assert found == window <= side or side <= found < side + 32
    assert (policy.windows(height, width) == 1) == (max(height, width) <= window)


@pytest.mark.parametrize("text", ["short=512", "exact=512x1024", "native=512+128"])
def test_a_policy_is_known_by_its_text(text):
    assert str(parse_policy(text)) == text


def test_native_is_known_by_its_windows_as_another_default_would_be_other_masks():
    assert str(parse_policy("native")) == "native=2048+512"


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (31, 33), (511, 512), (512, 511)])
@pytest.mark.parametrize("text", ["short=512", "exact=64x32", "native"])
def test_tiny_and_nearly_square_images_have_a_bucket(size, text):
    found = parse_policy(text).size(*size)
    assert all(side >= 32 and side % 32 == 0 for side in found)


@pytest.mark.parametrize(
    "text",
    [
        *("short=500", "short=0", "short", "exact=512", "exact=512x0", "", "short=99999"),
        *("native=", "native=1024", "native=1000+256", "native=32+0", "native=512+512", "native=512+100"),
        "native=16384+256",
    ],
)
def test_a_policy_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|multiple"):
        parse_policy(text)


@given(SIDE, SIDE, st.sampled_from(["short=512", "exact=64x96", "native"]), st.floats(0.5, 2))
def test_looks_are_of_whole_steps_about_as_large_as_asked_and_one_is_the_bucket(height, width, text, scale):
    bucket = parse_policy(text).size(height, width)
    assert ONE_LOOK.sizes(*bucket) == [bucket]
    found, looks = Looks(scales=(scale, 2.0)).sizes(*bucket), Looks(True, (scale, 2.0))
    assert all(side % 32 == 0 for side in found[0])
    assert all(abs(side - scale * base) <= 16 for side, base in zip(found[0], bucket, strict=True))
    assert found[1] == looks.largest(*bucket) == tuple(2 * side for side in bucket)
    assert (looks.count, looks.work) == (4, 2 * (scale**2 + 4))
