"""What a prefill worker's handovers did, for Prometheus."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kv_transfer.counters import SenderCounters
from kv_transfer.report import HandoverReport
from mesh.metrics import labelled_counter

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class HandoverSeconds:
    """How long the parts of committed handovers took."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "isthmus_handover_seconds",
            "Parts of a handover: reserve, transfer, commit; exposed: from the end of prefill on.",
            ["part"],
            buckets=_SECONDS,
            registry=registry,
        )

    def observe(self, report: HandoverReport) -> None:
        if report.outcome == "committed":
            self._seconds.labels("reserve").observe(report.reserve_ns / 1e9)
            self._seconds.labels("transfer").observe(report.write_ns / 1e9)
            self._seconds.labels("commit").observe(report.commit_ns / 1e9)
            self._seconds.labels("exposed").observe(report.exposed_ns / 1e9)


class SenderCollector(Collector):
    """The sender's numbers, read when Prometheus asks."""

    def __init__(self, counters: Callable[[], SenderCounters]) -> None:
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        counters = self._counters()
        yield GaugeMetricFamily(
            "isthmus_handover_open", "Handovers under way.", value=counters.num_open_handovers
        )
        yield labelled_counter(
            "isthmus_handover_bytes", "KV bytes sent.", "data_plane", counters.num_bytes
        )
        yield labelled_counter(
            "isthmus_handover_tokens",
            "Tokens of committed handovers: sent, or held by the receiver already.",
            "kind",
            counters.num_tokens,
        )
        yield labelled_counter(
            "isthmus_handovers", "Ended handovers.", "outcome", counters.handovers
        )
        yield labelled_counter(
            "isthmus_handover_retransfers",
            "Writes that were repeated: damaged on their way, or broken off.",
            "reason",
            counters.retransfers,
        )
        yield labelled_counter(
            "isthmus_handover_fallbacks",
            "Receivers whose fastest data plane does not work here.",
            "reason",
            counters.fallbacks,
        )
