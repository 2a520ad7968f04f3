"""Directories under a name that orbax and tensorstore take literally.

Orbax expands the characters of a glob in the whole path of a checkpoint, and tensorstore takes a backslash for a slash
and only UTF-8: the first leaves a step without an index, the second writes somewhere else.
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
    """`directory`, an absolute path of a directory that exists, or a link to it where its path has such characters.

    The links lie in a temporary directory that the process removes when it ends.
    """
    if not _ODD.search(str(directory)):
        return directory
    alias = pathlib.Path(_links().name) / str(len(os.listdir(_links().name)))
    alias.symlink_to(directory, target_is_directory=True)
    return alias


@functools.cache
def _links() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="v4jax-links-")
