"""The process of `v4jax <command>` and `python -m v4jax <command>`: `cli.main`, and how it ends."""

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
    try:
        from v4jax.cli import main

        code = main()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is Python's own end, which would print a traceback
    except KeyboardInterrupt:  # while `cli` was imported, or a second one
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nv4jax: interrupted", file=sys.stderr)
        code = _INTERRUPTED
    if code == _INTERRUPTED and "v4jax.serve.engine_loop" in sys.modules:
        with contextlib.suppress(OSError):  # whoever read it is gone
            sys.stdout.flush()
        os._exit(code)  # the engine's thread may compile for another minute, and an ordinary exit waits for it
    sys.exit(code)


def _unraisable(unraisable) -> None:
    """Python drops an exception of a callback or a finalizer; an interrupt that strikes there comes again later."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    run()
