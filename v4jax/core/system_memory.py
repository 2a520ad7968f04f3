"""Free memory of the host."""

import contextlib
import os
import pathlib


def available_memory() -> int:
    """Return the bytes of host memory that this process can still allocate.

    The limit of the process's control group counts if it is lower. If the system reports no free memory, all memory of
    the machine counts as free.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = pathlib.Path("/proc/meminfo").read_text(encoding="ascii")
        free = 1024 * int(text.split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", which means no limit
        free = min(free, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free
