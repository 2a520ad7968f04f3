"""Process-wide memory settings for the CPU backend."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # constants of mallopt(3)
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2**21


def tune_malloc() -> None:
    """Make glibc keep freed memory, in huge pages if the system allows them. Without glibc this does nothing.

    XLA:CPU allocates the temporary buffers of a program at every call. glibc allocates such large blocks by mmap and
    unmaps them when they are freed, so every training step page-faults all its memory again. After this call all
    threads share one heap that never shrinks. The heap is first extended to half of the physical memory, because huge
    pages are granted per address range. Extending reserves addresses only and touches no page.

    The command line calls this function; the library never does.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl has no mallopt
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
        libc.mallopt(option, value)
    size, address = ctypes.c_size_t, ctypes.c_void_p
    libc.malloc.restype, libc.malloc.argtypes = address, [size]
    libc.free.argtypes, libc.madvise.argtypes = [address], [address, size, ctypes.c_int]
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    start = libc.malloc(room)
    if start:
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(first, start + room - first, _MADV_HUGEPAGE)
        libc.free(start)
