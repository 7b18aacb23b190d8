import socket
import urllib.request
from dataclasses import fields

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from engine.runtime.commands import EngineStats
from mesh.metrics import EngineCollector, ExpertCollector, labelled_counter, serving_metrics


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_number_of_the_engine_is_served_as_it_is_now() -> None:
    stats = EngineStats()
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: stats))
    names = [field.name for field in fields(EngineStats)]
    stats = EngineStats(**{name: index + 1 for index, name in enumerate(names)})
    with serving_metrics(registry, host="127.0.0.1", port=0) as port:
        samples = scraped(port)
    assert sorted(samples.values()) == [index + 1 for index in range(len(names))]
    assert all(name.startswith("isthmus_") for name in samples)
    assert samples["isthmus_kv_free_blocks"] == stats.num_free_blocks
    assert samples["isthmus_engine_prefill_tokens_total"] == stats.num_prefill_tokens


def test_a_labelled_counter_has_a_sample_for_each_value() -> None:
    family = labelled_counter("isthmus_x", "X.", "reason", {"full": 2, "gone": 3})
    assert {s.labels["reason"]: s.value for s in family.samples} == {"full": 2, "gone": 3}


def test_experts_are_counted_over_ranks_and_their_imbalance_shown() -> None:
    ranks = [{0: [6, 0, 0, 0], 2: [1, 1, 0, 0]}, {0: [0, 0, 2, 0], 2: [0, 0, 1, 1]}, {4: [0] * 4}]
    registry = CollectorRegistry()
    registry.register(ExpertCollector(lambda: ranks))
    with serving_metrics(registry, host="127.0.0.1", port=0) as port:
        samples = scraped(port)
    tokens = [samples[f"isthmus_expert_tokens_total{expert}0"] for expert in range(4)]
    assert tokens == [6, 0, 2, 0]
    imbalances = [samples[f"isthmus_expert_imbalance{layer}"] for layer in (0, 2, 4)]
    assert imbalances == [3.0, 1.0, 1.0]
    of_rank = [samples[f"isthmus_expert_rank_tokens_total{rank}"] for rank in range(3)]
    assert of_rank == [8, 4, 0]


def test_the_endpoint_is_gone_after_the_block() -> None:
    registry = CollectorRegistry()
    Counter("isthmus_seen", "Seen.", registry=registry).inc()
    with serving_metrics(registry, host="127.0.0.1", port=0) as port:
        assert scraped(port)["isthmus_seen_total"] == 1
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_in_use_is_named() -> None:
    with (
        serving_metrics(CollectorRegistry(), host="127.0.0.1", port=0) as port,
        pytest.raises(ValueError, match=f"cannot serve metrics on 127.0.0.1:{port}"),
        serving_metrics(CollectorRegistry(), host="127.0.0.1", port=port),
    ):
        pytest.fail("two servers on one port")
