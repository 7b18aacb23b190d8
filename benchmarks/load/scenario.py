"""The loads that we make claims about, as values; `schedule.py` draws their requests."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedLoad:
    """`num_concurrent` callers that each ask again as soon as they are answered."""

    name: str
    prompt_tokens: int
    output_tokens: int
    num_concurrent: int
    num_requests: int

    def __str__(self) -> str:
        """Say the load in words."""
        return f"{self.prompt_tokens} in, {self.output_tokens} out, {self.num_concurrent} at a time"


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLoad:
    """Requests at Poisson arrivals, whether or not the earlier ones are answered."""

    name: str
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    num_requests: int

    def __str__(self) -> str:
        """Say the load in words."""
        shape = f"{self.prompt_tokens} in, {self.output_tokens} out"
        return f"{shape}, {self.requests_per_s:g} requests/s (Poisson)"


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedLoad:
    """Streams that decode alone for `phase_s`, then as long while long prompts come in between.

    Each phase opens fresh streams, so both see the same context lengths.
    """

    name: str
    num_streams: int
    stream_prompt_tokens: int
    stream_output_tokens: int
    phase_s: float
    long_prompt_tokens: int
    long_output_tokens: int
    long_every_s: float

    def __str__(self) -> str:
        """Say the load in words."""
        long = f"a {self.long_prompt_tokens}-token prompt every {self.long_every_s:g} s"
        return f"{self.num_streams} decoding streams, alone and with {long}"

    @property
    def num_long_prompts(self) -> int:
        return max(1, int(self.phase_s / self.long_every_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceLoad:
    """Requests at the times and lengths of a recorded trace, shared prefixes included."""

    name: str
    file: str
    rate: float
    """How many times faster than recorded."""
    max_prompt_tokens: int
    max_output_tokens: int
    num_requests: int

    def __str__(self) -> str:
        """Say the load in words."""
        cut = f"at most {self.max_prompt_tokens} in, {self.max_output_tokens} out"
        return f"the first {self.num_requests} of {self.file}, {self.rate:g} times as fast, {cut}"


Load = ClosedLoad | OpenLoad | MixedLoad | TraceLoad


def standard_loads(*, is_quick: bool) -> dict[str, Load]:
    """The five loads by name; the quick ones have the same shape and a third of the length."""
    loads: tuple[Load, ...] = (
        ClosedLoad(
            name="single",
            prompt_tokens=32,
            output_tokens=128,
            num_concurrent=1,
            num_requests=2 if is_quick else 6,
        ),
        ClosedLoad(
            name="closed",
            prompt_tokens=256,
            output_tokens=64,
            num_concurrent=8,
            num_requests=16 if is_quick else 48,
        ),
        ClosedLoad(
            name="closed16",
            prompt_tokens=64,
            output_tokens=64,
            num_concurrent=16,
            num_requests=32 if is_quick else 96,
        ),
        OpenLoad(
            name="open",
            prompt_tokens=512,
            output_tokens=32,
            requests_per_s=2.0,
            num_requests=20 if is_quick else 60,
        ),
        MixedLoad(
            name="mixed",
            num_streams=4,
            stream_prompt_tokens=32,
            stream_output_tokens=2048,
            phase_s=6.0 if is_quick else 16.0,
            long_prompt_tokens=1500,
            long_output_tokens=16,
            long_every_s=2.0,
        ),
    )
    return {load.name: load for load in loads}
