"""Lock files: one process at a time owns a directory, and a process that dies owns nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import BinaryIO


class Locked(Exception):
    """Another open file holds the lock; `str()` is what its owner wrote into it."""


def take_lock(path: str | os.PathLike, owner: str = "", at: int | None = None) -> BinaryIO:
    """Lock a file, which is made if need be.

    The kernel releases the lock with the returned file, so also when its process is killed. The file itself stays.

    Args:
      path: The lock file; a link or anything else that is no file of its own is refused.
      owner: Text left in the file for whoever finds it locked.
      at: Descriptor of the directory that a relative path starts from; None for the working directory.

    Returns:
      The open file; closing it releases the lock.

    Raises:
      Locked: Somebody else holds the lock.
      OSError: The file cannot be opened, or its file system has no locks (errno ENOLCK, ENOSYS or EOPNOTSUPP).
    """
    more = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # opening a named pipe would wait
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
