"""Sequences whose entries live in host memory decode to the bit as if all of them were on the device.

The programs' fusions are those that users have, for bits depend on them.
"""

import dataclasses

import jax
import pytest

from tests.compiler import FUSED
from tests.golden import weights
from tests.serve.engine_harness import LIMITS, MODEL, Request, compiled, drive, reset_cache
from tests.serve.offload_harness import one_by_one, tiered
from tests.serve.request_mixes import BASES, SAMPLED, crowded
from v4jax import config
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.core.errors import UserError
from v4jax.parallel.host_memory import is_host
from v4jax.serve.engine import Engine, validate_limits

pytestmark = pytest.mark.slow

LEAST = LIMITS.max_num_seqs * MODEL.indexer.index_topk  # what a step may pick: nearly all of it changes all the time
BITS = dataclasses.replace(SAMPLED, logprobs=4)
TWO = dataclasses.replace(
    MODEL, layer_types=("csa", "hca"), num_nextn_predict_layers=0, moe=dataclasses.replace(MODEL.moe, num_hash_layers=0)
)


@pytest.fixture(autouse=True, scope="module")
def fused():
    with compiled(FUSED):
        yield


@pytest.fixture(scope="module")
def layers():
    """A model of the two layers that have something in host memory."""
    return weights.build(TWO, weights.random_flat(TWO, 0))


@pytest.fixture(scope="module")
def near(layers):
    return Engine(layers, LIMITS, config.Cache(kv_cache_dtype="fp8_fp4"))


@pytest.fixture(scope="module")
def far(layers):
    return Engine(layers, LIMITS, config.Cache(kv_cache_dtype="fp8_fp4", kv_device_entries=LEAST))


def test_every_bit_is_that_of_the_engine_with_all_on_the_device(near, far):
    before, answers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(far.model_runner.caches)}, []
    for engine in (near, far):
        reset_cache(engine, pages=2, chunk=16)
        answers.append(drive(engine, crowded(3, sampling=BITS)))  # rows of different lengths, one must make room
        assert engine.stats()["num_preemptions"] > 0
        reset_cache(engine, pages=3, chunk=16)
        for _ in range(2):  # the second time from a prefix, in pages that held something else before
            answers[-1] += drive(engine, [Request(BASES[0][:400], BITS)])
        assert engine.stats()["prefix_cache_hits"] > 0
    assert answers[0] == answers[1]
    leaves, stats = jax.tree.leaves(far.model_runner.caches), far.stats()
    here = [leaf for leaf in leaves if not is_host(leaf)]
    assert {leaf.sharding.memory_kind for leaf in here} == {"device"}
    assert stats["kv_device_used_bytes"] == sum(leaf.nbytes for leaf in here)
    words, tail = there = [leaf for leaf in leaves if is_host(leaf)]
    assert {leaf.sharding.memory_kind for leaf in there} == {"pinned_host"} and tail.dtype == "float32"
    assert stats["kv_host_used_bytes"] == words.nbytes + tail.nbytes
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.nbytes > 4096} <= before  # updated in place
    hits, misses = stats["device_entry_cache_hits"], stats["device_entry_cache_misses"]
    assert hits > 0 and stats["device_entry_cache_hit_rate"] == hits / (hits + misses)
    assert stats["device_entry_cache_fetched_bytes"] == misses * 4 * words.shape[-1] > 0
    assert near.stats()["kv_host_used_bytes"] == 0 and "device_entry_cache_hits" not in near.stats()


def test_blocks_that_return_from_lower_tiers_are_not_taken_for_what_lay_there_before(layers, near):
    chats = [Request(base[:513], BITS) for base in BASES] * 2  # of three pages each
    reset_cache(near, pages=3, chunk=16)
    expected = one_by_one(near, chats)
    with tiered(layers, host=1 << 30, layout="fp8_fp4", hot=LEAST, chunk=16) as engine:
        assert one_by_one(engine, chats) == expected
        assert engine.stats()["restored_blocks"] > 0


@pytest.mark.parametrize(
    "options, queries",
    [
        (dict(num_speculative_tokens=2, max_num_seqs=1), 3),
        (dict(batch_invariant=True, max_num_seqs=2), 1),
    ],
)
def test_drafts_and_invariance_keep_every_bit(options, queries):
    """With as few copies as there can be: topk for each query of a step."""
    drafting = dataclasses.replace(TWO, num_nextn_predict_layers=1)
    model = weights.build(drafting, weights.random_flat(drafting, 0))
    limits, answers = dataclasses.replace(LIMITS, max_num_batched_tokens=16, **options), []
    for hot in (0, queries * TWO.indexer.index_topk):
        engine = Engine(model, limits, config.Cache(kv_cache_dtype="fp8_fp4", kv_device_entries=hot))
        reset_cache(engine, pages=2)
        answers.append(drive(engine, crowded(3, sampling=BITS)))  # in turn, or one must make room for the other
        reset_cache(engine, pages=3)
        for _ in range(2):
            answers[-1] += drive(engine, [Request(BASES[0][:400], dataclasses.replace(BITS, temperature=0.0))])
        assert engine.stats()["prefix_cache_hits"] > 0
    assert answers[0] == answers[1] and engine.stats()["device_entry_cache_hits"] > 0


@pytest.mark.parametrize(
    "options, limits, complaint",
    [
        (dict(kv_device_entries=-1), {}, "cache.kv_device_entries must be at least 0, got -1"),
        (
            dict(kv_device_entries=LEAST - 1),
            {},
            "4 sequences x 1 tokens x topk 4; give at least 16, or lower max_num_seqs",
        ),
        (dict(kv_device_entries=LEAST), dict(max_num_seqs=5), "5 sequences x 1 tokens x topk 4; give at least 20"),
        (dict(kv_device_entries=3), dict(batch_invariant=True), "1 sequences x 1 tokens x topk 4; give at least 4"),
        (dict(kv_device_entries=LEAST, block_size=16), dict(max_model_len=16), "of no use with max_model_len 16"),
        (
            dict(kv_device_entries=LEAST, kv_cache_memory_bytes=1000),
            {},
            "one block of 256 tokens and the kv_device_entries take",
        ),
    ],
)
def test_copies_that_cannot_be_are_one_line(layers, options, limits, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        Engine(layers, dataclasses.replace(LIMITS, **limits), config.Cache(**options))
    assert "\n" not in str(error.value)


def test_the_devices_budget_counts_what_is_on_the_device(layers, caplog):
    layout = KVCacheSpec(TWO, num_device_entries=LEAST)
    records = 1 + LIMITS.max_num_seqs + config.Cache().num_state_snapshots
    for device in (records * layout.state_bytes() + layout.device_cache_bytes + 2 * layout.block_bytes, 1_000_000):
        with caplog.at_level("INFO"):
            engine = Engine(layers, LIMITS, config.Cache(kv_cache_memory_bytes=device, kv_device_entries=LEAST))
        stats = engine.stats()
        pages = stats["num_blocks_free"] + 1
        assert device - engine.kv_cache_spec.block_bytes < stats["kv_device_used_bytes"] <= device
        held = pages * engine.kv_cache_spec.host_block_bytes + records * engine.kv_cache_spec.host_state_bytes()
        assert stats["kv_host_used_bytes"] == held
        assert f"entries of {256 * (pages - 1):,} tokens in host memory" in caplog.records[-1].message


def test_models_without_picks_have_none_to_copy():
    bare = dataclasses.replace(MODEL, layer_types=("swa", "hca"))
    with pytest.raises(UserError, match="this model has none: set it to 0"):
        validate_limits(bare, LIMITS, config.Cache(kv_device_entries=LEAST))
