"""Eight fake CPU devices, a quick compiler and one cache of programs for the whole run, before anything imports jax."""

import atexit
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from tests.compiler import KEEPS, PATIENT, QUICK

# A shell that starts the tests in the background has them ignore Ctrl-C, and the programs that they start too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

assert "jax" not in sys.modules, "jax was imported before the tests chose its devices"
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = ["--xla_force_host_platform_device_count=8", *QUICK, *PATIENT]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

# Workers of pytest-xdist and programs that tests start inherit the cache, so each program is compiled once a run.
# A fresh directory every time: a test that kills its child may leave a truncated entry behind.
if KEEPS and "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="v4jax-test-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


_MAX_BYTES = 4 << 30  # resident memory that a process of the tests may ever take
_FULL_BYTES = 3 << 29  # resident memory from which compiled programs are dropped
_FULL_MAPPINGS = 20_000  # memory mappings from which they are; Linux allows a process 65,530
_PEAKS: dict[str, int] = {}  # process -> its peak of resident memory, bytes


def _memory(field: str) -> int:
    """Return VmRSS or VmHWM (its peak) of this process in bytes; 0 where there is no /proc."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)


def _holds_much() -> bool:
    """Return whether compiled programs fill this process. Where there is no /proc they always do."""
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        return True
    return _memory("VmRSS") > _FULL_BYTES or maps.read_bytes().count(b"\n") > _FULL_MAPPINGS


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Drop compiled programs between modules once they fill the process.

    A worker that keeps all of them takes over 5 GB and more memory mappings than Linux allows, and XLA dies of a
    segmentation fault while it compiles one more. A worker that drops them after every module traces and loads the
    shared ones again.
    """
    yield
    if (jax := sys.modules.get("jax")) is not None and _holds_much():
        jax.clear_caches()


def pytest_sessionfinish(session):
    """Send this worker's peak of memory to the controller, or keep it; fail a session above the bound."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = _memory("VmHWM")
        return
    _PEAKS.setdefault("tests", _memory("VmHWM"))
    if max(_PEAKS.values()) > _MAX_BYTES and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Take the peak of a worker of pytest-xdist, which a worker that crashed does not send."""
    _PEAKS[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", 0)


def pytest_terminal_summary(terminalreporter):
    """Print the peaks of memory."""
    peaks = ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in _PEAKS.items())
    verdict = f" is more than {_MAX_BYTES >> 30} GiB" if max(_PEAKS.values()) > _MAX_BYTES else ""
    terminalreporter.write_line(f"peak of memory: {peaks}{verdict}")


@pytest.fixture(scope="session")
def project_files() -> list[str]:
    """Files of the project, from its root: tracked ones and new ones that git does not ignore."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the project's files")
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [file for file in listed if (root / file).is_file()]
