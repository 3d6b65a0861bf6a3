"""Sums of what shards did, which do not grow with the data."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.totals import REASON_LENGTH, REASONS, SHARD_REASONS, Totals, add, count_reasons, generalised

STATUSES = ("failed", "missing", "unreadable")
failures = st.lists(st.tuples(st.sampled_from(STATUSES), st.none() | st.text()), max_size=200)


def test_reasons_are_told_apart_and_images_are_not():
    assert count_reasons(
        [
            ("unreadable", "Truncated at byte 1234 of 99"),
            ("unreadable", "Truncated at byte 7 of 1000000"),
            ("failed", "SlowDown: s3://bucket/a b.jpg: request tx00000a1b2c3d4e5f-0001"),
            ("failed", "SlowDown: s3://bucket/c.jpg b.jpg: request tx00000ffffffffffff-0002"),
            ("missing", "no 'x.jpg' in \"y.tar\""),
            ("missing", None),
        ]
    ) == {
        "unreadable: Truncated at byte N of N": 2,
        "failed: SlowDown: … b.jpg: request …": 2,
        "missing: no … in …": 1,
        "missing: ": 1,
    }
    assert len(generalised("x" * 1000)) == REASON_LENGTH


@given(st.lists(failures, max_size=4))
def test_reasons_are_bounded_and_lose_no_image(shards):
    parts = [Totals(reasons=count_reasons(shard)) for shard in shards]
    for part in parts:
        assert len(part.reasons) <= SHARD_REASONS + len(STATUSES)
    found = add(parts).reasons
    assert len(found) <= REASONS + len(STATUSES)
    for status in STATUSES:
        images = sum(one == status for shard in shards for one, _ in shard)
        assert sum(n for reason, n in found.items() if reason.startswith(f"{status}: ")) == images


def test_the_rarest_reasons_are_put_together():
    reasons = {f"failed: {'x' * number}": 100 + number for number in range(REASONS + 5)}
    found = add([Totals(reasons=reasons), Totals(reasons={"failed: other reasons": 1})]).reasons
    assert found["failed: other reasons"] == 1 + sum(range(100, 105))
    assert len(found) == REASONS + 1
