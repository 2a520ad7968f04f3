"""Blocks and records that leave the device and come back: every answer, to the bit, is that of an engine without tiers.

Numbers of faults are those in v4jax/cache/README.md.
"""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.cache.offload.faulty_files import FaultyFiles, failing
from tests.serve.engine_harness import BLOCK, LIMITS, MODEL, Request, draw_model, drive, reset_cache
from tests.serve.offload_harness import LONG, one_by_one, parked, tiered
from tests.serve.request_mixes import BASES, GREEDY, Solo, check, crowded, few, request_mix, staying
from v4jax import config
from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES
from v4jax.core.errors import UserError
from v4jax.models.transformer import Transformer
from v4jax.serve import device_connector, model_steps
from v4jax.serve.engine import Engine
from v4jax.serve.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAMPLING = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2)
# Two blocks and a bit each: of three pages, the next request takes what the one before it had.
PROMPTS = np.random.default_rng(9).integers(3, MODEL.vocab_size, (4, 2 * BLOCK + 3)).tolist()
CHATS = [Request(prompt, SAMPLING) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def solo(plain):
    return Solo(plain)


@pytest.fixture(scope="module")
def alone(plain):
    """Answers of the chats by an engine without tiers."""
    reset_cache(plain, pages=11)
    return one_by_one(plain, CHATS)


# --- coming back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", ["host", "disk", "both"])
def test_what_was_evicted_comes_back(model, alone, tmp_path, tiers):
    room = {"host": {"host": 1 << 30}, "disk": {"directory": tmp_path}, "both": {"directory": tmp_path, "host": 40_000}}
    with tiered(model, **room[tiers]) as engine:
        assert one_by_one(engine, CHATS) == alone and engine.stats()["restored_blocks"] == 0
        compiled = [
            program._cache_size() for program in (model_steps.prefill, model_steps.decode, model_steps.sample_tokens)
        ]
        assert one_by_one(engine, CHATS) == alone
        assert compiled == [
            program._cache_size() for program in (model_steps.prefill, model_steps.decode, model_steps.sample_tokens)
        ]
        stats = parked(engine)
        assert stats["prefix_cache_hits"] == stats["restored_blocks"] * 256 == 2 * len(CHATS) * 256
        assert stats["transfer_saved"] == 3 * len(CHATS) and stats["transfer_dropped"] == 0
        if tiers == "both":
            assert stats["host_evictions"] > 0 and stats["host_bytes"] <= 40_000
        lowest = "host" if tiers == "host" else "disk"
        assert (stats[f"{lowest}_blocks"], stats[f"{lowest}_snapshots"]) == (2 * len(CHATS), len(CHATS))


def test_conversations_survive_a_restart(model, alone, tmp_path):
    with tiered(model, tmp_path) as engine:
        assert one_by_one(engine, CHATS) == alone
    with tiered(model, tmp_path, host=1 << 30) as engine:
        assert one_by_one(engine, CHATS) == alone
        stats = parked(engine)
        assert stats["restored_blocks"] == stats["disk_block_hits"] == 2 * len(CHATS)
        assert stats["disk_snapshot_hits"] == len(CHATS) and stats["transfer_saved"] == 0
        assert stats["prefix_cache_hit_rate"] == stats["prefix_cache_hit_ceiling"] == 1


def test_one_conversation_goes_and_comes_twenty_times(model, plain, tmp_path):
    def turns(engine):
        rng, tokens, answers = np.random.default_rng(5), CHATS[0].prompt[:290], []
        for _ in range(20):
            answers += one_by_one(engine, [Request(tokens, SAMPLING)])
            tokens = [*tokens, *answers[-1].tokens, *rng.integers(3, MODEL.vocab_size, 5).tolist()]
            one_by_one(engine, CHATS[1:2])  # which takes all pages
        return answers

    reset_cache(plain, pages=11)
    expected = turns(plain)
    with tiered(model, tmp_path, host=30_000) as engine:
        assert turns(engine) == expected
        stats = parked(engine)
        assert stats["restored_blocks"] >= 2 * 19 and stats["host_bytes"] <= 30_000
        assert stats["disk_corrupt"] == stats["host_corrupt"] == stats["transfer_late"] == 0


def test_what_one_request_alone_asked_for_may_be_kept_out(model, alone):
    with tiered(model, host=1 << 30, admission="second") as engine:
        saved = []
        for _ in range(3):
            assert one_by_one(engine, CHATS) == alone
            saved.append(engine.stats()["transfer_saved"])
        assert saved == [0, 12, 12] and engine.stats()["restored_blocks"] == 8


@pytest.fixture(scope="module")
def roomy(model):
    """Engines by bytes of their host tier; what they hold of earlier examples stays there."""
    with contextlib.ExitStack() as stack:
        yield {room: stack.enter_context(tiered(model, host=room)) for room in (1 << 30, 20_000)}


@few(max_examples=15)
@given(asked=request_mix(), pages=st.integers(3, 5), room=st.sampled_from([1 << 30, 20_000]))
def test_a_request_among_others_answers_as_alone(roomy, solo, asked, pages, room):
    reset_cache(roomy[room], pages=pages)
    for some in (asked, staying(asked[:2]), asked):
        check(some, drive(roomy[room], some), solo)
    parked(roomy[room])


@pytest.mark.parametrize("phase", [0, 3])
def test_preempted_requests_come_back(model, solo, phase):
    with tiered(model, host=1 << 30, pages=2) as engine:
        for _ in range(2):
            check(crowded(phase), drive(engine, crowded(phase)), solo)
        assert parked(engine)["num_preemptions"] == 2


# --- not another's ----------------------------------------------------------------------------------------------------


def test_other_weights_find_nothing(model, alone, tmp_path):
    with tiered(model, tmp_path) as engine:
        one_by_one(engine, CHATS[:1])
    trained = draw_model(0)  # the same but for one step of training in one weight
    trained.norm.scale[...] = trained.norm.scale[...].at[0].add(1e-3)
    with tiered(trained, tmp_path) as engine:
        assert one_by_one(engine, CHATS[:1]) != alone[:1]
        stats = parked(engine)
        assert stats["restored_blocks"] == stats["disk_reads"] == 0 and stats["disk_blocks"] == 4


def test_whatever_shapes_the_contents_is_in_the_key(model):
    def key(model, layout="auto", block=0, **limits):
        cache = config.Cache(kv_cache_dtype=layout, block_size=block, kv_cache_tokens=256)
        engine = Engine(model, dataclasses.replace(LIMITS, **limits), cache)
        return (
            engine.hash_seed,
            device_connector.block_schema(engine.model_runner.caches, "block").digest,
            device_connector.block_schema(engine.model_runner.caches, "record").digest,
        )

    def other(**changes):
        """The same weights under another config."""
        abstract = nnx.eval_shape(lambda: Transformer(dataclasses.replace(MODEL, **changes), nnx.Rngs(0)))
        return nnx.merge(nnx.graphdef(abstract), nnx.state(model))

    base = key(model)
    assert base == key(other(), max_num_seqs=1, max_model_len=300, max_num_batched_tokens=5)
    for changed in [
        *[key(model, layout) for layout in KV_CACHE_DTYPES if layout != "auto"],
        key(model, block=512),
        key(model, batch_invariant=True),
        key(model, num_speculative_tokens=1),
        key(other(rope=dataclasses.replace(MODEL.rope, rope_theta=MODEL.rope.rope_theta + 1))),
        key(other(indexer=dataclasses.replace(MODEL.indexer, index_topk=3))),
    ]:
        assert changed != base
    assert key(model, num_speculative_tokens=1)[2] != key(model, num_speculative_tokens=2)[2] != base[2]


def test_a_tenants_blocks_are_its_own(model, alone, tmp_path):
    with tiered(model, tmp_path) as engine:
        salts, restored = ["", "alice", "bob", "alice"], []
        for salt in salts:
            assert one_by_one(engine, [dataclasses.replace(CHATS[0], salt=salt)]) == alone[:1]
            one_by_one(engine, CHATS[1:2])
            restored.append(engine.stats()["restored_blocks"])
        assert np.diff(restored, prepend=0).tolist() == [0, 2, 2, 4]  # the other chat's; for alice her own, too
        assert parked(engine)["disk_blocks"] == 2 * 4
    assert not any(b"alice" in path.read_bytes() or "alice" in path.name for path in tmp_path.iterdir())


def test_a_second_engine_on_a_directory_is_refused(model, tmp_path):
    with tiered(model, tmp_path), pytest.raises(UserError, match="in use by another engine"):
        Engine(model, LIMITS, config.Cache(kv_disk_bytes=1 << 20, kv_dir=str(tmp_path)))


# --- faults 2, 3, 11, 13 to 15: what is stored cannot be had ----------------------------------------------------------


@pytest.fixture
def stored(model, alone, tmp_path):
    """A directory that holds all chats."""
    with tiered(model, tmp_path) as engine:
        assert one_by_one(engine, CHATS) == alone
    return tmp_path


@pytest.mark.parametrize(
    "fault, counter, count",
    [
        (dict(fault=failing("read")), "disk_read_errors", 3),
        (dict(flip=1.0), "disk_corrupt", 4),
        (dict(fault=failing("write", "rename")), "disk_write_errors", 0),
    ],
)
def test_a_disk_that_fails_costs_time_only(model, alone, stored, fault, counter, count):
    with tiered(model, stored, files=FaultyFiles(**fault)) as engine:
        assert one_by_one(engine, CHATS) == alone
        stats = parked(engine)
        assert stats[counter] == count and stats["restored_blocks"] == (0 if count else 8)
        assert stats["disk_breaker_open"] == (counter == "disk_read_errors")


def test_a_disk_that_refuses_writes_costs_time_only(model, alone, tmp_path):
    with tiered(model, tmp_path, files=FaultyFiles(room=30_000)) as engine:
        assert one_by_one(engine, CHATS) == one_by_one(engine, CHATS) == alone
        stats = parked(engine)
        assert stats["disk_full"] > 0 and stats["disk_evictions"] > 0 and stats["disk_bytes_in"] > 30_000


def test_a_disk_that_hangs_costs_the_deadline_until_the_breaker_opens(model, alone, stored):
    gate = threading.Event()
    files = FaultyFiles(lambda operation, path: gate.wait(LONG) if operation == "read" else None)
    with tiered(model, stored, files=files, deadline=0.05) as engine:
        answers = [drive(engine, [chat])[0] for chat in CHATS]
        stats = engine.stats()
        gate.set()
        assert answers == alone and stats["disk_late"] == stats["transfer_late"] == 3 and stats["disk_breaker_open"]
        parked(engine)


def test_others_decode_while_one_waits_for_a_disk_that_hangs(model, solo, stored):
    gate = threading.Event()
    files = FaultyFiles(lambda operation, path: gate.wait(LONG) if operation == "read" else None)
    with tiered(model, stored, files=files, pages=5) as engine:
        short = Request(BASES[0][:9], GREEDY)
        engine.add_request("short", short.prompt, short.sampling)
        engine.step()
        engine.add_request("long", CHATS[0].prompt, SAMPLING)
        tokens = {"short": [], "long": []}
        while engine.busy:
            for drawn in engine.step():
                tokens[drawn.id] += drawn.sampled.token_B[drawn.row, : drawn.count].tolist()
            if len(tokens["short"]) == GREEDY.max_tokens:
                assert tokens["long"] or engine.stats()["num_requests_waiting"] == 1 or gate.is_set()
                gate.set()
        assert tokens["short"] == solo(short).tokens and engine.stats()["restored_blocks"] == 2


def test_pieces_that_are_missing_shorten_what_is_found(model, alone, stored):
    chat = {}
    for path in stored.glob("*.*"):
        chat.setdefault(path.suffix, []).append(path)
    for path in chat[".record"][:2] + chat[".block"][:1]:
        path.unlink()
    with tiered(model, stored) as engine:
        assert one_by_one(engine, CHATS) == alone
        stats = parked(engine)
        assert stats["restored_blocks"] in (2, 4) and stats["disk_blocks"] == 8 and stats["disk_snapshots"] == 4


def test_no_memory_for_copies_costs_time_only(model, alone, monkeypatch):
    def refuse(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of pinned memory")

    with tiered(model, host=1 << 30) as engine:
        monkeypatch.setattr(device_connector, "pack_blocks", refuse)
        assert one_by_one(engine, CHATS) == alone
        stats = parked(engine)
        assert stats["transfer_dropped"] >= 3 * len(CHATS) and stats["transfer_saved"] == stats["host_blocks"] == 0


def test_without_pinned_memory_plain_memory_does(model, alone, stored):
    with tiered(model, stored, host=1 << 30) as engine:
        engine.kv_connector.device_connectors[0]._pinned = None
        assert one_by_one(engine, CHATS) == one_by_one(engine, CHATS) == alone


def test_pieces_evicted_between_fetch_and_admission_are_fetched_again(model, alone, stored):
    with tiered(model, stored) as engine:
        drive(engine, CHATS[:1])
        bring_in = engine.kv_connector.device_connectors[0]._install

        def once(visit, seed):
            engine.kv_connector.device_connectors[0]._install = bring_in
            # As if the blocks had been on the device when the job began.
            visit.job.resident_blocks = frozenset(visit.job.block_hashes)
            return bring_in(visit, seed)

        engine.kv_connector.device_connectors[0]._install = once
        assert drive(engine, CHATS[1:2]) == alone[1:2]
        assert engine.stats()["restored_blocks"] == 4


# --- 7: killed under load ---------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_an_engine_killed_under_load_leaves_what_its_restart_finds(model, alone, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.serve.crash_worker", str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        answered = json.loads(child.stdout.readline())
        assert answered == [answer.tokens for answer in alone]
        time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    with tiered(model, tmp_path) as engine:
        assert one_by_one(engine, CHATS) == alone
        stats = parked(engine)
        assert stats["restored_blocks"] == 2 * len(CHATS) and stats["disk_corrupt"] == 0
    assert not list(tmp_path.glob("*.partial"))


# --- what must not be kept --------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_not_stored(tmp_path):
    model = draw_model(0)
    model.embed.table[...] = model.embed.table[...].at[2].set(np.nan)
    with tiered(model, tmp_path) as engine:
        for position in (5, 300, 2 * BLOCK + 1):
            prompt = list(CHATS[0].prompt)
            prompt[position] = 2
            engine.add_request(position, prompt, SAMPLING)
            while engine.busy:
                engine.step()
        parked(engine)
        assert engine.stats()["transfer_saved"] == 0 and not list(tmp_path.glob("*.*"))


# --- copies to the bit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["auto", "fp8_fp4"])
def test_copies_off_the_device_and_back_keep_every_bit_of_every_leaf(model, layout):
    engine = Engine(
        model,
        dataclasses.replace(LIMITS, num_speculative_tokens=1),
        config.Cache(kv_cache_dtype=layout, kv_cache_tokens=2048),
    )
    rng, kinds = np.random.default_rng(0), device_connector.leaf_kinds(engine.model_runner.caches)

    def rubbish(leaf):
        raw = rng.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), np.uint8)
        return jax.device_put(raw.view(leaf.dtype)[..., 0])  # NaN of every kind among them

    bits = lambda live: [np.array(leaf).view(np.uint8) for leaf in jax.tree.leaves(live)]
    one, two = (jax.tree.map(rubbish, engine.model_runner.caches) for _ in range(2))
    source, before = bits(one), bits(two)
    for kind in ("block", "record"):
        numbers = np.array([3, 1, 4], np.int32)
        payloads = device_connector.pack_blocks(one, kinds, kind, numbers)
        assert {payload.nbytes for payload in payloads} == {device_connector.block_schema(one, kind).nbytes}
        two = device_connector.unpack_blocks(two, kinds, kind, np.array([2, 5, 2**31 - 1], np.int32), payloads)
    assert device_connector.block_schema(one, "block").nbytes == engine.kv_cache_spec.block_bytes
    assert device_connector.block_schema(one, "record").nbytes == engine.kv_cache_spec.state_bytes(3, mtp=True)
    for have, had, other in zip(bits(two), before, source, strict=True):
        had[[2, 5]] = other[[3, 1]]
        assert np.array_equal(have, had)


# --- what users type --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, complaint",
    [
        (dict(kv_disk_bytes=1), "needs its size and its place"),
        (dict(kv_dir="x"), "needs its size and its place"),
        (dict(kv_host_bytes=-1), "cache.kv_host_bytes must be at least 0"),
        (dict(kv_load_timeout_s=0), "cache.kv_load_timeout_s must be at least"),
        (dict(kv_admission_policy="none"), "one of all, second"),
        (dict(kv_eviction_policy="fifo"), "one of s3fifo, lru"),
        (dict(kv_host_bytes=1, enable_prefix_caching=False), "set cache.enable_prefix_caching to true"),
        (dict(kv_cache_memory_bytes=1000), "too small: 21 state slots and one block"),
    ],
)
def test_tiers_that_cannot_be_are_one_line(model, options, complaint):
    with pytest.raises(UserError, match=complaint):
        Engine(model, LIMITS, config.Cache(**options))


def test_the_devices_budget_bounds_all_arrays_of_the_cache(model):
    for device in (140_000, 151_040, 1_000_000):
        engine = Engine(model, LIMITS, config.Cache(kv_cache_memory_bytes=device))
        held, page = engine.stats()["kv_device_used_bytes"], engine.kv_cache_spec.block_bytes
        assert device - page < held <= device


def test_the_log_says_what_each_tier_holds(model, tmp_path, caplog):
    with caplog.at_level("INFO"), tiered(model, tmp_path, host=1 << 20, disk=1 << 30):
        pass
    [line] = [record.message for record in caplog.records if record.name == "v4jax.serve.offload_connector"]
    assert line == "cache: device 3,072 tokens, host up to 32,768 (0 are there), disk up to 22,369,536 (0 are there)"


def test_tiers_are_let_go_with_an_engine_that_nobody_closes(model, tmp_path):
    engine = Engine(model, LIMITS, config.Cache(kv_disk_bytes=1 << 20, kv_dir=str(tmp_path)))
    del engine
    gc.collect()
    with tiered(model, tmp_path):
        pass
