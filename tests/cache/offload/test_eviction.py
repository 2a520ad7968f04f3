"""What goes first from a full tier, under either policy."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.offload.block_fixtures import BLOCK, RECORD, ROOT, chain, item, items
from v4jax.cache.offload.disk_tier import DiskTier
from v4jax.cache.offload.eviction import POLICIES, S3FIFOPolicy
from v4jax.cache.offload.host_tier import HostTier
from v4jax.cache.offload.tier_index import TierIndex

BUDGET = 40
TREE = [
    (form.key(name), parent if form is BLOCK else name)
    for seed in range(4)
    for parent, name in zip([ROOT, *chain(seed, 6)], chain(seed, 6), strict=False)
    for form in (BLOCK, RECORD)
]
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "use", "use", "remove"]), st.integers(0, len(TREE) - 1), st.integers(1, 9)
    ),
    max_size=200,
)


def put(shelf, key, parent, size):
    """What had to go."""
    gone = []
    while not shelf.has_room(size):
        needed = {entry.parent if k.kind == "block" else k.block_hash for k, entry in shelf.entries.items()}
        gone.append(shelf.next_victim())
        assert gone[-1] in shelf and shelf.next_victim() == gone[-1]  # asked twice, it is the same
        assert gone[-1].kind == "record" or gone[-1].block_hash not in needed  # children leave before parents
        shelf.remove(gone[-1])
    shelf.add(key, parent, size)
    return gone


@pytest.mark.parametrize("policy", POLICIES)
@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(steps=steps)
def test_the_budget_holds_and_children_leave_before_parents(policy, steps):
    shelf = TierIndex(BUDGET, policy)
    for what, number, size in steps:
        key, parent = TREE[number]
        if what == "add" and key not in shelf:
            put(shelf, key, parent, size)
            assert key in shelf
        elif what == "use":
            shelf.touch([key, TREE[0][0]])
        elif what == "remove":
            there = key in shelf
            assert (shelf.remove(key) is not None) == there and key not in shelf
        assert shelf.used <= BUDGET
        shelf.check_invariants()
    while shelf.entries:
        shelf.remove(shelf.next_victim())
    shelf.check_invariants()


@pytest.mark.parametrize("seed", range(5))
def test_s3_fifo_is_that_of_the_paper_where_nothing_hangs_together(seed):
    """Against lists, of entries of one size: a tenth of the budget for the small queue, three uses remembered."""
    rng, shelf = random.Random(seed), TierIndex(50, "s3fifo")
    small, main, uses, ghosts, went = [], [], {}, [], 0

    def leave():
        while True:
            queue = small if small and (len(small) > 5 or not main) else main
            key = queue.pop(0)
            if uses[key] == 0:
                if queue is small:
                    ghosts.append(key)
                    del ghosts[:-50]
                del uses[key]
                return key
            uses[key] = 0 if queue is small else uses[key] - 1
            main.append(key)

    keys = [RECORD.key(name) for name in chain(seed, 400)]
    for _ in range(4000):
        key = keys[min(int(rng.paretovariate(0.6)), 399)]
        if key in shelf:
            shelf.touch([key])
            uses[key] = min(uses[key] + 1, 3)
            continue
        gone = put(shelf, key, ROOT, 1)
        assert gone == [leave() for _ in gone]
        went += len(gone)
        (main if key in ghosts else small).append(key)
        ghosts = [ghost for ghost in ghosts if ghost != key]
        uses[key] = 0
        assert shelf.entries.keys() == uses.keys()
    assert went > 200 and len(main) > 10


def test_one_pass_of_strangers_leaves_what_is_used():
    kept = {}
    for policy in POLICIES:
        shelf = TierIndex(20, policy)
        used = [RECORD.key(name) for name in chain("used", 10)]
        for key in used:
            put(shelf, key, ROOT, 1)
        shelf.touch(used)
        for name in chain("strangers", 100):
            put(shelf, RECORD.key(name), ROOT, 1)
        kept[policy] = sum(key in shelf for key in used)
    assert kept == {"lru": 0, "s3fifo": 10}


def test_a_request_is_one_use_and_the_memory_of_what_went_is_bounded():
    shelf = TierIndex(20, "s3fifo")
    for name in chain("a", 2000):
        put(shelf, RECORD.key(name), ROOT, 1)
        shelf.touch([RECORD.key(name)] * 9)
    policy = shelf._policy
    assert isinstance(policy, S3FIFOPolicy) and max(policy._uses.values()) <= 3
    assert policy._ghost_bytes == sum(policy._ghosts.values()) <= 20
    assert policy._small_bytes == sum(policy._size[key] for key in shelf.entries if key in policy._small)
    assert len(policy._small._heap) + len(policy._main._heap) < 300


@pytest.mark.parametrize("policy", POLICIES)
def test_tiers_go_by_their_policy(tmp_path, policy):
    names, host = chain("a", 3), HostTier(4 * BLOCK.nbytes, policy)
    disk = DiskTier(tmp_path, 4 * 4096, policy)
    for tier in (host, disk):
        for one in items(names):
            tier.put(one)
        tier.touch([BLOCK.key(name) for name in names])
        for name in chain("others", 5):
            tier.put(item(BLOCK, name))
            assert tier.stats()["bytes"] <= tier.stats()["budget"]
        tier.check_invariants()
        assert sum(BLOCK.key(name) in tier for name in names) == {"lru": 0, "s3fifo": 3}[policy]
    disk.close()
