"""The lock of a workdir where the file system has no locks, or refuses for another reason."""

import errno
import fcntl
import os

import pytest

from v4jax.core.errors import UserError
from v4jax.train.workdir_lock import LOCK_NAME, workdir_lock


def refuse(monkeypatch, number: int) -> None:
    """Let `flock` fail with an error of the system."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_workdir_lock_warns_where_there_are_no_locks_and_goes_on(tmp_path, monkeypatch, capsys, number):
    refuse(monkeypatch, number)
    entered = []
    for _ in range(2):  # another run is not noticed
        with workdir_lock(tmp_path / "run"):
            entered.append(number)
    lines = capsys.readouterr().err.splitlines()
    assert len(entered) == len(lines) == 2 and (tmp_path / "run" / LOCK_NAME).is_file()
    assert "is on a file system without locks" in lines[0] and "see that no second run trains there" in lines[0]


def test_workdir_lock_refuses_at_any_other_error(tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match="cannot write .*train.lock: .*nothing was trained"), workdir_lock(tmp_path):
        raise AssertionError("it was entered")
