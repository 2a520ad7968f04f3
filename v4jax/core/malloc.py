"""Process-wide memory settings for the CPU backend."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # names of mallopt(3)
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2**21


def tune_malloc() -> None:
    """Make glibc keep freed memory, in huge pages where the system allows them; elsewhere nothing happens.

    XLA:CPU allocates the temporary memory of a program anew at every call. glibc serves blocks that large by mmap and
    unmaps them when freed, so every training step page-faults all its memory again. Here all threads share one heap
    that never shrinks. It is first stretched over half of the physical memory (addresses alone, nothing is touched),
    because huge pages are granted by address range. Called by the command line, never by the library.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl has none
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
