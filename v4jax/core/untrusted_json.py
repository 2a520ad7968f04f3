"""Reader for untrusted JSON: configs, tokenizers, tensor headers, metadata, records.

The reader bounds the size and the number of values before it allocates memory for them, and then the nesting depth. It
refuses duplicate names, NaN and infinities, and text that has no UTF-8 form, because JSON readers disagree about them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import stat
from collections.abc import Iterator

from v4jax.core.errors import UserError

SMALL = 16 << 20  # bytes; limit of configs and metadata, of which published ones have less than 2 MB
LARGE = 64 << 20  # bytes; limit of tokenizers, tensor headers and indices, of which published ones have less than 40 MB
_MAX_DEPTH = 64  # published files have up to 12 levels of nesting
# Limit of names and values in a LARGE text. Each takes about 80 bytes of memory. Published tokenizers have 3e6.
_MAX_VALUES = 4 << 20
_VALUES_PER_BYTE = _MAX_VALUES / LARGE
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """A refused text. The message is a short reason without a fix."""


def parse(data: bytes | str, max_bytes: int = SMALL, strict: bool = True):
    """Parse a JSON text.

    Args:
        data: UTF-8 bytes, or decoded text.
        max_bytes: size limit of the text. The limit of its names and values is one per 16 bytes of `max_bytes`.
        strict: refuse NaN, infinities, numbers that overflow float64, and lone surrogates. False accepts them, because
            records of other programs may contain them in fields that v4jax does not read.

    Raises:
        JsonError: the text is not JSON, or is refused (see the module docstring).
    """
    if len(data) > max_bytes:
        raise JsonError(f"it has {len(data):,} bytes, and {max_bytes:,} are the most that is read")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8 at byte {error.start}") from error
    if _values(text) > max_bytes * _VALUES_PER_BYTE and _values(_STRING.sub("", text)) > max_bytes * _VALUES_PER_BYTE:
        raise JsonError("it holds too many values")
    hooks = {"parse_float": _finite, "parse_constant": _no_constant} if strict else {}
    try:
        with collection_paused():
            value = json.loads(text, object_pairs_hook=_unique, **hooks)
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(str(error)) from error
    _check_depth(value)
    if strict and _SURROGATE.search(text):
        _check_text(value)
    return value


def _values(text: str) -> int:
    """Return an upper bound of the names and values in a JSON text. Punctuation inside strings is counted too."""
    return sum(map(text.count, ",:[{"))


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Context manager that pauses the cyclic garbage collector.

    Python runs the collector after every 700 new containers. Creating a million containers then takes several times
    as long as without the collector, and the factor grows with the size of the process.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_bytes(path: str | os.PathLike, max_bytes: int = SMALL) -> bytes:
    """Read a regular file of at most `max_bytes`. A named pipe or a device is refused without blocking on it.

    Raises:
        JsonError: the file is larger or is not a regular file.
        OSError: the file is missing or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise JsonError("its name is no file name") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise JsonError("it is no regular file")
        if status.st_size > max_bytes:
            raise JsonError(f"it has {status.st_size:,} bytes, and {max_bytes:,} are the most that is read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes + 1)
    finally:
        os.close(descriptor)


def read_object(path: str | os.PathLike, max_bytes: int = SMALL) -> dict:
    """Read a file that holds one JSON object. Raises UserError, with the file name and the fix, for anything else."""
    try:
        value = parse(read_bytes(path, max_bytes), max_bytes)
    except JsonError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download or copy it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check that it exists and is readable") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; download or copy it again")
    return value


def _unique(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise JsonError("a name occurs twice")
    return result


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"the number {digits[:40]} overflows")
    return value


def _no_constant(name: str):
    raise JsonError(f"{name} is no JSON number")


def _check_depth(value) -> None:
    """Raise JsonError if a value is nested too deeply. The check proceeds level by level, without recursion."""
    level = [value] if type(value) in (dict, list) else []
    for _ in range(_MAX_DEPTH + 1):
        if not level:
            return
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) in (dict, list)
        ]
    raise JsonError("it is nested too deeply")


def _check_text(value) -> None:
    """Raise JsonError if a string contains a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise JsonError("it holds half a surrogate pair, which has no UTF-8 form") from error
