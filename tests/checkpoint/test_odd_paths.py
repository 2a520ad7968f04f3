"""Directories with any name that the system allows: written, verified and read like others."""

import os

import jax
import pytest

from tests.checkpoint import bit_flips
from v4jax.checkpoint import TrainCheckpointer
from v4jax.checkpoint.convert import convert
from v4jax.config import Data
from v4jax.data.sources import load_documents

_NOT_UTF8 = b"\xe9".decode("utf-8", "surrogateescape")
NAMES = [
    "br[ack]et",
    "[!a]",
    "a*b?c",
    "back\\slash",
    "sp ace",
    "new\nline",
    "tab\t",
    "ünï→日本",
    "100%20",
    "end~",
    "~",
    "-dash",
    "quo'te\"",
    "{br,ace}",
    "$HOME",
    "a:b",
    "#a?b=c&d",
    "..a",
    _NOT_UTF8,
]


@pytest.mark.parametrize("name", NAMES, ids=[f"name{i}" for i in range(len(NAMES))])
def test_a_run_in_it_is_saved_and_restored(tmp_path, name):
    path = tmp_path / name / name
    with TrainCheckpointer(path, bit_flips.config(), keep=2) as store:
        store.save(20, bit_flips.TREE, bit_flips.EXTRAS)
    bit_flips.read("run", path)
    assert os.listdir(path / "checkpoints") == ["20"]


@pytest.mark.parametrize("name", NAMES[:8], ids=[f"name{i}" for i in range(8)])
def test_models_in_it_are_written_converted_and_read(tmp_path, name):
    (tmp_path / name).mkdir()
    for kind in ("orbax", "huggingface"):
        bit_flips.make(kind, tmp_path / name / kind)
    values = bit_flips.read("orbax", tmp_path / name / "orbax")[1]
    assert bit_flips.read("huggingface", tmp_path / name / "huggingface")[1] == values
    convert(tmp_path / name / "orbax", tmp_path / name / "other")
    assert bit_flips.read("huggingface", tmp_path / name / "other")[1] == values


@pytest.mark.parametrize("name", NAMES[:-1], ids=[f"name{i}" for i in range(len(NAMES) - 1)])
def test_data_in_it_is_found(tmp_path, name):
    (tmp_path / name).mkdir()
    for number in range(3):
        (tmp_path / name / f"{number}.txt").write_text(f"text {number}\n")
    for spec in (tmp_path / name, tmp_path / name / "*.txt", tmp_path / name / "[0-2].txt"):
        corpus = load_documents(Data(source=str(spec)))
        assert [document.text for document in corpus.train + corpus.heldout] == ["text 0\n", "text 1\n", "text 2\n"]


def test_a_step_without_an_index_is_not_finished(tmp_path, monkeypatch):
    """Orbax skips its last step in silence where a path looks like a pattern; the step must not take its name then."""
    monkeypatch.setattr("v4jax.checkpoint.orbax.plain_path", lambda path: path)
    store = TrainCheckpointer(tmp_path / "br[ack]et", bit_flips.config(), keep=2)
    store.save(20, {"model": {"a": jax.numpy.ones(3)}}, {})
    with pytest.raises(Exception, match="wrote no index of the arrays"):
        store.wait()
    assert store.latest() is None


def test_what_was_not_written_right_never_takes_the_name(tmp_path, monkeypatch):
    """A disk that stores other bytes than it was given: the target stays as it was."""
    from v4jax.checkpoint import export, safetensors
    from v4jax.core.errors import UserError

    bit_flips.make("huggingface", tmp_path / "huggingface")
    before = bit_flips.read("huggingface", tmp_path / "huggingface")
    write_all = safetensors.write_all
    flip = lambda data: bytes(data)[:-1] + bytes([bytes(data)[-1] ^ 1])
    damaged = lambda file, data: write_all(file, flip(data) if len(data) == 32 * 32 * 4 else data)
    monkeypatch.setattr(safetensors, "write_all", damaged)
    with pytest.raises(UserError, match="differs from its checksum"):
        bit_flips.make("huggingface", tmp_path / "huggingface")
    assert bit_flips.read("huggingface", tmp_path / "huggingface") == before
    read = export.StepItem.read
    other = lambda self, name, index=(): read(self, name, index) + (name == "head.weight")
    monkeypatch.setattr(export.StepItem, "read", other)
    with pytest.raises(UserError, match="head.weight was not written as it is in memory"):
        bit_flips.make("orbax", tmp_path / "orbax")
    assert sorted(os.listdir(tmp_path)) == ["huggingface"]
