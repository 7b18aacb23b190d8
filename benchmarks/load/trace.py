"""Replays request traces in Mooncake's format: times, lengths and shared prefixes, without text.

One JSON object a line: `timestamp` in ms, `input_length` and `output_length` in tokens, `hash_ids`
with one id for each 512-token block of the prompt; the same ids from the start on are a shared
prefix. Source: Mooncake, FAST '25, traces released with the paper.
"""

from itertools import islice
from pathlib import Path

import msgspec

from benchmarks.load.scenario import TraceLoad
from benchmarks.load.schedule import Prompt, PromptSource

TRACE_BLOCK_TOKENS = 512


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def prompts_of_trace(load: TraceLoad, source: PromptSource) -> list[Prompt]:
    """Prompts whose shared prefixes are those of the trace; cut to the load's limits.

    Cutting at the end keeps the prefixes that requests share, which scaling lengths would not.
    """
    decode = msgspec.json.Decoder(_Line).decode
    with Path(load.file).open("rb") as file:
        lines = [decode(line) for line in islice(file, load.num_requests)]
    first_ms = lines[0].timestamp if lines else 0
    return [
        Prompt(
            token_ids=_token_ids(line, load.max_prompt_tokens, source),
            max_tokens=max(1, min(line.output_length, load.max_output_tokens)),
            at_s=(line.timestamp - first_ms) / 1000 / load.rate,
        )
        for line in lines
    ]


def _token_ids(line: _Line, max_prompt_tokens: int, source: PromptSource) -> tuple[int, ...]:
    num_tokens = max(1, min(line.input_length, max_prompt_tokens))
    num_blocks = -(-num_tokens // TRACE_BLOCK_TOKENS)
    blocks = (source.block(block_id, TRACE_BLOCK_TOKENS) for block_id in line.hash_ids[:num_blocks])
    return tuple(token_id for block in blocks for token_id in block)[:num_tokens]
