"""Lock files: one owner, named to the others, and none after its process is dead."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from v4jax.core.lock import Locked, take_lock

HOLDER = (
    "import sys; from v4jax.core.lock import take_lock; f = take_lock(sys.argv[1], 'me'); print(flush=True); input()"
)


def test_a_lock_has_one_owner_and_dies_with_it(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        with pytest.raises(Locked, match="^me$"):
            take_lock(path, "you")
        process.kill()
    with take_lock(path, "you"):
        with pytest.raises(Locked, match="^you$"):
            take_lock(path)
    take_lock(path).close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_an_os_error(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError) as caught:
        take_lock(tmp_path / "lock")
    assert caught.value.errno == number


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "precious").write_text("content")
    (tmp_path / "lock").symlink_to("precious")
    with pytest.raises(OSError):
        take_lock(tmp_path / "lock", "me")
    assert (tmp_path / "precious").read_text() == "content"
