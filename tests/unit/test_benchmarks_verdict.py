import pytest

from benchmarks.load.figures import Figures, Quantiles
from benchmarks.load.outcome import Cost, Row
from benchmarks.load.verdict import verdicts_of


def row(target: str, phase: str, *, tokens_per_s: float = 100.0, p99_ms: float = 10.0) -> Row:
    quantiles = Quantiles.of([p99_ms / 1000]) if p99_ms else None
    figures = Figures(
        num_requests=1,
        errors={},
        output_tokens=1,
        duration_s=1.0,
        output_tokens_per_s=tokens_per_s,
        tokens_per_chunk=1.0,
        itl=quantiles,
        ttft=quantiles,
        latency=quantiles,
    )
    return Row(
        target=target,
        load=phase.partition(" ")[0],
        phase=phase,
        figures=figures,
        tokens_per_s_by_repeat=(tokens_per_s,),
        client_cpu_us_per_token=1.0,
        busy_cores_before=0.0,
    )


def verdicts(*rows: Row) -> dict[str, tuple[float, bool]]:
    found = verdicts_of(rows, [], baseline="vllm")
    return {
        f"{verdict.target} {verdict.claim.partition(':')[0]} {index}": (
            round(verdict.value or 0.0, 6),
            verdict.is_met,
        )
        for index, verdict in enumerate(found)
    }


def test_mixed_claims_hold_up_to_their_bounds() -> None:
    rows = [
        row("mesh", "mixed alone", tokens_per_s=100, p99_ms=10),
        row("mesh", "mixed disturbed", tokens_per_s=80, p99_ms=20),
    ]
    assert verdicts(*rows) == {"mesh mixed 0": (2.0, True), "mesh mixed 1": (0.8, True)}


def test_mixed_claims_fail_past_their_bounds() -> None:
    rows = [
        row("mesh", "mixed alone", tokens_per_s=100, p99_ms=10),
        row("mesh", "mixed disturbed", tokens_per_s=79, p99_ms=21),
    ]
    assert verdicts(*rows) == {"mesh mixed 0": (2.1, False), "mesh mixed 1": (0.79, False)}


def test_claims_against_the_baseline_need_it_beside() -> None:
    rows = [row("mesh", "closed", tokens_per_s=99), row("mesh", "open", p99_ms=1)]
    assert verdicts(*rows) == {}
    peers = [row("vllm", "closed", tokens_per_s=100), row("vllm", "open", p99_ms=10)]
    assert verdicts(*rows, *peers) == {"mesh closed 0": (0.99, False), "mesh open 1": (0.1, True)}


def test_a_missing_figure_meets_no_claim() -> None:
    rows = [row("mesh", "open", p99_ms=0.0), row("vllm", "open")]
    (verdict,) = verdicts_of(rows, [], baseline="vllm")
    assert not verdict.is_met
    assert str(verdict).endswith("no figure: not met")


@pytest.mark.parametrize(("cpu_s", "is_met"), [(0.3, True), (0.31, False)])
def test_gateway_cpu_is_held_against_its_budget(cpu_s: float, is_met: bool) -> None:
    used = {"gateway-0": cpu_s, "decode-0": 99.0}
    cost = Cost(target="mesh", load="closed", cpu_s=used, num_requests=100, num_tokens=10_000)
    (verdict,) = verdicts_of([], [cost], baseline="vllm")
    assert verdict.is_met is is_met


def test_unknown_processes_make_no_claim() -> None:
    cost = Cost(target="mesh", load="closed", cpu_s={}, num_requests=1, num_tokens=1)
    assert verdicts_of([], [cost], baseline="vllm") == ()
