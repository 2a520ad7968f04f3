"""Which kind a directory is, and the v4jax.json that makes it a checkpoint."""

import dataclasses
import json
import os
import pathlib

import pytest

from v4jax import checkpoint
from v4jax import config as config_lib
from v4jax.checkpoint import directory
from v4jax.core.errors import UserError


class Words:
    """A tokenizer as far as checkpoints know one."""

    def save(self, path):
        (path / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("name", config_lib.preset_names())
def test_every_preset_comes_back(tmp_path, name):
    config = config_lib.load(name)
    directory.save_config(tmp_path, config)
    assert directory.read_config(tmp_path) == config
    assert os.listdir(tmp_path) == ["v4jax.json"]


def test_a_workdir_becomes_a_checkpoint(tmp_path):
    workdir = tmp_path / "runs" / "new"
    directory.save_config(workdir, config_lib.load("tiny"), Words())
    assert directory.format_of(workdir) == "orbax"
    assert sorted(os.listdir(workdir)) == ["tokenizer.json", "v4jax.json"]


def test_a_config_that_is_not_valid_is_not_saved(tmp_path):
    tiny = config_lib.load("tiny")
    with pytest.raises(config_lib.ConfigError, match="batch_size"):
        directory.save_config(tmp_path, dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, batch_size=0)))
    assert os.listdir(tmp_path) == []


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="missing is missing; give a Hugging Face directory, a v4jax one"):
        directory.format_of(tmp_path / "missing")
    with pytest.raises(UserError, match="is no checkpoint, for it holds neither v4jax.json nor config.json; give"):
        directory.format_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert directory.format_of(tmp_path) == "huggingface"
    with pytest.raises(UserError, match="config.json is a file"):
        directory.format_of(tmp_path / "config.json")


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda v: v | {"format": 3}, "has the format 3, this v4jax reads 1 to 2; use the version"),
        (lambda v: {"config": v["config"]}, "has the format None"),
        (lambda v: {"format": 1}, "holds no config"),
        (lambda v: v | {"config": [1]}, "holds no config"),
        (
            lambda v: v | {"config": v["config"] | {"model": 5}},
            "config field 'model' is 5, and must be a group of fields",
        ),
        (lambda v: v | {"config": v["config"] | {"modle": {}}}, "unknown config field 'modle'; did you mean 'model'"),
        (lambda v: [v], "holds no JSON object"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, change, complaint):
    directory.save_config(tmp_path, config_lib.load("tiny"))
    file = tmp_path / "v4jax.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=complaint) as error:
        directory.read_config(tmp_path)
    assert str(file) in str(error.value)
    file.write_text(file.read_text()[:-5])
    with pytest.raises(UserError, match="is not valid JSON"):
        directory.read_config(tmp_path)


def test_paths_in_a_checkpoint_are_not_followed(tmp_path):
    """Who publishes a checkpoint chooses neither where an engine writes nor what is read."""
    tiny = config_lib.load("tiny")
    cache = dataclasses.replace(
        tiny.cache, kv_disk_bytes=1 << 20, kv_dir=str(tmp_path / "other"), num_state_snapshots=7
    )
    data = dataclasses.replace(tiny.data, source="/etc/passwd", heldout="/etc/group", tokenizer="/etc/hosts")
    mesh = dataclasses.replace(tiny.mesh, rules=str(tmp_path / "code.py"))
    directory.save_config(tmp_path, dataclasses.replace(tiny, data=data, cache=cache, mesh=mesh))
    loaded = checkpoint.load_config(tmp_path)
    assert (loaded.cache.kv_dir, loaded.cache.kv_disk_bytes, loaded.cache.num_state_snapshots) == ("", 0, 7)
    assert (loaded.data.source, loaded.data.heldout, loaded.data.tokenizer) == ("", "", "auto")
    assert loaded.mesh == config_lib.Mesh() and loaded.model == tiny.model
    assert "passwd" not in repr(loaded) and str(tmp_path) not in repr(loaded)


def test_read_config_upgrades_version_1(tmp_path):
    stored = pathlib.Path(__file__).with_name("config_version_1.json").read_text(encoding="utf-8")  # of the preset tiny
    (tmp_path / "v4jax.json").write_text(stored, encoding="utf-8")
    assert directory.read_config(tmp_path) == config_lib.load("tiny")
    values = json.loads(stored)
    values["config"]["cache"].update(layout="fp8", directory="kv", disk=1, deadline=2.0)
    values["config"]["serve"].update(precision="fp8", max_seq_len=77)
    (tmp_path / "v4jax.json").write_text(json.dumps(values), encoding="utf-8")
    changed = directory.read_config(tmp_path)
    assert (changed.cache.kv_cache_dtype, changed.cache.kv_dir, changed.cache.kv_disk_bytes) == ("fp8", "kv", 1)
    assert (changed.cache.kv_load_timeout_s, changed.serve.quantization, changed.serve.max_model_len) == (
        2.0,
        "fp8",
        77,
    )
