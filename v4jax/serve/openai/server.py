"""`serve`: the HTTP server of one LLM, from the first connection to the last reply after SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from types import FrameType

import uvicorn

from v4jax.core.errors import UserError
from v4jax.serve.openai.app import build_app
from v4jax.serve.openai.service import Service

_log = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_KEEP_ALIVE = 75  # seconds that an idle connection stays open; longer than the 60 of common proxies
_STUCK_AT_EXIT = 30.0  # seconds without a step after which the process does not wait for the engine
_CLOSE_SECONDS = 5.0  # wait for connections after all replies were sent


class Server(uvicorn.Server):
    """A uvicorn server that drains at the first SIGTERM or Ctrl-C and ends at once at the second Ctrl-C.

    While it drains, it accepts connections and answers new requests with status 503, so that a load balancer sees
    `/health` fail before the port closes.

    Args:
        service: what is served.

    Attributes:
        signal: number of the first signal; None before.
    """

    def __init__(self, service: Service):
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                build_app(service),
                host=settings.host,
                port=settings.port,
                http="h11",  # the only parser with a limit of the head
                h11_max_incomplete_event_size=settings.max_header_bytes,
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
            )
        )
        self.signal: int | None = None
        self._service = service
        self._drain: asyncio.Task | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """Address of the server once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "https" if self._service.settings.ssl_certfile else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def startup(self, sockets=None) -> None:
        """Listen, and print the address."""
        await super().startup(sockets)
        if self.started:
            self._event_loop = asyncio.get_running_loop()
            settings = self._service.settings
            if settings.api_keys is None and settings.host not in _LOOPBACK:
                print(f"every client that reaches {settings.host} is let in; --api_keys asks for keys", file=sys.stderr)
            print(f"serving {self._service.model} at {self.url}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end at once at a later Ctrl-C. Later SIGTERMs have no effect."""
        if self.signal is None:
            self.signal = sig
            if self._event_loop is None:
                self.should_exit = True
            else:
                self._event_loop.call_soon_threadsafe(self._begin_drain)
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._end_after_drain())

    async def _end_after_drain(self) -> None:
        seconds, frontend = self._service.settings.drain_timeout, self._service.frontend
        if frontend.in_flight:
            print(f"draining: {frontend.in_flight} requests have {seconds:g} seconds to end", file=sys.stderr)
        if not await self._service.drain(seconds):
            _log.warning("%d requests are cut off after %g seconds", frontend.in_flight, seconds)
            frontend.cut_off()
        self.should_exit = True


def serve(service: Service) -> None:
    """Serve until a signal.

    Raises:
        UserError: the server cannot listen.
        KeyboardInterrupt: the signal was Ctrl-C.
    """
    settings = service.settings
    try:
        server = Server(service)
        server.run()
    except (OSError, ValueError) as error:  # such as a certificate that is none
        raise UserError(f"the server cannot start: {error}") from error
    except SystemExit:  # uvicorn has logged the reason
        raise UserError(f"cannot listen on {settings.host}:{settings.port}; choose another --port or --host") from None
    stuck = service.frontend.monitor.seconds_without_step
    if stuck > min(settings.engine_timeout, _STUCK_AT_EXIT):
        # The interpreter would wait for the thread of the engine, which may never end.
        print(f"v4jax: the engine has made no step for {stuck:.0f} seconds", file=sys.stderr, flush=True)
        os._exit(1)
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt
