"""The disk tier: a directory of files, one a block or record (see `cache/offload/block_file.py` for what is in a file).

The files are the index: their names say what they hold, so a directory that a killed process left is as good as one
that was closed. A file is written under a temporary name and renamed when whole, without waiting for the disk: what a
crash of the machine tears fails its checksum, and is a miss. One process at a time owns a directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import stat
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from v4jax.cache.offload import block_file, private_directory
from v4jax.cache.offload.block_file import BlockKey, BlockSchema, CorruptBlockError
from v4jax.cache.offload.host_tier import CircuitBreaker, StoredBlock
from v4jax.cache.offload.tier_index import TierIndex

_UNIT = 4096  # bytes in which a file takes space
_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileSystem:
    """What the disk tier asks of a file system: the place to put faults in. Everything raises OSError.

    Files are named inside a directory, of which `at` is the descriptor; links are not followed.
    """

    def write(self, name: str, pieces: Sequence[bytes | np.ndarray], at: int) -> None:
        """A new file, its space reserved first, readable by its owner alone."""
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=at)
        with open(descriptor, "wb", buffering=0) as file:
            _reserve(descriptor, sum(len(piece) for piece in pieces))
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]

    def read(self, name: str, most: int, at: int) -> np.ndarray:
        """The first `most` bytes of a file, or all of them: uint8 [bytes]."""
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "no regular file", name)
            data, count = np.empty(min(most, status.st_size), np.uint8), 0
            most = data.size
            while count < most and (new := file.readinto(data[count:])):
                count += new
        return data[:count]

    def rename(self, name: str, target: str, at: int) -> None:
        """Give a file its final name, whatever had it before."""
        os.replace(name, target, src_dir_fd=at, dst_dir_fd=at)

    def remove(self, name: str, at: int) -> None:
        """Remove a file."""
        os.remove(name, dir_fd=at)

    def used(self, name: str, at: int) -> None:
        """Mark a file as used now, for the order in which a later process evicts."""
        os.utime(name, dir_fd=at, follow_symlinks=False)


class DiskTier:
    """Items in the files of a directory, which is made if need be.

    policy: what goes first (`policy.POLICIES`). deadline: seconds that a read may take without counting against the
    disk; who waits gives up by then and calls `late`. A directory that takes the path of this one later is not touched.
    Raises UserError if the directory cannot be used or trusted, or is in use.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        budget: int,
        policy: str,
        *,
        deadline: float = 0.5,
        files: FileSystem | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.directory, self.deadline = pathlib.Path(directory), deadline
        self._files, self._clock = files or FileSystem(), clock
        self._index, self._reserved = TierIndex(budget, policy), 0
        self._lock = threading.Lock()
        self._reads, self._writes = CircuitBreaker(clock), CircuitBreaker(clock, limit=1)
        self._count = Counter(
            evictions=0,
            refused=0,
            corrupt=0,
            read_errors=0,
            write_errors=0,
            full=0,
            late=0,
            swept=0,
            bytes_in=0,
            bytes_out=0,
            reads=0,
        )
        self._seconds = self._slowest = 0.0
        self._at = private_directory.open_private(self.directory)
        # Not in `close`: a thread that still waits for the disk would use a number that means another file by then.
        weakref.finalize(self, os.close, self._at)
        self._owner = private_directory.lock(self._at, self.directory)
        self._scan()

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._index and not self._reads.open

    def get(self, schema: BlockSchema, block_hash: bytes) -> StoredBlock | None:
        """The item, every byte verified; None if it is not here, or could not be read and is therefore forgotten."""
        key = schema.key(block_hash)
        with self._lock:
            entry = self._index.entries.get(key)
        if entry is None or self._reads.open:
            return None
        file, start = key.file(entry.parent), self._clock()
        try:
            data = self._files.read(file, schema.file_bytes + 1, self._at)
            payload, sum = block_file.decode_payload(data, schema, block_hash, entry.parent)
        except (OSError, CorruptBlockError) as error:
            self._failed_read(error)
            self.discard(key)
            return None
        with contextlib.suppress(OSError):  # the order of eviction is worth no error
            self._files.used(file, self._at)
        seconds = self._clock() - start
        with self._lock:
            if seconds <= self.deadline:
                self._reads.worked()
            self._count.update(reads=1, bytes_out=data.size)
            self._seconds, self._slowest = self._seconds + seconds, max(self._slowest, seconds)
        return StoredBlock(schema, block_hash, entry.parent, payload, sum)

    def _failed_read(self, error: OSError | CorruptBlockError) -> None:
        with self._lock:
            if isinstance(error, CorruptBlockError):
                self._count.update(corrupt=1)
            elif not isinstance(error, FileNotFoundError):  # who removes files makes no disk fail
                self._count.update(read_errors=1)
                self._reads.failed()

    def record_timeout(self) -> None:
        """Somebody gave up waiting for a read."""
        with self._lock:
            self._count.update(late=1)
            self._reads.failed()

    def put(self, item: StoredBlock) -> tuple[bool, list[StoredBlock]]:
        """(whether it is here now, nothing: what had to go is gone)."""
        key, size = item.key, allocated_size(item.schema.file_bytes)
        with self._lock:
            if key in self._index:
                return True, []
            if self._reads.open or self._writes.open or size > self._index.budget:
                self._count.update(refused=1)
                return False, []
            gone = self._make_room(size)
            self._reserved += size
        self._unlink(gone)
        error = self._write(item)
        if error is not None and error.errno in _FULL:
            with self._lock:
                free = self._index.budget - self._index.used - self._reserved
                gone = self._make_room(free + size)  # evicts `size` bytes at least
            self._unlink(gone)
            error = self._write(item)
        with self._lock:
            self._reserved -= size
            if error is None:
                self._writes.worked()
                self._index.add(key, item.parent, size)
                self._count.update(bytes_in=item.schema.file_bytes)
            else:
                self._writes.failed()
        return error is None, []

    def _write(self, item: StoredBlock) -> OSError | None:
        file = item.key.file(item.parent)
        header = block_file.encode_header(item.schema, item.block_hash, item.parent, item.checksum)
        try:
            self._files.write(file + _PARTIAL, [header, np.asarray(item.payload)], self._at)
            self._files.rename(file + _PARTIAL, file, self._at)
        except OSError as error:
            with self._lock:
                self._count.update(write_errors=1, full=int(error.errno in _FULL))
            self._remove(file + _PARTIAL)
            return error
        return None

    def _make_room(self, size: int) -> list[str]:
        """Strike out what goes first until `size` bytes more fit; their files are still to be removed."""
        gone = []
        while not self._index.has_room(self._reserved + size) and (key := self._index.next_victim()) is not None:
            gone.append(key.file(self._index.remove(key).parent))
        self._count.update(evictions=len(gone))
        return gone

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """One request uses these keys, as far as they are here."""
        with self._lock:
            self._index.touch(keys)

    def discard(self, key: BlockKey) -> None:
        """Forget an item and remove its file, if it is here."""
        with self._lock:
            entry = self._index.remove(key)
        if entry is not None:
            self._remove(key.file(entry.parent))

    def stats(self) -> dict[str, float]:
        """Counts since the start, and what is here now; breaker_open: reads are not tried; paused: writes are not."""
        with self._lock:
            held = {"blocks": self._index.count["block"], "records": self._index.count["record"]}
            state = {"breaker_open": int(self._reads.open), "paused": int(self._writes.open)}
            mean = self._seconds / max(self._count["reads"], 1)
            times = {"read_ms_mean": 1e3 * mean, "read_ms_max": 1e3 * self._slowest}
            return held | {"bytes": self._index.used, "budget": self._index.budget, **self._count, **state, **times}

    def check_invariants(self) -> None:
        """Raise AssertionError if books and files differ; nobody may be writing."""
        with self._lock:
            self._index.check_invariants()
            files = set(os.listdir(self._at)) - {private_directory.LOCK}
            booked = {key.file(entry.parent) for key, entry in self._index.entries.items()}
            if self._reserved or files != booked:
                raise AssertionError(f"the disk tier's files and books differ in {files ^ booked or self._reserved}")

    def close(self) -> None:
        """Leave the directory to others. The files stay."""
        self._owner.close()

    # --- the directory ---------------------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Enter the files that are there, the least recently used first, and remove what is of no use."""
        found = []
        with os.scandir(self._at) as entries:
            for entry in entries:
                if (known := block_file.parse_filename(entry.name.removesuffix(_PARTIAL))) is not None:
                    status = entry.stat(follow_symlinks=False)
                    useless = entry.name.endswith(_PARTIAL) or not stat.S_ISREG(status.st_mode)
                    found.append((useless, status.st_mtime_ns, status.st_size, entry.name, known))
        for useless, _, size, file, (key, parent) in sorted(found):
            if useless or allocated_size(size) > self._index.budget or key in self._index:
                self._remove(file)
                self._count.update(swept=1)
                continue
            self._unlink(self._make_room(allocated_size(size)))
            self._index.add(key, parent, allocated_size(size))

    def _unlink(self, files: Iterable[str]) -> None:
        for file in files:
            self._remove(file)

    def _remove(self, file: str) -> None:
        with contextlib.suppress(OSError):  # gone already, or the next process that owns the directory finds it again
            self._files.remove(file, self._at)


def _reserve(descriptor: int, size: int) -> None:
    """Take the space of a file before it is written, where the file system can do that."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def allocated_size(size: int) -> int:
    """Bytes that a file of this size takes."""
    return -(-size // _UNIT) * _UNIT
