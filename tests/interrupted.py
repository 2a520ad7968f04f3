"""The command line, interrupted by a SIGINT at a chosen moment: `python -m tests.interrupted MOMENT generate ...`.

MOMENT: "MODULE", while it is first imported, or "MODULE:NAME:N", at the call number N of a function or a method.
"""

import importlib
import os
import signal
import sys


def interrupt():
    """As a terminal does: the signal is the process's, and its main thread takes it."""
    os.kill(os.getpid(), signal.SIGINT)


class Watch:
    """A finder that finds nothing, and interrupts the import of one module."""

    def __init__(self, module):
        self._module = module

    def find_spec(self, name, *_):
        """See `importlib.abc.MetaPathFinder`."""
        if name == self._module:
            sys.meta_path.remove(self)
            interrupt()


def at_call(module, name, number):
    """Interrupt the call number `number` of `module`.`name`."""
    *path, name = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), iter(range(10**9))

    def run(*args, **kwargs):
        if next(calls) == number:
            interrupt()
        return function(*args, **kwargs)

    setattr(owner, name, run)


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    moment = sys.argv.pop(1)
    if ":" in moment:
        module, name, number = moment.split(":")
        at_call(module, name, int(number))
    else:
        sys.meta_path.insert(0, Watch(moment))
    from v4jax.__main__ import run

    run()


if __name__ == "__main__":
    main()
