"""Engine values to protobuf and back; what comes from the wire is checked here."""

import math
from collections.abc import Callable

from engine.errors import InvalidRequestError
from engine.request import FinishReason, SamplingParams, TokenLogprobs
from protos.isthmus.v1 import sampling_pb2

MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_TOP_LOGPROBS = 20

_FINISH_TO_PB: dict[FinishReason, sampling_pb2.FinishReason] = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: sampling_pb2.FINISH_REASON_ABORTED,
    FinishReason.ERROR: sampling_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_PB: dict[int, FinishReason] = {
    value: reason for reason, value in _FINISH_TO_PB.items()
}

# field -> (default, whether a value is in range, the range in words); NaN fails every comparison.
_FLOAT_FIELDS: dict[str, tuple[float, Callable[[float], bool], str]] = {
    "temperature": (1.0, lambda x: 0 <= x < math.inf, "0 or more and finite"),
    "top_p": (1.0, lambda x: 0 < x <= 1, "in (0, 1]"),
    "min_p": (0.0, lambda x: 0 <= x <= 1, "in [0, 1]"),
    "presence_penalty": (0.0, lambda x: -2 <= x <= 2, "in [-2, 2]"),
    "frequency_penalty": (0.0, lambda x: -2 <= x <= 2, "in [-2, 2]"),
    "repetition_penalty": (1.0, lambda x: 0 < x < math.inf, "above 0 and finite"),
}


def sampling_to_pb(params: SamplingParams) -> sampling_pb2.SamplingParams:
    """Every field is set, so that the receiver needs no default of its own."""
    return sampling_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        seed=params.seed,
        stop_token_ids=sorted(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        min_tokens=params.min_tokens,
        max_tokens=params.max_tokens,
        num_top_logprobs=params.num_top_logprobs,
    )


def sampling_from_pb(
    message: sampling_pb2.SamplingParams,
    *,
    default_seed: int | None = None,
    default_max_tokens: int | None = None,
) -> SamplingParams:
    """Check every range and fill in what is absent.

    `stop` and `n` are the gateway's own business and are not looked at.

    Args:
        message: as a client or another service sent it.
        default_seed: used when the message has none; None (inside the mesh): it must have one.
        default_max_tokens: likewise; what the context leaves.

    Raises:
        InvalidRequestError: a field is out of range or missing; the text names it.
    """
    floats = {name: _checked_float(message, name) for name in _FLOAT_FIELDS}
    seed = message.seed if message.HasField("seed") else default_seed
    max_tokens = message.max_tokens if message.HasField("max_tokens") else default_max_tokens
    if seed is None or max_tokens is None:
        raise InvalidRequestError("sampling.seed and sampling.max_tokens must be set")
    if max_tokens < 1:
        raise InvalidRequestError(f"max_tokens must be at least 1, got {max_tokens}")
    if message.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens must be at most max_tokens ({max_tokens}), got {message.min_tokens}"
        )
    if len(message.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids, got {len(message.stop_token_ids)}"
        )
    return SamplingParams(
        **floats,
        top_k=message.top_k,
        logit_bias=_logit_bias_from_pb(message),
        seed=seed,
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        max_tokens=max_tokens,
        num_top_logprobs=_num_top_logprobs_from_pb(message),
    )


def _checked_float(message: sampling_pb2.SamplingParams, name: str) -> float:
    default, is_in_range, words = _FLOAT_FIELDS[name]
    value: float = getattr(message, name) if message.HasField(name) else default
    if not is_in_range(value):
        raise InvalidRequestError(f"{name} must be {words}, got {value:g}")
    return value


def _logit_bias_from_pb(message: sampling_pb2.SamplingParams) -> tuple[tuple[int, float], ...]:
    if len(message.logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(
            f"at most {MAX_LOGIT_BIASES} logit_bias entries, got {len(message.logit_bias)}"
        )
    for token_id, bias in message.logit_bias.items():
        if not -100 <= bias <= 100:
            raise InvalidRequestError(
                f"logit_bias of token {token_id} must be in [-100, 100], got {bias:g}"
            )
    return tuple(sorted(message.logit_bias.items()))


def _num_top_logprobs_from_pb(message: sampling_pb2.SamplingParams) -> int | None:
    if not message.HasField("num_top_logprobs"):
        return None
    if message.num_top_logprobs > MAX_TOP_LOGPROBS:
        raise InvalidRequestError(
            f"num_top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {message.num_top_logprobs}"
        )
    return message.num_top_logprobs


def logprobs_to_pb(logprobs: TokenLogprobs) -> sampling_pb2.TokenLogprobs:
    top = [
        sampling_pb2.TopLogprob(token_id=token_id, logprob=logprob)
        for token_id, logprob in logprobs.top
    ]
    return sampling_pb2.TokenLogprobs(logprob=logprobs.logprob, top=top)


def logprobs_from_pb(message: sampling_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple((top.token_id, top.logprob) for top in message.top))


def finish_reason_to_pb(reason: FinishReason | None) -> sampling_pb2.FinishReason:
    return sampling_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_PB[reason]


def finish_reason_from_pb(value: int) -> FinishReason | None:
    """None: not ended. A value of a later protocol version counts as STOP: the answer has ended."""
    if value == sampling_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    return _FINISH_FROM_PB.get(value, FinishReason.STOP)
