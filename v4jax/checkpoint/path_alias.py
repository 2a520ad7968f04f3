"""Aliases for directories whose path orbax and tensorstore would not take literally.

Orbax expands glob characters anywhere in the path of a checkpoint, which leaves a step without an index. Tensorstore
replaces a backslash with a slash, which writes to another directory, and accepts only UTF-8.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import tempfile

_ODD = re.compile(r"[\[\]*?\\\ud800-\udfff]")


@functools.cache
def plain_path(directory: pathlib.Path) -> pathlib.Path:
    """Return `directory`, or a symbolic link to it if its path contains such characters.

    The links are in a temporary directory that the process deletes when it ends.

    Args:
        directory: absolute path of an existing directory.
    """
    if not _ODD.search(str(directory)):
        return directory
    alias = pathlib.Path(_links().name) / str(len(os.listdir(_links().name)))
    alias.symlink_to(directory, target_is_directory=True)
    return alias


@functools.cache
def _links() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="v4jax-links-")
