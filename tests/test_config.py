"""Configs: presets load and validate, wrong fields and values are named, an installed wheel carries the presets."""

import dataclasses
import pathlib
import subprocess
import sys
import zipfile

import pytest

from v4jax import config as config_lib
from v4jax.config import Config, ConfigError, Model, from_dict, load, preset_names, to_dict, validate

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_preset_loads_by_name_and_by_path(path):
    config = load(path.stem)
    assert config == load(str(path)) == validate(config)
    assert config.model.layers == len(config.model.schedule) > 0


def test_presets_are_the_files():
    assert "tiny" in preset_names()
    assert preset_names() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="no config 'tinny'; did you mean 'tiny'"):
        load("tinny")


def test_argument_reaches_get_config(tmp_path):
    path = tmp_path / "wide.py"
    path.write_text(
        "from v4jax.config import Config, Model, Moe\n\ndef get_config(arg=''):\n"
        "    return Config(model=Model(schedule=('swa',), hidden_size=int(arg), moe=Moe(hash_layers=0)))\n"
    )
    assert load(f"{path}:77").model.hidden_size == 77


def test_file_without_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="does not define get_config"):
        load(str(tmp_path / "empty.py"))


def test_dict_round_trip_and_misspelt_fields():
    config = load("tiny")
    values = to_dict(config)
    assert from_dict(Config, values) == config
    values["model"]["moe"]["expert"] = 4
    with pytest.raises(ConfigError, match=r"unknown config field 'model.moe.expert'; did you mean 'model.moe.experts'"):
        from_dict(Config, values)


def test_lists_become_tuples():
    assert from_dict(Model, {"schedule": ["swa", "csa"]}).schedule == ("swa", "csa")


@pytest.mark.parametrize("part, change, says", [
    ("model", {"schedule": ()}, "model.schedule is empty"),
    ("model", {"schedule": ("swa", "mla")}, "'mla'; layers are one of swa, csa, hca"),
    ("model", {"rope_dim": 7}, "model.rope_dim 7 must be even"),
    ("model", {"o_groups": 5}, "model.o_groups 5"),
    ("model", {"hca_ratio": 7}, "model.hca_ratio 7"),
    ("model", {"dtype": "float64"}, "'float64'"),
    ("model", {"mtp_layers": 2}, "model.mtp_layers"),
    ("model", {"modalities": ("text", "image")}, "model.modalities has 'image'; this version reads text only"),
    ("model", {"modalities": ()}, "model.modalities is empty"),
    ("model", {"engram_layers": (1, 14)}, "this version has no Engram"),
    ("train", {"steps": 0}, "train.steps must be at least 1, got 0"),
    ("data", {"seq_len": 13}, "data.seq_len 13 must be a multiple"),
    ("serve", {"max_seq_len": 10**9}, "serve.max_seq_len"),
])  # fmt: skip
def test_impossible_values_are_one_line(part, change, says):
    tiny = load("tiny")
    broken = dataclasses.replace(tiny, **{part: dataclasses.replace(getattr(tiny, part), **change)})
    with pytest.raises(ConfigError) as caught:
        validate(broken)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_wheel_carries_presets_data_and_license(tmp_path):
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling, of the test extra")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("v4jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert all(name.startswith(("v4jax/", "v4jax-")) for name in names)
    [text] = [name for name in names if name.endswith(".dist-info/licenses/.github/LICENSE")]
    assert (tmp_path / "site" / text).read_text() == (ROOT / ".github/LICENSE").read_text()
    [metadata] = (tmp_path / "site").glob("v4jax-*.dist-info/METADATA")
    assert "License-Expression: Apache-2.0\n" in metadata.read_text(encoding="utf-8")
    assets = {path.name for path in (ROOT / "v4jax/data/assets").iterdir()}
    assert assets == {name.rpartition("/")[2] for name in names if name.startswith("v4jax/data/assets/")}

    code = "from v4jax import config as c; print(c.__file__, *[c.load(name).name for name in c.preset_names()])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
                          check=True, capture_output=True, text=True)  # fmt: skip
    file, *presets = done.stdout.split()
    assert pathlib.Path(file).is_relative_to(tmp_path)
    assert presets == [config_lib.load(name).name for name in preset_names()]
