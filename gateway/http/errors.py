"""Errors to OpenAI's error bodies and HTTP statuses, in one place."""

import logging
import re

import msgspec

from engine.errors import (
    CapacityError,
    DeadlineError,
    InvalidRequestError,
    NotReadyError,
    PeerUnavailableError,
)
from gateway.parameters import ParameterError, UnknownModelError
from mesh.status import deliberate_error

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
_NAMED_FIRST = re.compile(r"^(?:sampling\.)?([a-z_]+)\b")


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class BodyTooLargeError(InvalidRequestError):
    """The request has more bytes than the gateway reads."""


class ErrorReply(msgspec.Struct):
    status: int
    detail: ErrorDetail

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(RETRY_AFTER_S)} if self.status in {429, 503} else {}


def reply_of(error: Exception) -> ErrorReply:
    """What the caller is told; unknown errors show no detail and are logged."""
    inner = deliberate_error(error)
    text = str(inner)
    invalid = "invalid_request_error"
    match inner:
        case ParameterError():
            return ErrorReply(400, ErrorDetail(text, invalid, inner.param, inner.code))
        case UnknownModelError():
            return ErrorReply(404, ErrorDetail(text, invalid, "model", "model_not_found"))
        case BodyTooLargeError():
            return ErrorReply(413, ErrorDetail(text, invalid, None, "request_too_large"))
        case InvalidRequestError():
            return ErrorReply(400, ErrorDetail(text, invalid, _param_named_in(text)))
        case CapacityError():
            detail = ErrorDetail(text, "rate_limit_error", None, "rate_limit_exceeded")
            return ErrorReply(429, detail)
        case NotReadyError() | PeerUnavailableError():
            return ErrorReply(503, ErrorDetail(text, "server_error", None, "service_unavailable"))
        case DeadlineError():
            return ErrorReply(504, ErrorDetail(text, "server_error", None, "timeout"))
    logger.error("request failed", exc_info=error)
    return ErrorReply(500, ErrorDetail("internal error", "server_error", None, "internal_error"))


def _param_named_in(text: str) -> str | None:
    """Messages about a parameter begin with its name."""
    named = _NAMED_FIRST.match(text)
    is_name = named is not None and ("_" in named[1] or named[1] in _SHORT_NAMES)
    return named[1] if named is not None and is_name else None


_SHORT_NAMES = frozenset({"temperature", "messages", "prompt", "stop", "seed", "n", "model"})
