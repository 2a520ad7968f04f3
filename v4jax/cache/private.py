"""A directory that one engine keeps its files in: opened once, checked, locked, and used by descriptor from then on.

Whoever can write into the directory can change what a model answers, and a link in it leads to files of others. So the
directory must not be a symbolic link, not belong to another user, and not be writable by everybody. All files are then
reached through the descriptor, which goes on meaning this directory when another takes its path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import stat

from v4jax.core.check import UserError

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
            raise UserError(f"{path} is a symbolic link, which can be turned elsewhere at any time; name the directory "
                            f"it leads to: {os.path.realpath(path)}") from error  # fmt: skip
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


def lock(directory: int, path: pathlib.Path) -> int:
    """Descriptor of the directory's locked lock file; the lock goes with the process, however that ends.

    path: of the directory, for messages. Raises UserError if another engine has the lock, or its file is no file.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(LOCK, flags, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise UserError(f"{path / LOCK} is no regular file; remove it, or name another directory") from error
        raise UserError(f"cannot keep the cache in {path}: {error.strerror}; name another") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path / LOCK} is no regular file; remove it, or name another directory")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"cannot lock {path}: {error.strerror}; name another") from error
        raise UserError(
            f"{path} is in use by another engine; end that one or give each a directory of its own"
        ) from error
    except UserError:
        os.close(descriptor)
        raise
    return descriptor
