"""Reads a request's JSON body, within a limit, into a struct."""

import json
import math
import re
from typing import TypeVar

import msgspec
from starlette.types import Receive, Scope

from engine.errors import InvalidRequestError
from gateway.generation import ClientGoneError
from gateway.http.errors import BodyTooLargeError
from gateway.parameters import ParameterError

MAX_BODY_BYTES = 10 * 1024 * 1024
MAX_DIAGNOSED_BYTES = 64 * 1024

_AT = re.compile(r"^(?P<what>.*?) - at (?:`key` in )?`\$\.?(?P<where>.*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")

StructT = TypeVar("StructT", bound=msgspec.Struct)


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body.

    Raises:
        BodyTooLargeError: it is, or says it is, larger than `MAX_BODY_BYTES`.
        ClientGoneError: the client left before the end of it.
    """
    declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    _check_size(int(declared) if declared.isdigit() else 0)
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client left while sending")
        chunk: bytes = message.get("body", b"")
        chunks.append(chunk)
        num_bytes += len(chunk)
        _check_size(num_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)


def decoded(body: bytes, decoder: msgspec.json.Decoder[StructT]) -> StructT:
    """The struct that `body` holds.

    Raises:
        InvalidRequestError: it is not JSON, or a field has another type; the text names it.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deep") from None
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not valid UTF-8; send JSON in UTF-8") from None
    except msgspec.DecodeError as error:
        raise _malformed(body, str(error)) from None


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BODY_BYTES:
        raise BodyTooLargeError(f"the body is larger than {MAX_BODY_BYTES} bytes; send less")


def _named(text: str) -> InvalidRequestError:
    """Msgspec's message, with the field's name in front."""
    at = _AT.match(text)
    what, where = (at["what"], at["where"]) if at else (text, "")
    if unknown := _UNKNOWN.match(what):
        name = ".".join(filter(None, [where, unknown["name"]]))
        return ParameterError(f"Unrecognized request argument supplied: {name}", param=name)
    if missing := _MISSING.match(what):
        name = ".".join(filter(None, [where, missing["name"]]))
        return ParameterError(f"you must provide the parameter {name}", param=name)
    if not where:
        return InvalidRequestError(f"the body must be a JSON object: {what}")
    return ParameterError(f"{where}: {what[:1].lower()}{what[1:]}", param=where)


def _malformed(body: bytes, text: str) -> InvalidRequestError:
    """NaN and Infinity are what JSON libraries most often send that is not JSON: name the field."""
    if len(body) <= MAX_DIAGNOSED_BYTES:
        try:
            lenient = json.loads(body)
        except (ValueError, RecursionError):
            lenient = None
        if isinstance(lenient, dict):
            for name, value in lenient.items():
                if isinstance(value, float) and not math.isfinite(value):
                    return ParameterError(
                        f"{name} must be a finite number, got NaN or Infinity", param=name
                    )
            return InvalidRequestError(
                "the body holds text that is not valid Unicode, or NaN or Infinity: " + text
            )
    return InvalidRequestError(f"the body is not valid JSON: {text}")
