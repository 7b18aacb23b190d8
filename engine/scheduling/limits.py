"""What an engine can take at all: checks that need no state and no engine thread."""

import math
from dataclasses import dataclass

from engine.errors import CapacityError, InvalidRequestError
from engine.request import Request, SamplingParams
from engine.runtime.commands import SequenceMode

MAX_TOP_LOGPROBS = 20
_FLOAT_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """Bounds fixed at start-up."""

    vocab_size: int
    max_context_tokens: int
    num_blocks: int
    """Of each data shard: a sequence has blocks of one."""
    block_size_tokens: int
    num_data_shards: int = 1

    @property
    def num_worker_blocks(self) -> int:
        """Of all data shards together."""
        return self.num_blocks * self.num_data_shards

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)

    def check_request(self, request: Request, mode: SequenceMode) -> None:
        """Refuse what could never finish here.

        Raises:
            InvalidRequestError: the text names the field and the bound.
        """
        num_prompt, num_outputs = len(request.prompt_token_ids), len(request.output_token_ids)
        max_tokens = request.sampling.max_tokens
        if num_prompt == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if max_tokens < 1 or num_outputs >= max_tokens:
            raise InvalidRequestError(
                f"max_tokens is {max_tokens} and {num_outputs} tokens are drawn already; raise it"
            )
        if num_prompt + max_tokens > self.max_context_tokens:
            raise InvalidRequestError(
                f"{num_prompt} prompt tokens and max_tokens {max_tokens} exceed the context of "
                f"{self.max_context_tokens} tokens; shorten the prompt or lower max_tokens"
            )
        # KV of the last token is never needed.
        num_kv_tokens = num_prompt + (
            num_outputs if mode is SequenceMode.PREFILL else max_tokens - 1
        )
        if self.num_blocks_for(num_kv_tokens) > self.num_blocks:
            raise InvalidRequestError(
                f"{num_kv_tokens} tokens exceed the KV pool of "
                f"{self.num_blocks * self.block_size_tokens} tokens; shorten the request or give "
                "the worker a larger KV pool"
            )
        self.check_token_ids(request.prompt_token_ids, "the prompt")
        self.check_token_ids(request.output_token_ids, "output_token_ids")
        self._check_sampling(request.sampling)

    def check_token_ids(self, token_ids: tuple[int, ...], name: str) -> None:
        """Refuse ids outside the vocabulary: they would index past the embedding."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            raise InvalidRequestError(f"{name} has a token id outside [0, {self.vocab_size})")

    def check_reservation(self, num_tokens: int) -> None:
        """Refuse a reservation that no waiting could satisfy.

        Raises:
            CapacityError: it never fits.
        """
        if num_tokens < 1:
            raise InvalidRequestError(f"num_tokens must be at least 1, got {num_tokens}")
        if self.num_blocks_for(num_tokens) > self.num_blocks:
            raise CapacityError(
                f"{num_tokens} tokens can never fit the KV pool of "
                f"{self.num_blocks * self.block_size_tokens} tokens"
            )

    def _check_sampling(self, sampling: SamplingParams) -> None:
        for name in _FLOAT_FIELDS:
            if not math.isfinite(getattr(sampling, name)):
                raise InvalidRequestError(f"{name} must be finite, got {getattr(sampling, name)}")
        if sampling.temperature < 0:
            raise InvalidRequestError(f"temperature must be at least 0, got {sampling.temperature}")
        if sampling.repetition_penalty <= 0:
            raise InvalidRequestError(
                f"repetition_penalty must be above 0, got {sampling.repetition_penalty}"
            )
        if any(not math.isfinite(bias) for _, bias in sampling.logit_bias):
            raise InvalidRequestError("logit_bias must be finite")
        self.check_token_ids(tuple(token_id for token_id, _ in sampling.logit_bias), "logit_bias")
        if (sampling.num_top_logprobs or 0) > MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"num_top_logprobs must be at most {MAX_TOP_LOGPROBS}, "
                f"got {sampling.num_top_logprobs}"
            )
