"""The kv suite: published sizes, measured ones equal to the formula, flat records."""

import dataclasses
import json

import pytest

from tests.micro_model import micro
from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES
from v4jax.config import Config
from v4jax.core.errors import UserError
from v4jax.tools import bench

CONFIG = Config(name="mine", model=micro())


def test_sizes_by_formula_and_from_live_arrays(tmp_path, capsys):
    records = bench.run("kv", config=CONFIG, json=str(tmp_path / "kv.json"))
    assert json.loads((tmp_path / "kv.json").read_text()) == records
    tokens = [r for r in records if r["metric"] == "bytes_per_token"]
    sizes = {(r["config"], r["precision"], r["source"]): r["value"] for r in tokens}
    names = ("v4_flash", "v4_pro", "mine")
    assert set(sizes) == {
        (name, layout, source) for name in names for layout in KV_CACHE_DTYPES for source in ("formula", "measured")
    }
    for name in names:
        for layout in KV_CACHE_DTYPES:
            assert sizes[name, layout, "measured"] == sizes[name, layout, "formula"]
    assert [int(sizes["v4_flash", layout, "measured"]) for layout in KV_CACHE_DTYPES[1:]] == [6880, 3850, 3514]
    assert [int(sizes["v4_pro", layout, "measured"]) for layout in KV_CACHE_DTYPES[1:]] == [9848, 5511, 5031]
    assert all(r["suite"] == "kv" and r["unit"] == "B" for r in records)
    printed = capsys.readouterr().out
    assert "3,514.25" in printed and "5,031.44" in printed and "mine" in printed


def test_a_published_config_is_listed_once(capsys):
    from v4jax import config

    records = bench.run("kv", config=config.load("v4_flash"))
    assert len(records) == 2 * len(KV_CACHE_DTYPES) * 3
    assert capsys.readouterr().out.count("fp8_fp4") == 2


def test_a_model_without_entries_has_nothing_to_show():
    model = dataclasses.replace(CONFIG.model, layer_types=("swa",))
    with pytest.raises(UserError, match="window layers alone"):
        bench.run("kv", config=dataclasses.replace(CONFIG, model=model))
