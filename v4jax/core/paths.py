"""Check of paths that users pass. v4jax reads and writes only local files, so a URL is refused."""

from __future__ import annotations

import os
import pathlib
import re

from v4jax.core.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # one slash, because pathlib turns "gs://bucket" into "gs:/bucket"


def local_path(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Convert `path` to a Path.

    Args:
        path: path that a user passed.
        name: name of the path in the error message, such as "--workdir".

    Raises:
        UserError: `path` is a URL, such as gs://bucket/run, which Python would treat as a directory named "gs:".
    """
    match = _URL.match(os.fspath(path))
    if match is None:
        return pathlib.Path(path)
    if match[1].lower() == "file":
        raise UserError(f"{name} {path} is a URL; give the path without file://")
    raise UserError(
        f"{name} {path} is a URL, and v4jax reads and writes local files; mount the bucket (gcsfuse, mount-s3) and "
        "give the path of the mount, or copy the files"
    )
