"""Configs: presets load and validate, wrong fields and values are named, an installed wheel carries the presets."""

import dataclasses
import pathlib
import subprocess
import sys
import zipfile

import pytest

from v4jax import config as config_lib
from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES
from v4jax.cache.offload.eviction import POLICIES
from v4jax.config import Config, ConfigError, Data, Model, from_dict, load, preset_names, to_dict, validate
from v4jax.core.config_limits import CHOICES, RANGES
from v4jax.core.layer_spec import LayerSpec
from v4jax.models.quantize import QUANTIZATIONS

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_by_name_and_by_path(name):
    config = load(name)
    assert config == load(str(ROOT / "configs" / f"{name}.py")) == validate(config)
    assert config.model.num_hidden_layers == len(config.model.layer_types) > 0


def test_presets_are_the_files():
    assert "tiny" in preset_names()
    files = sorted((ROOT / "configs").glob("*.py")) + sorted((ROOT / "configs" / "bench").glob("*.py"))
    assert preset_names() == [str(path.relative_to(ROOT / "configs").with_suffix("")) for path in files]


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="no config 'tinny'; did you mean 'tiny'"):
        load("tinny")


def test_argument_reaches_get_config(tmp_path):
    path = tmp_path / "wide.py"
    path.write_text(
        "from v4jax.config import Config, Model, MoE\n\ndef get_config(arg=''):\n"
        "    return Config(model=Model(layer_types=('swa',), hidden_size=int(arg), moe=MoE(num_hash_layers=0)))\n"
    )
    assert load(f"{path}:77").model.hidden_size == 77


def test_file_without_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="does not define get_config"):
        load(str(tmp_path / "empty.py"))


def test_dict_round_trip_and_misspelled_fields():
    config = load("tiny")
    values = to_dict(config)
    assert from_dict(Config, values) == config
    values["model"]["moe"]["n_routed_expert"] = 4
    with pytest.raises(
        ConfigError,
        match=r"unknown config field 'model.moe.n_routed_expert'; did you mean 'model.moe.n_routed_experts'",
    ):
        from_dict(Config, values)


def test_model_layers_follow_layer_types_and_num_hash_layers():
    model = dataclasses.replace(load("tiny").model, layer_types=("swa", "csa", "hca"))
    assert model.layers == (LayerSpec("swa", "hash_moe"), LayerSpec("csa", "moe"), LayerSpec("hca", "moe"))
    assert model.mtp_layers == (LayerSpec("swa", "moe"),)
    assert dataclasses.replace(model, num_nextn_predict_layers=0).mtp_layers == ()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention": "mla"}, "the attention of a layer is 'mla'; known: swa, csa, hca"),
        ({"mlp": "dense"}, "the mlp of a layer is 'dense'; known: moe, hash_moe"),
        ({"residual": "plain"}, "the residual of a layer is 'plain'; known: mhc"),
        ({"engram": True}, "the engram of a layer is True; known: False"),
    ],
)
def test_layer_spec_refuses_unknown_values(change, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        LayerSpec(**({"attention": "swa", "mlp": "moe"} | change))


def test_lists_become_tuples():
    assert from_dict(Model, {"layer_types": ["swa", "csa"]}).layer_types == ("swa", "csa")


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("model", {"layer_types": ()}, "model.layer_types is empty"),
        ("model", {"layer_types": ("swa", "mla")}, "'mla'; layers are one of swa, csa, hca"),
        ("model", {"qk_rope_head_dim": 7}, "model.qk_rope_head_dim 7 must be even"),
        ("model", {"o_groups": 5}, "model.o_groups 5"),
        ("model", {"compress_rate_csa": 1}, "model.compress_rate_csa must be at least 2, got 1"),
        ("model", {"compress_rate_hca": 0}, "model.compress_rate_hca must be at least 1, got 0"),
        ("model", {"dtype": "float64"}, "'float64'"),
        ("model", {"num_nextn_predict_layers": 2}, "model.num_nextn_predict_layers"),
        ("model", {"modalities": ("text", "image")}, "model.modalities has 'image'; this version reads text only"),
        ("model", {"modalities": ()}, "model.modalities is empty"),
        ("model", {"engram_layers": (1, 14)}, "this version has no Engram"),
        ("train", {"steps": 0}, "train.steps must be at least 1, got 0"),
        ("train", {"seed": -1}, "train.seed must be at least 0, got -1"),
        ("data", {"seq_len": 13}, "data.seq_len 13 must be a multiple"),
        ("serve", {"max_model_len": 10**9}, "serve.max_model_len"),
    ],
)
def test_impossible_values_are_one_line(part, change, message):
    tiny = load("tiny")
    broken = dataclasses.replace(tiny, **{part: dataclasses.replace(getattr(tiny, part), **change)})
    with pytest.raises(ConfigError) as caught:
        validate(broken)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_ratios_need_not_divide_each_other():
    """A row of both kinds is cut where both ratios end; the ratio of a kind without layers has no effect."""
    model = dataclasses.replace(load("tiny").model, compress_rate_csa=4, compress_rate_hca=6)
    assert model.alignment == 12
    only_hca = dataclasses.replace(model, layer_types=("swa", "hca"), compress_rate_csa=1, compress_rate_hca=7)
    assert only_hca.alignment == 7
    for one in (model, only_hca):
        validate(dataclasses.replace(load("tiny"), model=one, data=Data(seq_len=84)))


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
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    file, *presets = done.stdout.split()
    assert pathlib.Path(file).is_relative_to(tmp_path)
    assert presets == [config_lib.load(name).name for name in preset_names()]


def test_choices_are_those_of_who_implements_them():
    """`core.config_limits` repeats names of upper packages, for it cannot import them."""
    assert set(CHOICES["cache.kv_eviction_policy"]) == set(POLICIES)
    assert CHOICES["cache.kv_cache_dtype"] == KV_CACHE_DTYPES
    assert CHOICES["serve.quantization"] == QUANTIZATIONS


def test_every_range_and_choice_is_of_a_field():
    leaves = {}

    def walk(part, path):
        for name, value in vars(part).items():
            walk(value, f"{path}{name}.") if dataclasses.is_dataclass(value) else leaves.update({path + name: value})

    walk(Config(), "")
    assert set(RANGES) | set(CHOICES) <= set(leaves)
    numbers = [name for name in RANGES if isinstance(leaves[name], (int, float)) and leaves[name] != 0]
    assert len(numbers) > 40 and all(RANGES[name][0] <= leaves[name] <= RANGES[name][1] for name in numbers)


@pytest.mark.parametrize("name", sorted(RANGES))
def test_beyond_a_range_is_one_line(name):
    *groups, last = name.split(".")
    for value in (RANGES[name][1] * 2, 10**400, float("nan"), float("inf"), "1", b"1", True):
        part = {last: value}
        for group in reversed(groups):
            part = {group: part}
        with pytest.raises(ConfigError) as caught:
            validate(from_dict(Config, _merged(to_dict(load("tiny")), part)))
        assert str(caught.value).startswith(name) and str(caught.value).isprintable()


def _merged(values: dict, part: dict) -> dict:
    return values | {key: _merged(values[key], one) if isinstance(one, dict) else one for key, one in part.items()}
