"""A spinner on stderr during slow work."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console


@contextlib.contextmanager
def spinner(text: str, show: bool = True) -> Iterator[None]:
    """Show a spinner on stderr during slow work; if stderr is no terminal, print a line instead.

    Args:
      text: Description of the work.
      show: False prints nothing.
    """
    if show and sys.stderr.isatty():
        from rich.console import Console  # slow to import

        console = Console(stderr=True)
        with console.status(text, spinner=spinner_name(console)):
            yield
        return
    if show:
        print(text, file=sys.stderr, flush=True)
    yield


def spinner_name(console: rich.console.Console) -> str:
    """Return rich's name of a spinner whose characters the terminal can show."""
    return "line" if console.options.ascii_only else "dots"
