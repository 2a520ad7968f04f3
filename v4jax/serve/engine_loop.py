"""One engine for callers on many threads: a thread of its own makes the steps while there is work.

Callers hand their requests to the loop and wait for text, so a signal (Ctrl-C, SIGALRM), which Python raises in the
main thread, ends the wait of one caller at once and never strikes inside a step. The requests of all callers share the
engine's batch. The thread starts with the first request and ends with the last one, so an `LLM` that nobody holds any
more is freed, and a program ends without waiting for anything idle.

The loop refers to callers weakly: a caller that was interrupted, closed or garbage collected is noticed before the next
step, and its requests are cancelled. An exception of the engine ends all requests that run, each caller raises it, and
the engine resets itself (`engine.Engine.reset`).

In a run of several processes all of them must make the same steps. There the caller's own thread makes them, one thread
alone may call, and an exception is final.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from v4jax.core.errors import UserError
from v4jax.serve.engine import Engine, SampledTokens
from v4jax.serve.sampling import SamplingParams

_CLOSED = "this LLM is closed; make a new one to generate"
_log = logging.getLogger(__name__)


class Request(Protocol):
    """One request of a caller: what the engine is asked for, and what becomes of it. `take` and `shown` are called by
    the loop's thread; the caller reads the rest once the request has ended, when `finish_reason` is not None."""

    prompt_ids: list[int]
    sampling: SamplingParams
    finish_reason: str | None

    def take(self, drawn: SampledTokens) -> None: ...
    def shown(self) -> str: ...


class _Call:
    """The requests of one `run`. events: (index, text), at the end None or the exception that ended it."""

    def __init__(self, requests: Sequence[Request], stream: bool):
        self.requests, self.stream, self.left = requests, stream, False
        self.events: queue.SimpleQueue[tuple[int, str] | BaseException | None] = queue.SimpleQueue()


class _Shared:
    """What the loop's finalizer needs without holding the loop."""

    closing = False
    thread: threading.Thread | None = None


class EngineLoop:
    """Runs the requests of any number of callers on one engine, which nobody else may call meanwhile."""

    def __init__(self, engine: Engine):
        self._engine, self._shared, self._process = engine, _Shared(), os.getpid()
        self._inline = len(set(engine.dp_group.processes)) > 1
        self._device = jax.config.jax_default_device  # of this thread; the loop's thread would have another
        self._driving = threading.Lock()  # held by the thread that calls the engine
        self._ids = itertools.count()
        self._inbox: queue.SimpleQueue[weakref.ref[_Call]] = queue.SimpleQueue()
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue]] = queue.SimpleQueue()
        self._due: list[tuple[Callable[[], Any], queue.SimpleQueue]] = []  # tasks for the end of the turn
        self._running: dict[weakref.ref[_Call], dict[int, int]] = {}  # of each call: index of a request by its id
        self._call: dict[int, weakref.ref[_Call]] = {}  # of each id that runs
        self._ended: list[tuple[weakref.ref[_Call], BaseException | None]] = []  # to be told
        # At the end of the process too, before the tiers are left: a thread must not compute while JAX is taken down.
        weakref.finalize(self, _stop, self._shared)

    # --- called by any thread --------------------------------------------------------------------------------------

    def run(self, requests: Sequence[Request], stream: bool = False) -> Iterator[tuple[int, str]]:
        """Run requests that `Engine.check` has passed to their end; with `stream`, yield their text while it comes.

        Yields:
            (index of the request, new text), text never empty.

        Raises:
            UserError: the loop is closed, or closes meanwhile.
            BaseException: whatever escaped from the engine's step.
        """
        call = _Call(requests, stream)
        try:
            self._check_open()
            self._inbox.put(weakref.ref(call))
            while (event := self._next(call.events)) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            call.left = True

    def do(self, task: Callable[[], Any]) -> Any:
        """What `task` returns, called between two steps, when the engine is nobody else's."""
        self._check_process()
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._tasks.put((task, answer))
        return self._answer(self._next(answer))

    def close(self, seconds: float | None = None) -> None:
        """End all requests with a UserError and close the engine; waits so long at most for that (None: to the end)."""
        self._check_process()
        self._shared.closing = True
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._tasks.put((self._engine.close, answer))
        try:
            self._answer(self._next(answer, seconds))
        except queue.Empty:
            _log.info("the engine is still at a step after %s seconds and is not closed", seconds)

    def _check_open(self) -> None:
        self._check_process()
        if self._shared.closing:
            raise UserError(_CLOSED)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UserError(
                "this LLM was made in another process, and JAX does not work after a fork; make the LLM in the process "
                "that uses it (multiprocessing's start method 'spawn')"
            )

    def _next(self, events: queue.SimpleQueue, seconds: float | None = None) -> Any:
        """The next event for a caller, who waits for the loop's thread or is it. Raises queue.Empty after `seconds`."""
        if not self._inline:
            if events.empty() and not self._driving.locked():
                threading.Thread(target=self._drive, name="v4jax-engine", daemon=True).start()
            return events.get(timeout=seconds)
        while events.empty():
            if not self._driving.acquire(blocking=False):
                raise UserError("an engine of several processes serves one thread; call it from one alone")
            try:
                self._turn()
            finally:
                self._driving.release()
        return events.get()

    def _answer(self, event: tuple[bool, Any]) -> Any:
        worked, result = event
        if not worked:
            raise result
        return result

    # --- called by the thread that drives the engine ---------------------------------------------------------------

    def _drive(self) -> None:
        """Make steps until there is nothing to do. Of several threads that try, one does."""
        while self._driving.acquire(blocking=False):
            self._shared.thread = threading.current_thread()
            try:
                with jax.default_device(self._device), jax.transfer_guard("disallow"):
                    while self._turn():
                        pass
            finally:
                self._driving.release()
            if self._inbox.empty() and self._tasks.empty():  # what comes from now on starts a thread
                return

    def _turn(self) -> bool:
        """One step, and what is to be done before and after it; whether there is more to do."""
        try:
            self._take_in()
            busy = self._has_work()
            if busy:
                for drawn in self._engine.step():
                    self._take(drawn)
                busy = self._has_work()
        except BaseException as error:  # every kind, because callers wait for this thread
            ran = bool(self._running)
            self._fail(error)
            if self._inline:
                raise
            if ran:
                return True  # the engine is reset first, then the callers are told
            busy = False  # the reset failed; the next request tries again
        if self._running or not busy:  # else the last plan under way is committed first, so that nothing is held
            self._tell()
        return busy or not self._inbox.empty() or not self._tasks.empty()

    def _has_work(self) -> bool:
        """Whether the engine has anything to do, which resets one that is broken, unless that is closed next."""
        return not (self._shared.closing and self._engine.broken) and self._engine.busy

    def _take_in(self) -> None:
        """Add the requests of new calls, cancel those of calls that were left."""
        while not self._tasks.empty():  # first, so that they see cancelled what was left before they came
            self._due.append(self._tasks.get())
        while not self._inbox.empty():
            ref = self._inbox.get()
            if (call := ref()) is None:
                continue
            ids = self._running[ref] = {}
            if self._shared.closing:
                continue
            for index, request in enumerate(call.requests):
                ids[id := next(self._ids)], self._call[id] = index, ref
                self._engine.add_request(id, request.prompt_ids, request.sampling)
            if not ids:  # no prompts
                self._end(ref)
        closing = self._shared.closing
        for ref in [ref for ref in self._running if closing or (call := ref()) is None or call.left]:
            self._cancel(ref, UserError(_CLOSED) if closing else None)

    def _take(self, drawn: SampledTokens) -> None:
        """Hand new tokens to their request, and its text to the caller."""
        ref = self._call.get(drawn.id)
        if ref is None or (call := ref()) is None:
            return
        ids = self._running[ref]
        request = call.requests[ids[drawn.id]]
        try:
            request.take(drawn)
            text = request.shown() if call.stream else ""
        except Exception as error:  # a tokenizer that cannot decode, say: other callers have no part in it
            return self._cancel(ref, error)
        if text:
            call.events.put((ids[drawn.id], text))
        if request.finish_reason is not None:
            self._engine.finish_request(drawn.id)
            del ids[drawn.id], self._call[drawn.id]
            if not ids:
                self._end(ref)

    def _cancel(self, ref: weakref.ref[_Call], error: BaseException | None) -> None:
        for id in self._running[ref]:
            self._engine.abort_request(id)
        self._end(ref, error)

    def _fail(self, error: BaseException) -> None:
        """End all calls that run with the exception that ended a step."""
        self._engine.broken = True  # wherever it was raised, nobody runs these requests any more
        traceback.clear_frames(error.__traceback__)  # they may hold the arrays that the reset replaces
        if not self._running:
            _log.error("the engine failed while nobody waited for it", exc_info=error)
        for ref in list(self._running):
            self._end(ref, error)

    def _end(self, ref: weakref.ref[_Call], error: BaseException | None = None) -> None:
        for id in self._running.pop(ref):
            del self._call[id]
        self._ended.append((ref, error))

    def _tell(self) -> None:
        """Wake the callers whose requests have ended, and do the tasks that are due."""
        ended, self._ended = self._ended, []
        for ref, error in ended:
            if (call := ref()) is not None:
                call.events.put(error)
        due, self._due = self._due, []
        for task, answer in due:
            try:
                answer.put((True, task()))
            except BaseException as error:
                answer.put((False, error))


def _stop(shared: _Shared) -> None:
    shared.closing = True
    if shared.thread is not None and shared.thread is not threading.current_thread():
        shared.thread.join()
