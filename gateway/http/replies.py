"""The JSON of OpenAI's API that we answer with."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.generation import Delta
from gateway.token_bytes import TokenBytes
from protos.isthmus.v1 import inference_pb2
from protos.isthmus.v1.sampling_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
    TokenLogprobs,
)

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

Finish = Literal["stop", "length"]
Report = dict[str, object]


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Message(msgspec.Struct):
    role: str
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class MessageDelta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class CompletionChoice(msgspec.Struct):
    """The same in a stream and not."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None


class Reply(msgspec.Struct):
    """A whole answer or one chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatChunkChoice] | list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    isthmus: Report | UnsetType = UNSET


class ModelCard(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "isthmus"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


def finish_name(reason: FinishReason) -> Finish | None:
    if reason == FINISH_REASON_UNSPECIFIED:
        return None
    return "length" if reason == FINISH_REASON_LENGTH else "stop"


def usage_from_pb(usage: inference_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_completion_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_completion_tokens,
        prompt_tokens_details=CachedTokens(usage.num_cached_tokens),
    )


def report_from_pb(report: inference_pb2.RequestReport) -> Report:
    """Field names and units as in the proto."""
    found: Report = {
        field.name: getattr(report, field.name)
        for field in report.DESCRIPTOR.fields
        if field.name != "degradations"
    }
    found["degradations"] = [{"kind": d.kind, "reason": d.reason} for d in report.degradations]
    return found


class LogprobWriter:
    """Log probabilities of one answer, in either of OpenAI's two forms."""

    def __init__(self, token_bytes: TokenBytes, text_offset: int = 0) -> None:
        self._token_bytes = token_bytes
        self._text_offset = text_offset

    def chat(self, delta: Delta) -> ChatLogprobs:
        return ChatLogprobs([self._chat_token(*pair) for pair in _visible(delta)])

    def completion(self, delta: Delta) -> CompletionLogprobs:
        found = CompletionLogprobs([], [], [], [])
        for token_id, logprobs in _visible(delta):
            text = self._text(token_id)
            found.tokens.append(text)
            found.token_logprobs.append(_finite(logprobs.logprob))
            found.top_logprobs.append(
                {self._text(top.token_id): _finite(top.logprob) for top in logprobs.top}
            )
            found.text_offset.append(self._text_offset)
            self._text_offset += len(text)
        return found

    def _chat_token(self, token_id: int, logprobs: TokenLogprobs) -> ChatLogprob:
        return ChatLogprob(
            token=self._text(token_id),
            logprob=_finite(logprobs.logprob),
            bytes=list(self._token_bytes.of(token_id)),
            top_logprobs=[
                TopLogprob(
                    self._text(top.token_id),
                    _finite(top.logprob),
                    list(self._token_bytes.of(top.token_id)),
                )
                for top in logprobs.top
            ],
        )

    def _text(self, token_id: int) -> str:
        return self._token_bytes.of(token_id).decode("utf-8", "replace")


def _visible(delta: Delta) -> list[tuple[int, TokenLogprobs]]:
    """All but the end token, which is no part of the text."""
    pairs = list(zip(delta.token_ids, delta.logprobs, strict=True))
    return pairs[:-1] if delta.has_end_token else pairs


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
