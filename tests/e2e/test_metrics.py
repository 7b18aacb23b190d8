"""The figures that an operator watches, read off a real mesh after requests of known size."""

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.held import held, idle
from tests.e2e.mesh_process import MeshProcess

NUM_REQUESTS = 3
NUM_TOKENS = 12
# 30 layers x (key, value) x 3 heads x 64 x 2 bytes
BYTES_PER_TOKEN = 23_040
TTFT, ITL = "isthmus_time_to_first_token_seconds", "isthmus_inter_token_latency_seconds"
HANDOVER = "isthmus_handover_seconds"


def families(mesh: MeshProcess, role: str) -> dict[str, Metric]:
    address = mesh.processes(role)[0]["addresses"]["metrics"]
    text = httpx.get(f"http://{address}/metrics", timeout=10).text
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.fixture(scope="module")
def gained(demo_mesh: MeshProcess) -> dict[str, float]:
    """What each counter gained by three requests, one after the other."""

    def look() -> dict[str, float]:
        return {
            **{
                f"{name}{part}": demo_mesh.metric("gateway", f"{name}{part}")
                for name in (TTFT, ITL)
                for part in ("_count", "_sum")
            },
            **{
                f"{HANDOVER}_{kind}_{part}": demo_mesh.metric(
                    "prefill", f"{HANDOVER}_{kind}", part=part
                )
                for kind in ("count", "sum")
                for part in ("reserve", "transfer", "commit", "exposed")
            },
            "sent": demo_mesh.metric("prefill", "isthmus_handover_bytes_total", data_plane="shm"),
            "received": demo_mesh.metric("decode", "isthmus_handover_received_bytes_total"),
            "decoded": demo_mesh.metric("decode", "isthmus_engine_decode_tokens_total"),
            "prefilled": demo_mesh.metric("prefill", "isthmus_engine_prefill_tokens_total"),
            "prompts": demo_mesh.metric("gateway", "isthmus_gateway_prompt_tokens_total"),
            "answers": demo_mesh.metric("gateway", "isthmus_gateway_completion_tokens_total"),
            "ok": demo_mesh.metric("gateway", "isthmus_gateway_requests_total", outcome="ok"),
        }

    before = look()
    for index in range(NUM_REQUESTS):
        ids = [1000 + 7 * index, *range(2000 + 100 * index, 2099 + 100 * index)]
        body = {"prompt": ids, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        answer = httpx.post(f"{demo_mesh.http}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
    after = look()
    return {name: value - before[name] for name, value in after.items()}


def test_time_to_first_token_is_counted_once_a_request(gained: dict[str, float]) -> None:
    assert gained[f"{TTFT}_count"] == NUM_REQUESTS == gained["ok"]
    assert 0 < gained[f"{TTFT}_sum"] < 60 * NUM_REQUESTS


def test_inter_token_latency_is_counted_for_every_other_token(gained: dict[str, float]) -> None:
    assert gained[f"{ITL}_count"] == NUM_REQUESTS * (NUM_TOKENS - 1) == gained["decoded"]
    assert 0 < gained[f"{ITL}_sum"] < 60 * NUM_REQUESTS


def test_handover_bytes_are_those_of_the_prompts_on_both_sides(gained: dict[str, float]) -> None:
    assert gained["sent"] == gained["received"] == NUM_REQUESTS * 100 * BYTES_PER_TOKEN
    assert gained["prompts"] == gained["prefilled"] == NUM_REQUESTS * 100
    assert gained["answers"] == NUM_REQUESTS * NUM_TOKENS


def test_handover_seconds_are_counted_by_part(gained: dict[str, float]) -> None:
    for part in ("reserve", "transfer", "commit", "exposed"):
        assert gained[f"{HANDOVER}_count_{part}"] == NUM_REQUESTS
        assert 0 < gained[f"{HANDOVER}_sum_{part}"] < 60 * NUM_REQUESTS


def test_queues_and_blocks_of_an_idle_mesh(demo_mesh: MeshProcess) -> None:
    """The tests of clients that leave see them rise."""
    assert held(demo_mesh) == idle(demo_mesh)
    for role in ("prefill", "decode"):
        assert demo_mesh.metric(role, "isthmus_kv_blocks") > 1000


@pytest.mark.parametrize("role", ["gateway", "prefill", "decode"])
def test_metrics_have_help_types_and_names_with_units(demo_mesh: MeshProcess, role: str) -> None:
    own = {n: f for n, f in families(demo_mesh, role).items() if n.startswith("isthmus_")}
    assert len(own) >= 7
    for name, family in own.items():
        assert family.documentation, name
        assert family.type in {"counter", "gauge", "histogram"}, name
