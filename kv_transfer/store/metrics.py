"""What a store holds and did, for Prometheus."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kv_transfer.store.block_store import BlockStore
from kv_transfer.store.servicer import KvStoreServicer
from mesh.metrics import labelled_counter


class StoreCollector(Collector):
    """The store's numbers, read when Prometheus asks."""

    def __init__(self, store: BlockStore, servicer: KvStoreServicer) -> None:
        self._store = store
        self._servicer = servicer

    def collect(self) -> Iterable[Metric]:
        shelf, spill, servicer = self._store.shelf, self._store.spill, self._servicer
        for name, text, value in (
            ("blocks", "KV blocks that memory has room for.", shelf.num_blocks),
            ("filed_blocks", "KV blocks in memory.", shelf.num_filed),
            ("pinned_blocks", "KV blocks that somebody reads or adds to.", shelf.num_pinned),
            ("arriving_blocks", "KV blocks that are being written.", shelf.num_arriving),
            ("open_fetches", "Handovers to workers under way.", servicer.num_fetches),
            ("spilled_bytes", "KV on disk.", spill.num_bytes if spill else 0),
        ):
            yield GaugeMetricFamily(f"isthmus_store_{name}", text, value=value)
        for name, text, value in (
            ("published_blocks", "KV blocks that workers brought.", shelf.num_accepted),
            ("fetched_blocks", "KV blocks that workers took.", servicer.num_fetched_blocks),
            ("evicted_blocks", "KV blocks that memory had no room for.", shelf.num_evicted),
        ):
            yield CounterMetricFamily(f"isthmus_store_{name}", text, value=value)
        yield labelled_counter(
            "isthmus_store_queries", "Questions what is here.", "result", dict(servicer.queries)
        )
        yield labelled_counter(
            "isthmus_store_spill_dropped",
            "KV blocks that did not get to disk, or did not come back sound.",
            "reason",
            dict(spill.dropped) if spill else {},
        )
