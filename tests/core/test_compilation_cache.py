"""The persistent compilation cache: where it is stored, when it is off, and that damage to its files hurts no run."""

import importlib.metadata
import os
import subprocess
import sys
import time
import zlib

import pytest

from v4jax.core import compilation_cache
from v4jax.core.errors import UserError

PROGRAM = """
import sys
from v4jax.core import compilation_cache
from jax import monitoring
import jax
compilation_cache.is_safe = lambda version: sys.argv[2] == "safe"
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
directory = compilation_cache.enable(None if sys.argv[1] == "default" else sys.argv[1])
jax.jit(lambda x: (x @ x + 3.0).sum())(jax.numpy.ones((64, 64))).block_until_ready()
print(directory, len(hits))
"""


def run(choice, tmp_path, safe="safe", **environment):
    """(directory, cache hits) of a process that compiles one function; nothing may appear on stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS", "XDG_"))}
    kept |= {"HOME": str(tmp_path / "home"), "XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept |= environment
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(choice), safe], env=kept, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    directory, hits = done.stdout.split()
    return directory, int(hits)


def programs(directory):
    return sorted(directory.glob("*-cache"))


needs_hits = pytest.mark.skipif(
    not compilation_cache.is_safe(importlib.metadata.version("jaxlib")), reason="jaxlib dies of writing programs"
)


@needs_hits
def test_a_second_process_finds_the_programs_and_a_damaged_one_is_replaced(tmp_path):
    directory, hits = run("default", tmp_path)
    assert hits == 0 and directory.startswith(str(tmp_path / "home/.cache/v4jax/jax/"))
    assert run("default", tmp_path)[1] > 0
    base = tmp_path / "home/.cache/v4jax/jax"
    [directory] = base.iterdir()
    assert directory.stat().st_mode & 0o077 == 0
    old = time.time() - 3600
    (directory / "swept").unlink()
    for path in programs(directory):
        path.write_bytes(path.read_bytes()[:-5])
        os.utime(path, (old, old))
    assert run("default", tmp_path)[1] == 0
    assert run("default", tmp_path)[1] > 0


@needs_hits
def test_a_directory_that_cannot_be_written_is_read(tmp_path):
    directory = tmp_path / "cache"
    run(directory, tmp_path)
    for path in programs(directory):  # a later write fails even for root, who may write anywhere
        path.with_name(path.name).chmod(0o400)
    directory.chmod(0o500)
    assert run(directory, tmp_path)[1] > 0
    directory.chmod(0o700)


def test_xdg_cache_home_and_jax_s_own_variable(tmp_path):
    assert run("default", tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg"))[0].startswith(str(tmp_path / "xdg/v4jax/jax"))
    assert run("default", tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"))[0] == "None"
    assert not (tmp_path / "home").exists()


def test_off_is_off(tmp_path):
    for choice, safe in [("off", "safe"), ("default", "unsafe")]:
        assert run(choice, tmp_path, safe=safe) == ("None", 0)
    assert run("off", tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax")) == ("None", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_used_is_no_error(tmp_path):
    (tmp_path / "home").write_text("not a directory")
    assert run("default", tmp_path) == ("None", 0)


def test_a_directory_that_others_can_write_is_refused(tmp_path):
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(UserError, match="other users can write programs there"):
        compilation_cache.enable(str(directory))


@pytest.mark.parametrize(
    "version, safe",
    [("0.10.2", True), ("0.11.0", True), ("0.12.0", False), ("0.12.0.1", False), ("0.13.1", False), ("1.0", False)],
)
def test_versions_of_jaxlib_that_die_are_left_alone(version, safe):
    assert compilation_cache.is_safe(version) is safe


def test_sweeping_keeps_the_newest_and_what_is_being_written(tmp_path):
    whole, now = zlib.compress(os.urandom(1000)), time.time()
    files = {
        "oldest": (whole, 500),
        "cut": (whole[:-9], 400),
        "old": (whole, 300),
        "new": (whole, 200),
        "written": (whole[:-9], 1),
        "empty": (b"", 100),
    }
    for name, (data, age) in files.items():
        (tmp_path / f"{name}-cache").write_bytes(data)
        os.utime(tmp_path / f"{name}-cache", (now - age, now - age))
    (tmp_path / "another").write_bytes(b"file")
    compilation_cache.sweep(tmp_path, max_bytes=3 * len(whole))
    assert [path.name for path in programs(tmp_path)] == ["new-cache", "old-cache", "written-cache"]
    assert (tmp_path / "another").exists()
    compilation_cache.sweep(tmp_path, max_bytes=0)
    assert programs(tmp_path) == []
