"""The scheduler when pages run out: who waits, who gives its pages up, and how it goes on (see fake_device.py)."""

import pytest

from tests.serve.fake_device import World, decoded
from v4jax.core.errors import UserError
from v4jax.serve.request import RequestStatus


def until(world, condition, ahead):
    """Step until the condition holds, with up to `ahead` plans under way."""
    for _ in range(100):
        if condition():
            return
        while len(world.flight) > ahead:
            world.commit()
        world.step()
        world.check()
    raise AssertionError("it never came to that")


def test_what_never_fits_is_refused_with_the_numbers():
    world = World(pages=4, lookahead=1)
    with pytest.raises(UserError, match="5 tokens with max_tokens 2 needs 4 pages of 2 tokens, but the cache has 3"):
        world.add(0, [1] * 5, 2)
    world.add(1, [1] * 4, 2)
    with pytest.raises(ValueError):
        world.scheduler.add_request(1, [1], 1)
    with pytest.raises(ValueError):
        world.scheduler.add_request(2, [], 1)
    world.drain()


def test_what_just_fits_is_admitted_and_the_next_waits_for_a_block_more_than_its_prompt(endless):
    world = World(pages=3)
    world.add(0, [1, 2, 3], 1)
    world.drain()
    world = World(pages=5)
    for id in range(2):
        world.add(id, [id, 2, 3], 3)
    world.drain()
    assert world.scheduler.stats()["num_preemptions"] == 0


def test_younger_ones_get_no_pages_while_an_older_one_waits_for_some(endless):
    world = World(pages=30, records=0, block=1, lookahead=1)
    rows = [world.add(id, [id], 9) for id in range(3)]
    until(world, lambda: all(row.status is RequestStatus.RUNNING for row in rows), ahead=0)
    while world.flight:
        world.commit()
    world.step()
    rows[1].block_ids += world.blocks.allocate(1)  # so that it needs fewer now
    held = world.blocks.allocate(world.blocks.num_available() - 1)
    assert world.step() is None and rows[2].status is RequestStatus.PREEMPTED
    assert world.blocks.num_available() == 1
    world.blocks.free(held)
    world.drain()


def test_the_youngest_is_preempted_and_resumes_with_the_same_answer(endless):
    world = World(pages=9, records=4)
    for id in range(3):
        world.add(id, [10 + id] * 3, 9)
    world.drain()
    rows = world.everyone
    assert rows[0].preemptions == 0 and rows[2].preemptions > 0
    assert world.scheduler.stats()["num_preemptions"] == sum(row.preemptions for row in rows.values())
    assert world.scheduler.stats()["prefix_cache_queries"] == 3 * 2  # coming back is no new query
    assert all(len(row.tokens) == 12 for row in rows.values())


def test_a_preempted_sequence_begins_behind_what_it_left(endless):
    world = World(pages=8, records=4, slots=2)
    world.add("old", [1, 2, 3], 10)
    young = world.add("young", [4, 5, 6], 8)
    until(world, lambda: young.status is RequestStatus.WAITING and young.preemptions, ahead=0)
    assert not young.block_ids and not young.state_slot
    until(world, lambda: young.status is RequestStatus.PREFILL or young.num_cached_blocks, ahead=0)
    assert young.num_cached_blocks > 0 and young.num_prefill_tokens > 3
    world.drain()


def test_with_replay_tokens_are_decoded_anew_and_not_shared(endless):
    world = World(pages=8, records=4, slots=2, replay=True)
    world.add("old", [1, 2, 3], 10)
    young = world.add("young", [4, 5, 6], 8)
    until(world, lambda: young.status is RequestStatus.WAITING and young.preemptions, ahead=0)
    reached = young.max_len_reached
    assert reached > 5 and young.tokens == [4, 5, 6] and young.is_replay
    until(world, lambda: young.state_slot, ahead=0)
    assert young.num_prefill_tokens == 3
    until(world, lambda: len(young.tokens) == reached - 1, ahead=0)
    assert young.is_replay
    until(world, lambda: len(young.tokens) == reached, ahead=0)
    assert not young.is_replay
    world.drain()
    for row in world.everyone.values():
        assert [name in world.blocks._page for name in row.block_hashes] == [True] + [False] * (
            len(row.block_hashes) - 1
        )
        assert not {*row.block_hashes[1:]} & {*world.blocks._record}


def test_only_as_many_as_needed_are_preempted_while_pages_are_on_their_way(endless):
    world = World(pages=9, records=0, slots=4, block=4, chunk=4)
    for id in range(4):
        world.add(id, [id] * 7, 9)
    row = world.everyone[2]
    until(world, lambda: world.scheduler.stats()["num_preemptions"], ahead=1)
    assert row.status is RequestStatus.PREEMPTED and row.block_ids and row.state_slot
    while len(world.flight) > 1:
        world.commit()
    world.step()
    assert world.scheduler.stats()["num_preemptions"] == 1
    world.drain()


def test_nobody_overtakes_a_sequence_that_is_being_preempted(endless):
    world = World(pages=11, records=0, slots=3, block=3)
    held = world.blocks.allocate(5)
    world.add("old", [1], 8)
    young = world.add("young", [2] * 3, 8)
    while young.status is not RequestStatus.PREEMPTED:
        if len(world.flight) > 1:
            world.commit()
        world.step()
    assert len(world.flight) == 1, "the case is that the step which preempts has nothing to run"
    world.blocks.free(held)
    world.add("late", [3], 2)
    plan = world.step()
    assert decoded(plan) == ["old"] and plan.prefill is None
    world.drain()
