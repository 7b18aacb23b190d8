"""What a client sees when workers fail, come, go or are slow: every token once, and the reason."""

import grpc
import pytest
from grpc import aio

from engine.errors import (
    CapacityError,
    EngineDeadError,
    InvalidRequestError,
    KvLeaseLostError,
    LayoutMismatchError,
    NotReadyError,
)
from gateway.session import RecoveryConfig
from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1.inference_pb2_grpc import InferenceStub
from protos.isthmus.v1.sampling_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, SamplingParams
from tests.fakes.gateway import RunningGateway, gateway_over
from tests.fakes.workers import END_TOKEN_ID, FakeDecodeWorker, FakePrefillWorker, next_token

PROMPT = list(b"Hello")
SEED = 11


def expected(num_tokens: int) -> list[int]:
    return [next_token(PROMPT, position, SEED) for position in range(num_tokens)]


class Answer:
    """One Generate call, read as it comes."""

    def __init__(self, stub: InferenceStub, num_tokens: int, **sampling) -> None:
        self.tokens: list[int] = []
        self.finish_reason = 0
        self.report = pb.RequestReport()
        self.usage = pb.Usage()
        self.call = stub.Generate(
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=PROMPT),
                sampling=SamplingParams(max_tokens=num_tokens, seed=SEED, **sampling),
            )
        )

    async def read(self, num_tokens: int = 10**9) -> list[int]:
        """Until so many tokens are there, or the end."""
        while len(self.tokens) < num_tokens:
            response = await self.call.read()
            if not isinstance(response, pb.GenerateResponse):
                break
            for delta in response.deltas:
                self.tokens += delta.token_ids
                self.finish_reason = delta.finish_reason or self.finish_reason
            if response.HasField("report"):
                self.report, self.usage = response.report, response.usage
        return self.tokens

    @property
    def degradations(self) -> list[tuple[str, str]]:
        return [(d.kind, d.reason) for d in self.report.degradations]


def stub_of(channel: aio.Channel) -> InferenceStub:
    return InferenceStub(channel)


async def settled(gateway: RunningGateway, *workers) -> None:
    """Nothing is held anywhere any more; a time-out of the test says that something is."""
    for worker in workers:
        await worker.until(lambda worker=worker: not worker.open_sequences)
    assert gateway.service.admission.num_sequences == 0
    await gateway.aborts_acknowledged()
    pools = gateway.service.pools
    books = [worker.book for worker in pools.decode.values()]
    books += [worker.book for worker in pools.prefill.values()]
    assert all((book.num_sequences, book.num_tokens) == (0, 0) for book in books)
    assert not any(w.reserved for w in workers if isinstance(w, FakeDecodeWorker))


async def test_the_first_token_does_not_wait_for_the_handover():
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    prefill.handover_tap.close()
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 4)
        assert await answer.read(1) == expected(1)
        assert decode.num_reserved_ever == 0
        prefill.handover_tap.open()
        assert await answer.read() == expected(4)
        assert answer.degradations == []
        assert answer.usage == pb.Usage(num_prompt_tokens=5, num_completion_tokens=4)


async def test_decoded_tokens_that_overtake_the_first_one_wait_for_it():
    prefill, decode = FakePrefillWorker("p0", commits_before_token=True), FakeDecodeWorker("d0")
    prefill.handover_tap.close()
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 4)
        await decode.until(lambda: bool(decode.submitted and not decode.open_sequences))
        prefill.handover_tap.open()
        assert await answer.read() == expected(4)


async def test_a_first_token_that_ends_the_answer_frees_the_decode_worker():
    def end_at_once(prompt, position, seed):
        return END_TOKEN_ID

    prefill = FakePrefillWorker("p0", next_token=end_at_once)
    decode = FakeDecodeWorker("d0")
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 4)
        assert await answer.read() == [END_TOKEN_ID]
        assert answer.finish_reason == FINISH_REASON_STOP
        await settled(gateway, prefill, decode)
        assert decode.aborted == [decode.submitted[0].request_id]


async def test_without_prefill_workers_decode_prefills():
    decode = FakeDecodeWorker("d0")
    async with gateway_over(decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 3)
        assert await answer.read() == expected(3)
        assert answer.degradations == [("local_prefill", "no_prefill_worker")]
        assert decode.num_prefill_tokens == len(PROMPT)
        assert (
            gateway.count(
                "isthmus_gateway_degradations_total",
                kind="local_prefill",
                reason="no_prefill_worker",
            )
            == 1
        )


async def test_what_a_decode_worker_does_otherwise_is_in_the_report():
    said = [("prefix_fetch", "deadline"), ("preemption", "no_free_blocks")]
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0", says_degraded=said)
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 4)
        assert await answer.read() == expected(4)
        assert answer.degradations == said
        for kind, reason in said:
            name = "isthmus_gateway_degradations_total"
            assert gateway.count(name, kind=kind, reason=reason) == 1


async def test_a_failing_prefill_worker_is_replaced_by_another():
    bad = FakePrefillWorker("p0", fail_next=[NotReadyError("draining")])
    good, decode = FakePrefillWorker("p1"), FakeDecodeWorker("d0")
    async with (
        gateway_over(bad, good, decode) as gateway,
        open_channel(gateway.grpc_address) as ch,
    ):
        answer = Answer(stub_of(ch), 5)
        assert await answer.read() == expected(5)
        assert answer.degradations == [("retry", "not_ready")]
        await settled(gateway, bad, good, decode)


@pytest.mark.parametrize(
    "error", [EngineDeadError("dead"), LayoutMismatchError("float32 is not bfloat16")]
)
async def test_when_all_prefill_workers_fail_decode_prefills(error):
    prefill, decode = FakePrefillWorker("p0", fail_next=[error]), FakeDecodeWorker("d0")
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 5)
        assert await answer.read() == expected(5)
        assert [kind for kind, _ in answer.degradations] == ["retry", "local_prefill"]
        assert answer.degradations[1][1] == "prefill_failed"
        await settled(gateway, prefill, decode)


async def test_a_handover_that_fails_is_repeated_behind_the_first_token():
    bad = FakePrefillWorker("p0", fail_handover_next=[KvLeaseLostError("lost")])
    good, decode = FakePrefillWorker("p1"), FakeDecodeWorker("d0")
    async with (
        gateway_over(bad, good, decode) as gateway,
        open_channel(gateway.grpc_address) as ch,
    ):
        answer = Answer(stub_of(ch), 5)
        assert await answer.read() == expected(5)
        assert answer.degradations == [("retry", "kv_lease_lost")]
        assert list(good.requests[0].output_token_ids) == expected(1)
        await settled(gateway, bad, good, decode)


@pytest.mark.parametrize("num_before", [1, 2, 7])
async def test_a_dead_decode_worker_costs_no_token(num_before):
    prefill = FakePrefillWorker("p0")
    first, second = FakeDecodeWorker("d0"), FakeDecodeWorker("d1")
    second.load.num_running = 5  # the other one is chosen first
    first.tap.close()
    first.tap.let_through(num_before - 1)
    async with (
        gateway_over(prefill, first, second) as gateway,
        open_channel(gateway.grpc_address) as ch,
    ):
        answer = Answer(stub_of(ch), 12)
        assert await answer.read(num_before) == expected(num_before)
        await first.die()
        assert await answer.read() == expected(12)
        assert answer.finish_reason == FINISH_REASON_LENGTH
        assert answer.degradations == [("migration", "peer_unavailable")]
        assert list(second.submitted[0].output_token_ids) == expected(num_before)
        await settled(gateway, prefill, second)


async def test_a_sequence_waits_for_the_only_decode_worker_to_come_back():
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    decode.tap.close()
    decode.tap.let_through(2)
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 6)
        assert await answer.read(3) == expected(3)
        await decode.die()
        decode.tap.open()
        await decode.start()
        gateway.directory.changed()
        assert await answer.read() == expected(6)
        assert answer.degradations == [("migration", "peer_unavailable")]


async def test_waiting_for_a_worker_ends():
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    decode.tap.close()
    recovery = RecoveryConfig(wait_for_worker_s=0.05, retry_delay_s=0.001)
    async with (
        gateway_over(prefill, decode, recovery=recovery) as gateway,
        open_channel(gateway.grpc_address) as ch,
    ):
        answer = Answer(stub_of(ch), 6)
        await answer.read(1)
        await decode.die()
        with pytest.raises(aio.AioRpcError) as caught:
            await answer.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert gateway.service.admission.num_sequences == 0


async def test_an_error_of_decode_moves_the_sequence():
    prefill = FakePrefillWorker("p0")
    bad = FakeDecodeWorker("d0", fail_next=[EngineDeadError("dead")])
    good = FakeDecodeWorker("d1")
    good.load.num_running = 5
    async with (
        gateway_over(prefill, bad, good) as gateway,
        open_channel(gateway.grpc_address) as ch,
    ):
        answer = Answer(stub_of(ch), 5)
        assert await answer.read() == expected(5)
        assert [reason for _, reason in answer.degradations] == ["engine_dead"]
        await settled(gateway, prefill, bad, good)


async def test_attempts_are_bounded():
    decode = FakeDecodeWorker("d0", fail_next=[EngineDeadError("dead") for _ in range(9)])
    async with gateway_over(decode) as gateway, open_channel(gateway.grpc_address) as ch:
        with pytest.raises(aio.AioRpcError):
            await Answer(stub_of(ch), 5).read()
        assert len(decode.submitted) == 5
        assert gateway.count("isthmus_gateway_requests_total", outcome="error") == 1


async def test_an_error_that_every_worker_would_give_is_passed_on_at_once():
    error = InvalidRequestError("prompt does not fit the pool")
    decode = FakeDecodeWorker("d0", fail_next=[error])
    async with gateway_over(decode) as gateway, open_channel(gateway.grpc_address) as ch:
        with pytest.raises(aio.AioRpcError, match="does not fit the pool") as caught:
            await Answer(stub_of(ch), 5).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(decode.submitted) == 1


async def test_a_full_decode_pool_is_told_to_the_caller():
    decode = FakeDecodeWorker("d0", fail_next=[CapacityError("queue is full")])
    async with gateway_over(decode) as gateway, open_channel(gateway.grpc_address) as ch:
        with pytest.raises(aio.AioRpcError, match="queue is full") as caught:
            await Answer(stub_of(ch), 5).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_cancelled_call_frees_both_workers():
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    decode.tap.close()
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 1000)
        await answer.read(1)
        answer.call.cancel()
        await settled(gateway, prefill, decode)
        assert decode.aborted == [decode.submitted[0].request_id]
        assert gateway.count("isthmus_gateway_requests_total", outcome="cancelled") == 1


async def test_a_call_cancelled_during_prefill_frees_both_workers():
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    prefill.tap.close()
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        answer = Answer(stub_of(ch), 1000)
        await prefill.until(lambda: bool(prefill.open_sequences))
        await decode.until(lambda: bool(decode.open_sequences))
        answer.call.cancel()
        await settled(gateway, prefill, decode)
        await prefill.until(lambda: prefill.aborted == [prefill.requests[0].request_id])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_callers_deadline_frees_both_workers(phase):
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    (prefill if phase == "prefill" else decode).tap.close()
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT), sampling=SamplingParams(max_tokens=1000)
        )
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in stub_of(ch).Generate(request, timeout=0.2):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await settled(gateway, prefill, decode)
        assert decode.aborted == [decode.submitted[0].request_id]
        assert gateway.count("isthmus_gateway_requests_total", outcome="cancelled") == 1


async def test_several_answers_differ_by_seed_and_share_one_prefill_first():
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    prefill.tap.close()
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        call = stub_of(ch).Generate(
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=PROMPT),
                sampling=SamplingParams(max_tokens=4, seed=SEED, n=3),
            )
        )
        await prefill.until(lambda: bool(prefill.open_sequences))
        assert len(prefill.requests) == 1
        prefill.tap.open()
        answers: dict[int, list[int]] = {}
        usage = pb.Usage()
        async for response in call:
            for delta in response.deltas:
                answers.setdefault(delta.index, []).extend(delta.token_ids)
            usage = response.usage
        seeds = [request.sampling.seed for request in prefill.requests]
        assert seeds[0] == SEED
        assert len(set(seeds)) == 3
        assert answers[0] == expected(4)
        assert sorted(map(len, answers.values())) == [4, 4, 4]
        assert usage.num_completion_tokens == 12
        await settled(gateway, prefill, decode)


async def test_load_is_spread_over_workers_before_any_report():
    prefill = [FakePrefillWorker(f"p{k}") for k in range(2)]
    decode = [FakeDecodeWorker(f"d{k}") for k in range(2)]
    async with (
        gateway_over(*prefill, *decode) as gateway,
        open_channel(gateway.grpc_address) as ch,
    ):
        for worker in prefill:
            worker.tap.close()  # else a prompt that is done early makes room for another there
        answers = [Answer(stub_of(ch), 3) for _ in range(8)]
        first, second = prefill
        await first.until(lambda: len(first.requests) >= 4)
        await second.until(lambda: len(second.requests) >= 4)
        for worker in prefill:
            worker.tap.open()
        for answer in answers:
            assert await answer.read() == expected(3)
        assert [len(worker.submitted) for worker in decode] == [4, 4]
        assert [len(worker.requests) for worker in prefill] == [4, 4]


async def test_a_draining_worker_gets_nothing_new():
    first, second = FakeDecodeWorker("d0"), FakeDecodeWorker("d1")
    async with gateway_over(first, second) as gateway, open_channel(gateway.grpc_address) as ch:
        first.draining = True
        gateway.directory.changed()
        for _ in range(4):
            await Answer(stub_of(ch), 2).read()
        assert (len(first.submitted), len(second.submitted)) == (0, 4)


async def test_a_stale_registry_is_reported_and_still_used():
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    async with gateway_over(prefill, decode) as gateway, open_channel(gateway.grpc_address) as ch:
        gateway.directory.is_stale = True
        answer = Answer(stub_of(ch), 3)
        assert await answer.read() == expected(3)
        assert answer.degradations == [("stale_registry", "redis_unreachable")]


async def test_workers_that_join_later_are_used():
    decode = FakeDecodeWorker("d0")
    async with gateway_over(decode) as gateway, open_channel(gateway.grpc_address) as ch:
        prefill = FakePrefillWorker("p0")
        await prefill.start()
        gateway.directory.members.append(prefill)
        gateway.directory.changed()
        answer = Answer(stub_of(ch), 3)
        assert await answer.read() == expected(3)
        assert answer.degradations == []
        assert answer.report.prefill_worker_id == "p0"
        await prefill.die()


async def test_too_many_sequences_are_refused_at_once():
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0")
    decode.tap.close()
    async with (
        gateway_over(prefill, decode, max_num_sequences=1) as gateway,
        open_channel(gateway.grpc_address) as ch,
    ):
        held = Answer(stub_of(ch), 5)
        await held.read(1)
        with pytest.raises(aio.AioRpcError) as caught:
            await Answer(stub_of(ch), 5).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        decode.tap.open()
        assert await held.read() == expected(5)
