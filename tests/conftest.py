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

from tests.compiler import KEEPS, QUICK

# A shell that starts the tests in the background has them ignore Ctrl-C, and the programs that they start too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

assert "jax" not in sys.modules, "jax was imported before the tests chose its devices"
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = ["--xla_force_host_platform_device_count=8", *QUICK]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

# Workers of pytest-xdist and programs that tests start inherit the cache, so each program is compiled once a run.
# A fresh directory every time: a test that kills its child may leave a truncated entry behind.
if KEEPS and "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="v4jax-test-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Drop a module's compiled programs. A worker that keeps all of them takes over 5 GB and many memory mappings, and
    XLA then dies of a segmentation fault while it compiles one more."""
    yield
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()


@pytest.fixture(scope="session")
def project_files() -> list[str]:
    """Files of the project, from its root: tracked ones and new ones that git does not ignore."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the project's files")
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [file for file in listed if (root / file).is_file()]
