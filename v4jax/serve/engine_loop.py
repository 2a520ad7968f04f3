"""Shares one engine among callers on many threads; a separate thread runs the engine's steps while there is work.

Callers submit requests to the loop and wait for text. The requests of all callers share the engine's batch. Python
handles signals (Ctrl-C, SIGALRM) in the main thread, so a signal ends the wait of one caller at once and never
interrupts a step. The thread starts with the first request and ends when no work is left. An unreferenced `LLM` can
therefore be freed, and a program ends without waiting for an idle thread.

The loop holds only weak references to calls. Before every step it looks for calls that were interrupted, closed or
garbage collected, and aborts their requests. An exception in the engine ends all running requests, every caller raises
it, and the engine resets itself (`engine.Engine.reset`).

With several processes, all processes must run the same steps. The caller's own thread then runs the steps, only one
thread may call, and after an exception the engine is unusable.
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


class OutputProcessor(Protocol):
    """One request of a caller: the input of the engine, and the object that receives its output.

    prompt_ids: token ids of the prompt. sampling: sampling options. finish_reason: None until the request has ended;
    the caller reads results only then. The loop's thread calls both methods.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    finish_reason: str | None

    def take(self, drawn: SampledTokens) -> None:
        """Append the tokens of one step; set `finish_reason` if they end the request."""
        ...

    def shown(self) -> str:
        """Return the text to stream that became complete since the last call; may be ""."""
        ...


class _Call:
    """The requests of one `EngineLoop.run`.

    events: (index of the request, new text), and at the end None or the exception that ended the call. left: the caller
    no longer waits.
    """

    def __init__(self, requests: Sequence[OutputProcessor], stream: bool):
        self.requests, self.stream, self.left = requests, stream, False
        self.events: queue.SimpleQueue[tuple[int, str] | BaseException | None] = queue.SimpleQueue()


class _Shared:
    """State shared by the loop and its finalizer, which must not reference the loop.

    closing: no further request is accepted. thread: the thread that last ran the engine, if any.
    """

    closing = False
    thread: threading.Thread | None = None


class EngineLoop:
    """Runs the requests of any number of callers on one engine; nothing else may call the engine meanwhile."""

    def __init__(self, engine: Engine):
        self._engine, self._shared, self._process = engine, _Shared(), os.getpid()
        self._inline = len(set(engine.dp_group.processes)) > 1
        self._device = jax.config.jax_default_device  # thread-local; passed on to the loop's thread
        self._driving = threading.Lock()  # held by the thread that runs the engine
        self._ids = itertools.count()
        self._inbox: queue.SimpleQueue[weakref.ref[_Call]] = queue.SimpleQueue()
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue]] = queue.SimpleQueue()
        self._due: list[tuple[Callable[[], Any], queue.SimpleQueue]] = []  # tasks to run at the end of this turn
        self._running: dict[weakref.ref[_Call], dict[int, int]] = {}  # per call: request id -> index
        self._call: dict[int, weakref.ref[_Call]] = {}  # running request id -> its call
        self._ended: list[tuple[weakref.ref[_Call], BaseException | None]] = []  # calls to notify
        # Also runs at process exit, before the tiers are closed, because no thread may compute while JAX shuts down.
        weakref.finalize(self, _stop, self._shared)

    # --- called by any thread --------------------------------------------------------------------------------------

    def run(self, requests: Sequence[OutputProcessor], stream: bool = False) -> Iterator[tuple[int, str]]:
        """Run requests to their end.

        Args:
            requests: requests that `Engine.check` accepted.
            stream: yield the text of the requests as it is generated; otherwise nothing is yielded.

        Yields:
            (index of the request, new text); the text is never empty.

        Raises:
            UserError: the loop is closed, or is closed before the requests end.
            BaseException: any exception that left a step of the engine.
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
        """Call `task` between two steps, when it may use the engine, and return its result."""
        self._check_process()
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._tasks.put((task, answer))
        return self._answer(self._next(answer))

    def close(self, seconds: float | None = None) -> None:
        """End all requests with a UserError and close the engine.

        Args:
            seconds: maximum wait for the engine to finish its current step and close; None waits without limit. After
                that time the engine closes in the background, if it still can.
        """
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
        """Return the caller's next event.

        The caller waits for the loop's thread, which is started if it is not running. With several processes the
        caller's thread runs the engine itself, and `seconds` is ignored.

        Raises:
            queue.Empty: the loop's thread sent no event within `seconds`.
            UserError: with several processes, another thread is running the engine.
        """
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

    # --- called by the thread that runs the engine -----------------------------------------------------------------

    def _drive(self) -> None:
        """Run turns until no work is left. If several threads call this, only one of them runs the engine."""
        while self._driving.acquire(blocking=False):
            self._shared.thread = threading.current_thread()
            try:
                with jax.default_device(self._device), jax.transfer_guard("disallow"):
                    while self._turn():
                        pass
            finally:
                self._driving.release()
            if self._inbox.empty() and self._tasks.empty():  # later requests start a new thread
                return

    def _turn(self) -> bool:
        """Accept and cancel calls, run one step of the engine, and notify callers; return whether work is left."""
        try:
            self._take_in()
            busy = self._has_work()
            if busy:
                for drawn in self._engine.step():
                    self._take(drawn)
                busy = self._has_work()
        except BaseException as error:  # BaseException, because callers wait for this thread
            ran = bool(self._running)
            self._fail(error)
            if self._inline:
                raise
            if ran:
                return True  # the next turn resets the engine before it notifies the callers
            busy = False  # the reset failed; the next request tries again
        # If only the last plan in flight is left, commit it before notifying, so that the requests' blocks are free.
        if self._running or not busy:
            self._tell()
        return busy or not self._inbox.empty() or not self._tasks.empty()

    def _has_work(self) -> bool:
        """Whether the engine has work. The check resets a broken engine, unless the engine is about to be closed."""
        return not (self._shared.closing and self._engine.broken) and self._engine.busy

    def _take_in(self) -> None:
        """Add the requests of new calls, and abort those of calls whose caller no longer waits."""
        while not self._tasks.empty():  # first, so that a task sees every cancellation that preceded it
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
        """Pass new tokens to their request, and the text that results to the caller."""
        ref = self._call.get(drawn.id)
        if ref is None or (call := ref()) is None:
            return
        ids = self._running[ref]
        request = call.requests[ids[drawn.id]]
        try:
            request.take(drawn)
            text = request.shown() if call.stream else ""
        except Exception as error:  # such as a failing tokenizer; other callers are not affected
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
        """End all running calls with the exception that ended a step."""
        self._engine.broken = True  # these requests end now, even if the exception was raised outside the engine
        traceback.clear_frames(error.__traceback__)  # frames may hold arrays that the reset must free
        if not self._running:
            _log.error("the engine failed while no request waited for it", exc_info=error)
        for ref in list(self._running):
            self._end(ref, error)

    def _end(self, ref: weakref.ref[_Call], error: BaseException | None = None) -> None:
        for id in self._running.pop(ref):
            del self._call[id]
        self._ended.append((ref, error))

    def _tell(self) -> None:
        """Wake the callers whose requests have ended, and run the tasks that are due."""
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
