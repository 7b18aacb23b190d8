"""Domain errors to gRPC status codes and back, in one place."""

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode, aio

from engine.errors import (
    CapacityError,
    CheckpointError,
    CollectiveAbortedError,
    CollectiveTimeoutError,
    DeadlineError,
    DuplicateRequestError,
    EngineDeadError,
    InvalidRequestError,
    IsthmusError,
    KvCorruptionError,
    KvLeaseLostError,
    LayoutMismatchError,
    NotReadyError,
    PeerUnavailableError,
    RankDeadError,
    RankGroupError,
    UnknownRequestError,
)

logger = logging.getLogger(__name__)

# A string, because grpc is generic in its type stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"

STATUS_OF: dict[type[IsthmusError], StatusCode] = {
    InvalidRequestError: StatusCode.INVALID_ARGUMENT,  # never retry
    UnknownRequestError: StatusCode.NOT_FOUND,
    DuplicateRequestError: StatusCode.ALREADY_EXISTS,
    CapacityError: StatusCode.RESOURCE_EXHAUSTED,  # retry after a pause
    NotReadyError: StatusCode.UNAVAILABLE,  # retry elsewhere
    PeerUnavailableError: StatusCode.UNAVAILABLE,  # retry elsewhere
    KvLeaseLostError: StatusCode.ABORTED,  # retry from prefill
    LayoutMismatchError: StatusCode.FAILED_PRECONDITION,
    KvCorruptionError: StatusCode.DATA_LOSS,  # retry from prefill
    DeadlineError: StatusCode.DEADLINE_EXCEEDED,
    EngineDeadError: StatusCode.INTERNAL,
    RankGroupError: StatusCode.INTERNAL,
    RankDeadError: StatusCode.INTERNAL,
    CollectiveTimeoutError: StatusCode.INTERNAL,
    CollectiveAbortedError: StatusCode.INTERNAL,
    CheckpointError: StatusCode.FAILED_PRECONDITION,
}

# Several errors share a code; this trailer says which one it was. It holds a class name.
ERROR_TRAILER = "isthmus-error"
RETRY_AFTER_TRAILER = "retry-after-ms"
RETRY_AFTER_MS = 1000
# A status text travels as an HTTP/2 header, percent-encoded, and peers refuse headers past 8 KiB.
MAX_TEXT_CHARS = 1500

_ERROR_NAMED: dict[str, type[IsthmusError]] = {
    cls.__name__: cls for cls in (*STATUS_OF, IsthmusError)
}

# What a code means when nothing but the code is known, as for a server that is not ours.
_ERROR_OF: dict[StatusCode, type[IsthmusError]] = {
    StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    StatusCode.OUT_OF_RANGE: InvalidRequestError,
    StatusCode.NOT_FOUND: UnknownRequestError,
    StatusCode.ALREADY_EXISTS: DuplicateRequestError,
    StatusCode.RESOURCE_EXHAUSTED: CapacityError,
    StatusCode.UNAVAILABLE: PeerUnavailableError,
    StatusCode.CANCELLED: PeerUnavailableError,  # the peer's doing: ours raises CancelledError
    StatusCode.ABORTED: KvLeaseLostError,
    StatusCode.FAILED_PRECONDITION: LayoutMismatchError,
    StatusCode.UNIMPLEMENTED: LayoutMismatchError,  # the peer speaks another protocol version
    StatusCode.DATA_LOSS: KvCorruptionError,
    StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    StatusCode.INTERNAL: EngineDeadError,
}
_CODE_OF_NUMBER: dict[int, StatusCode] = {code.value[0]: code for code in StatusCode}


def deliberate_error(error: BaseException) -> BaseException:
    """Look into exception groups: the first IsthmusError, else the first error of any kind."""
    while isinstance(error, BaseExceptionGroup):  # a TaskGroup wraps even a single failure
        deliberate, _ = error.split(IsthmusError)
        error = (deliberate or error).exceptions[0]
    return error


def status_of(error: Exception) -> tuple[StatusCode, str]:
    """Return the code and the text a caller may see; unknown errors show no detail."""
    inner = deliberate_error(error)
    for cls in type(inner).__mro__:
        if cls in STATUS_OF:
            return STATUS_OF[cls], str(inner)[:MAX_TEXT_CHARS]
    return StatusCode.INTERNAL, "internal error"


def error_from_status(code: int, message: str) -> IsthmusError:
    """The error behind a status number that travelled inside a message (SequenceError)."""
    status = _CODE_OF_NUMBER.get(code, StatusCode.UNKNOWN)
    return _ERROR_OF.get(status, IsthmusError)(message)


def error_from_rpc(error: aio.AioRpcError) -> IsthmusError:
    """The error that the called servicer raised, or the nearest one when nobody raised any."""
    text = error.details() or f"call failed with {error.code().name}"
    name = next((value for key, value in error.trailing_metadata() if key == ERROR_TRAILER), None)
    if isinstance(name, str) and name in _ERROR_NAMED:
        return _ERROR_NAMED[name](text)
    if error.code() is StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in text:
        return InvalidRequestError(f"the message is too large: {text}")
    return _ERROR_OF.get(error.code(), IsthmusError)(text)


class StatusInterceptor(aio.ServerInterceptor):
    """Answer every error raised by a coroutine handler with its status code."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return wrapped_handler(handler, _guarded)


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a request whose bytes are no message; grpc would answer UNKNOWN by itself."""

    reason: str


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def tolerant(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return tolerant


def wrapped_handler(
    handler: Handler, wrap: Callable[[Callable[..., Awaitable[Any]]], Callable[..., Awaitable[Any]]]
) -> Handler:
    """Rebuild `handler` around `wrap(its coroutine function)`; others are returned as they are.

    A request that cannot be decoded reaches the wrapper as an `_Undecodable`.
    """
    if handler is None:
        return None
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        method = getattr(handler, kind)
        if inspect.iscoroutinefunction(method):
            rebuild = getattr(grpc, f"{kind}_rpc_method_handler")
            decode = handler.request_deserializer
            if not handler.request_streaming and decode is not None:
                decode = _tolerant(decode)
            return rebuild(  # type: ignore[no-any-return]
                wrap(method), decode, handler.response_serializer
            )
    return handler


def _guarded(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        try:
            if isinstance(request, _Undecodable):
                raise InvalidRequestError(f"the request cannot be decoded: {request.reason}")
            return await method(request, context)
        except aio.AbortError:
            raise
        except Exception as error:
            code, text = status_of(error)
            if code is StatusCode.INTERNAL:
                request_id = getattr(request, "request_id", "")  # a stream of requests has none
                logger.exception(
                    "rpc failed method=%s request_id=%s: %s",
                    *(method.__qualname__, request_id, error),
                    exc_info=not isinstance(deliberate_error(error), EngineDeadError),
                )
            await context.abort(code, text, trailing_metadata=_trailers(error))

    return guarded


def _trailers(error: Exception) -> tuple[tuple[str, str], ...]:
    inner = deliberate_error(error)
    named = next((cls for cls in type(inner).__mro__ if cls in STATUS_OF), IsthmusError)
    trailers = [(ERROR_TRAILER, named.__name__)]
    if issubclass(named, CapacityError):
        trailers.append((RETRY_AFTER_TRAILER, str(RETRY_AFTER_MS)))
    return tuple(trailers)
