"""Directories replaced whole: what moves along, what is refused, and what a death in between leaves."""

import errno
import os

import pytest

from v4jax.core import atomic
from v4jax.core.errors import UserError


def _write(path, *names, text="new"):
    with atomic.replace_directory(path, "marker", lambda name: name.startswith("part")) as directory:
        for name in ("marker", *names):
            atomic.write_text(directory / name, text)


@pytest.fixture
def model(tmp_path):
    """A written directory with one part."""
    _write(tmp_path / "m", "part1", text="old")
    return tmp_path / "m"


def test_replacing_drops_stale_files_and_keeps_others(model):
    _write(model, "part2")
    (model / "README.md").write_text("mine")
    (model / "sub").mkdir()
    (model / "sub" / "x").write_text("mine too")
    _write(model, "part1")
    assert os.listdir(model.parent) == ["m"]
    assert sorted(os.listdir(model)) == ["README.md", "marker", "part1", "sub"]
    assert (model / "sub" / "x").read_text() == "mine too"


def test_a_directory_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is no model directory"):
        _write(tmp_path / "m", "part1")
    assert os.listdir(tmp_path / "m") == ["thesis.txt"] and os.listdir(tmp_path) == ["m"]
    (tmp_path / "m" / "thesis.txt").unlink()
    _write(tmp_path / "m", "part1")  # an empty one is as good as none
    assert sorted(os.listdir(tmp_path / "m")) == ["marker", "part1"]


def test_plain_files_of_the_reserved_names_are_replaced(model):
    (model.parent / ".m.partial").write_text("no directory")
    (model.parent / ".m.previous").write_text("no directory")
    _write(model, "part1")
    assert os.listdir(model.parent) == ["m"] and (model / "part1").read_text() == "new"


def test_death_between_the_two_renames_is_repaired(model):
    os.rename(model, model.parent / ".m.previous")
    (model.parent / ".m.partial").mkdir()
    with pytest.raises(KeyboardInterrupt), atomic.replace_directory(model, "marker", lambda name: False):
        raise KeyboardInterrupt
    assert os.listdir(model.parent) == ["m"] and (model / "part1").read_text() == "old"


def test_failing_swap_puts_the_old_directory_back(model, monkeypatch):
    original = os.rename

    def rename(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match="Permission denied; choose a directory that can be written, nothing was"):
        _write(model, "part1")
    assert os.listdir(model.parent) == ["m"] and (model / "part1").read_text() == "old"


def test_replacing_a_text_keeps_the_old_one_on_failure(tmp_path, monkeypatch):
    atomic.replace_file(tmp_path / "a.json", b"old")

    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        atomic.replace_file(tmp_path / "a.json", b"new")
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"
