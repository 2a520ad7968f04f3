"""All that a sequence stands on is its pages, a record, and what follows from its tokens: going on from these alone.

Forgetting the overlap of compression windows is almost silent, for most tokens stay what they were: bits are compared.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

from tests.serve.engine_harness import BLOCK, LIMITS, MODEL, Request, drive, reset_cache
from v4jax import config
from v4jax.cache import block_hash
from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES
from v4jax.serve.engine import Engine
from v4jax.serve.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

RECORDS = 1 + LIMITS.max_num_seqs + config.Cache().num_state_snapshots
# Fewer tokens behind the boundary than the window has, and so drawn that the entry over the boundary is picked.
PROMPT = np.random.default_rng(0).integers(3, MODEL.vocab_size, 2 * BLOCK + 3).tolist()
ASKED = [Request(PROMPT, SamplingParams(temperature=0.0, max_tokens=24, logprobs=4))]

# Leaves of the small model's cache, by what they belong to.
RINGS = [f".layers[{i}][0].window_ring_ZSH" for i in range(3)]
TAILS = [
    ".layers[1][0].compressor_state['main']",
    ".layers[1][0].compressor_state['index']",
    ".layers[2][0].compressor_state['main']",
]
POOLS = [".layers[1][0].entries", ".layers[1][0].index_keys", ".layers[2][0].entries"]


def leaves(engine):
    """Arrays of the cache by name."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(engine.model_runner.caches)
    }


def change(engine, touch):
    """Put touch(name, array) in the place of every array of the cache; it may write to the numpy array it gets."""
    new = lambda path, leaf: jax.device_put(touch(jax.tree_util.keystr(path), np.array(leaf)))
    engine.model_runner.caches = jax.tree_util.tree_map_with_path(new, engine.model_runner.caches)


def boundary(engine):
    """(names, pages, record) that the last whole block of the prompt stands on."""
    names = block_hash.block_hashes(block_hash.hash_seed(engine.hash_seed, salt=""), PROMPT, BLOCK)
    blocks = engine.schedulers[0].block_pool
    return names, [blocks._page[name] for name in names], blocks._record[names[-1]]


@pytest.fixture(scope="module")
def uninterrupted(plain):
    reset_cache(plain)
    return drive(plain, ASKED)


@pytest.fixture
def kept(plain, uninterrupted):
    """The engine when the prompt has been read once."""
    reset_cache(plain)
    assert drive(plain, ASKED) == uninterrupted
    return plain


@pytest.mark.parametrize("layout", KV_CACHE_DTYPES)
def test_every_leaf_belongs_to_a_page_or_to_a_record(model, layout):
    engine = Engine(model, dataclasses.replace(LIMITS, num_speculative_tokens=2), config.Cache(kv_cache_dtype=layout))
    pages = 1 + engine.schedulers[0].block_pool.capacity
    assert len({pages, RECORDS}) == 2  # so that the leading axis tells them apart
    named = leaves(engine)
    records = [*RINGS, *TAILS, ".mtp.window_ring_ZSH"]
    assert {name for name, leaf in named.items() if leaf.shape[0] == RECORDS} == set(records)
    for name in named.keys() - records:
        pool, plane = re.fullmatch(r"(.*\.(?:entries|index_keys))(\..*)", name).groups()
        assert pool in POOLS and named[name].shape[0] == pages
    # And the engine holds no other arrays: the heads follow from the tokens, tables from the block pool.
    runner = engine.model_runner
    arrays = lambda value: any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    held = {name for name, value in vars(runner).items() if arrays(value)}
    assert held == {"weights", "caches", "decode_state", "block_tables"}
    assert all(leaf.shape[0] == 1 + LIMITS.max_num_seqs for leaf in [*runner.decode_state, runner.block_tables])


def test_going_on_from_a_record_gives_every_bit_of_the_uninterrupted_run(kept, uninterrupted):
    assert drive(kept, ASKED) == uninterrupted
    assert kept.stats()["prefix_cache_hits"] == 2 * BLOCK


def test_pages_and_a_record_are_all_it_takes(model, kept, uninterrupted):
    """They are moved into another engine, to other numbers, where everything else is rubbish."""
    names, pages, record = boundary(kept)
    source, rng = leaves(kept), np.random.default_rng(0)
    engine = Engine(model, LIMITS)
    blocks, seed = engine.schedulers[0].block_pool, block_hash.hash_seed(engine.hash_seed, salt="")
    given = blocks.allocate(5)
    moved = [given[4], given[2]]
    blocks.cache_block(seed, names[0], moved[0])
    blocks.cache_block(names[0], names[1], moved[1])
    blocks.free([given[i] for i in (0, 1, 3)])
    blocks.free(moved)
    blocks.reserve_snapshot(b"another's")
    target = blocks.reserve_snapshot(names[1])
    blocks.commit_snapshot(names[1], target)
    assert target != record and not set(moved) & set(pages)

    def touch(name, array):
        array[...] = rng.normal(0, 100, array.shape)
        if name in (*RINGS, *TAILS):
            array[target] = source[name][record]
        else:
            array[moved] = source[name][np.array(pages)]
        return array

    change(engine, touch)
    engine.model_runner.decode_state = jax.tree.map(
        lambda a: jax.device_put(np.full(a.shape, 99, np.int32)), engine.model_runner.decode_state
    )
    blocks.commit_snapshot(b"another's", blocks._record[b"another's"], valid=False)
    assert drive(engine, ASKED) == uninterrupted
    assert engine.stats()["prefix_cache_hits"] == 2 * BLOCK


OVERLAP = slice(MODEL.compress_rate_csa, None)  # slots of the last window, as a block is a whole number of tails


@pytest.mark.parametrize(
    "name, slots, needed",
    [
        *((name, slice(None), True) for name in (*RINGS, *TAILS[:2])),
        *((name, OVERLAP, True) for name in TAILS[:2]),
        # What is behind the overlap, and the whole tail of a compressor without one, has become entries at a boundary.
        *((name, slice(0, OVERLAP.start), False) for name in TAILS[:2]),
        (TAILS[2], slice(None), False),
    ],
)
def test_what_a_record_needs_at_a_boundary(kept, uninterrupted, name, slots, needed):
    _, _, record = boundary(kept)

    def touch(leaf, array):
        if leaf == name:
            array[record, slots] = 0
        return array

    change(kept, touch)
    assert (drive(kept, ASKED) != uninterrupted) == needed
    assert kept.stats()["prefix_cache_hits"] == 2 * BLOCK


@pytest.mark.parametrize("pool", POOLS)
def test_what_the_pages_hold_is_read(kept, uninterrupted, pool):
    _, pages, _ = boundary(kept)

    def touch(leaf, array):
        if leaf.startswith(pool):
            array[pages] = 0
        return array

    change(kept, touch)
    assert drive(kept, ASKED) != uninterrupted
