"""Requests of clients on the engine: admission, outputs as they come, abort, and counts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from v4jax.serve.llm import LLM
from v4jax.serve.openai.errors import ApiError, bad_request
from v4jax.serve.openai.metrics import ServerMetrics
from v4jax.serve.openai.monitor import EngineMonitor
from v4jax.serve.openai.settings import Settings
from v4jax.serve.output_processor import RequestState
from v4jax.serve.outputs import RequestOutput
from v4jax.serve.prompts import Prompt
from v4jax.serve.sampling_params import SamplingParams

_RETRY_AFTER = 1.0  # seconds that a client waits at least before it tries again
_METRICS_WAIT = 5.0  # seconds that a scrape waits for the end of a step


class Frontend:
    """Runs the requests of all clients on one LLM. The thread of the event loop calls it.

    Attributes:
        llm: the LLM.
        monitor: statistics and health of the engine.
        metrics: metrics of the server.
        in_flight: engine requests that are admitted and have not ended.
        draining: no further request is admitted.
        idle: set while nothing is in flight.
        generations: generations whose outputs are being read.
    """

    def __init__(self, llm: LLM, settings: Settings):
        self.llm = llm
        self.monitor = EngineMonitor(llm.stats, settings.engine_timeout)
        self.metrics = ServerMetrics(self.monitor)
        self.in_flight = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self.generations: set[Generation] = set()
        self._settings = settings
        slots = llm.engine.limits.max_num_seqs * llm.engine.dp_group.count
        self._capacity = slots + settings.max_queued_requests
        self._seconds = 0.0  # moving average of the time of a request

    def room(self, prompt_tokens: int) -> int:
        """Return the most tokens that can be generated after a prompt, at least 1."""
        engine = self.llm.engine
        scheduler = engine.schedulers[0]
        cached = scheduler.block_pool.capacity * scheduler.block_size + 1 - scheduler.num_lookahead_tokens
        return max(1, min(engine.limits.max_model_len, cached) - prompt_tokens)

    @contextlib.contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold room for `count` engine requests inside the context.

        Raises:
            ApiError: the server drains (503), has no room now (429) or never has that much (400).
        """
        if self.draining:
            self.metrics.rejected.labels("draining").inc()
            raise ApiError(503, "the server is shutting down; send the request to another one", retry_after=5)
        if count > self._capacity:
            raise bad_request(f"the request asks for {count} continuations; this server takes {self._capacity} at once")
        if self.in_flight + count > self._capacity:
            self.metrics.rejected.labels("queue_full").inc()
            raise ApiError(429, "the queue is full; try again later", retry_after=max(_RETRY_AFTER, self._seconds / 2))
        self._count(count)
        try:
            yield
        finally:
            self._count(-count)

    def _count(self, change: int) -> None:
        self.in_flight += change
        self.monitor.running = self.in_flight
        if self.in_flight:
            self.idle.clear()
        else:
            self.idle.set()

    async def make_requests(
        self, prompts: Sequence[Prompt], sampling_params: Sequence[SamplingParams]
    ) -> list[RequestState]:
        """Encode and check prompts, in a thread (`LLM.make_requests`)."""
        return await asyncio.to_thread(self.llm.make_requests, prompts, sampling_params)

    async def refresh_metrics(self) -> bytes:
        """Return the metrics in the text format of Prometheus, with new statistics unless a step takes long."""
        await asyncio.to_thread(self.monitor.refresh, _METRICS_WAIT)
        return self.metrics.text()

    def cut_off(self) -> None:
        """End all generations with an error, because the server ends."""
        for generation in list(self.generations):
            generation.fail(ApiError(503, "the server is shutting down, and the reply is cut off", retry_after=5))

    def note_end(self, seconds: float, finish_reason: str) -> None:
        """Count an engine request that has ended by itself after `seconds`."""
        self.metrics.finished.labels(finish_reason).inc()
        self.metrics.end_to_end.observe(seconds)
        self._seconds = 0.9 * self._seconds + 0.1 * seconds


class Generation:
    """The engine requests of one HTTP request. `outputs` may be iterated once.

    Args:
        frontend: frontend that has admitted the requests.
        requests: requests of `Frontend.make_requests`.
        settings: settings of the server.
        on_overflow: called when more outputs wait than a slow client may have.
    """

    def __init__(
        self,
        frontend: Frontend,
        requests: Sequence[RequestState],
        settings: Settings,
        on_overflow: Callable[[], None],
    ):
        self.requests = list(requests)
        self._frontend, self._on_overflow = frontend, on_overflow
        self._interval = settings.heartbeat_interval
        self._room = settings.max_unread_outputs * len(self.requests)
        self._event_loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, RequestOutput | BaseException]] = asyncio.Queue()
        self._ids: list[int] = []
        self._left: set[int] = set()
        self._open = True

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput] | None]:
        """Run the requests. Closing the iterator aborts those that are left.

        Yields:
            (index of the request, `RequestState.delta`), and None after every `heartbeat_interval` without an output.

        Raises:
            ApiError: the logits of a request are not finite.
            BaseException: any exception that left a step of the engine.
        """
        engine_loop, start = self._frontend.llm.engine_loop, time.monotonic()
        self._left = set(range(len(self.requests)))
        last: dict[int, float] = {}  # time of the last output of each request
        try:
            self._frontend.generations.add(self)
            for index, request in enumerate(self.requests):
                self._ids.append(engine_loop.submit(request, functools.partial(self._put, index)))
            while self._left:
                event = await self._next()
                if event is None:
                    yield None
                    continue
                index, output = event
                if index not in self._left:
                    continue
                if isinstance(output, ApiError):
                    raise output
                if isinstance(output, BaseException):
                    self._frontend.monitor.fail(output)
                    raise output
                self._note(index, output, start, last)
                yield index, output
        finally:
            self._open = False
            self._frontend.generations.discard(self)
            for id in self._ids:
                engine_loop.abort(id)

    def fail(self, error: ApiError) -> None:
        """End the generation with an error."""
        if self._left:
            self._queue.put_nowait((min(self._left), error))

    def stop(self, index: int) -> None:
        """End one request, whose reply is complete."""
        if index in self._left:
            self._left.remove(index)
            self._frontend.llm.engine_loop.abort(self._ids[index])

    async def _next(self) -> tuple[int, RequestOutput | BaseException] | None:
        if not self._queue.empty():
            return self._queue.get_nowait()
        try:
            async with asyncio.timeout(self._interval):
                return await self._queue.get()
        except TimeoutError:
            return None

    def _note(self, index: int, output: RequestOutput, start: float, last: dict[int, float]) -> None:
        """Record times and the end of a request.

        Raises:
            ApiError: the request ended with an error.
        """
        now, metrics = time.monotonic(), self._frontend.metrics
        self._frontend.monitor.succeed()
        if index not in last:
            metrics.first_token.observe(now - start)
        else:
            metrics.inter_token.observe(now - last[index])
        last[index] = now
        if output.finished:
            self._left.remove(index)
            self._frontend.note_end(now - start, output.finish_reason)
        if output.finish_reason == "error":
            raise ApiError(500, f"the request was stopped: {output.error}")

    def _put(self, index: int, output: RequestOutput | BaseException) -> None:
        """Pass an output to the event loop; the thread of the engine calls this."""
        if self._open:
            self._event_loop.call_soon_threadsafe(self._receive, index, output)

    def _receive(self, index: int, output: RequestOutput | BaseException) -> None:
        self._queue.put_nowait((index, output))
        if self._open and self._queue.qsize() > self._room:
            self._open = False
            for id in self._ids:
                self._frontend.llm.engine_loop.abort(id)
            self._on_overflow()
