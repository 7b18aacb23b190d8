"""Turns what a generation yields into chat or completion bodies, whole or in chunks."""

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET

from gateway.generation import Delta, Generation
from gateway.http.replies import (
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    LogprobWriter,
    Message,
    MessageDelta,
    Reply,
    Report,
    Usage,
    finish_name,
    report_from_pb,
    usage_from_pb,
)
from gateway.token_bytes import TokenBytes

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode

Choices = list[ChatChoice] | list[ChatChunkChoice] | list[CompletionChoice]


def event(reply: Reply) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(reply) + b"\n\n"


class Head(msgspec.Struct, frozen=True):
    """What is the same in every chunk of an answer."""

    reply_id: str
    object: str
    model: str
    created: int

    def reply(
        self,
        choices: Choices,
        usage: Usage | msgspec.UnsetType | None = UNSET,
        isthmus: Report | msgspec.UnsetType = UNSET,
    ) -> Reply:
        return Reply(self.reply_id, self.object, self.created, self.model, choices, usage, isthmus)


class Form(Protocol):
    """One request's way of writing answers."""

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """The events of one batch of deltas; may be empty."""

    def closing(self, generation: Generation) -> bytes:
        """The events after the last delta."""

    def whole(self, deltas: Sequence[Delta], generation: Generation) -> bytes:
        """The body of an answer that is not streamed."""


class BaseForm:
    """What chat and completions share: ends of streams, usage and report."""

    def __init__(
        self, head: Head, *, is_streamed: bool, wants_usage: bool, wants_report: bool
    ) -> None:
        self._head = head
        self._wants_usage = wants_usage
        self._wants_report = wants_report
        self._chunk_usage = None if wants_usage and is_streamed else UNSET

    def closing(self, generation: Generation) -> bytes:
        closing = b""
        if self._wants_usage or self._wants_report:
            usage = usage_from_pb(generation.usage()) if self._wants_usage else UNSET
            closing = event(self._head.reply([], usage, self._report(generation)))
        return closing + DONE

    def _body(self, choices: Choices, generation: Generation) -> bytes:
        usage = usage_from_pb(generation.usage())
        return _encode(self._head.reply(choices, usage, self._report(generation)))

    def _report(self, generation: Generation) -> Report | msgspec.UnsetType:
        return report_from_pb(generation.report()) if self._wants_report else UNSET


class ChatForm(BaseForm):
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self,
        head: Head,
        token_bytes: TokenBytes,
        *,
        is_streamed: bool,
        wants_usage: bool,
        wants_report: bool,
    ) -> None:
        super().__init__(
            head, is_streamed=is_streamed, wants_usage=wants_usage, wants_report=wants_report
        )
        self._opened: set[int] = set()
        self._logprobs = LogprobWriter(token_bytes)

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        return b"".join([self._chunk(delta) for delta in deltas])

    def whole(self, deltas: Sequence[Delta], generation: Generation) -> bytes:
        return self._body([self._choice(delta) for delta in deltas], generation)

    def _chunk(self, delta: Delta) -> bytes:
        events = b""
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            events = self._event(
                ChatChunkChoice(delta.index, MessageDelta(role="assistant", content=""))
            )
        if delta.text or delta.logprobs:
            events += self._event(
                ChatChunkChoice(
                    delta.index, MessageDelta(content=delta.text), self._logprobs_of(delta)
                )
            )
        if delta.finish_reason:
            finish = finish_name(delta.finish_reason)
            events += self._event(
                ChatChunkChoice(delta.index, MessageDelta(), finish_reason=finish)
            )
        return events

    def _event(self, choice: ChatChunkChoice) -> bytes:
        return event(self._head.reply([choice], self._chunk_usage))

    def _choice(self, delta: Delta) -> ChatChoice:
        message = Message("assistant", delta.text)
        finish = finish_name(delta.finish_reason)
        return ChatChoice(delta.index, message, self._logprobs_of(delta), finish)

    def _logprobs_of(self, delta: Delta) -> ChatLogprobs | None:
        return self._logprobs.chat(delta) if delta.logprobs else None


class CompletionForm(BaseForm):
    """text_completion, whole and in chunks.

    Args:
        echoes: for each answer the prompt that stands before it; empty without echo.
    """

    def __init__(
        self,
        head: Head,
        token_bytes: TokenBytes,
        *,
        echoes: Sequence[str],
        is_streamed: bool,
        wants_usage: bool,
        wants_report: bool,
    ) -> None:
        super().__init__(
            head, is_streamed=is_streamed, wants_usage=wants_usage, wants_report=wants_report
        )
        self._echoes = dict(enumerate(echoes))
        self._token_bytes = token_bytes
        self._logprobs: dict[int, LogprobWriter] = {}

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        choices = [self._choice(delta) for delta in deltas]
        return b"".join(
            event(self._head.reply([choice], self._chunk_usage))
            for choice in choices
            if choice.text or choice.logprobs or choice.finish_reason
        )

    def whole(self, deltas: Sequence[Delta], generation: Generation) -> bytes:
        return self._body([self._choice(delta) for delta in deltas], generation)

    def _choice(self, delta: Delta) -> CompletionChoice:
        echo = self._echoes.pop(delta.index, "")
        return CompletionChoice(
            delta.index,
            echo + delta.text,
            self._logprobs_of(delta),
            finish_name(delta.finish_reason),
        )

    def _logprobs_of(self, delta: Delta) -> CompletionLogprobs | None:
        if not delta.logprobs:
            return None
        writer = self._logprobs.get(delta.index)
        if writer is None:
            writer = self._logprobs[delta.index] = LogprobWriter(self._token_bytes)
        return writer.completion(delta)


def new_head(kind: str, request_id: str, model: str) -> Head:
    """`kind` is the object's name: chat.completion, chat.completion.chunk or text_completion."""
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return Head(f"{prefix}-{request_id}", kind, model, int(time.time()))
