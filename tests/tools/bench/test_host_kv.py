import dataclasses

import pytest

from tests.golden import weights
from tests.micro_model import one_layer
from v4jax import config
from v4jax.core.errors import UserError
from v4jax.tools import bench
from v4jax.tools.bench import host_kv

pytestmark = pytest.mark.slow

MODEL = one_layer("csa", indexer=config.Indexer(index_n_heads=4, index_head_dim=8, index_topk=4))
CONFIG = config.Config(name="tiny", model=MODEL)


def test_the_suite_measures_what_it_says(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(host_kv, "load", lambda name: CONFIG)
    monkeypatch.setattr(host_kv, "LENGTHS", (2048, 4096))
    monkeypatch.setattr(host_kv, "SLOTS", 16)
    monkeypatch.setattr(host_kv, "ROWS", 2)
    monkeypatch.setattr(host_kv, "_random", lambda model: weights.build(model, weights.random_flat(model, 0)))
    records = bench.run("host_kv", config=CONFIG, rounds=1, contexts=["300"], json=str(tmp_path / "records.json"))
    value = {(record["metric"], record.get("context"), record.get("arm")): record["value"] for record in records}
    assert value["same_bits", 300, None] == 1 and 0 <= value["hit_rate", 300, None] < 1
    assert value["decode_speed", 300, "live"] > 0 and value["decode_speed_kept", 300, None] > 0
    entries = 4096 // 4 + 64  # beside them the null block
    saved = value["device_bytes_plain", 4096, None] - value["device_bytes_live", 4096, None]
    assert value["host_bytes_live", 4096, None] == entries * 28  # 8 numbers in 8 bits, 8 in 16, a scale, in whole words
    assert saved == entries * (28 - 4) - 17 * (28 + 8) - 20
    assert 0 < value["device_less", 2048, None] < value["device_less", 4096, None]
    assert "copies a CSA layer, from live arrays" in capsys.readouterr().out


def test_hit_rates_of_a_trained_model_are_shown_and_drawn(tmp_path, capsys):
    records = host_kv._show_hits("trained", MODEL, {16: (0.5, True), 32: (0.75, True)})
    assert [(record["slots"], record["value"]) for record in records] == [(16, 0.5), (32, 0.75)]
    assert "| 32             | 6%             | 75.0%" in capsys.readouterr().out
    sizes = {(1024 << i, arm): host_kv.Bytes(10 << i, 5 << i, 1) for i in range(2) for arm in ("bf16", "fp8", "live")}
    host_kv._plot(str(tmp_path / "plot.png"), sizes, {16: (0.5, True), 32: (0.75, True)})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("contexts", [["16"], ["5000"]])
def test_contexts_that_cannot_be_measured_are_one_line(contexts):
    with pytest.raises(UserError, match="cannot be measured; take more than topk 4 entries hold, and at most"):
        bench.run("host_kv", config=CONFIG, contexts=contexts)


def test_models_without_picks_are_one_line():
    bare = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, layer_types=("swa", "hca")))
    with pytest.raises(UserError, match="about csa layers"):
        bench.run("host_kv", config=bare, contexts=["300"])
