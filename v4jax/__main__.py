"""Entry point of `v4jax <command>` and `python -m v4jax <command>`: runs `cli.main` and sets the exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def run() -> NoReturn:
    """Run the command line and end with its exit code. Ctrl-C gives 130 at any moment, imports included."""
    sys.unraisablehook = _unraisable
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # False in a shell's background job
    if heeds:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from v4jax.cli import main

        code = main()
        if heeds:  # an interrupt while Python shuts down would print a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:  # during the import of `cli`, or a second interrupt
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nv4jax: interrupted", file=sys.stderr)
        code = _INTERRUPTED
    if code == _INTERRUPTED and "v4jax.serve.engine_loop" in sys.modules:
        _leave()  # the engine's thread may compile for another minute, and an ordinary exit waits for it
    sys.exit(code)


def _interrupt(signum, frame) -> None:
    """Raise KeyboardInterrupt where it can propagate.

    During an import, the process ends at once instead, because extension modules (such as numpy inside jaxlib's) turn
    an exception that is raised there into an ImportError and print tracebacks of their own.
    """
    at = frame
    while at is not None:
        if at.f_code is _unraisable.__code__:
            return _come_again()
        if at.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\nv4jax: interrupted\n")
            _leave()
        at = at.f_back
    signal.default_int_handler(signum, frame)


def _unraisable(unraisable) -> None:
    """Raise an interrupt again later if it hit a callback or a finalizer, whose exceptions Python drops."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
    elif threading.current_thread() is threading.main_thread():
        _come_again()


def _come_again() -> None:
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def _leave() -> NoReturn:
    with contextlib.suppress(OSError, RuntimeError):  # the reader is gone, or a write is in progress
        sys.stdout.flush()
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    run()
