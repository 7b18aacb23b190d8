"""Every request field that OpenAI's own client knows is known here, or refused by its name."""

import typing
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from engine.errors import InvalidRequestError
from gateway.http.body import decoded
from gateway.http.schemas import ChatCompletionRequest, CompletionRequest
from gateway.parameters import ParameterError

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
HINTS: dict[str, Any] = {
    "metadata": {"team": "a"},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "Hello"},
    "prompt_cache_key": "key",
    "prompt_cache_retention": "24h",
    "response_format": {"type": "text"},
    "safety_identifier": "user",
    "service_tier": "auto",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "user": "user",
}
REFUSED: dict[str, Any] = {
    "audio": {"format": "mp3", "voice": "ash"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "verbosity": "low",
    "web_search_options": {},
}


def chat(**fields: Any) -> ChatCompletionRequest:
    body = msgspec.json.encode({**CHAT, **fields})
    return decoded(body, msgspec.json.Decoder(ChatCompletionRequest))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (chat_create_params.CompletionCreateParamsBase, ChatCompletionRequest),
        (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
    ],
    ids=["chat", "completion"],
)
def test_every_field_of_openais_client_has_a_place(
    theirs: type, ours: type[msgspec.Struct]
) -> None:
    known = {field.name for field in msgspec.structs.fields(ours)}
    assert set(typing.get_type_hints(theirs)) - known == set()


def test_absent_and_null_are_the_same() -> None:
    names = [field.name for field in msgspec.structs.fields(ChatCompletionRequest)]
    nulls = dict.fromkeys(set(names) - {"messages"})
    assert chat(**nulls).sampling() == chat().sampling()


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_changes_nothing(name: str) -> None:
    assert chat(**{name: HINTS[name]}).sampling() == chat().sampling()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(name: str) -> None:
    with pytest.raises(ParameterError, match=name) as caught:
        chat(**{name: REFUSED[name]}).sampling()
    assert caught.value.param == name


def test_what_openai_does_not_know_either_is_a_mistake() -> None:
    with pytest.raises(InvalidRequestError, match="Unrecognized request argument supplied: topp"):
        chat(topp=1)
