"""Shares one engine among callers on many threads; a separate thread runs the engine's steps while there is work.

`EngineLoop.run` waits for the outputs of requests, `submit` passes them to a callback, and `generate` to a coroutine.
The requests of all callers share the engine's batch. Python handles signals (Ctrl-C, SIGALRM) in the main thread, so a
signal ends the wait of one caller at once and never interrupts a step. The thread starts with the first request and
ends when no work is left. An unreferenced `LLM` can therefore be freed, and a program ends without waiting for an idle
thread.

The loop holds only weak references to the calls of `run`. Before every step it looks for calls that were interrupted,
closed or garbage collected, and aborts their requests. An exception in the engine ends all running requests, every
caller gets it, and the engine resets itself (`engine.Engine.reset`).

With several processes, all processes must run the same steps. The caller's own thread then runs the steps, only one
thread may call `run`, no thread `submit`, and after an exception the engine is unusable.

When the process ends, loops that were not closed end their threads and store the idle blocks of their engines. A loop
that is garbage collected stores none: the collector may run in any thread and while it holds any lock, also one that
the copy to the tiers needs. Neither does a process that a signal kills.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import logging
import os
import queue
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import jax

from v4jax.core.errors import UserError
from v4jax.serve.engine import Engine, SampledTokens
from v4jax.serve.output_processor import RequestState
from v4jax.serve.outputs import RequestOutput

_CLOSED = "this LLM is closed; make a new one to generate"
_log = logging.getLogger(__name__)
_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


class _Call:
    """Requests that one caller waits for.

    Attributes:
        ids: id in the engine -> (index in `requests`, index of the continuation).
        stream: whether the caller wants outputs while they are generated.
        notify: takes (index, output), and at the end None or the exception that ended the call. The thread of the
            engine calls it.
        left: the caller no longer waits.
    """

    def __init__(
        self,
        requests: Sequence[RequestState],
        ids: Iterator[int],
        stream: bool,
        notify: Callable[[tuple[int, RequestOutput] | BaseException | None], object],
    ):
        self.requests, self.stream, self.notify, self.left = requests, stream, notify, False
        pairs = [(i, n) for i, request in enumerate(requests) for n in range(len(request.completions))]
        self.ids = {next(ids): pair for pair in pairs}


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
        self._submitted: dict[int, _Call] = {}  # calls of `submit`, kept alive here
        self._running: dict[weakref.ref[_Call], set[int]] = {}  # ids of the running requests of each call
        self._call: dict[int, weakref.ref[_Call]] = {}  # running request id -> its call
        self._ended: list[tuple[weakref.ref[_Call], BaseException | None]] = []  # calls to notify
        weakref.finalize(self, _stop, self._shared)
        _loops.add(self)
        _register_exit_handler()

    # --- called by any thread --------------------------------------------------------------------------------------

    def run(self, requests: Sequence[RequestState], stream: bool = False) -> Iterator[tuple[int, RequestOutput]]:
        """Run requests to their end.

        Closing the iterator aborts the requests that are left.

        Args:
            requests: requests that `Engine.check` accepted.
            stream: yield what the requests generate as it is generated; otherwise nothing is yielded.

        Yields:
            (index of the request, `RequestState.delta` after a step).

        Raises:
            UserError: the loop is closed, or is closed before the requests end.
            BaseException: any exception that left a step of the engine.
        """
        events: queue.SimpleQueue = queue.SimpleQueue()
        call = _Call(requests, self._ids, stream, events.put)
        try:
            self._check_open()
            self._inbox.put(weakref.ref(call))
            while (event := self._next(events)) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            call.left = True

    def submit(self, request: RequestState, on_output: Callable[[RequestOutput | BaseException], object]) -> int:
        """Run one request and return at once; any thread may call it.

        Args:
            request: a request that `Engine.check` accepted.
            on_output: takes `RequestState.delta` after every step with new tokens, up to one that is `finished`, or an
                exception: a UserError if the loop is closed, else one that left a step of the engine. The thread of the
                engine calls it between two steps, so it must be quick. If it raises, the request is aborted.

        Returns:
            The id of the request, for `abort`.

        Raises:
            UserError: the loop is closed, or the engine has several processes, whose steps the caller of `run` makes.
        """
        self._check_open()
        if self._inline:
            raise UserError("an engine of several processes computes in the thread of its caller; use LLM.generate")

        def notify(event: tuple[int, RequestOutput] | BaseException | None) -> None:
            if event is None and not request.finished:
                request.abort()
                event = (0, request.delta())
            if event is not None:
                on_output(event if isinstance(event, BaseException) else event[1])

        call = _Call([request], self._ids, True, notify)
        id = min(call.ids)
        self._submitted[id] = call
        self._inbox.put(weakref.ref(call))
        self._wake()
        return id

    def abort(self, request_id: int) -> None:
        """End a request of `submit` before the next step; its last output has the finish_reason "abort".

        Any thread may call it. An id of a request that has ended is ignored.
        """
        if (call := self._submitted.get(request_id)) is not None:
            call.left = True

    async def generate(self, request: RequestState) -> AsyncIterator[RequestOutput]:
        """Run one request from an asyncio event loop.

        Closing the iterator, or cancelling its task, aborts the request.

        Args:
            request: a request that `Engine.check` accepted.

        Yields:
            `RequestState.delta` after every step with new tokens; the last one is `finished`.

        Raises:
            UserError, BaseException: see `submit`.
        """
        event_loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()
        reading, output = True, None

        def put(output: RequestOutput | BaseException) -> None:
            if reading:  # else the event loop may have ended
                event_loop.call_soon_threadsafe(outputs.put_nowait, output)

        id = self.submit(request, put)
        try:
            while output is None or not output.finished:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
        finally:
            reading = False
            self.abort(id)

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
                that time the engine closes in the background, if it still can. With several processes, whose steps wait
                for each other, the end of this process does not wait for that; with one it does.
        """
        self._check_process()
        self._shared.closing = True
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._tasks.put((self._engine.close, answer))
        try:
            if self._inline and seconds is not None:
                self._answer(self._close_in_thread(answer, seconds))
            else:
                self._answer(self._next(answer, seconds))
        except queue.Empty:
            _log.info("the engine is still at a step after %s seconds and is not closed", seconds)

    def _close_in_thread(self, answer: queue.SimpleQueue, seconds: float) -> Any:
        """Run the engine in a thread until the task of `close` is done; raise queue.Empty after `seconds`."""

        def run() -> None:
            try:
                with self._driving, jax.default_device(self._device):
                    while answer.empty():
                        self._turn()
            except BaseException as error:  # BaseException, because the caller waits for this thread
                answer.put((False, error))

        threading.Thread(target=run, name="v4jax-engine", daemon=True).start()
        return answer.get(timeout=seconds)

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
        caller's thread runs the engine itself, without a time limit.

        Raises:
            queue.Empty: the loop's thread sent no event within `seconds`.
            UserError: with several processes, another thread is running the engine.
        """
        if not self._inline:
            if events.empty():
                self._wake()
            return events.get(timeout=seconds)
        while events.empty():
            if not self._driving.acquire(blocking=False):
                raise UserError("an engine of several processes serves one thread; call it from one alone")
            try:
                self._turn()
            finally:
                self._driving.release()
        return events.get()

    def _wake(self) -> None:
        """Start the thread of the engine if it is not running."""
        if not self._driving.locked():
            threading.Thread(target=self._drive, name="v4jax-engine", daemon=True).start()

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
            self._running[ref] = set()
            if self._shared.closing:
                continue
            self._running[ref].update(call.ids)
            for id, (index, continuation) in call.ids.items():
                self._call[id], request = ref, call.requests[index]
                self._engine.add_request(
                    id,
                    request.prompt_token_ids,
                    request.sampling_of(continuation),
                    request.cache_salt,
                    request.extra_keys,
                    stop_ids=request.stop_ids,
                    masks=request.completions[continuation].masks,
                )
            if not call.ids:  # no prompts
                self._end(ref)
        closing = self._shared.closing
        for ref in [ref for ref in self._running if closing or (call := ref()) is None or call.left]:
            self._cancel(ref, UserError(_CLOSED) if closing else None)

    def _take(self, drawn: SampledTokens) -> None:
        """Pass new tokens to their request, and the text that results to the caller."""
        ref = self._call.get(drawn.id)
        if ref is None or (call := ref()) is None:
            return
        index, continuation = call.ids[drawn.id]
        request = call.requests[index]
        try:
            request.update(drawn, continuation)
            if call.stream and (output := request.delta()) is not None:
                call.notify((index, output))
        except Exception as error:  # such as a failing tokenizer; other callers are not affected
            return self._cancel(ref, error)
        if request.completions[continuation].finish_reason is not None:
            self._engine.finish_request(drawn.id)
            self._running[ref].remove(drawn.id)
            del self._call[drawn.id]
            if not self._running[ref]:
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
            self._call.pop(id, None)
        self._ended.append((ref, error))

    def _tell(self) -> None:
        """Wake the callers whose requests have ended, and run the tasks that are due."""
        ended, self._ended = self._ended, []
        for ref, error in ended:
            if (call := ref()) is not None:
                self._notify_end(call, error)
        due, self._due = self._due, []
        for task, answer in due:
            try:
                answer.put((True, task()))
            except BaseException as error:
                answer.put((False, error))

    def _notify_end(self, call: _Call, error: BaseException | None) -> None:
        for id in call.ids:
            self._submitted.pop(id, None)
        try:
            call.notify(error)
        except Exception:  # of a callback, such as one of an event loop that is closed
            _log.exception("the callback of a request failed at the end of the request")


@functools.cache
def _register_exit_handler() -> None:
    """Call `_close_all` when the process ends.

    Handlers run in reverse order. The first loop registers this one, so it runs before JAX shuts down, while no thread
    may compute, and before the finalizers of the offload tiers.
    """
    atexit.register(_close_all)


def _close_all() -> None:
    """End the threads of all loops, then store their idle blocks in the offload tiers."""
    for loop in list(_loops):
        if loop._process == os.getpid():
            _stop(loop._shared)
            if loop._driving.acquire(blocking=False):  # not if a step hangs in a `close` that did not wait for it
                try:
                    loop._engine.close()
                except Exception:
                    _log.exception("the idle blocks of an engine were not stored at the end of the process")


def _stop(shared: _Shared) -> None:
    shared.closing = True
    if shared.thread is not None and shared.thread is not threading.current_thread():
        shared.thread.join()
