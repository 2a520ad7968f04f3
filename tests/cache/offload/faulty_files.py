"""A file system that fails on demand, for tests of what stands on it."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from v4jax.cache.offload.disk_tier import FileSystem


class FaultyFiles(FileSystem):
    """Real files, but before every operation `fault(operation, name)` may raise, sleep, or whatever it likes.

    operation: "write", "read", "rename" or "remove". room: bytes that all files together may take, None for no limit.
    flip: after a read, flip one bit of what was read with this probability. seed: of the flips.
    """

    def __init__(
        self,
        fault: Callable[[str, str], None] = lambda operation, path: None,
        *,
        room: int | None = None,
        flip: float = 0.0,
        seed: int = 0,
    ):
        self.fault, self.room, self.flip = fault, room, flip
        self._random, self._sizes, self._lock = random.Random(seed), {}, threading.Lock()

    def write(self, name: str, pieces: Sequence[bytes | np.ndarray], at: int) -> None:
        self.fault("write", name)
        size = sum(len(piece) for piece in pieces)
        with self._lock:
            if self.room is not None and sum(self._sizes.values()) + size > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            self._sizes[name] = size
        super().write(name, pieces, at)

    def read(self, name: str, most: int, at: int) -> np.ndarray:
        self.fault("read", name)
        data = super().read(name, most, at)
        if data.size and self._random.random() < self.flip:
            data[self._random.randrange(data.size)] ^= 1 << self._random.randrange(8)
        return data

    def rename(self, name: str, target: str, at: int) -> None:
        self.fault("rename", name)
        super().rename(name, target, at)
        with self._lock:
            self._sizes[target] = self._sizes.pop(name, 0)

    def remove(self, name: str, at: int) -> None:
        self.fault("remove", name)
        with self._lock:
            self._sizes.pop(name, None)
        super().remove(name, at)


def failing(*operations: str, code: int = errno.EIO) -> Callable[[str, str], None]:
    """A fault: these operations raise OSError with this code."""

    def fault(operation: str, path: str) -> None:
        if operation in operations:
            raise OSError(code, os.strerror(code), path)

    return fault


def slow(seconds: float, *operations: str) -> Callable[[str, str], None]:
    """A fault: these operations take the given number of seconds longer."""
    return lambda operation, path: time.sleep(seconds) if operation in operations else None
