"""The persistent compilation cache of the command line, which stores compiled programs so that a second run skips XLA.

JAX manages the cache and its keys. This module chooses the directory, decides whether the cache is on, bounds its size
and deletes damaged files. It imports jax only inside functions, so that help and usage errors do not wait for jax.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import pathlib
import platform
import stat
import time
import warnings
import zlib

from v4jax.core.errors import UserError
from v4jax.core.paths import local_path

OFF = "off"
# jaxlib 0.12 crashed with a segmentation fault while it serialized programs (twice in long test runs). From this
# version on, the cache is off by default, until a later version is known to be safe.
_FIRST_UNSAFE = (0, 12)
_MIN_COMPILE_SECONDS = 0.3  # programs that compile faster are not stored
_MAX_BYTES = 4 << 30  # total size of all files
_SETTLED_SECONDS = 60  # another process may still be writing a file that is younger
_SUFFIX = "-cache"  # suffix of JAX's cache files
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # first bytes of a Zstandard frame


def is_safe(jaxlib_version: str) -> bool:
    """Return whether this version of jaxlib can serialize programs without the risk of a crash."""
    return tuple(int(part) for part in jaxlib_version.split(".")[:2]) < _FIRST_UNSAFE


def default_directory() -> pathlib.Path:
    """Return `$XDG_CACHE_HOME/v4jax/jax/VERSION-CPU`. If XDG_CACHE_HOME is unset or relative, ~/.cache replaces it.

    A compiled CPU program contains instructions of one CPU type. Machines with different CPUs may share a home
    directory, so each CPU type has its own directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "v4jax" / "jax" / f"{importlib.metadata.version('jaxlib')}-{_cpu()}"


def _cpu() -> str:
    """Return a name for this CPU type: the architecture and a digest of the CPU features that Linux lists."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine() or 'cpu'}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def enable(choice: str | None) -> pathlib.Path | None:
    """Turn on JAX's persistent compilation cache for this process.

    Args:
      choice: A directory, "off", or None for the default. The default is JAX_COMPILATION_CACHE_DIR if it is set, else
        `default_directory()`, or no cache if jaxlib is unsafe (0.12 or later) or the directory cannot be used.

    Returns:
      The directory, or None if there is no cache or JAX's own environment variable names it.

    Raises:
      UserError: `choice` is a directory that cannot be used.
    """
    if choice is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    if choice == OFF or (choice is None and not is_safe(importlib.metadata.version("jaxlib"))):
        directory = None
    else:
        directory = _usable(choice)
    import jax

    if choice == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    if directory is None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    # A failing cache only costs compile time. JAX compiles the program again, but warns for every program.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    return directory


def _usable(choice: str | None) -> pathlib.Path | None:
    """Create and sweep the cache directory. Return it, or None if it is the default one and cannot be used."""
    chosen = None if choice is None else local_path(choice, "--compilation_cache")
    try:
        directory = default_directory() if chosen is None else chosen.expanduser()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _distrust(directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        if choice is None:
            return None
        raise UserError(f"cannot use --compilation_cache={choice}: {problem}; name another directory, or off")
    sweep(directory)
    return directory


def _distrust(directory: pathlib.Path) -> str:
    """Return why programs from this directory must not be run, or "". JAX runs any code that it finds there."""
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a directory"
    if hasattr(os, "geteuid") and (found.st_uid not in (0, os.geteuid()) or found.st_mode & stat.S_IWOTH):
        return "other users can write programs there, and JAX would run them"
    return ""


def sweep(directory: pathlib.Path, max_bytes: int = _MAX_BYTES) -> None:
    """Delete damaged programs, then the least recently used programs until the total size is at most `max_bytes`.

    JAX writes a program directly into its final file and never replaces a file, so a killed process leaves a truncated
    file for good. Only files written since the last sweep are checked. Errors are ignored, because another process may
    sweep at the same time, and the directory may be read-only.
    """
    stamp = directory / "swept"
    settled = time.time() - _SETTLED_SECONDS
    try:
        since = stamp.stat().st_mtime if stamp.exists() else 0.0
        files = []
        for path in directory.glob(f"*{_SUFFIX}"):
            found = path.stat()
            if since < found.st_mtime <= settled and not _is_whole(path):
                path.unlink(missing_ok=True)
            else:
                files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
        excess = sum(size for _, size, _ in files) - max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        stamp.touch()
        os.utime(stamp, (settled, settled))
    except OSError:
        pass


def _is_whole(path: pathlib.Path) -> bool:
    """Return whether the file can be decompressed. If the decompressor is not installed, the file counts as intact."""
    data = path.read_bytes()
    try:
        if data.startswith(_ZSTANDARD):
            # Python 3.14 and later, where JAX uses it; JAX uses zlib before.
            importlib.import_module("compression.zstd").decompress(data)
        else:
            zlib.decompress(data)
    except ImportError:
        return True
    except Exception:  # zlib.error or ZstdError: the file is truncated
        return False
    return True
