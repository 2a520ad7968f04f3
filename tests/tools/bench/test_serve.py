"""The suite serve: what it asks of a small engine, counts and refuses."""

import dataclasses
import json

import numpy as np
import pytest

from tests.golden import weights
from tests.micro_model import one_layer
from v4jax.config import Cache, Config, Serve
from v4jax.core.errors import UserError
from v4jax.tools import bench
from v4jax.tools.bench import serve

pytestmark = pytest.mark.slow

MODEL = one_layer("csa")
CONFIG = Config(
    name="mine", model=MODEL, serve=Serve(max_num_batched_tokens=16, max_model_len=64), cache=Cache(block_size=16)
)
SIZES = {"MANY": 6, "PROMPT": 10, "NEW": 6, "BURST": 24, "BURST_NEW": 6, "SHARED": 2, "POOL": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small sizes, and weights drawn by numpy: JAX would compile a program a shape to draw them."""
    for name, size in SIZES.items():
        monkeypatch.setattr(serve, name, size)
    monkeypatch.setattr(serve, "_random", lambda model: weights.build(model, weights.random_flat(model, 0)))


def test_one_many_and_a_burst(tmp_path, capsys):
    path = tmp_path / "serve.json"
    records = bench.run("serve", config=CONFIG, rounds=2, json=str(path))
    assert json.loads(path.read_text()) == records
    value = {(r["metric"], r["concurrency"]): r["value"] for r in records}
    assert len(value) == len(records) == 2 * 5 + 8 and all(r["config"] == "mine" for r in records)
    assert value["throughput_ratio", 1] == 1 and value["throughput_ratio", 6] > 0
    for count in (1, 6):
        assert 0 < value["time_to_first_token", count] <= value["time_to_last_first_token", count]
        assert value["token_time", count] > 0 and value["tokens_per_second", count] > 0
    assert value["burst_equal_answers", 24] == 24 and value["burst_leaked_pages", 24] == 0
    assert value["burst_preemptions", 24] > 0 and value["burst_prefix_hits", 24] > 0 and value["burst_time", 24] > 0
    printed = capsys.readouterr().out
    assert "24 requests at once into a cache that holds 3" in printed and "rounding" not in printed


def test_answers_that_differ_are_told(monkeypatch, capsys):
    answers = iter([serve._Answer([1], [0.1]), serve._Answer([2], [0.2])])
    engine = serve.Engine(serve._random(MODEL), CONFIG.serve, CONFIG.cache)
    monkeypatch.setattr(serve, "_serve", lambda *args: [next(answers)])
    records = serve._burst(engine, [serve._asked([5], 1)], {})
    assert next(r["value"] for r in records if r["metric"] == "burst_equal_answers") == 0
    assert "see --config.serve.batch_invariant=true" in capsys.readouterr().out


def test_requests_take_two_blocks_at_most():
    requests = serve._requests(MODEL, 16, np.random.default_rng(0))
    lengths = [len(request.prompt) for request in requests]
    assert all(16 < length + SIZES["BURST_NEW"] <= 32 for length in lengths)
    assert all(length < 16 for length in lengths[::2]) and all(length > 16 for length in lengths[1::2])
    assert len({tuple(request.prompt[:16]) for request in requests[1::2]}) == 2


def test_a_config_that_is_too_short_is_one_line():
    short = dataclasses.replace(CONFIG, serve=Serve(max_model_len=20))
    with pytest.raises(UserError, match="needs --config.serve.max_model_len=32, and it is 20"):
        bench.run("serve", config=short)
