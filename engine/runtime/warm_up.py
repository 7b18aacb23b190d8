"""Steps that nobody asked for, before the first request: caches, thread pools, kernels."""

import torch

from engine.request import SamplingParams
from engine.runtime.runner import StepRunner
from engine.sampling.history import SamplerState
from engine.sampling.sampler import SampleRow, sample
from engine.scheduling.step_plan import ScheduledChunk, StepPlan

_DECODE_BATCHES = (1, 8)


def warm_up(runner: StepRunner, *, max_num_tokens: int, num_threads: int) -> None:
    """Run one prefill of the largest chunk and some decode steps on blocks that nobody holds.

    What it leaves in the pool is never read: no block is registered in the prefix cache.
    """
    block_size = runner.pool.layout.block_size_tokens
    pool_tokens = runner.pool.num_blocks * block_size
    num_tokens = min(max_num_tokens, runner.model.config.max_context_tokens, pool_tokens)
    _run(runner, [num_tokens], num_threads=num_threads)
    for num_sequences in _DECODE_BATCHES:
        if num_sequences <= runner.pool.num_blocks:
            _run(runner, [1] * num_sequences, num_threads=num_threads)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _run(runner: StepRunner, query_lens: list[int], *, num_threads: int) -> None:
    block_size = runner.pool.layout.block_size_tokens
    chunks: list[ScheduledChunk] = []
    for shard in range(runner.num_data_shards):
        next_block = shard * runner.pool.num_blocks
        for index, num_new in enumerate(query_lens):
            num_blocks = -(-num_new // block_size)
            blocks = tuple(range(next_block, next_block + num_blocks))
            next_block += num_blocks
            name = f"warm-up-{shard}-{index}"
            chunks.append(ScheduledChunk(name, 0, (0,) * num_new, blocks, num_new, is_drawing=True))
    runner.begin(StepPlan(tuple(chunks)), num_threads)
    logits_BV = runner.finish()
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)):
        rows = [
            SampleRow(
                SamplerState(
                    params,
                    prompt_token_ids=(),
                    output_token_ids=(),
                    eos_token_ids=frozenset(),
                ),
                position=1,
                num_output_tokens=0,
            )
            for _ in chunks
        ]
        sample(logits_BV.clone(), rows)
