"""Run an object in a process of its own, which is idle between calls."""

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

# Errors that an installation or a machine can cause. Any other error is a bug and keeps its traceback.
_FORESEEN = (ImportError, MemoryError, OSError, RuntimeError, ValueError)


@contextlib.contextmanager
def remote(name: str, make: Callable, *args, heap: bool = False) -> Iterator[Ask]:
    """Make an object in a new process, and yield a function that calls its methods there.

    Arguments and results are pickled. The process ends with the `with` block, and also if this process ends.

    Args:
      name: Name of the process, for messages.
      make: Makes the object.
      *args: Arguments of `make`.
      heap: Whether the process tunes malloc as the command line does (`core.malloc.tune_malloc`).

    Yields:
      A function (name of a method, *arguments) that waits for the result of the method.

    Raises:
      UserError: The process ended, or an error was raised in it (`--debug` shows its traceback). Each call can raise
        it too.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, heap), name=name, daemon=True)
    process.start()
    there.close()  # only the other process holds this end, so `recv` here fails when it ends
    try:
        ask = functools.partial(_ask, process, here)
        ask(make, *args)
        yield ask
    finally:
        process.kill()  # it may be busy, and it writes no files that could stay incomplete
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
    """Make the object and call its methods until the pipe is closed; runs in the other process."""
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
