import random

import pytest

from tests.cache.offload.block_fixtures import BLOCK, RECORD, ROOT, chain
from v4jax.cache.offload.block_file import BlockKey
from v4jax.cache.offload.tier_index import TierIndex


def put(shelf, names, *boundaries, size=1):
    for parent, name in zip([ROOT, *names], names, strict=False):
        shelf.add(BLOCK.key(name), parent, size)
    for count in boundaries:
        shelf.add(RECORD.key(names[count - 1]), names[count - 1], size)


def emptied(shelf):
    order = []
    while (key := shelf.next_victim()) is not None:
        shelf.remove(key)
        shelf.check_invariants()
        order.append(key)
    assert not shelf.entries and not shelf.used
    return order


def test_a_chain_goes_from_its_end():
    shelf, names = TierIndex(100, "lru"), chain("a", 4)
    put(shelf, names, 2, 4)
    shelf.touch([BLOCK.key(name) for name in names] + [RECORD.key(names[3]), RECORD.key(names[1])])
    order = emptied(shelf)
    blocks = [key for key in order if key.kind == "block"]
    assert blocks == [BLOCK.key(name) for name in reversed(names)]
    for count in (2, 4):
        assert order.index(RECORD.key(names[count - 1])) < order.index(BLOCK.key(names[count - 1]))


def test_the_least_recently_used_chain_goes_first():
    shelf, old, new = TierIndex(100, "lru"), chain("old", 3), chain("new", 3)
    put(shelf, new)
    put(shelf, old)
    shelf.touch([BLOCK.key(name) for name in new])
    assert emptied(shelf) == [BLOCK.key(name) for name in (*reversed(old), *reversed(new))]


def test_a_shared_beginning_goes_after_both_ends():
    shelf, trunk = TierIndex(100, "lru"), chain("trunk", 2)
    put(shelf, trunk)
    ends = chain("left", 1) + chain("right", 1)
    for end in ends:
        shelf.add(BLOCK.key(end), trunk[-1], 1)
    assert emptied(shelf)[:2] == [BLOCK.key(end) for end in ends]


def test_children_whose_parent_is_gone_go_like_others():
    shelf, names = TierIndex(100, "lru"), chain("a", 3)
    put(shelf, names)
    shelf.remove(BLOCK.key(names[1]))
    shelf.check_invariants()
    assert len(emptied(shelf)) == 2


def test_a_ring_of_forged_names_can_be_emptied():
    shelf, (one, two) = TierIndex(100, "lru"), chain("ring", 2)
    shelf.add(BLOCK.key(one), two, 1)
    shelf.add(BLOCK.key(two), one, 1)
    shelf.add(BLOCK.key(ROOT), ROOT, 1)
    assert len(emptied(shelf)) == 3


def test_the_budget_holds():
    shelf, names = TierIndex(10, "lru"), chain("a", 3)
    put(shelf, names[:2], size=4)
    assert not shelf.has_room(3) and shelf.has_room(2)
    with pytest.raises(ValueError, match="do not fit"):
        shelf.add(BLOCK.key(names[2]), names[1], 3)
    with pytest.raises(ValueError, match="the index contains"):
        shelf.add(BLOCK.key(names[0]), ROOT, 1)
    assert shelf.remove(BlockKey("block", names[2], BLOCK.digest)) is None


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_the_books_and_the_order(seed):
    """Against a plain model: of all leaves, the one whose last use is the oldest."""
    rng, shelf, parent, used, clock = random.Random(seed), TierIndex(40, "lru"), {}, {}, 0
    names = chain(seed, 60)
    for _ in range(1500):
        clock += 1
        key = (BLOCK if rng.random() < 0.7 else RECORD).key(rng.choice(names))
        if rng.random() < 0.4 and key in used:
            some = [key, *rng.sample(sorted(used), min(len(used), 3))]
            shelf.touch(some)
            used.update(dict.fromkeys(some, clock))
        elif key not in used:
            if not shelf.has_room(1):
                needed = {parent[k] if k.kind == "block" else k.block_hash for k in used}
                leaves = [k for k in used if k.kind == "record" or k.block_hash not in needed]
                gone = shelf.next_victim()
                assert gone in leaves and used[gone] == min(used[k] for k in leaves)
                shelf.remove(gone)
                del used[gone]
            i = names.index(key.block_hash)
            parent[key] = names[rng.randrange(i)] if i else ROOT  # no rings
            shelf.add(key, parent[key], 1)
            used[key] = clock
        else:
            shelf.remove(key)
            del used[key]
        assert shelf.entries.keys() == used.keys()
    shelf.check_invariants()
