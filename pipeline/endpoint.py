"""What a run says last: its final metrics, served for a while by the driver, as Prometheus comes only now and then.

While a run lasts its hub serves them (`metrics`). The hub ends with Ray, before the run is committed; its last words
are served here at the same address, with the time of the commit, so that no cluster waits for a scrape.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily

from pipeline.config import MetricsSettings

FREE_WITHIN = 10.0  # seconds: the hub, which had the address, may take a moment to end


class Speaker(Protocol):
    """Who tells a person."""

    def say(self, text: str) -> None:
        """One line about what happens next."""


class LastWords:
    """Metrics that do not change any more, as a registry wants them."""

    def __init__(self, metrics: Sequence[Metric]):
        self.metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self.metrics


def timestamp(name: str, meaning: str, output: str, seconds: float) -> Metric:
    """A gauge of one output: when something was, in seconds since 1970."""
    gauge = GaugeMetricFamily(name, meaning, labels=["output"])
    gauge.add_metric([output], seconds)
    return gauge


def linger(settings: MetricsSettings, port: int, metrics: Sequence[Metric], speaker: Speaker) -> None:
    """Serve `metrics` for as long as the settings say. A run that cannot be watched ends all the same."""
    if not settings.metrics_linger:
        return
    registry = CollectorRegistry()
    registry.register(LastWords(metrics))
    deadline = time.monotonic() + FREE_WITHIN
    while True:
        try:
            server, thread = prometheus_client.start_http_server(port, settings.metrics_host, registry)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                speaker.say(f"metrics cannot be served any more at port {port} ({error.strerror})")
                return
            time.sleep(0.2)
    try:
        url = f"http://{settings.metrics_host}:{server.server_port}/metrics"
        speaker.say(f"the last metrics stay at {url} for {settings.metrics_linger:g} s")
        time.sleep(settings.metrics_linger)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
