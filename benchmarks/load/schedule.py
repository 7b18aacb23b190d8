"""Draws the requests of a load from a seed: token ids, lengths, arrival times. Sends nothing."""

import itertools
import random
from dataclasses import dataclass

import msgspec

from benchmarks.load.exchange import Exchange, post

COMPLETIONS_PATH = "/v1/completions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One request to be made."""

    token_ids: tuple[int, ...]
    max_tokens: int
    at_s: float = 0.0
    """Arrival after the start of the load; closed loads do not look at it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRange:
    """The half-open range [start, stop) that random token ids are drawn from."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        """Refuse an empty range."""
        if not 0 <= self.start < self.stop:
            raise ValueError(f"token ids must be START:STOP with 0 <= START < STOP, got {self}")

    def __str__(self) -> str:
        """Write the range as the command line takes it."""
        return f"{self.start}:{self.stop}"


class PromptSource:
    """Random prompts without shared prefixes, the same ones for the same seed and name."""

    def __init__(self, tokens: TokenRange, *, seed: int, name: str) -> None:
        # A string seed hashes by SHA-512, so it is the same in every process.
        self._key = f"{seed}/{name}"
        self._random = random.Random(self._key)
        self._tokens = range(tokens.start, tokens.stop)

    def prompt(self, prompt_tokens: int, max_tokens: int, at_s: float = 0.0) -> Prompt:
        token_ids = tuple(self._random.choices(self._tokens, k=prompt_tokens))
        return Prompt(token_ids=token_ids, max_tokens=max_tokens, at_s=at_s)

    def prompts(self, number: int, prompt_tokens: int, max_tokens: int) -> list[Prompt]:
        return [self.prompt(prompt_tokens, max_tokens) for _ in range(number)]

    def poisson(
        self, number: int, prompt_tokens: int, max_tokens: int, *, per_s: float
    ) -> list[Prompt]:
        """Prompts whose distances in time are exponential with mean 1 / `per_s`."""
        gaps_s = (self._random.expovariate(per_s) for _ in range(number))
        return [
            self.prompt(prompt_tokens, max_tokens, at_s) for at_s in itertools.accumulate(gaps_s)
        ]

    def block(self, block_id: int, num_tokens: int) -> list[int]:
        """The tokens that stand for `block_id`: always the same ones from this source."""
        return random.Random(f"{self._key}/{block_id}").choices(self._tokens, k=num_tokens)


def exchange_for(prompt: Prompt, *, host: str, model: str) -> Exchange:
    """The request as bytes, made before the load starts so that it costs nothing during it."""
    body = msgspec.json.encode(
        {
            "model": model,
            "prompt": prompt.token_ids,
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    return Exchange(request=post(host, COMPLETIONS_PATH, body), max_tokens=prompt.max_tokens)
