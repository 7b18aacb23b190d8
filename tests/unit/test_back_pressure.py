"""A decode pool that is full holds up handovers, and nothing else of a prefill worker."""

import asyncio
from typing import Any

from engine.request import Request, SamplingParams
from engine.runtime.commands import TokenEvent
from prefill_worker.prefill import PrefillJob
from tests.fakes.engine import expected_tokens
from tests.fakes.sim.chance import Chance, Plan
from tests.fakes.sim.network import Network
from tests.fakes.sim.watch import Watch
from tests.fakes.sim.workers import decode_worker, prefill_worker
from tests.fakes.virtual_time import run_in_virtual_time

NUM_BLOCKS = 6
PROMPTS = [tuple(range(start, start + 9)) for start in (0, 100, 200)]


def test_prompts_are_computed_and_first_tokens_leave_while_decode_has_no_block() -> None:
    run_in_virtual_time(hand_over_to_a_full_pool())


async def hand_over_to_a_full_pool() -> None:
    watch = Watch()
    network = Network(Chance(Plan(0, faults=frozenset())), watch)
    ends: dict[str, Any] = {}
    first_tokens: dict[str, int] = {}
    async with (
        decode_worker("d", network, ends, num_blocks=NUM_BLOCKS) as decode,
        prefill_worker("p", network, ends, num_blocks=32, plane="shm") as prefill,
        asyncio.TaskGroup() as tasks,
    ):
        hog = await decode.receiver.reserve(
            "hog",
            owner="somebody",
            epoch=decode.receiver.epoch,
            num_tokens=4 * NUM_BLOCKS,
            block_hashes=(),
            lease_s=1.0,
        )

        async def run(index: int) -> None:
            request = Request(
                request_id=f"r{index}",
                prompt_token_ids=PROMPTS[index],
                sampling=SamplingParams(max_tokens=3, ignore_eos=True),
            )

            async def emit(token: TokenEvent) -> None:
                first_tokens[token.request_id] = token.token_id

            job = PrefillJob(request=request, decode_worker_id="d", decode_address="d")
            report = await prefill.prefiller.run(job, emit)
            assert report is not None
            assert report.outcome == "committed"
            await decode.abort(request.request_id)

        running = [tasks.create_task(run(index)) for index in range(len(PROMPTS))]
        async with asyncio.timeout(0.9):  # the hog's lease lasts longer
            while len(first_tokens) < len(PROMPTS):  # noqa: ASYNC110 - in virtual time
                await asyncio.sleep(0.01)
        assert decode.receiver.counters.num_waiting_reserves == len(PROMPTS)
        assert prefill.engine.stats.num_prefill_tokens == sum(map(len, PROMPTS))
        assert not any(task.done() for task in running)
        await decode.receiver.release(decode.receiver.epoch, hog.lease_id)
        async with asyncio.timeout(5):
            await asyncio.wait(running)
    assert first_tokens == {
        f"r{index}": expected_tokens(prompt, 1)[0] for index, prompt in enumerate(PROMPTS)
    }
    assert watch.violations == []
