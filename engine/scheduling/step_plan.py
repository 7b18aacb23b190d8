"""What one step computes, and what came of it, as frozen values that every rank can be sent."""

from dataclasses import dataclass

from engine.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens [first_position, first_position + len(token_ids)) of one sequence."""

    request_id: str
    first_position: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    """All blocks of the sequence, in order; they cover the chunk."""
    num_prompt_tokens: int
    """Of the whole prompt: some rope scalings depend on it."""
    is_drawing: bool
    """The chunk ends the tokens known so far: the next one is drawn from its last position."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The chunks of one forward pass, one a sequence; decoding sequences come first.

    With several data shards the chunks of the first shard come first.
    """

    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """The sampler's answer to a drawing chunk."""

    token_id: int
    logprobs: TokenLogprobs | None
