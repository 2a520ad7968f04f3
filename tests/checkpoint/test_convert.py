"""Conversion in either direction, and what it refuses."""

import dataclasses
import os
import pathlib
import resource

import ml_dtypes
import numpy as np
import pytest

from v4jax.checkpoint import hf, load_config
from v4jax.checkpoint import safetensors as st
from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.model_io import open_checkpoint
from v4jax.core.check import UserError
from v4jax.data.tokenizer import Tokenizer


@pytest.fixture
def source(tmp_path, tiny, random_flat) -> pathlib.Path:
    """A Hugging Face directory in bfloat16 with a tokenizer."""
    hf.write_hf(tmp_path / "source", tiny, random_flat(tiny, ml_dtypes.bfloat16))
    Tokenizer().save(tmp_path / "source")
    return tmp_path / "source"


def test_there_and_back_is_exact(tmp_path, source):
    convert(source, tmp_path / "orbax")
    files = ["checkpoints", "tokenizer.json", "tokenizer_config.json", "v4jax.json"]
    assert sorted(os.listdir(tmp_path / "orbax")) == files
    convert(tmp_path / "orbax", tmp_path / "back")
    assert sorted(os.listdir(tmp_path / "back")) == sorted(os.listdir(source))
    for file in os.listdir(source):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes(), file


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_types_are_converted(tmp_path, source, tiny, same_bits, format):
    convert(source, tmp_path / "wide", format=format, dtype="float32")
    config, tensors = open_checkpoint(tmp_path / "wide")
    assert config.model == dataclasses.replace(tiny, dtype="float32") == load_config(tmp_path / "wide").model
    same_bits(tensors, hf.read_hf(source, "float32")[1])
    convert(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16")
    _, tensors = open_checkpoint(tmp_path / "narrow")
    assert tensors.dtype("norm.scale") == np.float32 and tensors.dtype("head.weight") == ml_dtypes.bfloat16


def test_what_is_refused(tmp_path, source):
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(UserError, match="source and target are both .*; choose another target"):
            convert(source, target, format="huggingface")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for format in ("orbax", "huggingface"):
        with pytest.raises(UserError, match="full exists and is no model directory"):
            convert(source, tmp_path / "full", format=format)
    with pytest.raises(UserError, match="nowhere is missing"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(UserError, match="is no checkpoint"):
        convert(tmp_path / "full", tmp_path / "new")
    with pytest.raises(UserError, match="no format 'torch'; choose huggingface or orbax"):
        convert(source, tmp_path / "new", format="torch")
    assert sorted(os.listdir(tmp_path)) == ["full", "link", "source"]


@pytest.mark.parametrize("format", ["orbax", "huggingface"])
def test_a_source_damaged_midway_leaves_nothing(tmp_path, source, monkeypatch, format):
    original, read = st.SafetensorsDir.read, []

    def fail(self, name, index=()):
        read.append(name)
        if len(read) == 20:
            raise UserError("model.safetensors ends inside a tensor")
        return original(self, name, index)

    monkeypatch.setattr(st.SafetensorsDir, "read", fail)
    with pytest.raises(UserError, match="ends inside a tensor"):
        convert(source, tmp_path / "new", format=format)
    assert os.listdir(tmp_path) == ["source"]


def test_a_full_disk_leaves_nothing(tmp_path, source):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*new: File too large; free some .* nothing was changed"):
            convert(source, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["source"]
