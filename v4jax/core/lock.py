"""Lock files, by which one process at a time owns a directory. The lock of a process that dies is released."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import BinaryIO


class Locked(Exception):
    """Another open file holds the lock. `str()` is the text that its owner wrote into the file."""


def take_lock(path: str | os.PathLike, owner: str = "", at: int | None = None) -> BinaryIO:
    """Lock a file, creating it if it does not exist.

    The kernel releases the lock when the returned file is closed, including when the process is killed. The file itself
    is not deleted.

    Args:
      path: The lock file. A symbolic link, a file with several hard links, or a non-regular file is refused.
      owner: Text to write into the file; `Locked` reports it to other processes.
      at: File descriptor of the directory for a relative path; None for the working directory.

    Returns:
      The open file; closing it releases the lock.

    Raises:
      Locked: Another open file holds the lock.
      OSError: The file cannot be opened, or its file system has no locks (errno ENOLCK, ENOSYS or EOPNOTSUPP).
    """
    more = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # do not block on a named pipe
    file = open(path, "a+b", buffering=0, opener=lambda name, flags: os.open(name, flags | more, 0o600, dir_fd=at))
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise OSError(errno.EINVAL, "it is no file of its own", str(path))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(owner.encode())
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise
        file.seek(0)
        said = file.read(200).decode(errors="replace")
        file.close()
        raise Locked(said) from error
    return file
