"""What a prefill worker calls the blocks of a migrated request is what a decode engine does."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

import pytest

from engine.errors import PeerUnavailableError
from engine.request import Request, SamplingParams
from engine.runtime.commands import SequenceMode
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from kv_transfer.handover import Handover
from prefill_worker.prefill import Prefiller, PrefillJob
from tests.fakes.engine import FakeEngine

SIZE = 4


def salt_of(num_prompt_tokens: int) -> int:
    """As of dynamic rope scaling above 8 tokens."""
    return num_prompt_tokens if num_prompt_tokens > 8 else 0


class ListeningSender:
    """Takes what a handover would reserve, and offers no handover."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.hashes: Sequence[bytes] = ()

    def handover(
        self,
        request_id: str,
        *,
        decode_address: str,
        num_tokens: int,
        hash_blocks: Callable[[int], Sequence[bytes]],
    ) -> AbstractAsyncContextManager[Handover]:
        self.num_tokens, self.hashes = num_tokens, hash_blocks(SIZE)
        raise PeerUnavailableError("nobody is there")


@pytest.mark.parametrize(("num_prompt", "num_emitted"), [(13, 0), (13, 4), (7, 6)])
async def test_a_decode_engine_takes_what_was_reserved(num_prompt: int, num_emitted: int) -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(range(num_prompt)),
        output_token_ids=tuple(range(50, 50 + num_emitted)),
        sampling=SamplingParams(max_tokens=20),
    )
    sender = ListeningSender()
    prefiller = Prefiller(FakeEngine(), cast("Any", sender), hash_salt_of=salt_of)
    job = PrefillJob(request=request, decode_worker_id="d0", decode_address="here")

    async def emit(token: Any) -> None: ...

    with pytest.raises(ExceptionGroup):
        await prefiller.run(job, emit)

    limits = EngineLimits(
        vocab_size=1000, max_context_tokens=200, num_blocks=64, block_size_tokens=SIZE
    )
    decode = Scheduler(limits, max_num_sequences=8, eos_token_ids=frozenset(), hash_salt_of=salt_of)
    decode.submit(request, SequenceMode.DECODE, now_ns=0)
    decode.reserve("r", sender.num_tokens, sender.hashes)
    assert decode.grant_reservations()
    assert len(sender.hashes) == sender.num_tokens // SIZE
    assert decode.commit_reservation("r", first_token_id=7, now_ns=0) == []
    assert decode.is_decoding
