"""Prometheus metrics of a worker, and the endpoint that serves a process' metrics."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.runtime.commands import EngineStats
from engine.runtime.rank_message import ExpertTokens, RankTimes

# name, help, field of EngineStats; counters get the suffix _total from the client library.
_GAUGES = (
    ("isthmus_engine_waiting_sequences", "Sequences not yet scheduled.", "num_waiting"),
    ("isthmus_engine_running_sequences", "Sequences being computed.", "num_running"),
    ("isthmus_engine_waiting_tokens", "Prompt tokens not yet computed.", "num_waiting_tokens"),
    ("isthmus_kv_free_blocks", "KV blocks that a sequence could take.", "num_free_blocks"),
    ("isthmus_kv_blocks", "KV blocks of the pool.", "num_blocks"),
)
_COUNTERS = (
    ("isthmus_engine_prefill_tokens", "Prompt tokens computed here.", "num_prefill_tokens"),
    ("isthmus_engine_decode_tokens", "Tokens decoded here.", "num_decode_tokens"),
    ("isthmus_engine_steps", "Forward passes.", "num_steps"),
    ("isthmus_engine_step_seconds", "Time spent in forward passes.", "step_s_total"),
    ("isthmus_engine_prefill_seconds", "Of it, for prompt tokens.", "prefill_s_total"),
    ("isthmus_engine_preemptions", "Sequences put back for want of blocks.", "num_preemptions"),
    ("isthmus_engine_prefix_hit_tokens", "Prompt tokens found in the prefix cache.",
     "num_prefix_hit_tokens"),
)  # fmt: skip

_RANK_COUNTERS = (
    ("isthmus_rank_steps", "Steps that a rank took part in.", "num_steps"),
    ("isthmus_rank_step_seconds", "Time of a rank from a plan to its last result.", "step_s"),
    ("isthmus_rank_busy_seconds", "Of it, not waiting for another pipeline stage.", "busy_s"),
    (
        "isthmus_rank_communication_seconds",
        "Of it, in collectives; not while a sum travels beside computing.",
        "communication_s",
    ),
    ("isthmus_rank_communication_bytes", "Bytes that collectives moved.", "communication_bytes"),
)


class EngineCollector(Collector):
    """The engine's numbers, read when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, field in _GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for name, text, field in _COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(stats, field))


class RankCollector(Collector):
    """Where the time of each rank of a worker goes; only of workers with several."""

    def __init__(self, times: Callable[[], Sequence[RankTimes]]) -> None:
        self._times = times

    def collect(self) -> Iterable[Metric]:
        times = self._times()
        for name, text, field in _RANK_COUNTERS:
            values = {str(each.rank): getattr(each, field) for each in times}
            yield labelled_counter(name, text, "rank", values)
        step_s = sum(each.step_s for each in times)
        communication_s = sum(each.communication_s for each in times)
        yield GaugeMetricFamily(
            "isthmus_rank_communication_share",
            "Part of all ranks' step time spent in collectives, not what travels beside computing.",
            value=communication_s / step_s if step_s else 0.0,
        )
        yield GaugeMetricFamily(
            "isthmus_pipeline_bubble_share",
            "Part of all ranks' time, while the worker computes, spent waiting for other stages.",
            value=bubble_share(times),
        )


def bubble_share(times: Sequence[RankTimes]) -> float:
    """Of the time in which rank 0 had plans in flight; `times` in rank order.

    0 where no rank ever waits for another stage (or data shard).
    """
    if not times or all(each.busy_s == each.step_s for each in times):
        return 0.0
    return max(0.0, 1.0 - sum(each.busy_s for each in times) / (len(times) * times[0].step_s))


class ExpertCollector(Collector):
    """Which experts, and which ranks, the tokens of a mixture of experts went to."""

    def __init__(self, tokens: Callable[[], Sequence[ExpertTokens]]) -> None:
        """Take what returns the counts of each rank, in rank order."""
        self._tokens = tokens

    def collect(self) -> Iterable[Metric]:
        ranks = self._tokens()
        of_expert = CounterMetricFamily(
            "isthmus_expert_tokens",
            "Tokens that an expert computed.",
            labels=["layer", "expert"],
        )
        imbalance = GaugeMetricFamily(
            "isthmus_expert_imbalance",
            "Tokens of a layer's busiest expert over the mean of its experts.",
            labels=["layer"],
        )
        for layer in sorted({layer for tokens in ranks for layer in tokens}):
            held = [tokens[layer] for tokens in ranks if layer in tokens]
            counts = [sum(column) for column in zip(*held, strict=True)]
            for expert, count in enumerate(counts):
                of_expert.add_metric([str(layer), str(expert)], count)
            imbalance.add_metric([str(layer)], imbalance_of(counts))
        yield of_expert
        yield imbalance
        of_rank = {str(rank): sum(map(sum, tokens.values())) for rank, tokens in enumerate(ranks)}
        text = "Tokens that the experts of a rank computed; of ranks that share them, the first's."
        yield labelled_counter("isthmus_expert_rank_tokens", text, "rank", of_rank)


def imbalance_of(counts: Sequence[int]) -> float:
    """The largest over the mean: 1 is even; 1 too where nothing was counted yet."""
    return max(counts) * len(counts) / sum(counts) if any(counts) else 1.0


def labelled_counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """A counter family with one sample for each value of its label."""
    family = CounterMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


@contextmanager
def serving_metrics(registry: CollectorRegistry, *, host: str, port: int) -> Iterator[int]:
    """Answer GET /metrics inside the block, in a thread; yields the bound port.

    Raises:
        ValueError: the address cannot be bound.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ValueError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another"
            " --metrics-port, or 0 for a free one"
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
