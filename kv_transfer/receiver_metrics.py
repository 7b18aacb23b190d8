"""What the receiving end of handovers did, for Prometheus."""

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kv_transfer.counters import ReceiverCounters
from mesh.metrics import labelled_counter


class ReceiverCollector(Collector):
    """The receiver's numbers, read when Prometheus asks."""

    def __init__(self, counters: Callable[[], ReceiverCounters]) -> None:
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        counters = self._counters()
        yield GaugeMetricFamily(
            "isthmus_kv_leases", "Leases that are live.", value=counters.num_live_leases
        )
        yield GaugeMetricFamily(
            "isthmus_kv_quarantined_leases",
            "Leases taken back whose blocks a writer may still touch.",
            value=counters.num_quarantined_leases,
        )
        yield GaugeMetricFamily(
            "isthmus_kv_waiting_reservations",
            "Reservations that wait for blocks.",
            value=counters.num_waiting_reserves,
        )
        yield CounterMetricFamily(
            "isthmus_handover_received_tokens",
            "Tokens whose KV arrived from other processes.",
            value=counters.num_committed_tokens,
        )
        yield CounterMetricFamily(
            "isthmus_handover_received_bytes",
            "KV bytes that arrived from other processes.",
            value=counters.num_committed_bytes,
        )
        yield labelled_counter(
            "isthmus_kv_leases_ended", "Leases by how they ended.", "reason", counters.ended_leases
        )
        yield labelled_counter(
            "isthmus_kv_dropped_connections",
            "Data connections closed from this side.",
            "reason",
            counters.dropped_connections,
        )
