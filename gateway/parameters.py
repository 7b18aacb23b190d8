"""Checks what a caller asked for, for both doors, and completes it for the workers."""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequestError, UnknownRequestError
from mesh.convert import sampling_from_pb
from protos.isthmus.v1 import sampling_pb2

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_ANSWERS = 16
UINT64_MASK = (1 << 64) - 1


class ParameterError(InvalidRequestError):
    """One named parameter is wrong; `code` is OpenAI's, where it has one."""

    def __init__(self, text: str, *, param: str, code: str | None = None) -> None:
        super().__init__(text)
        self.param = param
        self.code = code


class UnknownModelError(UnknownRequestError):
    """The request names a model that is not served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Checked and complete."""

    worker: sampling_pb2.SamplingParams
    """For the workers: seed and max_tokens are set; of answer 0."""
    num_answers: int
    stops: tuple[str, ...]


def checked_sampling(
    message: sampling_pb2.SamplingParams,
    *,
    num_prompt_tokens: int,
    max_context_tokens: int,
    num_vocabulary_tokens: int,
    default_max_tokens: int | None = None,
) -> Sampling:
    """Complete the parameters of a request.

    max_tokens defaults to `default_max_tokens`, or to what the context leaves.

    Raises:
        InvalidRequestError: a value is out of range or does not fit the context.
    """
    _check_stops(message.stop)
    if message.n > MAX_ANSWERS:
        raise ParameterError(f"n must be in [1, {MAX_ANSWERS}], got {message.n}", param="n")
    check_ids(message.logit_bias, num_vocabulary_tokens, "logit_bias")
    check_ids(message.stop_token_ids, num_vocabulary_tokens, "stop_token_ids")
    room = max_context_tokens - num_prompt_tokens
    if room < 1 or (message.HasField("max_tokens") and message.max_tokens > room):
        raise _context_error(message, num_prompt_tokens, max_context_tokens)
    worker = sampling_pb2.SamplingParams()
    worker.CopyFrom(message)
    worker.ClearField("stop")
    worker.ClearField("n")
    if not worker.HasField("max_tokens"):
        worker.max_tokens = room if default_max_tokens is None else min(default_max_tokens, room)
    if not worker.HasField("seed"):
        worker.seed = secrets.randbits(64)
    sampling_from_pb(worker)  # checks the ranges, as the workers will
    return Sampling(worker=worker, num_answers=message.n or 1, stops=tuple(message.stop))


def sampling_of_answer(
    worker: sampling_pb2.SamplingParams, index: int
) -> sampling_pb2.SamplingParams:
    """The parameters of answer `index`: as those of answer 0 but for the seed."""
    if index == 0:
        return worker
    derived = sampling_pb2.SamplingParams()
    derived.CopyFrom(worker)
    derived.seed = _mixed(worker.seed + index)
    return derived


def _mixed(value: int) -> int:
    """Spread neighbouring seeds over all 64 bits. Source: splitmix64, Vigna 2015."""
    value = (value + 0x9E3779B97F4A7C15) & UINT64_MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & UINT64_MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & UINT64_MASK
    return value ^ (value >> 31)


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise ParameterError(
            f"stop takes at most {MAX_STOPS} strings, got {len(stops)}", param="stop"
        )
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ParameterError(
                f"each stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}",
                param="stop",
            )


def check_ids(token_ids: Iterable[int], num_vocabulary_tokens: int, param: str) -> None:
    """Raises ParameterError unless all ids are in the vocabulary."""
    largest = max(token_ids, default=0)
    if largest >= num_vocabulary_tokens:
        raise ParameterError(
            f"{param} holds token id {largest}; the vocabulary has {num_vocabulary_tokens} tokens",
            param=param,
        )


def _context_error(
    message: sampling_pb2.SamplingParams, num_prompt_tokens: int, max_context_tokens: int
) -> ParameterError:
    asked = message.max_tokens if message.HasField("max_tokens") else 1
    return ParameterError(
        f"This model's maximum context length is {max_context_tokens} tokens. However, you "
        f"requested {num_prompt_tokens + asked} tokens ({num_prompt_tokens} in the prompt, at "
        f"least {asked} in the answer). Please shorten the prompt or lower max_tokens.",
        param="max_tokens" if num_prompt_tokens < max_context_tokens else "prompt",
        code="context_length_exceeded",
    )
