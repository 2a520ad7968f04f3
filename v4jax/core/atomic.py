"""Atomic writes of files and directories, and one-line errors for failed writes."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from v4jax.core.errors import UserError
from v4jax.core.paths import local_path


def write_all(file, data) -> None:
    """Write every byte of a buffer to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a small file and flush it to disk."""
    _write(path, text.encode())


def _write(path: pathlib.Path, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        write_all(file, data)
        os.fsync(file.fileno())


def replace_file(path: pathlib.Path, data: bytes) -> None:
    """Replace a small file atomically: after a crash it has either the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        _write(partial, data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_directory(path: str | os.PathLike, marker: str, stale: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """Context manager that replaces a directory atomically. If the block raises, `path` is unchanged.

    The caller fills the yielded directory `.NAME.partial` beside `path`. When the block ends, `path` is renamed to
    `.NAME.previous`, the new directory is renamed to `path`, and the previous one is deleted. If the machine crashes
    between the two renames, the next call restores the previous directory. Only one process may write to a path at a
    time.

    Args:
        path: directory to create or replace.
        marker: file name that identifies a directory that may be replaced. It protects other files from a mistyped
            path.
        stale: tells whether the old entry of a given name is dropped. Every other old entry that the caller did not
            write, such as a README, is hard-linked into the new directory.

    Yields:
        The empty directory to fill.

    Raises:
        UserError: the disk is full or not writable, or `path` exists and is neither an empty directory nor one with
            the file `marker`.
    """
    path = pathlib.Path(os.path.realpath(local_path(path, "target")))
    partial, previous = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.previous")
    try:
        _recover(path, previous)
        if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / marker).is_file())):
            raise UserError(
                f"{path} exists and is no model directory with a {marker}; choose an empty or a new directory"
            )
        _remove(partial)
        partial.mkdir(parents=True)
        yield partial
        _carry_over(path, partial, stale)
        _sync_directory(partial)
        if path.exists():
            os.rename(path, previous)
        os.rename(partial, path)
        _sync_directory(path.parent)
        _remove(previous)
    except OSError as error:
        raise write_error(path, error, "nothing was changed") from error
    finally:
        _recover(path, previous)
        _remove(partial)


def require_space(path: pathlib.Path, needed: int) -> None:
    """Raise OSError (ENOSPC) if the disk of `path` has less than `needed` bytes free."""
    if shutil.disk_usage(path).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_error(path: str | os.PathLike, error: OSError, state: str) -> UserError:
    """Return a one-line UserError for a failed write.

    Args:
        path: path of the failed write.
        error: error of the operating system.
        state: what the failure left behind, such as "nothing was changed"; ends the message.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cure = "free some space or choose another disk" if full else "choose a directory that can be written"
    return UserError(f"cannot write {path}: {error.strerror or error}; {cure}, {state}")


def _recover(path: pathlib.Path, previous: pathlib.Path) -> None:
    if previous.exists():
        if path.exists():
            _remove(previous)
        else:
            os.rename(previous, path)


def _carry_over(old: pathlib.Path, new: pathlib.Path, stale: Callable[[str], bool]) -> None:
    if not old.exists():
        return
    for item in old.iterdir():
        if stale(item.name) or (new / item.name).exists():
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True, copy_function=_link)
        else:
            _link(item, new / item.name)


def _link(source, target) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
