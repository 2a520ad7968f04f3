"""The audit log: one line of JSON for each request, without prompts, replies and keys."""

from __future__ import annotations

import datetime
import io
import logging
import logging.handlers
import os

from v4jax.core.errors import UserError
from v4jax.serve.openai.stream import dump

_FILES = 5  # old files that are kept


class AuditLog:
    """Appends lines to a file, which only its owner may read, and rotates it.

    Args:
        path: the file.
        max_bytes: size at which it becomes `path.1`.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str, max_bytes: int):
        try:
            self._handler = _PrivateFile(path, maxBytes=max_bytes, backupCount=_FILES, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write --audit_log={path}: {error.strerror}") from error

    def write(self, **fields) -> None:
        """Append a line with the time and these fields. A full disk is reported on stderr and ends nothing."""
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = dump({"time": time, **fields})
        self._handler.handle(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


class _PrivateFile(logging.handlers.RotatingFileHandler):
    def _open(self) -> io.TextIOWrapper:
        opener = lambda path, flags: os.open(path, flags, 0o600)
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=opener)
