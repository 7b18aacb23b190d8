"""What a caller asks of the engine and what it gets back, as frozen values; no torch."""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why an answer ended; values as in OpenAI's API where it has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are drawn; the gateway has checked the ranges."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """uint64; the random number of a token is a function of (seed, its position)."""
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    """So many tokens are drawn before one that ends the answer can be."""
    max_tokens: int = 16
    num_top_logprobs: int | None = None
    """None: no log probabilities; 0: the drawn token's only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to compute. Immutable; progress lives in `engine.scheduling.sequence`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    """Tokens emitted before this engine got the request; they count against max_tokens."""
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms, before temperature and penalties."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), most likely first."""
