import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from v4jax.cache import block_hash
from v4jax.cache.block_pool import BlockPool

SEED = block_hash.hash_seed(b"weights")


def names(*tokens):
    return block_hash.block_hashes(SEED, tokens, 1)


def fill(blocks, *tokens, records=()):
    """What a sequence does that computes these one-token blocks: its pages, still in use."""
    pages = blocks.allocate(len(tokens))
    publish(blocks, names(*tokens), pages)
    for i in records:
        name = names(*tokens)[i]
        blocks.commit_snapshot(name, blocks.reserve_snapshot(name))
    return pages


def publish(blocks, chain, pages):
    parents = [SEED, *chain[:-1]]
    return [blocks.cache_block(*block) for block in zip(parents, chain, pages, strict=True)]


def test_pages_are_given_out_once_and_never_page_0():
    blocks = BlockPool(5)
    one, other = blocks.allocate(1), blocks.allocate(3)
    assert sorted(one + other) == [1, 2, 3, 4]
    assert blocks.allocate(1) is None
    blocks.check_invariants([one, other])
    blocks.free(other)
    blocks.check_invariants([one])
    assert blocks.num_available() == 3 and blocks.allocate(4) is None and sorted(blocks.allocate(3)) == sorted(other)


def test_what_a_sequence_left_is_found_up_to_the_last_record():
    blocks = BlockPool(9, [7, 8])
    chain = names(1, 2, 3, 4)
    pages = fill(blocks, 1, 2, 3, 4, records=[0, 2])
    record = blocks.match_prefix(chain)[1]
    assert blocks.match_prefix(chain) == (3, record) and record in (7, 8)
    assert blocks.match_prefix(names(1, 2, 9, 4)) == (1, ({7, 8} - {record}).pop())
    assert blocks.match_prefix(names(9)) == blocks.match_prefix([]) == (0, None)
    assert blocks.match_prefix(
        block_hash.block_hashes(block_hash.hash_seed(b"weights", salt="a"), [1, 2, 3, 4], 1)
    ) == (0, None)
    blocks.free(pages)
    assert blocks.match_prefix(chain) == (3, record)
    assert blocks.num_available(chain[:3]) == 8 - 3
    assert blocks.touch(chain[:3]) == pages[:3] == blocks.touch(chain[:3])
    blocks.check_invariants([pages[:3], pages[:3]])


def findable(blocks: BlockPool) -> dict[bytes, int]:
    return blocks.contents()[0]


def snapshots(blocks: BlockPool) -> dict[bytes, int]:
    return blocks.contents()[1]


def test_a_record_alone_or_a_page_alone_is_no_hit():
    blocks = BlockPool(9, [1])
    chain = names(1)
    pages = fill(blocks, 1)
    assert blocks.match_prefix(chain) == (0, None)
    record = blocks.reserve_snapshot(chain[0])
    assert blocks.match_prefix(chain) == (0, None)  # not written yet
    blocks.commit_snapshot(chain[0], record)
    assert blocks.match_prefix(chain) == (1, record)
    blocks.invalidate(pages)
    assert blocks.match_prefix(chain) == (0, None)


def test_the_longest_unused_goes_first_and_leaves_before_parents():
    blocks = BlockPool(7)
    for tokens in [(1, 2), (3, 4), (1, 5)]:
        chain = names(*tokens)
        known = [name for name in chain if name in findable(blocks)]
        pages = blocks.touch(known) + blocks.allocate(len(chain) - len(known))
        publish(blocks, chain, pages)
        blocks.free(pages)
    order = []
    for _ in range(6):
        before = set(findable(blocks))
        blocks.allocate(1)
        blocks.check_invariants()
        order += before - set(findable(blocks))
    assert order == [names(1, 2)[1], names(3, 4)[1], names(3)[0], names(1, 5)[1], names(1)[0]]
    assert blocks.stats()["num_block_evictions"] == 5


def test_a_duplicate_stays_private_and_takes_over_when_the_other_is_gone():
    blocks = BlockPool(6, [9])
    first = fill(blocks, 1, 2)
    blocks.free(first)
    second = blocks.allocate(3)
    assert publish(blocks, names(1, 2, 3), second) == [False, False, True]
    assert blocks.touch(names(1, 2)) == first
    blocks.free(first)
    blocks.free(second)
    blocks.check_invariants([])
    assert [findable(blocks)[name] for name in names(1, 2, 3)] == [*first, second[2]]
    assert blocks.stats()["num_blocks_cached"] == 3  # duplicates are freed

    again = blocks.allocate(2)
    assert publish(blocks, names(1, 2), again) == [False, False]
    other = blocks.allocate(3)  # evicts all that was cached
    assert blocks.match_prefix(names(1)) == (0, None)
    blocks.free(again)
    blocks.check_invariants([other])
    assert blocks.touch(names(1, 2)) == again


def test_retracted_pages_are_never_found_again_even_when_others_hold_them():
    blocks = BlockPool(6, [9])
    bad = fill(blocks, 1, 2, records=[1])
    shared = blocks.touch(names(1))
    blocks.invalidate(bad)
    blocks.free(bad)
    blocks.check_invariants([shared])
    fresh = fill(blocks, 1)
    blocks.free(fresh)
    blocks.free(shared)
    blocks.check_invariants([])
    assert blocks.touch(names(1)) == fresh != shared
    assert blocks.stats()["num_snapshots_free"] == 1 and names(1, 2)[1] not in findable(blocks)


def test_records_are_evicted_by_use_but_not_while_pinned():
    blocks = BlockPool(9, [11, 12])
    fill(blocks, 1, 2, 3, records=[0, 1])
    a, b, c = names(1, 2, 3)
    assert blocks.reserve_snapshot(a) is None  # there is one
    record = blocks.pin(a)
    assert blocks.reserve_snapshot(c) is not None and b not in snapshots(blocks)
    assert blocks.reserve_snapshot(b) is None  # one is pinned, the other is being written
    blocks.drop_snapshot(a)
    assert blocks.match_prefix([a]) == (0, None)  # forgotten
    assert blocks.reserve_snapshot(b) is None  # but somebody reads it
    blocks.unpin(record)
    blocks.check_invariants()
    assert blocks.reserve_snapshot(b) == record


def test_records_that_others_used_are_not_superseded():
    blocks = BlockPool(9, [1, 2])
    fill(blocks, 1, 2, records=[0, 1])
    a, b = names(1, 2)
    blocks.unpin(blocks.pin(a))
    blocks.drop_snapshot(a, unless_used=True)
    blocks.drop_snapshot(b, unless_used=True)
    assert list(snapshots(blocks)) == [a]


def test_use_renews_a_record():
    blocks = BlockPool(9, [1, 2])
    fill(blocks, 1, 2, 3, records=[0, 1])
    a, b, c = names(1, 2, 3)
    blocks.unpin(blocks.pin(a))
    assert blocks.reserve_snapshot(c) and list(snapshots(blocks)) == [a, c]
    assert blocks.stats()["num_snapshot_evictions"] == 1


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_record_that_went_wrong_returns(forgotten):
    blocks = BlockPool(3, [1])
    (name,) = names(1)
    record = blocks.reserve_snapshot(name)
    if forgotten:
        blocks.drop_snapshot(name)
    blocks.commit_snapshot(name, record, valid=forgotten)
    blocks.check_invariants()
    assert blocks.stats()["num_snapshots_free"] == 1


def test_counts_of_hits_and_their_ceiling():
    blocks = BlockPool(3, remember=3)
    blocks.note(names(1, 2), 0)
    blocks.note(names(1, 2, 3), 1)
    assert blocks.stats()["hit_rate"] == 1 / 5 and blocks.stats()["hit_ceiling"] == 2 / 5
    blocks.note(names(4), 0)  # the fourth name: the first is forgotten
    blocks.note(names(1), 0)
    assert blocks.stats()["repeated"] == 2


def test_breaking_the_rules_is_an_error_and_changes_nothing():
    blocks = BlockPool(4, [1])
    pages = fill(blocks, 1, 2)
    for wrong in [
        lambda: blocks.free([pages[0], pages[1], pages[0]]),
        lambda: blocks.cache_block(SEED, names(3)[0], pages[0]),
        lambda: blocks.cache_block(SEED, names(3)[0], 3),
        lambda: blocks.unpin(1),
        lambda: BlockPool(1),
    ]:
        with pytest.raises(ValueError):
            wrong()
        blocks.check_invariants([pages])
    with pytest.raises(KeyError):
        blocks.touch(names(1, 9))
    blocks.check_invariants([pages])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda blocks: blocks._free.pop(),
        lambda blocks: blocks._free.append(blocks._free[-1]),
        lambda blocks: blocks._idle.move_to_end(next(iter(blocks._idle))),
        lambda blocks: blocks._page.popitem(),
        lambda blocks: blocks._free_slots.pop(),
        lambda blocks: blocks._uncommitted.add(names(1)[0]),
        lambda blocks: blocks._references.__setitem__(1, -1),
        lambda blocks: blocks._references.__setitem__(next(iter(blocks._idle)), 1),
    ],
)
def test_check_sees_spoilt_books(spoil):
    blocks = BlockPool(9, [1, 2])
    blocks.free(fill(blocks, 1, 2, records=[0]))
    blocks.check_invariants([])
    spoil(blocks)
    with pytest.raises(AssertionError, match="the state of the cache is inconsistent"):
        blocks.check_invariants([])


class Owners(RuleBasedStateMachine):
    """Owners come, share, publish, fail and go; a page stands for one token chain as long as it can be found."""

    @initialize(pages=st.integers(2, 9), records=st.integers(0, 3))
    def start(self, pages, records):
        self.blocks, self.owners, self.pins = BlockPool(pages, range(20, 20 + records)), [], []
        self.content = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def come(self, tokens):
        chain = names(*tokens)
        found, record = self.blocks.match_prefix(chain)
        assert all(self.content[page] == name for page, name in self._found(chain[:found]))
        if self.blocks.num_available(chain[:found]) < len(tokens) - found:
            assert self.blocks.allocate(len(tokens)) is None
            return
        self.blocks.note(chain, found)
        if record is not None:
            assert self.blocks.pin(chain[found - 1]) == record
            self.pins.append(record)
        pages = self.blocks.touch(chain[:found]) + self.blocks.allocate(len(tokens) - found)
        self.content.update(zip(pages, chain, strict=True))
        publish(self.blocks, chain, pages)
        record = self.blocks.reserve_snapshot(chain[-1])
        if record is not None:
            self.blocks.commit_snapshot(chain[-1], record)
        self.owners.append((pages, found))

    @rule(which=st.integers(0, 9), failed=st.booleans())
    def go(self, which, failed):
        if self.owners:
            pages, found = self.owners.pop(which % len(self.owners))
            if failed:
                self.blocks.invalidate(pages[found:])
                assert not set(pages[found:]) & set(findable(self.blocks).values())
            self.blocks.free(pages)

    @rule()
    def copied(self):
        if self.pins:
            self.blocks.unpin(self.pins.pop())

    @rule(token=st.integers(0, 1), unless_used=st.booleans())
    def forget(self, token, unless_used):
        self.blocks.drop_snapshot(names(token)[0], unless_used=unless_used)

    def _found(self, chain):
        return [(findable(self.blocks)[name], name) for name in chain]

    @invariant()
    def invariants(self):
        if hasattr(self, "blocks"):
            self.blocks.check_invariants([pages for pages, _ in self.owners])
            assert all(self.content[page] == name for name, page in findable(self.blocks).items())

    def teardown(self):
        if hasattr(self, "blocks"):
            while self.owners:
                self.go(0, False)
            while self.pins:
                self.copied()
            self.blocks.check_invariants([])
            assert (
                self.blocks.num_available() == self.blocks.capacity == len(self.blocks.allocate(self.blocks.capacity))
            )
            assert not snapshots(self.blocks)  # gone with their pages


TestOwners = Owners.TestCase
TestOwners.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
