"""Paths that users give. v4jax reads and writes local files; a URL is refused before anything is made of it."""

from __future__ import annotations

import os
import pathlib
import re

from v4jax.core.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib has made "gs:/bucket" of "gs://bucket"


def local_path(path: str | os.PathLike, name: str) -> pathlib.Path:
    """`path` as a Path.

    Args:
        name: what the message calls it, such as "--workdir".

    Raises:
        UserError: `path` is a URL, such as gs://bucket/run; Python would take it for a folder called "gs:".
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
