"""Conversion in either direction, and what it refuses."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest

from v4jax.checkpoint import hf, load_config
from v4jax.checkpoint import safetensors as st
from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.model_io import open_checkpoint
from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Tokenizer


@pytest.fixture
def source(tmp_path, tiny, random_flat) -> pathlib.Path:
    """A Hugging Face directory in bfloat16 with a tokenizer."""
    hf.write_hf(tmp_path / "source", tiny, random_flat(tiny, ml_dtypes.bfloat16))
    Tokenizer().save(tmp_path / "source")
    return tmp_path / "source"


def test_there_and_back_is_exact(tmp_path, source, same_bits):
    convert(source, tmp_path / "orbax")
    files = ["checkpoints", "tokenizer.json", "tokenizer_config.json", "v4jax.json"]
    assert sorted(os.listdir(tmp_path / "orbax")) == files
    convert(tmp_path / "orbax", tmp_path / "back")
    assert sorted(os.listdir(tmp_path / "back")) == sorted(os.listdir(source))
    for file in set(os.listdir(source)) - {st.SINGLE_NAME}:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes(), file
    # The headers differ: each holds checksums of the files that lay there when it was written.
    stores = [st.SafetensorsDir(path) for path in (source, tmp_path / "back")]
    same_bits(*({name: store.read(name) for name in store.names()} for store in stores))


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_types_are_converted(tmp_path, source, tiny, same_bits, format):
    convert(source, tmp_path / "wide", format=format, dtype="float32")
    config, tensors = open_checkpoint(tmp_path / "wide")
    assert config.model == dataclasses.replace(tiny, dtype="float32") == load_config(tmp_path / "wide").model
    same_bits(tensors, hf.read_hf(source, "float32")[1])
    convert(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16")
    _, tensors = open_checkpoint(tmp_path / "narrow")
    assert tensors.dtype("norm.scale") == np.float32 and tensors.dtype("head.weight") == ml_dtypes.bfloat16


COMPANIONS = {
    "generation_config.json": '{"eos_token_id": [1, 5], "temperature": 0.6}',
    "chat_template.jinja": "{{ messages }}",
    "modeling_custom.py": "x = 1",
    "LICENSE": "MIT",
    "README.md": "# hello",
    "encoding/encode.py": "y = 2",
    "special_tokens_map.json": "{}",
}
FIELDS = {"auto_map": {"AutoModel": "modeling_custom.Model"}, "transformers_version": "5.0", "my_field": [1, None]}


@pytest.fixture
def released(source) -> pathlib.Path:
    """The source with all that a release brings besides, and what is not handed on."""
    for name, text in COMPANIONS.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    config = json.loads((source / "config.json").read_text()) | FIELDS
    config |= {"quantization_config": None, "torch_dtype": "bfloat16", "eos_token_id": [1, 7], "bos_token_id": None}
    (source / "config.json").write_text(json.dumps(config))
    (source / "pytorch_model.bin").write_text("weights")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / ".gitattributes").write_text("*.bin lfs")
    return source


def files_of(directory: pathlib.Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


@pytest.mark.parametrize("through", [["orbax", "huggingface"], ["huggingface"], ["orbax", "orbax", "huggingface"]])
def test_all_that_a_release_brings_survives(tmp_path, released, through):
    at = released
    for number, format in enumerate(through):
        convert(at, tmp_path / str(number), format=format)
        at = tmp_path / str(number)
        for name, text in COMPANIONS.items():
            assert (at / name).read_text() == text, name
        assert load_config(at).model == load_config(released).model
    weights = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files_of(at) == {*COMPANIONS, *weights}
    values = json.loads((at / "config.json").read_text())
    assert {name: values[name] for name in FIELDS} == FIELDS
    assert (values["eos_token_id"], values["bos_token_id"]) == ([1, 7], None)
    assert not {"quantization_config", "torch_dtype", "rope_scaling"} & set(values)


def test_fields_handed_on_change_none_of_ours(tmp_path, released):
    convert(released, tmp_path / "orbax")
    file = tmp_path / "orbax" / "v4jax.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"huggingface": {"vocab_size": 5, "my_field": 7}}))
    convert(tmp_path / "orbax", tmp_path / "back")
    assert load_config(tmp_path / "back").model == load_config(released).model
    assert json.loads((tmp_path / "back" / "config.json").read_text())["my_field"] == 7
    file.write_text(json.dumps(stored | {"huggingface": [1]}))
    with pytest.raises(UserError, match="v4jax.json: the field 'huggingface' is no object"):
        convert(tmp_path / "orbax", tmp_path / "more")


def test_links_are_followed_within_the_checkpoint_alone(tmp_path, released):
    (tmp_path / "secret").write_text("mine")
    (released / "leak.txt").symlink_to(tmp_path / "secret")
    (released / "folder").symlink_to(tmp_path)
    (released / "COPYING").symlink_to("LICENSE")
    convert(released, tmp_path / "out")
    assert files_of(tmp_path / "out") & {"leak.txt", "COPYING"} == {"COPYING"}
    assert not (tmp_path / "out" / "folder").exists()
    repository = tmp_path / "models--a--b"  # Hugging Face's cache: a snapshot is links into blobs
    (repository / "snapshots").mkdir(parents=True)
    shutil.move(released, repository / "blobs")
    (repository / "snapshots" / "abc").mkdir()
    for file in files_of(repository / "blobs"):
        link = repository / "snapshots" / "abc" / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(repository / "blobs" / file)
    convert(repository / "snapshots" / "abc", tmp_path / "cached")
    assert set(COMPANIONS) <= files_of(tmp_path / "cached")


def test_a_run_hands_on_its_tokenizer_alone(tmp_path, source):
    convert(source, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "v4jax.json").read_text())
    assert config.pop("huggingface") == {}
    (tmp_path / "run" / "v4jax.json").write_text(json.dumps(config))  # as a training run writes it
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    (tmp_path / "run" / "generation_config.json").write_text("{}")
    convert(tmp_path / "run", tmp_path / "out")
    wanted = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(files_of(tmp_path / "out")) == wanted


def test_nothing_is_overwritten_unasked(tmp_path, source):
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("precious")
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match="out is not empty; choose another target, or pass --overwrite"):
        convert(source, tmp_path / "out", dtype="float32")
    assert files_of(tmp_path / "out") == before and load_config(tmp_path / "out").model.dtype == "bfloat16"
    convert(source, tmp_path / "out", dtype="float32", overwrite=True)
    assert load_config(tmp_path / "out").model.dtype == "float32"
    assert not (tmp_path / "out" / "notes.txt").exists()  # as a chat template of the earlier model must
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    for format in ("orbax", "huggingface"):
        with pytest.raises(UserError, match="other exists and is no model directory"):
            convert(source, tmp_path / "other", format=format, overwrite=True)


def test_what_was_written_is_said(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr("v4jax.checkpoint.convert._REPORT_SECONDS", 0.0)
    written = convert(source, tmp_path / "back", format="huggingface", progress=True)
    size = sum(file.stat().st_size for file in (tmp_path / "back").iterdir())
    assert written.files.keys() == set(os.listdir(tmp_path / "back")) and sum(written.files.values()) == size
    assert str(written) == (
        f"wrote {tmp_path / 'back'} (huggingface, bfloat16, {size / 1e6:.1f} MB): config.json, "
        "model.safetensors, tokenizer.json, tokenizer_config.json"
    )
    lines = capsys.readouterr().err.splitlines()
    done, total = lines[-1].removeprefix("converting: ").split(" of ")
    assert len(lines) > 10 and done == total and total.endswith(" MB")
    assert "checkpoints/" in str(convert(source, tmp_path / "orbax"))
    assert capsys.readouterr().err == ""


def test_what_is_refused(tmp_path, source):
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(UserError, match="source and target are both .*; choose another target"):
            convert(source, target, format="huggingface")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for format in ("orbax", "huggingface"):
        with pytest.raises(UserError, match="full is not empty; choose another target"):
            convert(source, tmp_path / "full", format=format)
    with pytest.raises(UserError, match="nowhere is missing"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(UserError, match="is no checkpoint"):
        convert(tmp_path / "full", tmp_path / "new")
    with pytest.raises(UserError, match="no format 'torch'; formats: huggingface, orbax"):
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
