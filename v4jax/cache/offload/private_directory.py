"""Opens, checks and locks the directory in which one engine stores its files.

Anyone who can write into the directory can change the answers of the model, and a symbolic link can lead to other
users' files. So the directory must not be a symbolic link, belong to another user (root is allowed) or be writable by
every user. Files are then opened relative to its descriptor, which refers to the same directory even if another
directory takes its path.
"""

from __future__ import annotations

import errno
import os
import pathlib
import stat
from typing import BinaryIO

from v4jax.core.errors import UserError
from v4jax.core.lock import Locked, take_lock
from v4jax.core.paths import local_path

LOCK = "lock"


def open_private(path: pathlib.Path) -> int:
    """Open a directory, created with mode 0700 if missing. Raises UserError if it cannot be used or trusted."""
    local_path(path, "cache.kv_dir")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return open_trusted(path)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UserError(f"{path} {error.strerror}") from error
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link, whose target can change at any time; name the directory "
                f"it leads to: {os.path.realpath(path)}"
            ) from error
        raise UserError(f"cannot keep the cache in {path}: {error.strerror}; name another") from error


def open_trusted(path: pathlib.Path) -> int:
    """Open an existing directory and check who can write to it.

    Returns:
      The descriptor of the directory, which the caller must close.

    Raises:
      PermissionError: Every user can write to the directory, or another user than root owns it (errno EPERM). The
        owner is not checked if this process runs as root.
      OSError: The path is a symbolic link or cannot be opened as a directory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status, user = os.fstat(descriptor), os.geteuid()
    complaint = ""
    if user and status.st_uid not in (0, user):
        complaint = f"belongs to another user (uid {status.st_uid}), who could change what is cached; name your own"
    elif status.st_mode & stat.S_IWOTH:
        complaint = "can be written by every user, who could change what is cached; run chmod o-w on it"
    if complaint:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, complaint, str(path))
    return descriptor


def lock(directory: int, path: pathlib.Path) -> BinaryIO:
    """Lock a directory for one engine.

    Args:
      directory: Descriptor of the directory.
      path: Path of the directory, for error messages.

    Returns:
      The locked file. Closing it releases the lock.

    Raises:
      UserError: Another engine holds the lock, the lock file is not a regular file, or it cannot be locked.
    """
    try:
        return take_lock(LOCK, at=directory)
    except Locked as error:
        raise UserError(
            f"{path} is in use by another engine; end that one or give each a directory of its own"
        ) from error
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise UserError(f"{path / LOCK} is no regular file; remove it, or name another directory") from error
        raise UserError(f"cannot lock {path}: {error.strerror}; name another") from error
