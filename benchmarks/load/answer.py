"""Reads a finished exchange: which tokens came when, and what was wrong with it.

The inter-token time used everywhere here is the gap between two neighbouring chunks of one answer,
each gap counted once and whole. A server that bundles k tokens in a chunk gets one long gap, never
k short ones and never k - 1 zeros, so bundling cannot flatter it; `tokens_per_chunk` shows it.
"""

from dataclasses import dataclass
from itertools import pairwise

import msgspec

from benchmarks.load.exchange import Exchange
from benchmarks.load.sse import SseParser


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None

    def carries_tokens(self) -> bool:
        """Whether the chunk stands for a token: an empty one does unless it only says the end."""
        return bool(self.text or self.token_ids) or self.finish_reason is None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_decode_event = msgspec.json.Decoder(_Event).decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """When the tokens of one request came. An answer with an `error` gives no latencies."""

    start_s: float
    end_s: float
    chunk_times_s: tuple[float, ...]
    num_tokens: int
    is_complete: bool
    error: str

    @property
    def ttft_s(self) -> float:
        return self.chunk_times_s[0] - self.start_s

    @property
    def latency_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def gaps_s(self) -> list[tuple[float, float]]:
        """(when it ended, length) of each gap between neighbouring chunks."""
        return [(after, after - before) for before, after in pairwise(self.chunk_times_s)]


def answer_from(exchange: Exchange) -> Answer:
    """Parse what arrived. A stopped exchange counts a token for each chunk that it got."""
    parser = SseParser()
    times_s: list[float] = []
    num_tokens_stated: int | None = None
    error = _error_before_body(exchange)
    for when_s, body in exchange.arrivals if not error else []:
        for payload in parser.feed(body):
            if payload == b"[DONE]":
                continue
            try:
                event = _decode_event(payload)
            except msgspec.DecodeError as bad:
                error = error or f"unreadable event: {bad}"
                continue
            if event.error:
                error = error or f"error event: {bytes(event.error)[:200].decode(errors='replace')}"
            if event.usage is not None:
                num_tokens_stated = event.usage.completion_tokens
            if any(choice.carries_tokens() for choice in event.choices):
                times_s.append(when_s)
    num_tokens = len(times_s) if num_tokens_stated is None else num_tokens_stated
    return Answer(
        start_s=exchange.start_s,
        end_s=exchange.arrivals[-1][0] if exchange.arrivals else exchange.start_s,
        chunk_times_s=tuple(times_s),
        num_tokens=num_tokens,
        is_complete=exchange.is_complete,
        error=error or _error_in_count(exchange, num_tokens, len(times_s)),
    )


def _error_before_body(exchange: Exchange) -> str:
    if exchange.failure:
        return exchange.failure
    if exchange.status not in {0, 200}:
        body = b"".join(piece for _, piece in exchange.arrivals)
        return f"status {exchange.status}: {body[:200].decode(errors='replace')}"
    return ""


def _error_in_count(exchange: Exchange, num_tokens: int, num_chunks: int) -> str:
    """With `ignore_eos`, an answer that ended by itself has exactly the tokens asked for."""
    if exchange.is_complete and num_tokens != exchange.max_tokens:
        return f"{num_tokens} tokens instead of {exchange.max_tokens}"
    if exchange.is_complete and not num_chunks:
        return "no chunk with a token"
    return ""
