"""Process-wide memory settings for the CPU backend."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of mallopt(3)


def keep_heap() -> None:
    """Make glibc keep freed memory instead of returning it to the system; elsewhere nothing happens.

    XLA:CPU allocates the temporary memory of a program anew at every call. glibc serves blocks that large by mmap and
    unmaps them when freed, so every training step page-faults all its memory again. Called by the
    command line, never by the library.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
