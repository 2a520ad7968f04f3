"""The ASGI application: the routes of the server, and errors of the router in the shape of OpenAI's API."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import v4jax
from v4jax.serve.openai.chat import chat_completions
from v4jax.serve.openai.completions import completions
from v4jax.serve.openai.endpoint import Call, Endpoint, Handler
from v4jax.serve.openai.errors import ApiError
from v4jax.serve.openai.messages import count_tokens, messages
from v4jax.serve.openai.openapi import document
from v4jax.serve.openai.responses import responses
from v4jax.serve.openai.service import Service
from v4jax.serve.openai.tokens import detokenize, tokenize


def build_app(service: Service) -> Starlette:
    """Return the application of a service."""

    def route(path: str, handle: Handler, method: str = "POST", **options) -> Route:
        return Route(path, Endpoint(service, path, handle, **options), methods=[method])

    anthropic = {"error_body": ApiError.anthropic_body, "error_event": "error"}
    routes = [
        route("/v1/completions", completions),
        route("/v1/chat/completions", chat_completions),
        route("/v1/responses", responses),
        route("/v1/messages", messages, **anthropic),
        route("/v1/messages/count_tokens", count_tokens, **anthropic),
        route("/tokenize", tokenize),
        route("/detokenize", detokenize),
        route("/v1/models", _models, "GET"),
        route("/v1/models/{model:path}", _model, "GET"),
        route("/health", _health, "GET", is_open=True),
        route("/ready", _ready, "GET", is_open=True),
        route("/version", _version, "GET", is_open=True),
        route("/metrics", _metrics, "GET", is_open=True),
        route("/openapi.json", _openapi, "GET", is_open=True),
    ]
    middleware = []
    if service.settings.allowed_origins:
        origins = list(service.settings.allowed_origins)
        middleware.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.frontend.monitor.start()
        try:
            yield
        finally:
            service.frontend.monitor.close()

    return Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _router_error}
    )


async def _router_error(request: Request, error: HTTPException) -> JSONResponse:
    """Return the reply to an unknown path or method."""
    path = request.url.path
    if error.status_code == 405:
        message = f"{path} has no method {request.method}; use {(error.headers or {}).get('Allow', 'another one')}"
    else:
        message = f"there is no {path}; /openapi.json lists the paths" if error.status_code == 404 else error.detail
    shown = ApiError(error.status_code, message)
    return JSONResponse(shown.openai_body(), error.status_code, error.headers)


async def _models(call: Call) -> None:
    await call.reply.json({"object": "list", "data": [_card(call.service)]})


async def _model(call: Call) -> None:
    name = call.path.removeprefix("/v1/models/")
    if name != call.service.model:
        raise ApiError(404, f"the model {name!r} is not served; this server has {call.service.model!r}", param="model")
    await call.reply.json(_card(call.service))


def _card(service: Service) -> dict:
    return {
        "id": service.model,
        "object": "model",
        "created": service.started,
        "owned_by": "v4jax",
        "root": service.model,
        "parent": None,
        "max_model_len": service.llm.engine.limits.max_model_len,
    }


async def _health(call: Call) -> None:
    """Status 200 without a body, as in vLLM; 503 with the reason while no requests are served."""
    if (problem := call.service.problem) is not None:
        raise ApiError(503, problem)
    await call.reply.body(b"", "text/plain")


async def _ready(call: Call) -> None:
    """Status 200 while requests are admitted. The programs of the engine are compiled before the server listens."""
    await _health(call)


async def _version(call: Call) -> None:
    await call.reply.json({"version": v4jax.__version__})


async def _metrics(call: Call) -> None:
    await call.reply.body(await call.service.frontend.refresh_metrics(), CONTENT_TYPE_LATEST)


async def _openapi(call: Call) -> None:
    await call.reply.json(document())
