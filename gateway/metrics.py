"""What the gateway counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 3, 10)


class GatewayMetrics:
    """One set for a process, in the registry that is passed in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.time_to_first_token_s = Histogram(
            "isthmus_time_to_first_token_seconds",
            "Arrival of a request to its first token leaving the gateway.",
            registry=registry,
            buckets=_TTFT_BUCKETS_S,
        )
        self.inter_token_latency_s = Histogram(
            "isthmus_inter_token_latency_seconds",
            "Time between two tokens of one answer.",
            registry=registry,
            buckets=_ITL_BUCKETS_S,
        )
        self.requests_in_flight = Gauge(
            "isthmus_gateway_requests_in_flight", "Requests being answered.", registry=registry
        )
        self.requests = Counter(
            "isthmus_gateway_requests",
            "Requests by how they ended.",
            ["outcome"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "isthmus_gateway_prompt_tokens",
            "Prompt tokens of admitted requests.",
            registry=registry,
        )
        self.completion_tokens = Counter(
            "isthmus_gateway_completion_tokens", "Tokens sent to clients.", registry=registry
        )
        self.degradations = Counter(
            "isthmus_gateway_degradations",
            "Times a request left the best path.",
            ["kind", "reason"],
            registry=registry,
        )
        self.workers = Gauge(
            "isthmus_gateway_workers",
            "Workers that a new sequence could be placed on.",
            ["role"],
            registry=registry,
        )
