"""An object in a process of its own, which is idle between calls."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from v4jax.core.errors import UserError
from v4jax.core.malloc import tune_malloc

Ask = Callable[..., Any]  # (name of a method, its arguments) to its result

# What an installation or a machine can cause, besides a user. Anything else is a bug and keeps its traceback.
_FORESEEN = (ImportError, MemoryError, OSError, RuntimeError, ValueError)


@contextlib.contextmanager
def remote(name: str, make: Callable, *args, heap: bool = False) -> Iterator[Ask]:
    """`make(*args)` in a process of its own: gives a function that calls a method of it there and waits for the result.

    heap: that process keeps its heap as the command line does (`core.malloc.tune_malloc`). All that crosses is pickled.
    The process ends with the block, and with this process however that ends. Raises UserError, here and from every
    call, for an error over there (`--debug` shows its traceback) or if the process died.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, heap), name=name, daemon=True)
    process.start()
    there.close()  # the other process has the only one, so that its end shows here
    try:
        ask = functools.partial(_ask, process, here)
        ask(make, *args)
        yield ask
    finally:
        process.kill()  # it may be at work, and holds nothing that could be left half-written
        process.join()
        here.close()


def _ask(process: SpawnProcess, pipe: Connection, what: str | Callable, *args):
    try:
        pipe.send((what, args))
        result, error, trace = pipe.recv()
    except (EOFError, ConnectionError) as closed:
        process.join()
        code = process.exitcode
        why = f"signal {-code}; perhaps memory ran out" if code < 0 else f"exit code {code}; its own message is above"
        raise UserError(f"the process of {process.name} ended with {why}") from closed
    if error is not None:
        failure = UserError(error)
        failure.add_note(trace)
        raise failure
    return result


def _serve(pipe: Connection, heap: bool) -> None:
    """The other process: make the object, then call its methods until the pipe is closed."""
    if heap:
        tune_malloc()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the first one ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    served = None
    while True:
        result = error = trace = None
        try:
            what, args = pipe.recv()  # unpickling may import jax or torch
            if served is None:
                served = what(*args)
            else:
                result = getattr(served, what)(*args)
        except EOFError:
            return
        except UserError as failure:
            error, trace = str(failure), traceback.format_exc()
        except _FORESEEN as failure:
            first = str(failure).strip().partition("\n")[0]
            error = f"{multiprocessing.current_process().name}: {type(failure).__name__}: {first}"
            trace = traceback.format_exc()
        pipe.send((result, error, trace))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
