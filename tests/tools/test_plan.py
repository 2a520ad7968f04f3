"""The closed form of the planner: exact where it can be, else plausible, and clear about what it cannot."""

import dataclasses
import json
import math
import pathlib

import pytest

from v4jax import config as config_lib
from v4jax.cli import main
from v4jax.config import Mesh
from v4jax.core.errors import UserError
from v4jax.models.param_count import count_parameters
from v4jax.tools import aot, plan
from v4jax.tools.cost_model import (
    Collectives,
    Workload,
    abstract_sharding,
    attention_flops,
    default_mesh,
    estimate,
    state_bytes,
)
from v4jax.tools.topology import CHIPS, listed, parse
from v4jax.train.trainer import Trainer


def values(records, metric, **where):
    return [r["value"] for r in records if r["metric"] == metric and where.items() <= r.items()]


def test_topologies_by_name():
    pod = parse("v5p:8x8x8")
    assert (pod.chips, pod.devices, pod.device_memory) == (512, 512, int(95.74 * 2**30))
    assert parse("tpu7x:4x4x4").devices == 128 and parse("v5e:16x16x4slices").chips == 1024
    assert parse("v5e:16x16x4slices").name == "v5e:16x16x4slices" and parse("h100:64").chips == 64
    assert parse("H100:8") == parse("h100:8") and parse("h100-8") == parse("h100:8")
    assert parse("v5p-512") == parse("v5p:4x8x8") and parse("v5p-512").chips == 256  # two TensorCores a chip
    assert parse("v5litepod-16") == parse("v5e:4x4") and parse("v6e-256") == parse("v6e:16x16")
    assert parse("tpu7x-128x2slices") == parse("tpu7x:4x4x4x2slices")
    wrong = {
        "v9:2x2": "no topology",
        "v5p-500": "v5p-256, v5p-512, v5p-1024",
        "v5p:8x8": "a shape of v5p has 3 sizes",
        "h100:8x8": "1 sizes",
        "v5e:0x4": "up",
    }
    for text, message in wrong.items():
        with pytest.raises(UserError, match=message):
            parse(text)
    for chip in CHIPS.values():
        assert [t.chips for t in listed(chip)] == sorted(t.chips for t in listed(chip))


def test_accelerators_of_several_makers_are_listed():
    assert {"a100", "h100", "h200", "b200", "gb200", "mi300x"} <= set(CHIPS)
    for chip in CHIPS.values():
        assert chip.slow_network < chip.network < chip.bandwidth < chip.flops and chip.memory < chip.host_bytes


@pytest.mark.parametrize(
    "topology, expert, inside",
    [
        ("h100:64", 8, 1),
        ("h100:64", 64, 7 / 63),
        ("h100:8", 8, 1),
        ("h100:16", 2, 1),
        ("gb200:128", 64, 1),
        ("v5p:4x4x4", 64, 1),
    ],
)
def test_tokens_that_stay_in_a_host_do_not_load_its_network_cards(topology, expert, inside):
    """Of what an all-to-all sends, the part that NVLink carries; of 64 experts, 7 of the other 63 are in the host."""
    flash, work = config_lib.load("v4_flash"), Workload("train", 4096, 128)
    place = parse(topology)
    found = estimate(flash, place, Mesh("pod", expert=expert), work)
    fast, slow = (parts["all-to-all"] for parts in found.links.values())
    assert fast / (fast + slow) == pytest.approx(inside)
    assert list(found.seconds) == ["compute", "memory", *place.chip.links]
    for link, speed in zip(place.chip.links, (place.chip.network, place.chip.slow_network), strict=True):
        assert found.seconds[link] == pytest.approx(sum(found.links[link].values()) / speed)


def test_a_gather_enters_a_host_once():
    """64 GPUs gather 1 GB: 7/8 of it comes from other hosts, an eighth of that by each card, the rest by NVLink."""
    sharding = abstract_sharding(Mesh("fsdp"), 64)
    sent = Collectives(sharding, parse("h100:64"))
    assert sent.group(("fsdp",)) == (8, 8)
    sent.gather("all-gather", 1e9, ("fsdp",))
    assert sent.links["NIC"]["all-gather"] == pytest.approx(1e9 * 7 / 8 / 8)
    assert sum(link["all-gather"] for link in sent.links.values()) == pytest.approx(1e9 * 63 / 64)
    slices = Collectives(abstract_sharding(Mesh("fsdp", slice=2), 32), parse("v5e:4x4x2slices"))
    assert slices.group(("slice",)) == (1, 2) and slices.group(("fsdp",)) == (16, 1)


def test_exit_status_says_whether_it_fits(capsys):
    assert main(["plan", "--config=v4_flash", "--topology=H100:8", "--analytic"]) == 3
    assert "does not fit" in capsys.readouterr().out
    assert main(["plan", "--config=v4_flash", "--topology=v5p-512", "--analytic"]) == 0
    assert main(["plan", "--config=v4_flash", "--topology=h100:8,h100:256", "--analytic"]) == 0  # one of them does
    assert main(["plan", "--config=v4_flash", "--topology=h100:eight", "--analytic"]) == 1


def test_a_program_that_the_compiler_refuses_does_not_fit(monkeypatch, capsys):
    def refuse(*_):
        raise aot.NoRoom("the compiler finds no room on v5p:2x2x1: RESOURCE_EXHAUSTED")

    monkeypatch.setattr(aot, "compile_step", refuse)
    assert main(["plan", "--config=tiny", "--topology=v5p:2x2x1"]) == 3
    assert "compiled, compiler: does not fit" in capsys.readouterr().out


def test_bytes_of_the_state_are_those_of_the_real_one():
    """Weights and optimizer of the abstract training state, as its shardings split it."""
    tiny = dataclasses.replace(config_lib.load("tiny"), mesh=Mesh("fsdp", data=2))
    tiny = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, scan=True))
    trainer = Trainer(tiny)
    state, where = trainer.abstract(), trainer.state_sharding
    size = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    weights = sum(size(leaf, where.params[name]) for name, leaf in state.params.items())
    import jax

    optimizer = sum(map(size, jax.tree.leaves(state.opt), jax.tree.leaves(where.opt)))
    got, host = state_bytes(tiny, trainer.sharding)
    assert host == 0
    assert got["weights"] == weights and got["gradients"] == weights
    assert optimizer - 64 < got["optimizer"] <= optimizer  # which also counts steps


def test_the_flagship_on_one_pod(capsys, tmp_path):
    flagship = config_lib.load("v4_1t")
    records = plan.run(flagship, "v5p:8x8x8", analytic=True, json=str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text()) == records
    counts = count_parameters(flagship.model)
    assert values(records, "parameters_total") == [counts.total]
    assert values(records, "parameters_active") == [counts.active]
    [weights] = values(records, "device_bytes", part="weights")
    assert weights * 512 == pytest.approx(4 * (counts.total + counts.by_group["mtp"]), rel=0.01)
    [flops] = values(records, "flops_per_step")
    assert flops > 6 * counts.active * 1024 * 4096
    [bound] = values(records, "step_seconds_bound", part="longest")
    assert bound == max(
        value
        for part in ("compute", "memory", "ICI", "DCN")
        for value in values(records, "step_seconds_bound", part=part)
    )
    assert 0 < values(records, "mfu_bound")[0] <= 1 and values(records, "device_bytes_limit") == [int(95.74 * 2**30)]
    metrics = {"host_bytes", "fits", "collective_bytes", "smallest_topology", "link_bytes"}
    assert metrics <= {r["metric"] for r in records}
    out = capsys.readouterr().out
    assert "1,003.15B parameters, 32.06B active" in out and "It can't know" in out


def test_more_chips_need_less_memory_each_and_less_time():
    flagship, totals, bounds = config_lib.load("v4_1t"), [], []
    work = Workload("train", 4096, 1024)
    for name in ("v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16"):
        place = parse(name)
        found = estimate(flagship, place, default_mesh(flagship, place, work), work)
        totals.append(sum(found.device_bytes.values()))
        bounds.append(max(found.seconds.values()))
    assert totals == sorted(totals, reverse=True) and bounds == sorted(bounds, reverse=True)


def test_topologies_are_compared_in_one_table(capsys):
    names = "v5p:4x8x8,v5p:8x8x16"
    records = plan.run(config_lib.load("v4_1t"), names, analytic=True)
    assert {r["topology"] for r in records} == set(names.split(","))
    out = capsys.readouterr().out
    assert "chip-seconds a million tokens" in out and "fsdp 16, expert 64" in out
    with pytest.raises(UserError, match="add --analytic"):
        plan.run(config_lib.load("v4_1t"), names)


def test_decoding_keeps_and_reads_a_cache():
    flash = config_lib.load("v4_flash")
    short, long = (plan.run(flash, "v5p:4x4x4", "decode", context, 64, analytic=True) for context in (4096, 1_048_576))
    [a], [b] = (values(records, "device_bytes", part="kv") for records in (short, long))
    assert 20 < b / a < 256 and values(long, "fits") == [1]
    assert values(short, "device_bytes", part="weights") == values(long, "device_bytes", part="weights")


def test_what_training_offloads_and_rounds_is_planned_for():
    flagship, work = config_lib.load("v4_1t"), Workload("train", 4096, 1024)

    def found(place, **train):
        one = dataclasses.replace(flagship, train=dataclasses.replace(flagship.train, **train))
        return estimate(one, parse(place), default_mesh(one, parse(place), work), work)

    plain = found("v5p:8x8x8")
    moments = plain.device_bytes["optimizer"]
    moved = found("v5p:8x8x8", offload=("optimizer",))
    assert moved.device_bytes["optimizer"] < moments and moved.traffic == plain.traffic
    assert moved.host_bytes - plain.host_bytes == 4 * moments  # of a host's four chips
    streams = found("v5p:8x8x8", offload=("streams",))
    away = plain.device_bytes["activations"] - streams.device_bytes["activations"]
    assert 0 < away < (streams.host_bytes - plain.host_bytes) / 4 < 1.2 * away
    rounded = found("v5p:8x8x8", expert_weight_format="mxfp4")
    assert rounded.device_bytes["gathered"] > plain.device_bytes["gathered"] and rounded.seconds == plain.seconds
    # Attention, the shared experts and nothing else of the products is in FP8, and on GPUs alone.
    assert found("v5p:8x8x8", matmul_precision="fp8").seconds == plain.seconds
    bf16, fp8 = (found("h100:512", matmul_precision=how).seconds["compute"] for how in ("plain", "fp8"))
    assert 0.5 * bf16 < fp8 < bf16


def recorded() -> dict[tuple, list[dict]]:
    """What the compiler said of the flagships' steps, by config, topology, mode, context, rows and
    `cache.kv_device_entries`.

    From `v4jax plan --config=CONFIG --topology=TOPOLOGY --mode=MODE --context=CONTEXT --concurrency=ROWS
    --kv_device_entries=HOT --stage=buffers --json=FILE`, the records whose source is "compiled", by `python -m
    tests.golden plans FILE...`. Without machine code, they lack the program's bytes.
    """
    groups = {}
    for record in json.loads((pathlib.Path(__file__).parents[1] / "golden" / "compiled.json").read_text()):
        key = tuple(record.get(name, 0) for name in ("config", "topology", "mode", "context", "concurrency", "hot"))
        groups.setdefault(key, []).append(record)
    return groups


@pytest.mark.parametrize("key", recorded(), ids=lambda key: "-".join(map(str, key[:3])))
def test_the_closed_form_is_near_the_compiler(key):
    (name, place, mode, context, rows, hot), records = key, recorded()[key]
    config, place, work = config_lib.load(name), parse(place), Workload(mode, context, rows)
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, kv_device_entries=hot))
    mesh = default_mesh(config, place, work)
    found = estimate(config, place, mesh, work)
    [total] = values(records, "device_bytes", part="total")
    closed = sum(found.device_bytes.values())
    if total <= place.device_memory:
        assert closed == pytest.approx(total, rel=plan.MARGIN)
    else:  # where there is no room the compiler computes things twice to save some, and both say that it will not do
        assert not plan.fits(closed, place)
    if hot:  # the host's rows lie in whole tiles there, which the closed form does not know
        [held] = values(records, "host_bytes", part="arguments")
        entries = found.host_bytes / place.chip.host - 2 * 2**30
        assert entries <= held <= 1.3 * entries
        [copied] = values(records, "host_bytes", part="temporaries")
        [largest] = [r["value"] for r in records if r["metric"] == "largest_temporary"]
        pool = held / config.model.layer_types.count("csa")  # of one layer
        assert copied < pool / 10 and largest < pool
    sent = {r["part"]: r["value"] for r in records if r["metric"] == "collective_bytes"}
    rows = config.model.moe.num_experts_per_tok * work.tokens / place.devices
    room = math.ceil(1.5 * rows / 8) * 8  # of a round; what comes back has no more rows than were sent
    arriving = sent["ragged-all-to-all"] * 2 * rows / (room + rows)
    assert arriving == pytest.approx(found.collectives["all-to-all"], rel=0.25)
    if mode == "train":  # results, not both ways. The compiler chooses whether it splits while it sums.
        moved = found.collectives["reduce-scatter"] + found.collectives["all-reduce"] / 2
        moved += found.collectives["all-gather"]
        assert 0.5 < moved / sum(sent.get(kind, 0) for kind in ("all-reduce", "reduce-scatter", "all-gather")) < 2
        if mesh.fsdp > 1 and mesh.context == 1:  # Muon's matrices alone, of which a device keeps its own part
            assert sent["all-to-all"] * (mesh.fsdp - 1) / mesh.fsdp == pytest.approx(found.collectives["matrices"], 0.1)


def test_work_of_attention():
    m = config_lib.load("v4_flash").model
    one = dataclasses.replace(m, layer_types=("swa",))
    assert attention_flops(one, 10**6) == 4 * 64 * 512 * 128
    csa = dataclasses.replace(m, layer_types=("csa",))
    assert attention_flops(csa, 2**20) == 4 * 64 * 512 * (128 + 512) + 2 * 64 * 128 * 2**18


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("v5p:4x4x4", "train", 4096, 7), "7 rows cannot be split|cannot be split"),
        (("v5q:4x4x4",), "no topology"),
    ],
)
def test_plans_that_cannot_be_are_one_line(arguments, message):
    flagship = dataclasses.replace(config_lib.load("v4_1t"), mesh=Mesh("pod", expert=64))
    with pytest.raises(UserError, match=message):
        plan.run(flagship, *arguments, analytic=True)


def test_collectives_of_a_program_count_loops_by_their_trips():
    text = """HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = bf16[8,4]{1,0} all-gather(%x), dimensions={0}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(%a), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  %r = f32[] all-reduce(%b), to_apply=%sum
}
"""
    assert aot.collective_bytes(text) == {"all-gather": 5 * 64 + 64, "all-reduce": 4}
    counted = text.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert aot.collective_bytes(counted) == {"all-gather": 64, "all-reduce": 4}  # the number of iterations is unknown
    condition = """%c (p: (s32[], /*index=1*/f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
"""
    assert aot.collective_bytes(condition + counted) == {"all-gather": 7 * 64 + 64, "all-reduce": 4}
