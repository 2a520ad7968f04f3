"""The scheduler against a device that remembers which tokens everything it holds was computed from (fake_device.py).

What happens when pages run out: test_scheduler_pages.py.
"""

import pytest

from tests.serve.fake_device import World, decoded, solo
from v4jax.serve.request import RequestStatus


def run(world, steps):
    """Plans of `steps` steps, each committed at once."""
    plans = []
    for _ in range(steps):
        plans.append(world.step())
        world.check()
        if world.flight:
            world.commit()
    return plans


def chunks(plans, id):
    return [(p.prefill.start, p.prefill.count) for p in plans if p and p.prefill and p.prefill.request.id == id]


# --- order and chunks -----------------------------------------------------------------------------------------------


def test_one_prompt_is_read_at_a_time_while_the_others_decode(endless):
    world = World(pages=20, slots=2)
    for id in "abc":
        world.add(id, [1] * 5 + [ord(id)], 3, salt=id)
    plans = run(world, 8)
    assert [p.prefill and p.prefill.request.id for p in plans] == ["a", "a", "b", "b", "c", "c", None, None]
    assert [decoded(p) for p in plans] == [[], [], ["a"], ["a"], ["b"], ["b"], ["c"], ["c"]]
    assert [p.prefill.last for p in plans[:4]] == [False, True, False, True]
    world.drain()


@pytest.mark.parametrize(
    "prompt, options, expected",
    [
        (11, {"chunk": 4, "block": 4}, [(0, 4), (4, 4), (8, 3)]),
        (11, {"chunk": 3, "block": 4}, [(0, 3), (3, 3), (6, 2), (8, 1), (9, 2)]),
        (8, {"chunk": 16, "block": 4}, [(0, 4), (4, 4)]),  # a prompt asked again must find a record before its end
        (3, {"chunk": 16, "block": 4}, [(0, 3)]),
        (14, {"chunk": 16, "block": 2, "snapshot_interval_blocks": 3}, [(0, 6), (6, 6), (12, 2)]),
    ],
)
def test_chunks_end_at_multiples_and_at_the_last_boundary(prompt, options, expected):
    world = World(pages=20, **options)
    world.add(0, list(range(prompt)), 1)
    plans = run(world, len(expected))
    assert chunks(plans, 0) == expected
    assert [p.prefill.last for p in plans] == [*[False] * (len(expected) - 1), True]
    assert world.everyone[0].status is RequestStatus.FINISHED


def test_records_are_kept_at_the_last_boundary_and_periodically():
    for every, records in [(0, 1), (2, 3)]:
        world = World(pages=20, records=9, snapshot_interval_blocks=every)
        world.add(0, list(range(11)), 1)
        world.drain()
        assert world.scheduler.stats()["num_snapshots_cached"] == records


def test_decoding_moves_one_record_along(endless):
    world = World(pages=20, records=9)
    world.add(0, [1, 2, 3], 9)
    kept = []
    while world.scheduler.busy:
        run(world, 1)
        kept.append(len(world.blocks._record))
    assert max(kept) == 2  # the prompt's and the newest
    answer = world.everyone[0].tokens
    row = world.add(1, [*answer, 3], 1)
    run(world, 1)
    assert row.num_cached_blocks == (len(answer) - 1) // 2


def test_with_lookahead_a_boundary_is_copied_once_and_not_too_late(endless):
    for slack, late in [(3, 0), (6, 1)]:
        world = World(pages=40, records=30, block=5, lookahead=3, slack=slack)
        row = world.add(0, [1, 2, 3], 60)
        copies = 0
        while world.scheduler.busy:
            plan = world.step()
            if len(world.flight) > 1 or plan is None:
                world.commit()
            copies += len(plan.copies) if plan else 0
        assert copies <= len(row.tokens) // 5
        assert late == (copies == len(row.tokens) // 5)


def test_with_lookahead_a_record_never_lies_further_back_than_slack(endless):
    for random_seed, (block, slack) in enumerate(10 * [(5, 3), (8, 6)]):
        world = World(pages=20, records=20, block=block, lookahead=3, slack=slack, random_seed=random_seed)
        world.add(0, [1, 2, 3], 60)
        world.drain()


@pytest.mark.parametrize("shared", [True, False])
def test_a_record_that_others_resumed_from_is_not_dropped(endless, shared):
    world = World(pages=40, records=9, slots=2)
    row = world.add(0, [1, 2, 3], 12)
    run(world, 4)
    assert row.decode_snapshot == row.block_hashes[1]
    if shared:
        other = world.add(1, [*row.tokens[:5], 9], 1)
        run(world, 1)
        assert other.num_cached_blocks == 2
    world.drain()
    assert world.blocks.match_prefix(row.block_hashes[:2])[0] == (2 if shared else 1)


# --- prefix cache ----------------------------------------------------------------------------------------------------


def test_a_prefix_is_found_up_to_the_last_record_and_by_its_own_tenant_only():
    world = World(pages=30, records=9)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    for id, salt in enumerate(["", "", "other", "other", None, None]):
        world.add(id, prompt, 1, salt=salt)
        world.drain()
    assert [world.everyone[id].tokens for id in range(6)] == [
        solo(s, prompt, 1) for s in ["", "", *["other"] * 2, *[None] * 2]
    ]
    stats = world.scheduler.stats()
    tokens = [stats[f"prefix_cache_{name}"] for name in ("hits", "queries", "repeats")]
    assert tokens == [6 * 2, 12 * 2, 6 * 2]  # two a block
    assert stats["num_blocks_cached"] == 6


def test_a_burst_with_one_prefix_waits_for_the_first_to_compute_it():
    world = World(pages=60, records=9, slots=8)
    for id in range(6):
        world.add(id, [1, 2, 3, 4, 5, 6, 10 + id], 2)
    world.drain()
    assert world.scheduler.stats()["prefix_cache_hits"] == 5 * 3 * 2
    assert world.scheduler.stats()["num_preemptions"] == 0


def test_nobody_waits_for_a_record_that_could_not_be_kept(endless):
    world = World(pages=30, records=0, slots=2)
    for id in range(2):
        world.add(id, [1, 2, 3], 9)
    run(world, 3)
    assert world.everyone[0].status is RequestStatus.RUNNING and world.everyone[1].status is RequestStatus.PREFILL
    world.drain()


# --- one step ahead --------------------------------------------------------------------------------------------------


def test_what_ends_keeps_its_pages_until_the_plan_under_way_is_committed(endless):
    world = World(pages=9)
    row = world.add(0, [1, 2, 3], 5)
    run(world, 2)
    first, second = world.step(), world.step()
    assert (decoded(first), decoded(second)) == ([0], [0]) and second.decode[0].position == first.decode[0].position + 1
    with pytest.raises(RuntimeError, match="commit"):
        world.step()
    world.scheduler.update_from_output(first, {0: [4]}, finished={0})
    world.flight.pop(0)
    assert row.status is RequestStatus.FINISHED
    assert row.block_ids
    assert world.scheduler.stats()["num_blocks_in_use"] == len(row.block_ids)
    with pytest.raises(ValueError, match="in the order"):
        world.scheduler.update_from_output(first, {})
    world.scheduler.update_from_output(second, {})
    assert not row.block_ids and not world.scheduler.busy and world.scheduler.stats()["num_blocks_in_use"] == 0
    world.scheduler.check_invariants()


def test_no_step_is_spent_beyond_max_tokens(endless):
    world = World(pages=9)
    world.add(0, [1, 2, 3], 2)
    assert [world.step() is not None, world.step() is not None] == [True, True]  # two chunks
    world.commit()
    assert decoded(world.step()) == [0]
    world.commit()
    assert world.step() is None
    world.commit()
    assert not world.scheduler.busy


@pytest.mark.parametrize("gained", [{}, {0: []}, {0: [1, 1]}])
def test_results_must_be_what_the_plan_adds(gained):
    world = World()
    world.add(0, [1], 5)
    plan = world.step()
    with pytest.raises(ValueError, match=r"gained \d tokens, where 1 to 1 can be"):
        world.scheduler.update_from_output(plan, gained)


# --- ending early -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("under_way", [0, 1, 2])
@pytest.mark.parametrize("how", ["abort_request", "fail_request"])
def test_ending_at_any_moment_frees_everything(endless, steps, under_way, how):
    world = World(pages=9, records=3)
    row = world.add(0, [1, 2, 3, 4, 5], 10)
    run(world, steps)
    for _ in range(under_way):
        world.step()
    own = row.block_ids[row.num_cached_blocks :]
    assert getattr(world.scheduler, how)(0) is True
    assert getattr(world.scheduler, how)(0) is False
    world.check()
    while world.flight:
        world.commit()
    stats = world.scheduler.stats()
    assert not world.scheduler.busy and stats["num_blocks_in_use"] == 0
    if how == "fail_request":
        assert stats["num_blocks_cached"] == stats["num_snapshots_cached"] == 0
        assert not set(own) & set(world.blocks._page.values())
    else:
        ends = [row.block_hashes.index(name) + 1 for name in world.blocks._record]
        assert all(world.blocks.match_prefix(row.block_hashes[:end])[0] == end for end in ends), (
            "a record that cannot be reached"
        )
    world.settled()


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_finish_that_comes_later_keeps_the_blocks(endless, ahead):
    world = World(pages=9)
    row = world.add(0, [1, 2, 3, 4], 9)
    run(world, 3)
    for _ in range(ahead):
        world.step()
    assert world.scheduler.finish_request(0)
    assert not world.scheduler.finish_request(0)
    assert row.status is RequestStatus.FINISHED
    while world.flight:
        world.commit()
    assert not world.scheduler.busy and world.blocks.match_prefix(row.block_hashes)[0] == 2


def test_a_failure_keeps_what_it_had_found_and_hurts_nobody_else(endless):
    world = World(pages=20, records=6)
    prompt = [1, 2, 3, 4, 5]
    world.add("first", prompt, 1)
    world.drain()
    bad = world.add("bad", [*prompt, 6, 7, 8], 5)
    run(world, 2)
    sharing = world.add("sharing", [*prompt, 6, 7, 8, 9, 10], 4)
    run(world, 1)
    assert bad.num_cached_blocks == 2 and sharing.num_cached_blocks == 3
    world.scheduler.fail_request("bad")
    world.drain()
    assert sharing.status is RequestStatus.FINISHED
    assert world.blocks.match_prefix(sharing.block_hashes)[0] == 2  # its own blocks hang behind a retracted one


def test_a_failure_takes_its_record_along_even_behind_the_page_of_another(endless):
    world = World(pages=20, records=1)
    row = world.add("first", [1, 2, 3], 1)
    world.drain()
    world.blocks.drop_snapshot(row.block_hashes[0])
    bad = world.add("bad", [1, 2, 3], 5)
    run(world, 2)
    assert bad.num_published_blocks == 1 and world.blocks.match_prefix(row.block_hashes)[0] == 1
    assert world.blocks._page[row.block_hashes[0]] != bad.block_ids[0]
    world.scheduler.fail_request("bad")
    assert world.blocks.match_prefix(row.block_hashes) == (0, None) and row.block_hashes[0] in world.blocks._page


def test_unknown_requests_cannot_be_ended():
    assert World().scheduler.abort_request("unknown") is False


# --- everything at once ----------------------------------------------------------------------------------------------


def test_a_burst_of_200_into_a_pool_for_8_gets_every_answer_right():
    world = World(pages=33, records=8, slots=8, block=4, chunk=8)
    for id in range(200):
        world.add(id, [id % 2, 2, 3, 3, 1, 1, id % 3, 1, 1][: 3 + id % 7], 1 + id % 9)
    world.drain()
    assert all(row.status is RequestStatus.FINISHED for row in world.everyone.values())
    assert world.scheduler.stats()["prefix_cache_hits"] > 0
