"""What a sequence's earlier tokens change about its next one: counts for penalties; no torch."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from engine.request import SamplingParams


class TokenHistory:
    """Distinct tokens of prompt and output, with how often each stands in the output.

    Arrays grow by doubling, so that a step copies slices and never walks Python lists.
    """

    def __init__(self, prompt: Iterable[int], output: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._index_of = {token_id: index for index, token_id in enumerate(distinct)}
        capacity = max(64, 2 * len(distinct))
        self._token_ids = np.zeros(capacity, dtype=np.int64)
        self._token_ids[: len(distinct)] = distinct
        self._output_counts = np.zeros(capacity, dtype=np.float32)
        for token_id in output:
            self.add(token_id)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        return self._token_ids[: len(self._index_of)]

    @property
    def output_counts(self) -> npt.NDArray[np.float32]:
        return self._output_counts[: len(self._index_of)]

    def add(self, token_id: int) -> None:
        """Count a token that was drawn."""
        index = self._index_of.setdefault(token_id, len(self._index_of))
        if index == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._output_counts = np.concatenate(
                [self._output_counts, np.zeros_like(self._output_counts)]
            )
        self._token_ids[index] = token_id
        self._output_counts[index] += 1


class SamplerState:
    """One sequence as the sampler sees it; `add` after every drawn token."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_token_ids: Iterable[int],
        output_token_ids: Iterable[int],
        eos_token_ids: frozenset[int],
    ) -> None:
        self.params = params
        self.is_greedy = params.temperature < MIN_TEMPERATURE
        has_penalties = (
            params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.repetition_penalty != 1
        )
        self.history = TokenHistory(prompt_token_ids, output_token_ids) if has_penalties else None
        eos = frozenset[int]() if params.ignore_eos else eos_token_ids
        self.end_token_ids = tuple(sorted(eos | params.stop_token_ids))
        self.is_plain = (
            self.is_greedy
            and not has_penalties
            and not params.logit_bias
            and params.min_tokens == 0
            and params.num_top_logprobs is None
        )
        """Nothing but an argmax is needed."""

    def add(self, token_id: int) -> None:
        if self.history is not None:
            self.history.add(token_id)


MIN_TEMPERATURE = 1e-5
"""Below it the softmax is an argmax in all but rounding."""
