"""Lock of a workdir, so that only one run at a time trains in it."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
import sys
from collections.abc import Iterator

from v4jax.core.atomic import write_error
from v4jax.core.errors import UserError
from v4jax.core.lock import Locked, take_lock
from v4jax.parallel.distributed import all_gather_bytes, is_primary

LOCK_NAME = "train.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # Lustre mounted without `flock`, some object stores


@contextlib.contextmanager
def workdir_lock(workdir: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of `workdir` inside the context.

    The directory is created if it is missing. In a run of several processes, the first process takes the lock for all.
    The operating system releases the lock when the process ends, so a killed run leaves no lock behind. On a file
    system without locks, a warning is printed and the context is entered without a lock.

    Args:
      workdir: Directory of the run.

    Raises:
      UserError: Another run holds the lock, or the directory cannot be written. All processes of the run raise it.
    """
    file, refusal = None, ""
    if is_primary():
        path = pathlib.Path(workdir) / LOCK_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = take_lock(path, f"process {os.getpid()} on {socket.gethostname()}")
        except Locked as owner:
            refusal = f"{workdir} is in use by another trainer ({owner}); end that one, or choose another --workdir"
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(
                    f"v4jax: {workdir} is on a file system without locks ({error.strerror}); see that no second run "
                    "trains there",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                refusal = str(write_error(path, error, "nothing was trained"))
    try:
        refusals = [text.decode() for text in all_gather_bytes(refusal.encode()) if text]
        if refusals:
            raise UserError(refusals[0])
        yield
    finally:
        if file is not None:
            file.close()
