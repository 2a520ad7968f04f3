"""The suites decode and generate: every arm on a small model, what is printed, drawn and refused."""

import dataclasses
import json

import numpy as np
import pytest

from tests.golden import weights
from tests.micro_model import one_layer
from v4jax import cli
from v4jax.config import Cache, Config, Indexer, Serve
from v4jax.core.errors import UserError
from v4jax.tools import bench
from v4jax.tools.bench import decode, generate, report

pytestmark = pytest.mark.slow

MODEL = one_layer("csa", indexer=Indexer(index_n_heads=4, index_head_dim=8, index_topk=20))
CONFIG = Config(name="mine", model=MODEL, serve=Serve(max_num_batched_tokens=16))
CONTEXTS = (20, 300)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Weights are drawn by numpy: JAX would compile a program a shape to draw them."""
    draw = lambda model: weights.build(model, weights.random_flat(model, 0))
    with pytest.MonkeyPatch.context() as patch:
        for suite in (decode, generate):
            patch.setattr(suite, "_random", draw)
        yield


def test_every_arm_is_measured_printed_and_drawn(tmp_path, capsys):
    files = {name: str(tmp_path / f"decode.{name}") for name in ("json", "plot")}
    config, arms = dataclasses.replace(CONFIG, serve=Serve(quantization="fp8")), decode.ARMS | decode.WEIGHTS
    records = bench.run("decode", config=config, rounds=3, contexts=["300", "20"], **files)
    assert json.loads((tmp_path / "decode.json").read_text()) == records
    assert (tmp_path / "decode.plot").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.json", "decode.plot"]
    times = {(r["arm"], r["context"]): r for r in records if r["metric"] == "decode_time"}
    assert set(times) == {(arm, context) for arm in arms for context in CONTEXTS}
    for (arm, _), r in times.items():
        assert 0 < r["low"] <= r["value"] <= r["high"] and r["unit"] == "ms" and r["rounds"] == 3
        assert r["precision"] == arms[arm][1] and r["concurrency"] == 1 and r["config"] == "mine"
    speedups = [(r["arm"], r["context"]) for r in records if r["metric"] == "decode_speedup"]
    assert speedups == [(arm, context) for context in CONTEXTS for arm in ("A3/A0", "A1/A0", "A2/A0", "A3/A1", "A4/A3")]
    printed = capsys.readouterr().out
    assert "| 300 " in printed and "time at 300 by that at 20" in printed and "the A/A control differs by" in printed
    assert "random numbers" in printed


def test_arms_read_what_they_say():
    """Dense equals sparse as long as the top k are all there are, and FP8 is not bfloat16."""
    arms = decode._arms(MODEL, max(CONTEXTS), "auto")
    logits = lambda name, at: np.asarray(arms[name]._step(decode._heads(7, at)))
    for position, equal in ((82, True), (99, False)):  # 20 entries are complete after 83 tokens
        for dense, sparse in (("A0", "A1"), ("A2", "A3")):
            close = np.allclose(logits(dense, position), logits(sparse, position), rtol=1e-4, atol=1e-5)
            assert close == equal, (dense, position)
    assert not np.allclose(logits("A1", 82), logits("A3", 82), rtol=1e-4, atol=1e-5)


def test_quality_is_zero_where_nothing_differs_and_small_in_fp8():
    arms = decode._arms(MODEL, max(CONTEXTS), "auto")
    heads = [decode._heads(token, 290 + token) for token in range(2, 6)]
    found = decode._quality(arms, heads)
    assert set(found) == {("A3", "A1"), ("A2", "A0")}
    assert all(0 < kl < 0.05 and 0 <= same <= 1 for kl, same in found.values())
    same = decode._quality(arms | {"A3": arms["A1"], "A2": arms["A0"]}, heads)
    assert all(value == (0.0, 1.0) for value in same.values())


QUALITY = {("A3", "A1"): (1e-3, 0.5), ("A2", "A0"): (2e-3, 1.0)}


def seconds_of(per_context, rounds=5, **factors):
    """What the arms took: a time by context, times a factor by arm."""
    return {
        (context, arm): [value * factors.get(arm, 1.0)] * rounds
        for context, value in per_context.items()
        for arm in decode.ARMS
    }


def test_ratios_fit_and_growth_of_known_times(capsys):
    times = {4096: 2e-3, 65_536: 2e-3 + 61_440e-8, 1_048_576: 2e-3 + 1_044_480e-8}
    seconds = seconds_of(times, A0=4.0, A1=0.5, A2=2.0)
    records = decode._report("mine", MODEL, list(times), seconds, dict.fromkeys(times, QUALITY), 0.5, None)
    assert "WARNING" not in capsys.readouterr().out
    value = lambda metric, arm, **at: next(
        r["value"] for r in records if r["metric"] == metric and r["arm"] == arm and at.items() <= r.items()
    )
    for fast, expected in (("A3/A0", 4), ("A1/A0", 8), ("A2/A0", 2), ("A3/A1", 0.5)):
        assert value("decode_speedup", fast, context=65_536) == pytest.approx(expected)
    assert value("decode_growth", "A3") == pytest.approx(times[1_048_576] / times[4096])
    assert value("decode_slope", "A3") == pytest.approx(1e-5)
    assert value("decode_fixed", "A0") == pytest.approx(4 * (2 - 4096e-5))
    assert value("control", "A3/A3'", context=4096) == 1
    assert value("decode_kl", "A3/A1", context=4096) == 1e-3
    assert value("decode_same_token", "A2/A0", context=4096) == 1


def test_a_control_that_differs_is_told(capsys):
    decode._report("mine", MODEL, [64], seconds_of({64: 1e-3}, **{"A3'": 1.08}), {64: QUALITY}, 0.5, None)
    assert "WARNING: the A/A control differs by 8.0% (at 64 tokens): do not trust" in capsys.readouterr().out


def test_the_interval_holds_the_median():
    values = np.random.default_rng(1).normal(10, 1, 40)
    low, high = decode.interval(values)
    assert low < np.median(values) < high and high - low < 1.5
    assert decode.interval([3.0]) == (3.0, 3.0)


def test_generate_reads_prompts_through_the_engine(monkeypatch, capsys):
    monkeypatch.setattr(generate, "DECODED", 4)
    config = dataclasses.replace(CONFIG, cache=Cache(kv_cache_dtype="fp8"))
    records = bench.run("generate", config=config, rounds=2, contexts=[20, 5])
    found = [(r["metric"], r["context"], r["unit"], r["precision"], r["rounds"]) for r in records]
    units = {"prefill_time": "s", "prefill_tokens_per_second": "1/s", "decode_time": "ms"}
    expected = [(metric, length, unit, "fp8", 2) for length in (5, 20) for metric, unit in units.items()]
    assert found == [*expected, ("peak_memory", 20, "B", "fp8", 1)]
    assert records[-1]["value"] > 2**26
    assert all(r["value"] > 0 for r in records)
    assert "kv_cache_dtype fp8: one request at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    "suite, options, words",
    [
        ("decode", {"contexts": [10]}, "context 10 cannot be measured; take 17 to model.max_position_embeddings 4096"),
        ("decode", {"contexts": [5000]}, "context 5000 cannot be measured"),
        ("decode", {"contexts": ["4k"]}, "--contexts=4k are not numbers"),
        ("decode", {"checkpoint": "DIR"}, "drop --checkpoint"),
        ("generate", {"contexts": [4090]}, "needs contexts from 1 to 3839 tokens"),
        ("generate", {"plot": "x.png"}, "draws no plot"),
        ("kv", {"contexts": [64]}, "drop --contexts"),
        ("decode", {"plot": "no/such/x.png"}, "there is no directory for no/such/x.png"),
    ],
)
def test_what_cannot_be_measured_is_one_line(suite, options, words):
    with pytest.raises(UserError, match=words):
        bench.run(suite, config=CONFIG, **options)


def test_dense_and_sparse_need_an_indexer():
    model = dataclasses.replace(MODEL, layer_types=("hca",))
    with pytest.raises(UserError, match="no csa layer"):
        bench.run("decode", config=dataclasses.replace(CONFIG, model=model))


def test_contexts_come_from_the_command_line(capsys):
    assert cli.main(["bench", "--suite=decode", "--config=tiny", "--contexts=64,4k"]) == 1
    assert capsys.readouterr().err == "v4jax: --contexts=64,4k are not numbers; such as 1024,4096\n"


def test_contexts_on_the_axis_are_short():
    assert [report.short(context) for context in (20, 1024, 4096, 1_048_576)] == ["20", "1k", "4k", "1M"]
