"""Where the packed tokens of one step stand in their sequences and in the KV pool.

Shape suffixes: T = tokens of this step, packed over sequences; B = sequences; W = blocks per
sequence; X = spans of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True, slots=True)
class KeySpans:
    """Parts of the contexts of a step's sequences: which positions their queries attend to."""

    by_sequence: tuple[tuple[range, ...], ...]
    """Of each, ascending, none in another. What a query does not see for other reasons stays
    unseen: later positions, those before its window."""
    bound_X2: torch.Tensor
    """int32 on the host: first position and end of all spans, sequence after sequence."""
    start_B1: torch.Tensor
    """int32 on the host, B + 1 prefix sums of the spans."""

    @classmethod
    def of(cls, by_sequence: Sequence[Sequence[range]]) -> "KeySpans":
        """With their index tensors."""
        bounds = [(span.start, span.stop) for spans in by_sequence for span in spans]
        starts = [0, *accumulate(len(spans) for spans in by_sequence)]
        return cls(
            tuple(tuple(spans) for spans in by_sequence),
            torch.tensor(bounds, dtype=torch.int32).view(-1, 2),
            torch.tensor(starts, dtype=torch.int32),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSplit:
    """Where the tokens of a step stand that is split along its tokens; N tokens of all ranks."""

    num_tokens: tuple[int, ...]
    """Of each rank of the sequence axis."""
    slot_N: torch.Tensor
    """int64 `slot_T` of each rank, in rank order."""
    ring: tuple[KeySpans, ...] | None
    """Where keys and values go round a ring: what this rank's queries see of each rank's tokens, of
    its own with all that earlier steps computed. None where they are gathered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """Index tensors of one forward pass, built once a step on the host, then moved to the device.

    Sequence b owns tokens [query_start[b], query_start[b + 1]) of the packed axis. Its context
    after this step is [0, context_len_B[b]) and its queries are the context's last positions.
    """

    token_T: torch.Tensor
    """int64 token ids."""
    position_T: torch.Tensor
    """int64 absolute position of each token in its sequence."""
    slot_T: torch.Tensor
    """int64 block id * block size + offset: where the token's key and value are written."""
    block_table_BW: torch.Tensor
    """int32 block ids of each sequence in order; padded with 0."""
    query_start_B1: torch.Tensor
    """int32, B + 1 prefix sums."""
    context_len_B: torch.Tensor
    """int32 tokens in the KV cache once this step is written."""
    query_lens: tuple[int, ...]
    """The same as Python ints, so that nothing asks the device."""
    context_lens: tuple[int, ...]
    num_threads: int = 1
    """CPU threads this step may use."""
    prompt_lens: tuple[int, ...] | None = None
    """Prompt tokens of each sequence, those of later chunks too. Only rope scalings that depend on
    a length read it (`ModelConfig.rope_length_threshold_tokens`); None stands for `context_lens`.
    """
    split: SequenceSplit | None = None
    """The other ranks of the sequence axis compute other tokens of the step; None: the same."""
    parts: tuple["StepBatch", ...] = ()
    """Runs of the packed tokens that take turns in each layer, in order; none: all at once. What
    one has to exchange with other ranks travels while the next one is computed."""
