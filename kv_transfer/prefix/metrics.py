"""What a worker gave to stores and had from them, for Prometheus."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kv_transfer.prefix.fetcher import PrefixFetcher
from kv_transfer.prefix.publisher import PrefixPublisher
from mesh.metrics import labelled_counter


class PrefixCollector(Collector):
    """Both directions, read when Prometheus asks."""

    def __init__(self, publisher: PrefixPublisher, fetcher: PrefixFetcher) -> None:
        self._publisher = publisher
        self._fetcher = fetcher

    def collect(self) -> Iterable[Metric]:
        publisher, fetcher = self._publisher, self._fetcher
        yield labelled_counter(
            "isthmus_prefix_published", "Prefixes by outcome.", "outcome", dict(publisher.outcomes)
        )
        yield CounterMetricFamily(
            "isthmus_prefix_published_tokens", "Tokens whose KV went to a store.",
            value=publisher.num_tokens,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "isthmus_prefix_waiting", "Prefixes to be published.", value=publisher.num_waiting
        )
        decisions = CounterMetricFamily(
            "isthmus_prefix_decisions",
            "Prompts whose missing part was fetched or computed, and why.",
            labels=["decision", "reason"],
        )
        for labels, number in dict(fetcher.decisions).items():
            decisions.add_metric(labels, number)
        yield decisions
        yield CounterMetricFamily(
            "isthmus_prefix_fetched_tokens", "Tokens whose KV came from a store.",
            value=fetcher.num_tokens,
        )  # fmt: skip
        yield CounterMetricFamily(
            "isthmus_prefix_fetched_bytes", "KV bytes that came from stores.",
            value=fetcher.num_bytes,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "isthmus_prefix_open_fetches", "Prompts that wait for a decision or a fetch.",
            value=fetcher.num_open,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "isthmus_prefix_prefill_tokens_per_second",
            "What the decision assumes of computing; 0 before the first prompt.",
            value=fetcher.cost.prefill_tokens_per_s or 0.0,
        )
