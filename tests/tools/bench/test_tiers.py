import pytest

from tests.golden import weights
from tests.micro_model import one_layer
from v4jax import config
from v4jax.core.errors import UserError
from v4jax.tools import bench
from v4jax.tools.bench import host_kv, tiers

pytestmark = pytest.mark.slow

MODEL = one_layer("csa", indexer=config.Indexer(index_n_heads=4, index_head_dim=8, index_topk=20))
CONFIG = config.Config(name="tiny", model=MODEL, serve=config.Serve(max_num_batched_tokens=16))


def test_the_suite_measures_what_it_says(monkeypatch, tmp_path, capsys):
    draw = lambda model: weights.build(model, weights.random_flat(model, 0))
    monkeypatch.setattr(tiers, "_random", draw)
    monkeypatch.setattr(tiers, "BURST", 1)  # fewer programs
    monkeypatch.setattr(tiers, "SYSTEMS", 1)
    monkeypatch.setattr(tiers, "CONVERSATIONS", 3)
    monkeypatch.setattr(tiers, "load", lambda name: CONFIG)
    monkeypatch.setattr(host_kv, "LENGTHS", (2048,))
    monkeypatch.setattr(host_kv, "SLOTS", 20)
    plot = tmp_path / "plot.png"
    records = bench.run(
        "tiers", config=CONFIG, rounds=1, contexts=["300"], json=str(tmp_path / "records.json"), plot=str(plot)
    )
    value = {(record["metric"], record.get("arm")): record["value"] for record in records}
    assert value["restart_same_tokens", None] == 1 and value["first_token", "restart"] > 0
    arms = [arm for metric, arm in value if metric == "trace_hit_rate"]
    assert len(arms) == 6 and all(value["trace_same_tokens", arm] == 1 for arm in arms)
    assert value["trace_hit_rate", tiers._ANEW] == 0
    assert 0 < value["trace_hit_rate", "device"] <= value["trace_hit_rate", "device, host, disk"]
    assert {value["trace_device_bytes", arm] for arm in arms[1:]} == {value["trace_device_bytes", "device"]}
    assert 0 < value["device_bytes_live", None] < value["device_bytes_plain", None]
    assert 0 < value["trace_resumable_per_device_gb", "device"] < value["trace_resumable_per_device_gb", arms[-1]]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "a prompt after a restart" in capsys.readouterr().out


@pytest.mark.parametrize("contexts", [["0"], ["4096"]])
def test_contexts_that_cannot_be_measured_are_one_line(contexts):
    with pytest.raises(UserError, match="needs contexts from 1 to 4080"):
        bench.run("tiers", config=CONFIG, contexts=contexts)
