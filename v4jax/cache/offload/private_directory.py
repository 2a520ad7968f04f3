"""A directory that one engine keeps its files in: opened once, checked, locked, and used by descriptor from then on.

Whoever can write into the directory can change what a model answers, and a link in it leads to files of others. So the
directory must not be a symbolic link, not belong to another user, and not be writable by everybody. All files are then
reached through the descriptor, which goes on meaning this directory when another takes its path.
"""

from __future__ import annotations

import errno
import os
import pathlib
import stat
from typing import BinaryIO

from v4jax.core.errors import UserError
from v4jax.core.lock import Locked, take_lock

LOCK = "lock"


def open_private(path: pathlib.Path) -> int:
    """Descriptor of a directory, which is made if need be, with mode 0700. Raises UserError if it cannot be trusted."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return open_trusted(path)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UserError(f"{path} {error.strerror}") from error
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link, which can be turned elsewhere at any time; name the directory "
                f"it leads to: {os.path.realpath(path)}"
            ) from error
        raise UserError(f"cannot keep the cache in {path}: {error.strerror}; name another") from error


def open_trusted(path: pathlib.Path) -> int:
    """Descriptor of a directory that is there. Raises OSError for a symbolic link, and for files of unknown origin."""
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
    """The locked lock file of a directory; closing it releases the lock.

    path: of the directory, for messages. Raises UserError if another engine has the lock, or its file is no file.
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
