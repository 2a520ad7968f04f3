"""One route of the API: keys, body, deadline, disconnects, and errors in the shape of its protocol."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from v4jax.serve.openai.errors import ApiError, to_api_error
from v4jax.serve.openai.frontend import Generation
from v4jax.serve.openai.json_body import parse_object
from v4jax.serve.openai.keys import Key
from v4jax.serve.openai.stream import ClientTooSlow, Reply
from v4jax.serve.output_processor import RequestState

if TYPE_CHECKING:
    from v4jax.serve.openai.service import Service

_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_LARGE_BODY = 1 << 16  # bytes from which a body is parsed in a thread
_CLIENT_GONE = 499  # status of a request whose client went away before the reply began
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Call:
    """One HTTP request while it is handled.

    Attributes:
        service: what the server serves.
        path: path of the route.
        id: id of the request, for logs and for ids of objects.
        reply: reply to the client.
        body: object of the request; {} for a request without a body.
        created: time of arrival, seconds since 1970.
        prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens: usage of the request so far.
        finish_reasons: why its continuations ended.
        cancel_reason: why it was cut off; None if it was not.
        task: task that handles it.
        key: key of its client; None on a server without keys and on open routes.
        client: address of its client.
        start: time of arrival on the monotonic clock, seconds.
    """

    service: Service
    path: str
    id: str
    reply: Reply
    body: dict = dataclasses.field(default_factory=dict)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    finish_reasons: list[str] = dataclasses.field(default_factory=list)
    cancel_reason: str | None = None
    task: asyncio.Task | None = None
    key: Key | None = None
    client: str = ""
    start: float = dataclasses.field(default_factory=time.monotonic)

    def cancel(self, reason: str) -> None:
        """Stop handling the request, whose client no longer reads."""
        if self.cancel_reason is None and self.task is not None and not self.task.done():
            self.cancel_reason = reason
            self.task.cancel()

    def usage(self) -> dict:
        """Return the usage so far in OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def generation(self, requests: list[RequestState]) -> Generation:
        """Return a generation that ends if the client is too slow."""
        settings = self.service.settings
        return Generation(self.service.frontend, requests, settings, lambda: self.cancel("slow_client"))


Handler = Callable[[Call], Awaitable[None]]


class Endpoint:
    """ASGI application of one route.

    Args:
        service: what the server serves.
        path: path of the route, for metrics and the audit log.
        handle: coroutine that sends the reply to a call. It may raise ApiError and UserError at any moment.
        error_body: body of an error in the protocol of the route.
        error_event: name of the event of an error in a stream; None for none.
        is_open: the route needs no key.
    """

    def __init__(
        self,
        service: Service,
        path: str,
        handle: Handler,
        *,
        error_body: Callable[[ApiError], dict] = ApiError.openai_body,
        error_event: str | None = None,
        is_open: bool = False,
    ):
        self._service, self._path, self._handle = service, path, handle
        self._error_body, self._error_event, self._is_open = error_body, error_event, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        id = sent_id if _REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(12)
        settings = self._service.settings
        call = Call(self._service, scope["path"], id, Reply(send, settings.send_timeout, {"x-request-id": id}))
        call.client = (scope.get("client") or ("",))[0]
        call.task = asyncio.ensure_future(self._run(call, scope["method"], headers, receive))
        try:
            await call.task
        except asyncio.CancelledError:
            if call.cancel_reason is None:  # the server ends
                raise
        finally:
            self._count(call)

    async def _run(self, call: Call, method: str, headers: Headers, receive: Receive) -> None:
        """Handle one request, with its errors."""
        watch: asyncio.Task | None = None
        try:
            _check_head(headers, self._service.settings.max_header_bytes)
            if self._service.keys is not None and not self._is_open:
                call.key = self._service.keys.authenticate(headers)
            if method == "POST":
                _check_content_type(headers)
                raw = await _read_body(headers, receive, self._service.settings)
                watch = asyncio.create_task(_watch(receive, call))
                parse = asyncio.to_thread(parse_object, raw) if len(raw) > _LARGE_BODY else None
                call.body = parse_object(raw) if parse is None else await parse
            await self._within_deadline(call)
        except ClientTooSlow:
            call.cancel_reason = "slow_client"
        except Exception as error:
            await self._fail(call, error)
        finally:
            if watch is not None:
                watch.cancel()

    async def _within_deadline(self, call: Call) -> None:
        seconds = self._service.settings.request_timeout
        try:
            async with asyncio.timeout(seconds or None) as deadline:
                await self._handle(call)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise ApiError(504, f"the request was not complete after {seconds:g} seconds") from None

    async def _fail(self, call: Call, error: Exception) -> None:
        """Send an error: as the whole reply, or as an event after the first byte of a stream."""
        shown = to_api_error(error)
        if not isinstance(error, ApiError) and shown.status >= 500:
            _log.error("request %s to %s failed", call.id, call.path, exc_info=error)
        try:
            if call.reply.streaming:
                await call.reply.event(self._error_body(shown), self._error_event)
                await call.reply.end()
            elif call.reply.status is None:
                await call.reply.json(self._error_body(shown), shown.status, shown.headers)
        except ClientTooSlow:
            call.cancel_reason = "slow_client"

    def _count(self, call: Call) -> None:
        """Record a request that has ended: metrics, budget of its key, audit log."""
        metrics, audit = self._service.frontend.metrics, self._service.audit
        status = call.reply.status or _CLIENT_GONE
        if call.cancel_reason is not None:
            metrics.cancelled.labels(call.cancel_reason).inc()
        metrics.http_requests.labels(self._path, str(status)).inc()
        if call.key is not None:
            call.key.tokens.use(call.prompt_tokens + call.completion_tokens)
        if audit is not None and not self._is_open:
            audit.write(
                id=call.id,
                key=call.key and call.key.name,
                client=call.client,
                path=self._path,
                model=self._service.model,
                status=status,
                prompt_tokens=call.prompt_tokens,
                cached_tokens=call.cached_tokens,
                completion_tokens=call.completion_tokens,
                finish_reasons=call.finish_reasons,
                cancel_reason=call.cancel_reason,
                seconds=round(time.monotonic() - call.start, 3),
            )


def _check_head(headers: Headers, limit: int) -> None:
    """Refuse a long head, which the parser lets pass if it arrives at once."""
    if sum(len(name) + len(value) for name, value in headers.raw) > limit:
        raise ApiError(431, f"the head of the request is longer than {limit:,} bytes")


def _check_content_type(headers: Headers) -> None:
    """Refuse bodies that are not declared as JSON. A web page of another origin can only send those."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "the body must be JSON; send it with the header Content-Type: application/json")


async def _read_body(headers: Headers, receive: Receive, settings) -> bytes:
    """Return the body. A body that is too long is read and dropped, so that the client sees the error.

    Raises:
        ApiError: the body is too long (413), or did not arrive in time (408).
    """
    declared = headers.get("content-length", "")
    too_long = declared.isdecimal() and int(declared) > settings.max_body_bytes
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client went away before its body was complete")
                part, more = message.get("body", b""), message.get("more_body", False)
                size += len(part)
                too_long = too_long or size > settings.max_body_bytes
                if too_long:
                    parts.clear()
                    more = more and size <= 4 * settings.max_body_bytes
                else:
                    parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_timeout:g} seconds") from None
    if too_long:
        raise ApiError(413, f"the body is longer than {settings.max_body_bytes:,} bytes")
    return b"".join(parts)


async def _watch(receive: Receive, call: Call) -> None:
    """Cancel the call when its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not call.reply.complete:
        call.cancel("disconnect")
