"""The JSON of OpenAI's API that clients send, with our extensions, as typed structs."""

from typing import Annotated, Any

import msgspec

from gateway.parameters import UINT64_MASK, ParameterError
from protos.isthmus.v1.sampling_pb2 import SamplingParams

UINT32_MAX = (1 << 32) - 1

Count = Annotated[int, msgspec.Meta(ge=0, le=UINT32_MAX)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=UINT32_MAX)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class IsthmusOptions(msgspec.Struct, forbid_unknown_fields=True):
    report: bool = False
    """The answer carries where the request's time went, as field `isthmus`."""


class ResponseFormat(msgspec.Struct):
    type: str = "text"


class SamplingFields(msgspec.Struct, kw_only=True):
    """What chat and plain completions have in common."""

    model: str | None = None
    frequency_penalty: Penalty | None = None
    ignore_eos: bool | None = None
    isthmus: IsthmusOptions | None = None
    logit_bias: dict[int, float] | None = None
    max_tokens: AtLeastOne | None = None
    metadata: dict[str, Any] | None = None
    min_p: Share | None = None
    min_tokens: Count | None = None
    n: AtLeastOne | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Count] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=UINT32_MAX)] | None = None
    top_p: Share | None = None
    user: str | None = None

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> SamplingParams:
        """As the mesh says it; absent stays absent."""
        if self.stream_options is not None and not self.stream:
            raise ParameterError(
                "stream_options may be set only with stream: true", param="stream_options"
            )
        message = SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else self.seed & UINT64_MASK,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            n=self.n,
        )
        for token_id, bias in (self.logit_bias or {}).items():
            if not 0 <= token_id <= UINT32_MAX:
                raise ParameterError(f"logit_bias: {token_id} is no token id", param="logit_bias")
            message.logit_bias[token_id] = bias
        return message


class ChatMessage(msgspec.Struct, kw_only=True):
    """Fields beyond these are accepted and left out."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self, index: int) -> dict[str, object]:
        """As chat templates expect it: text parts joined, absent fields left out."""
        message: dict[str, object] = {"role": self.role, "content": self._text(index)}
        for name in ("name", "tool_calls", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message

    def _text(self, index: int) -> str:
        if self.content is None and not self.tool_calls:
            raise ParameterError(
                f"messages[{index}].content must be a string", param=f"messages[{index}].content"
            )
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        texts = []
        for part in self.content:
            text = part.get("text")
            if part.get("type") != "text" or not isinstance(text, str):
                raise ParameterError(
                    f"messages[{index}].content has a part of type {part.get('type')!r}; this "
                    "model takes text only",
                    param=f"messages[{index}].content",
                )
            texts.append(text)
        return "".join(texts)


_NOT_SUPPORTED = (
    *("audio", "function_call", "functions", "moderation", "reasoning_effort", "tools"),
    *("verbosity", "web_search_options"),
)
_NOT_ASKED_FOR: tuple[object, ...] = (None, [], "none")


class ChatCompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Every field that OpenAI's API has: what only hints is taken, what cannot be done is refused.

    A field that is not here is a mistake of the caller's.
    """

    messages: list[ChatMessage]
    audio: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's chat template."""
    function_call: Any = None
    functions: Any = None
    logprobs: bool | None = None
    max_completion_tokens: AtLeastOne | None = None
    modalities: list[str] | None = None
    moderation: Any = None
    parallel_tool_calls: bool | None = None
    prediction: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    tool_choice: Any = None
    tools: list[Any] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    verbosity: str | None = None
    web_search_options: Any = None

    def sampling(self) -> SamplingParams:
        for name in _NOT_SUPPORTED:
            if getattr(self, name) not in _NOT_ASKED_FOR:
                raise ParameterError(f"{name} is not supported by this model", param=name)
        if self.response_format is not None and self.response_format.type != "text":
            raise ParameterError(
                f"response_format {self.response_format.type!r} is not supported, only 'text'",
                param="response_format",
            )
        if self.modalities not in (None, ["text"]):
            raise ParameterError("modalities must be ['text']", param="modalities")
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs needs logprobs: true", param="top_logprobs")
        message = SamplingFields.sampling(self)
        if self.max_completion_tokens is not None:
            message.max_tokens = self.max_completion_tokens
        if self.logprobs:
            message.num_top_logprobs = self.top_logprobs or 0
        return message


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | Count | list[Count]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    suffix: str | None = None

    def sampling(self) -> SamplingParams:
        if self.suffix:
            raise ParameterError("suffix is not supported", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ParameterError("best_of is not supported beyond n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ParameterError(
                "echo together with logprobs is not supported: prompts are not scored",
                param="echo",
            )
        message = SamplingFields.sampling(self)
        if self.logprobs is not None:
            message.num_top_logprobs = self.logprobs
        return message

    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, of one kind: texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [item for item in self.prompt if isinstance(item, str)]
        if self.prompt and len(texts) == len(self.prompt):
            return texts
        ids = [item for item in self.prompt if isinstance(item, int)]
        if self.prompt and len(ids) == len(self.prompt):
            return [ids]
        lists = [item for item in self.prompt if isinstance(item, list)]
        if self.prompt and len(lists) == len(self.prompt):
            return lists
        raise ParameterError(
            "prompt must be a string, a list of strings, a list of token ids or a list of those, "
            "and must not be empty",
            param="prompt",
        )
