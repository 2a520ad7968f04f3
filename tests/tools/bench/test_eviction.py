from tests.micro_model import micro
from v4jax import config
from v4jax.tools import bench
from v4jax.tools.bench import eviction

CONFIG = config.Config(name="tiny", model=micro())


def test_the_replay_counts_what_each_policy_keeps(monkeypatch, capsys):
    monkeypatch.setattr(eviction, "CONVERSATIONS", 40)
    monkeypatch.setattr(eviction, "SEEDS", 2)
    records = bench.run("eviction", config=CONFIG)
    assert records == bench.run("eviction", config=CONFIG)  # it is exact
    at = lambda metric, arm, host, disk: next(
        r["value"]
        for r in records
        if (r["metric"], r["arm"], r["host_share"], r["disk_share"]) == (metric, arm, host, disk)
    )
    for arm in eviction.ARMS:
        hits = [at("hit_rate", arm, host, 0) for host in (0.05, 0.4)]
        assert 0 < hits[0] < hits[1] <= at("hit_ceiling", arm, 0.05, 0)
        parts = sum(at(f"{tier}_hit_rate", arm, 0.1, 0.2) for tier in ("device", "host", "disk"))
        assert abs(parts - at("hit_rate", arm, 0.1, 0.2)) < 1e-9 and at("disk_hit_rate", arm, 0.4, 0) == 0
    assert at("hit_rate_beyond_lru", "lru", 0.2, 0) == 0
    assert "host and disk as shares" in capsys.readouterr().out


def test_an_infinite_cache_finds_what_was_there_before():
    sizes = {"block": 1, "record": 1}
    rates = eviction._replay(256, sizes, (1 << 40, 0, 0), "lru", False, seed=0)
    assert rates["host"] == rates["disk"] == 0 and 0.5 < rates["device"] < 1
    assert eviction._replay(256, sizes, (1, 1 << 40, 0), "lru", False, seed=0)["host"] == rates["device"]
