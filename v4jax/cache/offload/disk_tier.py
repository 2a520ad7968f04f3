"""The disk tier: a directory with one file per KV block or state snapshot.

`cache/offload/block_file.py` specifies the contents of a file. File names contain the whole key, so the index is
rebuilt from the names at startup. A directory is therefore as usable after a killed process as after a clean shutdown.

A file is written under a temporary name and renamed when it is complete. There is no fsync: a file that a crash of the
machine leaves incomplete fails its checksum and counts as a miss. One process at a time owns a directory.

In identifiers and in the kind of a key, "record" is a state snapshot.
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

_UNIT = 4096  # bytes; a file is charged a multiple of this
_PARTIAL = ".partial"  # suffix of a file that is being written
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that evicting files may cure


class FileSystem:
    """File operations of the disk tier. Tests replace it to inject faults.

    Every method names a file relative to `at`, the descriptor of its directory. No method follows symbolic links. Every
    method raises OSError if the operation fails.
    """

    def write(self, name: str, pieces: Sequence[bytes | np.ndarray], at: int) -> None:
        """Write a new file with mode 0600, after reserving its space. An existing file is an error.

        Args:
          name: Name of the file.
          pieces: Contents of the file in order; bytes or uint8 [bytes].
          at: Descriptor of the directory.
        """
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=at)
        with open(descriptor, "wb", buffering=0) as file:
            _reserve(descriptor, sum(len(piece) for piece in pieces))
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]

    def read(self, name: str, most: int, at: int) -> np.ndarray:
        """Read a regular file up to its end or `most` bytes, whichever comes first: uint8 [bytes]."""
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
        """Rename a file to `target`, and replace a file of that name if there is one."""
        os.replace(name, target, src_dir_fd=at, dst_dir_fd=at)

    def remove(self, name: str, at: int) -> None:
        """Remove a file."""
        os.remove(name, dir_fd=at)

    def used(self, name: str, at: int) -> None:
        """Set the modification time of a file to now. The next process enters the files in this order."""
        os.utime(name, dir_fd=at, follow_symlinks=False)


class DiskTier:
    """Tier that holds items in the files of one directory. All methods are safe to call from several threads.

    One circuit breaker stops reads after 3 consecutive read errors or timeouts; another stops writes after one failed
    write. The tier keeps the descriptor of its directory, so it never touches a directory that takes the same path
    later.
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
        """Open and lock the directory, and enter the files that it contains.

        Args:
          directory: The directory; it is created with mode 0700 if it does not exist.
          budget: Bytes of disk space that the files may take, each file rounded up to 4096 bytes.
          policy: Eviction policy, a key of `eviction.POLICIES`.
          deadline: Seconds. A read that takes longer does not reset the read breaker; whoever waits for it stops
            waiting after that time and calls `record_timeout`.
          files: File operations; None for those of the operating system.
          clock: Returns the time in seconds.

        Raises:
          UserError: The directory cannot be used or trusted, or another engine uses it.
        """
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
        # The descriptor is not closed in `close`: a thread that still waits for the disk would then use a descriptor
        # number that may belong to another file.
        weakref.finalize(self, os.close, self._at)
        self._owner = private_directory.lock(self._at, self.directory)
        self._scan()

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._index and not self._reads.open

    def get(self, schema: BlockSchema, block_hash: bytes) -> StoredBlock | None:
        """Read an item and verify every byte.

        Returns:
          The item, or None if the tier does not hold it, reads are stopped or the read failed. An item that could not
          be read, or is corrupt, is discarded.
        """
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
        with contextlib.suppress(OSError):  # a wrong eviction order is better than a failed read
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
            elif not isinstance(error, FileNotFoundError):  # a removed file is no disk fault
                self._count.update(read_errors=1)
                self._reads.failed()

    def record_timeout(self) -> None:
        """Count a read whose caller stopped waiting; the read breaker counts it as a failure."""
        with self._lock:
            self._count.update(late=1)
            self._reads.failed()

    def put(self, item: StoredBlock) -> bool:
        """Write an item, and evict others to make room.

        If the file system reports that it is full, at least the size of the file is evicted and the write is tried once
        more. The tier refuses an item while a breaker is open, or if the file is larger than the budget.

        Returns:
          Whether the tier holds the item now.
        """
        key, size = item.key, allocated_size(item.schema.file_bytes)
        with self._lock:
            if key in self._index:
                return True
            if self._reads.open or self._writes.open or size > self._index.budget:
                self._count.update(refused=1)
                return False
            gone = self._make_room(size)
            self._reserved += size
        self._unlink(gone)
        error = self._write(item)
        if error is not None and error.errno in _FULL:
            with self._lock:
                free = self._index.budget - self._index.used - self._reserved
                gone = self._make_room(free + size)  # evicts at least `size` bytes if there are as many
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
        return error is None

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
        """Remove victims from the index until `size` more bytes fit or the index is empty. The caller holds the lock.

        Returns:
          Names of the victims' files, which the caller must remove without the lock.
        """
        gone = []
        while not self._index.has_room(self._reserved + size) and (key := self._index.next_victim()) is not None:
            entry = self._index.remove(key)
            assert entry is not None  # the index itself named the key
            gone.append(key.file(entry.parent))
        self._count.update(evictions=len(gone))
        return gone

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Count one use by one request of those keys that the tier holds. Other keys are ignored."""
        with self._lock:
            self._index.touch(keys)

    def discard(self, key: BlockKey) -> None:
        """Remove an item and its file if the tier holds it."""
        with self._lock:
            entry = self._index.remove(key)
        if entry is not None:
            self._remove(key.file(entry.parent))

    def stats(self) -> dict[str, float]:
        """Counters since the start, and the present state.

        Returns:
          Counters by name, the number of blocks and snapshots, bytes held and budget, and mean and longest time of a
          read in ms. `breaker_open` is 1 while reads are stopped, `paused` is 1 while writes are stopped, else 0.
        """
        with self._lock:
            held: dict[str, float] = {"blocks": self._index.count["block"], "snapshots": self._index.count["record"]}
            state = {"breaker_open": int(self._reads.open), "paused": int(self._writes.open)}
            mean = self._seconds / max(self._count["reads"], 1)
            times = {"read_ms_mean": 1e3 * mean, "read_ms_max": 1e3 * self._slowest}
            return held | {"bytes": self._index.used, "budget": self._index.budget, **self._count, **state, **times}

    def check_invariants(self) -> None:
        """Raise AssertionError if the index is inconsistent or does not match the files. No write may be running."""
        with self._lock:
            self._index.check_invariants()
            files = set(os.listdir(self._at)) - {private_directory.LOCK}
            booked = {key.file(entry.parent) for key, entry in self._index.entries.items()}
            if self._reserved or files != booked:
                raise AssertionError(f"the disk tier's files and index differ in {files ^ booked or self._reserved}")

    def close(self) -> None:
        """Release the lock of the directory. The files stay."""
        self._owner.close()

    # --- the directory ---------------------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Enter the files of the directory into the index, least recently used first.

        Incomplete files, non-regular files, files larger than the budget and second files of a key are removed. Files
        whose names this tier does not write are left alone.
        """
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
        with contextlib.suppress(OSError):  # the file is gone already, or the next owner's scan finds it
            self._files.remove(file, self._at)


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the disk space of a file before it is written, if the file system supports that."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def allocated_size(size: int) -> int:
    """Disk space in bytes charged for a file of `size` bytes, a multiple of 4096."""
    return -(-size // _UNIT) * _UNIT
