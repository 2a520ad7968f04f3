"""Entries in host memory: read as those on the device are, and copied to it by least recent use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from v4jax.cache import entry_cache as hot_lib
from v4jax.cache.entry_cache import read_counters
from v4jax.cache.host_pool import new_host_entry_pool, pinned_zeros
from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES, entry_format
from v4jax.cache.paged_cache import PagedLayerCache
from v4jax.cache.pools import new_pool
from v4jax.core.errors import UserError
from v4jax.parallel.host_memory import is_host

PAGES, SLOTS = 3, 8
SMALL = dataclasses.replace(weights.config(), head_dim=40)  # 32 numbers and 8 rotary ones
DEVICE = jax.devices()[0]
WORDS = functools.partial(pinned_zeros, DEVICE)
EVERY = tuple(np.meshgrid(np.arange(PAGES, dtype=np.int32), np.arange(SLOTS, dtype=np.int32), indexing="ij"))


def bits(tree):
    return [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("layout", KV_CACHE_DTYPES)
def test_a_pool_in_host_memory_reads_as_one_on_the_device(layout):
    rng = np.random.default_rng(0)
    page, slot = np.array([[0, 2, 3], [-1, 1, 0]], np.int32), np.array([[7, 0, 1], [2, 3, 3]], np.int32)
    rows = rng.standard_normal((2, 3, SMALL.head_dim), np.float32)

    @jax.jit
    def run(pool):
        pool = pool.write(page, slot, rows)
        there = np.array([[2, 0], [1, 1]], np.int32)
        return pool, pool.gather(*EVERY, jnp.float32), pool.gather_blocks(there).decode(jnp.float32)

    far, _ = new_host_entry_pool(SMALL, PAGES, SLOTS, layout, 4, WORDS)
    there, *read = run(far)
    here, *want = run(new_pool(SMALL, "main", PAGES, SLOTS, layout))
    assert [a.sharding.memory_kind for a in (far.words, there.words, *read)] == 2 * ["pinned_host"] + 2 * ["device"]
    assert all(np.array_equal(*pair) for pair in zip(bits(read), bits(want), strict=True))
    assert np.abs(read[0]).max() > 1 and there.shape == here.shape
    fetched = jax.jit(lambda far: far.fetch(*EVERY))(there)
    assert all(np.array_equal(*pair) for pair in zip(bits(fetched), bits(here), strict=True))
    assert there.words.nbytes == PAGES * SLOTS * 4 * entry_format(SMALL, "main", layout).words


class Copies:
    """A far pool of numbered rows and its copies, beside a plain record of what was asked for when."""

    def __init__(self, copies):
        far, hot = new_host_entry_pool(SMALL, PAGES, SLOTS, "fp8", copies, WORDS)
        self.kept = PagedLayerCache(jnp.zeros((1, 1, 1)), {}, far, None, hot)
        self.clock, self.held, self.asked, self.fetched = 0, {}, 0, 0  # held: entry to the step that last asked for it
        self.ask = jax.jit(self._ask, donate_argnums=0)
        self.change = jax.jit(self._change, donate_argnums=0)
        self.wipe = jax.jit(lambda kept, page_A: kept.zero_blocks(page_A), donate_argnums=0)

    def _ask(self, kept, page, slot, wanted):
        hot, row = kept.device_cache.fetch(kept.entries, page, slot, wanted)
        copied = jax.tree.map(lambda a: a[0, row], hot.rows)
        zeros = jax.tree.map(jnp.zeros_like, copied)
        right = jax.tree.map(
            lambda far, no: jnp.where(wanted[..., None], far, no), kept.entries.fetch(page, slot), zeros
        )
        return dataclasses.replace(kept, device_cache=hot), copied, right

    def _change(self, kept, page, slot, rows):
        found = kept.device_cache.lookup(page, slot)
        hot = kept.device_cache.invalidate(page, slot, found)
        return dataclasses.replace(kept, entries=kept.entries.write(page, slot, rows), device_cache=hot)

    def step(self, picks, wanted):
        ptr = self.kept.entries.words.unsafe_buffer_pointer()
        self.kept, copied, right = self.ask(self.kept, picks // SLOTS, picks % SLOTS, wanted)
        assert self.kept.entries.words.unsafe_buffer_pointer() == ptr and is_host(self.kept.entries.words)
        assert all(np.array_equal(*pair) for pair in zip(bits(copied), bits(right), strict=True))
        entries, self.clock = set(picks[wanted].tolist()), self.clock + 1
        before, after = dict(self.held), self.entries()
        assert entries <= after and after <= entries | set(before)
        self.held = {entry: self.clock if entry in entries else before[entry] for entry in after}
        gone = [before[entry] for entry in set(before) - after]
        assert not gone or max(gone) <= min(self.held.values())  # least recent use
        self.asked, self.fetched = self.asked + int(wanted.sum()), self.fetched + len(entries - set(before))
        assert read_counters(np.asarray(self.kept.device_cache.counters_5)).tolist() == [
            self.asked - self.fetched,
            self.fetched,
        ]

    def forget(self, entries):
        self.held = {entry: when for entry, when in self.held.items() if entry not in entries}
        assert self.entries() == set(self.held)

    def entries(self):
        """What is held, by both of its maps."""
        at, entry = (
            np.asarray(self.kept.device_cache.slot_of_entry_ZP).ravel(),
            np.asarray(self.kept.device_cache.entry_of_slot_S),
        )
        held = np.flatnonzero(at)
        assert entry[0] == -1 and np.array_equal(entry[at[held]], held) and (entry >= 0).sum() == len(held)
        assert not any(plane[0, 0].any() for plane in jax.tree.leaves(self.kept.device_cache.rows))
        return set(held.tolist())


@pytest.mark.parametrize("queries, at_once", [((2, 2), 5), ((1, 1), 128)])
def test_copies_are_those_asked_for_last_and_never_stale(monkeypatch, queries, at_once):
    monkeypatch.setattr(hot_lib, "_AT_ONCE", at_once)
    rng, k = np.random.default_rng(0), 3
    copies, liked = Copies(k * queries[0] * queries[1]), 1 / (1 + np.arange(PAGES * SLOTS))
    for step in range(60):
        draw = lambda: rng.choice(PAGES * SLOTS, k, replace=False, p=liked / liked.sum())
        picks = np.stack([draw() for _ in range(queries[0] * queries[1])]).astype(np.int32)
        copies.step(picks.reshape(*queries, k), rng.random((*queries, k)) < rng.choice([0.2, 0.9, 1.0]))
        if step % 4 == 1:
            page, slot = rng.integers(-1, PAGES + 1, 2, np.int32), rng.integers(0, SLOTS, 2, np.int32)
            copies.kept = copies.change(copies.kept, page, slot, rng.standard_normal((2, SMALL.head_dim), np.float32))
            copies.forget({int(p * SLOTS + s) for p, s in zip(page, slot, strict=True) if 0 <= p < PAGES})
        elif step % 9 == 2:
            page = np.array([step % PAGES, -1], np.int32)
            copies.kept = copies.wipe(copies.kept, page)
            copies.forget(set(range(page[0] * SLOTS, (page[0] + 1) * SLOTS)))
    assert 0 < copies.fetched < copies.asked


def test_counters_of_64_bits():
    count = jnp.array([7, 2**32 - 2, 0, 5, 3], jnp.uint32)
    for want in ((2**32 + 1, (3 << 32) + 5), (2**32 + 4, (3 << 32) + 5)):
        count = hot_lib._counted(count, jnp.int32(3), jnp.int32(0))
        assert tuple(read_counters(np.asarray(count)).tolist()) == want
    assert count[0] == 9


def test_without_pinned_memory_it_is_one_line():
    class Bare:
        platform = "abacus"

        def addressable_memories(self):
            return []

    with pytest.raises(UserError, match="abacus devices here have no pinned_host memory"):
        pinned_zeros(Bare(), (PAGES, SLOTS, 9), jnp.uint32)


def test_too_little_host_memory_is_one_line():
    with pytest.raises(UserError, match="lower kv_cache_memory_bytes or kv_cache_tokens"):
        pinned_zeros(DEVICE, (2**40, 8000, 9), jnp.uint32)
