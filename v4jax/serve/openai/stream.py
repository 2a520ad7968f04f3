"""The reply to one HTTP request: a JSON body, or a stream of server-sent events that a slow client cannot hold up."""

from __future__ import annotations

import asyncio
import json

from starlette.types import Send

# Line ends of `str.splitlines` that JSON does not escape; some clients cut events there.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy passes every event on at once
}


class ClientTooSlow(Exception):
    """A client did not read a part of its reply in time."""


class Reply:
    """Sends one reply.

    Args:
        send: channel of ASGI to the client.
        timeout: seconds that the client may take to read a part.
        headers: headers of every reply.

    Attributes:
        status: status that was sent; None before.
        streaming: whether the reply is a stream of events.
        complete: whether the reply was sent whole.
    """

    def __init__(self, send: Send, timeout: float, headers: dict[str, str]):
        self.status: int | None = None
        self.streaming = False
        self.complete = False
        self._channel, self._timeout, self._headers = send, timeout, headers

    async def json(self, content: dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send an object as the whole reply."""
        body = dump(content).encode()
        await self.body(body, "application/json", status, headers)

    async def body(
        self, body: bytes, content_type: str, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """Send bytes as the whole reply."""
        length = {"content-type": content_type, "content-length": str(len(body))}
        await self._start(status, {**length, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})
        self.complete = True

    async def event(self, data: dict | str, name: str | None = None) -> None:
        """Send an event; the first one begins the stream.

        Args:
            data: object, or text without line ends.
            name: kind of the event; None for events without a name.
        """
        line = data if isinstance(data, str) else dump(data)
        await self._part((f"event: {name}\n" if name else "") + f"data: {line}\n\n")

    async def heartbeat(self) -> None:
        """Send a comment, which clients ignore, to keep the connection from being closed as idle."""
        await self._part(": heartbeat\n\n")

    async def end(self) -> None:
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self.complete = True

    async def _part(self, text: str) -> None:
        if not self.streaming:
            await self._start(200, _STREAM_HEADERS)
            self.streaming = True
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in {**self._headers, **headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _send(self, message: dict) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._channel(message)
        except TimeoutError:
            raise ClientTooSlow(f"the client read nothing for {self._timeout:g} seconds") from None


def dump(content: object) -> str:
    """Return JSON on one line. It never has NaN or Infinity, which are no JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_LINE_ENDS)
