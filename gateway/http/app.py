"""The HTTP door: routes, and error bodies for what no endpoint answers."""

import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.http.endpoints import ChatCompletions, Completions
from gateway.http.errors import ErrorDetail, ErrorReply, reply_of
from gateway.http.replies import ModelCard, ModelList
from gateway.http.status import mesh_status
from gateway.parameters import UnknownModelError
from gateway.service import InferenceService

PAGE = Path(__file__).with_name("status.html")


def new_app(service: InferenceService, registry: CollectorRegistry) -> ASGIApp:
    """The application; `registry` is what /metrics shows."""
    generation: dict[str, ASGIApp] = {
        "/v1/chat/completions": ChatCompletions(service),
        "/v1/completions": Completions(service),
    }
    others = _new_pages(service, registry, generation)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Generation goes to its endpoint at once: middleware would handle every token."""
        endpoint = generation.get(scope["path"]) if scope["method"] == "POST" else None
        await (endpoint or others)(scope, receive, send)

    return app


def _new_pages(
    service: InferenceService, registry: CollectorRegistry, generation: Mapping[str, ASGIApp]
) -> Starlette:
    pages = Pages(service, registry)
    return Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in generation.items()),
            Route("/v1/models", pages.models),
            Route("/v1/models/{model:path}", pages.model),
            Route("/health", pages.health),
            Route("/live", pages.live),
            Route("/metrics", pages.metrics),
            Route("/status", pages.status),
            Route("/", pages.page),
        ],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_error},
    )


class Pages:
    """Everything but generation."""

    def __init__(self, service: InferenceService, registry: CollectorRegistry) -> None:
        self._service = service
        self._registry = registry
        self._created_s = int(time.time())
        self._page = PAGE.read_text(encoding="utf-8")

    async def models(self, _: Request) -> Response:
        return _json(ModelList([self._card()]))

    async def model(self, request: Request) -> Response:
        try:
            self._service.check_model(request.path_params["model"])
        except UnknownModelError as error:
            return _error(reply_of(error))
        return _json(self._card())

    async def health(self, _: Request) -> Response:
        """200 when a new request would find a decode worker."""
        status = mesh_status(self._service)
        return _json(status, 200 if status.is_ready else 503)

    async def live(self, _: Request) -> Response:
        """200 while the process answers at all."""
        return Response(status_code=200)

    async def metrics(self, _: Request) -> Response:
        body = generate_latest(self._registry)
        return Response(body, headers={"content-type": CONTENT_TYPE_LATEST})

    async def status(self, _: Request) -> Response:
        return _json(mesh_status(self._service))

    async def page(self, _: Request) -> Response:
        return HTMLResponse(self._page)

    def _card(self) -> ModelCard:
        return ModelCard(
            self._service.model_id, self._created_s, self._service.pools.max_context_tokens
        )


def _json(value: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _error(reply: ErrorReply) -> Response:
    return Response(reply.body, reply.status, reply.headers, media_type="application/json")


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = {
        404: f"Unknown request URL: {request.method} {request.url.path}.",
        405: f"Not allowed to {request.method} {request.url.path}.",
    }.get(status, str(error))
    code = {404: "unknown_url", 405: "method_not_supported"}.get(status)
    reply = _error(ErrorReply(status, ErrorDetail(text, "invalid_request_error", None, code)))
    if isinstance(error, HTTPException) and error.headers:
        reply.headers.update(error.headers)
    return reply


async def _on_error(_: Request, error: Exception) -> Response:
    return _error(reply_of(error))
