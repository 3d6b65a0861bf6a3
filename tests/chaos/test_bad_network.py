"""Requests that are throttled, cut off, damaged and unanswered cost time, and nothing else."""

from pipeline.config import SegmentSettings
from pipeline.run import segment
from tests.chaos.collection import FULL, Collection, Onlooker, outcomes
from tests.chaos.fault_proxy import Fault, FaultProxy

FAULTS = (
    Fault("throttle", 0.05),
    Fault("reset", 0.02),
    Fault("truncate", 0.01),
    Fault("flip", 0.01),
    Fault("lose", 0.01 if FULL else 0.2, "^PUT "),  # a short run puts few objects
)


def test_a_bad_network_changes_nothing_and_is_counted(s3, photos: Collection, seed: int):
    output, onlooker = f"{photos.bucket}/bad-network", Onlooker()
    with FaultProxy(s3.endpoint_url, FAULTS, seed) as proxy:
        settings = SegmentSettings(
            input=(photos.url,), output=output, run_id="night", endpoint_url=proxy.url, **photos.on_cluster()
        )
        result = segment(settings, onlooker)
    print(f"{proxy.requests} requests, of which {dict(proxy.injected)}")
    assert outcomes(output) == photos.expected
    assert {"throttle", "reset"} <= set(proxy.injected)
    if FULL:
        assert set(proxy.injected) == {fault.kind for fault in FAULTS}
    assert result.record
    assert sum(result.record["store_retries"].values()) >= proxy.injected["throttle"] / 2
    assert onlooker.metric("swath_retries_total") > 0
