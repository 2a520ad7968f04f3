"""The persistent compilation cache of the command line: compiled programs on disk, so that a second run skips XLA.

JAX keeps the cache and its keys; this module says where the cache lies, when it is off, and keeps the directory small
and whole. Imports jax inside functions alone, because help and mistakes must not wait for it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import stat
import time
import warnings
import zlib

from v4jax.core.errors import UserError

OFF = "off"
# jaxlib 0.12 dies of a segmentation fault while it serializes some programs (twice in long test runs). Until a later
# version is known to be safe, the cache has to be asked for there.
_FIRST_UNSAFE = (0, 12)
_MIN_COMPILE_SECONDS = 0.3  # programs that compile faster are not worth a file
_MAX_BYTES = 4 << 30  # of all files; the programs of `tiny` take some 50 MB
_SETTLED_SECONDS = 60  # a younger file may still be written by another process
_SUFFIX = "-cache"  # of JAX's files
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # the first bytes of a frame


def is_safe(jaxlib_version: str) -> bool:
    """Whether programs of this jaxlib can be written to disk without the risk of a crash."""
    return tuple(int(part) for part in jaxlib_version.split(".")[:2]) < _FIRST_UNSAFE


def default_directory() -> pathlib.Path:
    """`$XDG_CACHE_HOME/v4jax/jax/VERSION-CPU`; XDG_CACHE_HOME is ~/.cache where it is unset or relative.

    Programs for CPUs hold the instructions of one kind of CPU. Machines of several kinds may share a home directory,
    so each kind has a directory of its own.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "v4jax" / "jax" / f"{importlib.metadata.version('jaxlib')}-{_cpu()}"


def _cpu() -> str:
    """Name of this kind of CPU: its architecture and a digest of the instruction sets that Linux lists."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine() or 'cpu'}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def enable(choice: str | None) -> pathlib.Path | None:
    """Turn on JAX's persistent compilation cache for this process.

    Args:
      choice: A directory, "off", or None for the default: JAX_COMPILATION_CACHE_DIR where that is set, else
        `default_directory()`, else no cache (jaxlib 0.12, or a home that cannot be used).

    Returns:
      The directory, or None where there is no cache or JAX's own variable names it.

    Raises:
      UserError: A directory that was asked for cannot be used.
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
    # A cache that fails costs the time to compile. JAX compiles anew, and warns at every program.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    return directory


def _usable(choice: str | None) -> pathlib.Path | None:
    """The directory, made and swept; None where the default one cannot be used."""
    try:
        directory = pathlib.Path(choice).expanduser() if choice is not None else default_directory()
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
    """Why programs from this directory must not be run; "" if they may: JAX runs the code it finds there."""
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a directory"
    if hasattr(os, "geteuid") and (found.st_uid not in (0, os.geteuid()) or found.st_mode & stat.S_IWOTH):
        return "other users can write programs there, and JAX would run them"
    return ""


def sweep(directory: pathlib.Path, max_bytes: int = _MAX_BYTES) -> None:
    """Delete damaged programs, and the least recently used ones beyond `max_bytes`.

    JAX writes a program into its final file, so a process that is killed leaves a file cut short, and JAX never
    replaces a file. Only files written since the last sweep are read. Errors are ignored: another process may sweep at
    the same time, and the directory may be read-only.
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
    """Whether the file can be decompressed; one that was compressed by a package that is not here counts as whole."""
    data = path.read_bytes()
    try:
        if data.startswith(_ZSTANDARD):
            from compression import zstd  # Python 3.14; JAX uses it from there on, zlib before

            zstd.decompress(data)
        else:
            zlib.decompress(data)
    except ImportError:
        return True
    except Exception:  # zlib.error, ZstdError: the file is cut short
        return False
    return True
