"""Renders a conversation through the model's chat template, in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, InvalidRequestError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


class ChatTemplate:
    """One model's template, compiled once.

    Args:
        source: jinja2 text from the tokenizer's config.
        special_tokens: variables such as bos_token that templates refer to.
        max_chars: longest rendered prompt; rendering stops as soon as it is passed.

    Raises:
        CheckpointError: the template does not compile.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, max_chars: int = 4_000_000
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for the next answer of the assistant.

        Raises:
            InvalidRequestError: an unknown role, or the template refuses the conversation.
        """
        for index, message in enumerate(messages):
            self._check_role(index, message.get("role"))
        chunks: list[str] = []
        num_chars = 0
        try:
            for chunk in self._template.generate(
                **self._special_tokens,
                **(variables or {}),
                messages=list(messages),
                add_generation_prompt=True,
            ):
                chunks.append(chunk)
                num_chars += len(chunk)
                if num_chars > self._max_chars:
                    raise InvalidRequestError(
                        f"messages render to more than {self._max_chars} characters"
                    )
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"messages: the model's chat template refuses them: {error.message}"
            ) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InvalidRequestError(
                f"messages: the model's chat template fails on them: {error}"
            ) from error
        return "".join(chunks)

    def _check_role(self, index: int, role: object) -> None:
        if role in ROLES or (isinstance(role, str) and role and f"'{role}'" in self._source):
            return
        raise InvalidRequestError(
            f"messages[{index}].role is {role!r}; it must be one of {', '.join(sorted(ROLES))}"
        )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None, **_: object) -> str:
    """Plain JSON: unlike jinja2's own filter it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
