"""All or nothing on disk: small files flushed, directories replaced whole, system errors told in one line."""

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
    with open(path, "wb", buffering=0) as file:
        write_all(file, text.encode())
        os.fsync(file.fileno())


def replace_text(path: pathlib.Path, text: str) -> None:
    """`write_text` that leaves either the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_text(partial, text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_directory(path: str | os.PathLike, marker: str, stale: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """Fill the yielded directory; when the block ends well it takes the place of `path`, else nothing has changed.

    The new content is built beside `path` as `.NAME.partial` and swapped in by renaming; the old content waits as
    `.NAME.previous` between the two renames, and a later call puts it back if the machine died just there. Entries of
    the old directory that were not written anew and whose name is not `stale` (a README, a tokenizer) move along as
    links. One writer per path. Raises UserError when the disk is full or not writable, or when `path` is a non-empty
    directory without a file `marker` (so a mistyped path cannot swallow someone's files).
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
    """Raise OSError, as a write would, unless the disk of `path` has `needed` bytes left."""
    if shutil.disk_usage(path).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_error(path: str | os.PathLike, error: OSError, state: str) -> UserError:
    """One line for a failed write: the path, the system's reason, the cure, and what state things are in."""
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
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _remove(path: pathlib.Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _sync_directory(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
