"""Threads between the tiers, under faults. Numbers are those of the faults in v4jax/cache/README.md."""

import random
import threading
import time

import numpy as np
import pytest

from tests.cache.offload.block_fixtures import BLOCK, RECORD, ROOT, chain, is_right, item, items, payload
from tests.cache.offload.faulty_files import FaultyFiles, failing, slow
from v4jax.cache.offload.block_file import checksum
from v4jax.cache.offload.disk_tier import DiskTier
from v4jax.cache.offload.host_tier import HostTier
from v4jax.cache.offload.manager import LoadJob, OffloadManager

PLENTY, LONG = 1 << 30, 60.0


@pytest.fixture
def make(tmp_path):
    made = []

    def make(host=PLENTY, disk=PLENTY, files=None, deadline=LONG, **options):
        tiers = (
            HostTier(host, "lru") if host else None,
            DiskTier(tmp_path, disk, "lru", files=files, deadline=deadline) if disk else None,
        )
        made.append(OffloadManager(BLOCK, RECORD, *tiers, deadline=deadline, **options))
        return made[-1]

    yield make
    for transfer in made:
        transfer.close(LONG)


def save(transfer, stored, wait=True):
    for one in stored:
        transfer.store(one.schema, one.block_hash, one.parent, one.payload)
        assert not wait or transfer.flush(LONG)


def fetched(transfer, names, blocks_here=(), records_here=(), least=0):
    """The job when it is done, or None if there was nothing to fetch."""
    job = LoadJob(tuple(names), frozenset(blocks_here), frozenset(records_here), least)
    if not transfer.load(job):
        return None
    assert job.done.wait(LONG)
    assert all(map(is_right, job.blocks.values())) and (job.record is None or is_right(job.record))
    return job


def settled(transfer):
    assert transfer.flush(LONG)
    for tier in transfer.tiers.values():
        tier.check_invariants()
    stats = transfer.stats()
    assert stats["queue_saves"] == stats["queue_writes"] == transfer._loose_bytes == 0 and not transfer._coming
    return stats


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", [{"disk": 0}, {"host": 0}, {}, {"host": 3 * BLOCK.nbytes}])
def test_what_goes_down_comes_up(make, tiers):
    transfer, names = make(**tiers), chain("a", 5)
    save(transfer, items(names, 3, 5))
    job = fetched(transfer, names)
    assert job.num_loaded == 5 and list(job.blocks) == names and job.record.block_hash == names[4]
    job = fetched(transfer, names, blocks_here=names[:2], least=2)
    assert job.num_loaded == 5 and list(job.blocks) == names[2:]
    job = fetched(transfer, [*names[:4], *chain("b", 2)])
    assert job.num_loaded == 3 and list(job.blocks) == names[:3]
    job = fetched(transfer, names[:4], records_here=[names[3]])
    assert job.num_loaded == 4 and job.record is None
    assert fetched(transfer, names[:3], least=3) is None and fetched(transfer, chain("b", 3)) is None
    settled(transfer)


def test_look_ups_are_counted_by_tier_and_kind(make):
    transfer, names = make(host=2 * BLOCK.nbytes + RECORD.nbytes), chain("a", 5)
    save(transfer, items(names, 5))
    assert fetched(transfer, [*names, *chain("b", 2)]).num_loaded == 5
    stats = settled(transfer)
    counted = {key: int(stats[key]) for key in stats if key.endswith(("hits", "misses"))}
    # Of the host's three places the last things saved have one each; the disk is asked for what is not there.
    assert counted["host_block_hits"] + counted["host_block_misses"] == 7
    assert counted["disk_block_hits"] + counted["disk_block_misses"] == counted["host_block_misses"]
    assert counted["disk_block_misses"] == 2 and counted["host_snapshot_hits"] == 1
    assert stats["transfer_saved"] == 6 and stats["disk_blocks"] == 5 and stats["disk_bytes_in"] > 5 * BLOCK.nbytes


def test_what_is_still_on_its_way_down_can_come_up(make):
    gate, names = threading.Event(), chain("a", 3)
    transfer = make(host=0, files=FaultyFiles(lambda operation, path: gate.wait(LONG)))
    save(transfer, items(names, 3), wait=False)
    assert fetched(transfer, names).num_loaded == 3 and transfer.stats()["queue_writes"] == 4
    assert not transfer.should_store(BLOCK.key(names[0])) and transfer.should_store(BLOCK.key(ROOT))
    gate.set()
    assert settled(transfer)["disk_blocks"] == 3


# --- 3, 14, 15: pieces that are missing or bad -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_missing_or_bad_the_longest_sound_beginning_comes(make, seed):
    rng, names = random.Random(seed), chain(seed, 8)
    boundaries = sorted(rng.sample(range(1, 9), 4))
    transfer = make(host=rng.choice([0, PLENTY]))
    stored = items(names, *boundaries)
    save(transfer, stored)
    lost = {one.key for one in rng.sample(stored, rng.randrange(5))}
    for one in stored:
        if one.key in lost:  # some are known to be gone, the others turn out to be bad when they are read
            bad = rng.random() < 0.5
            for tier in transfer.tiers.values():
                if not bad:
                    tier.discard(one.key)
                elif isinstance(tier, HostTier):
                    tier._items[one.key] = one._replace(payload=one.payload ^ 1)
                else:
                    path = tier.directory / one.key.file(one.parent)
                    path.write_bytes(path.read_bytes()[:-1] + b"?")
    whole = next((i for i, name in enumerate(names) if BLOCK.key(name) in lost), 8)
    most = max((b for b in boundaries if b <= whole and RECORD.key(names[b - 1]) not in lost), default=0)
    job = fetched(transfer, names)
    assert (job.num_loaded if job else 0) == most
    settled(transfer)
    again = fetched(transfer, names)
    assert (again.num_loaded if again else 0) == most


def test_bad_bytes_on_the_host_are_counted_and_the_disk_has_them_still(make):
    transfer, names = make(), chain("a", 2)
    save(transfer, items(names, 2))
    for key, one in transfer.host._items.items():
        transfer.host._items[key] = one._replace(payload=one.payload ^ 128)
    assert fetched(transfer, names).num_loaded == 2
    stats = settled(transfer)
    assert stats["host_corrupt"] == 3 and stats["disk_corrupt"] == 0
    assert fetched(transfer, names).num_loaded == 2 and transfer.stats()["disk_reads"] == 3  # back on the host


def test_read_errors_cost_what_they_hit(make):
    files = FaultyFiles()
    transfer, names = make(host=0, files=files), chain("a", 6)
    save(transfer, items(names, 3, 6))
    bad = BLOCK.key(names[4]).file(names[3])
    files.fault = lambda operation, path: failing("read")(operation, path) if path.endswith(bad) else None
    assert fetched(transfer, names).num_loaded == 3
    stats = settled(transfer)
    assert stats["disk_read_errors"] == 1 and stats["disk_blocks"] == 5 and not stats["disk_breaker_open"]


# --- 11: a disk that hangs --------------------------------------------------------------------------------------------


def test_a_disk_that_hangs_is_given_up_and_the_breaker_opens(make):
    gate, files = threading.Event(), FaultyFiles()
    transfer = make(host=0, files=files, deadline=0.25)
    names = [chain(seed, 2) for seed in range(5)]
    for some in names:
        save(transfer, items(some, 2))
    files.fault = lambda operation, path: gate.wait(LONG) if operation == "read" else None
    jobs = []
    for some in names[:3]:  # the third waits behind readers that hang
        jobs.append(job := LoadJob(tuple(some), frozenset(), frozenset(), 0))
        assert transfer.load(job) and not transfer.expired(job)
        while not transfer.expired(job):
            time.sleep(0.01)
        transfer.give_up(job)
        assert job.num_loaded == 0
    assert fetched(transfer, names[3]) is None  # not even tried
    stats = transfer.stats()
    assert stats["disk_late"] == stats["transfer_late"] == 3 and stats["disk_breaker_open"]
    written = []
    transfer.disk.put = written.append
    gate.set()
    assert all(job.done.wait(LONG) for job in jobs)
    settled(transfer)
    assert not written  # what loaded after the deadline is in the host tier already


def test_what_is_on_the_host_does_not_wait_for_a_disk_that_hangs(make):
    gate, files = threading.Event(), FaultyFiles()
    transfer = make(host=2 * BLOCK.nbytes + RECORD.nbytes, files=files)
    names = [chain(seed, 2) for seed in range(4)]
    for some in names:
        save(transfer, items(some, 2))
    files.fault = lambda operation, path: gate.wait(LONG) if operation == "read" else None
    jobs = [LoadJob(tuple(some), frozenset(), frozenset(), 0) for some in names[:2]]
    assert all(map(transfer.load, jobs))
    assert fetched(transfer, names[3]).num_loaded == 2 and not any(job.done.is_set() for job in jobs)
    gate.set()
    assert all(job.done.wait(LONG) for job in jobs)


# --- 1, 12, 13: offloads that are too fast, or fail -------------------------------------------------------------------


def test_queues_are_bounded_when_the_disk_is_slow(make):
    transfer = make(host=0, files=FaultyFiles(slow(0.005, "write")), room=4 * RECORD.nbytes)
    most = 0
    for name in chain("a", 80):
        if transfer.num_free(BLOCK):
            transfer.store(BLOCK, name, ROOT, payload(BLOCK, name))
        else:
            transfer.record_dropped(1)
        most = max(most, sum(transfer._coming.values()), transfer._loose_bytes)
    stats = settled(transfer)
    assert most <= 4 * RECORD.nbytes and stats["transfer_dropped"] > 0
    assert stats["disk_blocks"] + stats["transfer_dropped"] == 80


def test_what_the_host_holds_waits_for_a_slow_disk_beyond_the_queue(make):
    gate = threading.Event()
    transfer = make(files=FaultyFiles(lambda operation, path: gate.wait(LONG)), room=1)
    names = chain("a", 40)
    for one in items(names, 40):
        while not transfer.num_free(one.schema):
            time.sleep(0.001)
        transfer.store(one.schema, one.block_hash, one.parent, one.payload)
    gate.set()
    stats = settled(transfer)
    assert stats["disk_blocks"] == 40 and stats["transfer_dropped"] == 0


class Refused:
    """An array whose copy off the device fails."""

    def __array__(self, *_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of pinned memory")


def test_a_copy_that_fails_is_dropped(make):
    transfer, names = make(), chain("a", 2)
    transfer.store(BLOCK, names[0], ROOT, Refused())
    save(transfer, items(names)[1:])
    stats = settled(transfer)
    assert stats["transfer_dropped"] == 1 and stats["host_blocks"] == 1


@pytest.mark.parametrize("where", ["put", "get"])
def test_transfer_threads_outlive_an_error_that_nobody_foresaw(make, monkeypatch, where, caplog):
    transfer, names = make(host=0), chain("a", 2)
    if where == "get":
        save(transfer, items(names, 2))
    with monkeypatch.context() as patch:
        patch.setattr(transfer.disk, where, lambda *_: 1 // 0)
        if where == "put":
            save(transfer, items(names, 2))
        else:
            for _ in range(4):  # more often than there are threads
                assert not fetched(transfer, names).blocks
    assert "leaves out" in caplog.text and "ZeroDivisionError" in caplog.text
    save(transfer, items(names, 2))
    assert len(fetched(transfer, names).blocks) == 2
    settled(transfer)


def test_transfer_an_interrupted_save_takes_no_room(make):
    transfer, [name] = make(room=1), chain("a", 1)

    class Interrupting:
        put = staticmethod(lambda _: (_ for _ in ()).throw(KeyboardInterrupt))

    before, saves, transfer._saves = transfer.num_free(BLOCK), transfer._saves, Interrupting
    with pytest.raises(KeyboardInterrupt):
        save(transfer, items([name]))
    transfer._saves = saves
    assert transfer.num_free(BLOCK) == before
    save(transfer, items([name]))
    settled(transfer)


@pytest.mark.parametrize("host, disk", [(1, 1), (BLOCK.nbytes, 4096), (2 * BLOCK.nbytes, 1)])
def test_tiers_of_next_to_nothing_do_no_harm(make, host, disk):
    transfer, names = make(host=host, disk=disk), chain("a", 4)
    save(transfer, items(names, 2, 4))
    fetched(transfer, names)
    settled(transfer)


def test_what_leaves_the_host_unwritten_is_written_then(make):
    files = FaultyFiles(failing("write"))
    transfer, names = make(host=2 * BLOCK.nbytes, files=files), chain("a", 4)
    save(transfer, items(names[:2]))
    assert transfer.stats()["disk_blocks"] == 0
    files.fault = failing()
    transfer.disk._writes.worked()  # as if the pause were over
    save(transfer, items(names)[2:])
    assert {key.block_hash for key in transfer.disk._index.entries} == set(names)
    settled(transfer)


# --- 16, 17: many at once, for long ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_eviction_races_with_loads(make, seed):
    """Room for little more than one chain, and threads that save, load, damage and discard at random."""
    files = FaultyFiles(flip=0.05, seed=seed)
    transfer = make(host=5 * BLOCK.nbytes + RECORD.nbytes, disk=8 * 4096, files=files)
    chains, failed = [chain((seed, i), 4) for i in range(6)], []

    def work(number):
        rng = random.Random((seed, number).__repr__())
        try:
            for _ in range(40):
                names = rng.choice(chains)
                if rng.random() < 0.5:
                    save(transfer, [one for one in items(names, 2, 4) if transfer.should_store(one.key)], wait=False)
                else:
                    job = fetched(transfer, names)
                    assert job is None or job.num_loaded in (0, 2, 4)
                    assert job is None or job.cancelled or set(job.blocks) >= set(names[: job.num_loaded])
        except BaseException as error:  # whatever it is, the test is to fail by it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    stats = settled(transfer)
    assert stats["host_bytes"] <= stats["host_budget"] and stats["disk_bytes"] <= stats["disk_budget"]
    assert stats["host_evictions"] > 50 and stats["disk_corrupt"] > 0


def test_full_tiers_turn_over_many_times_with_exact_books(make):
    transfer = make(host=6 * BLOCK.nbytes, disk=12 * 4096)
    for turn in range(60):
        names = chain(turn, 4)
        save(transfer, items(names, 4), wait=turn % 2)
        if turn % 2:
            assert fetched(transfer, names).num_loaded == 4
    stats = settled(transfer)
    assert stats["disk_evictions"] >= 60 * 5 - 12 - stats["transfer_dropped"] and stats["disk_bytes"] <= 12 * 4096
    assert len(transfer.host._index._policy._queue._heap) < 200 and threading.active_count() < 100


def test_closing_leaves_no_thread_and_no_owner(make, tmp_path):
    before = threading.active_count()
    transfer = make()
    save(transfer, items(chain("a", 3), 3), wait=False)
    transfer.close(LONG)
    for _ in range(200):
        if threading.active_count() <= before:  # less, if threads of an earlier test end meanwhile
            break
        time.sleep(0.01)
    assert threading.active_count() <= before
    disk = DiskTier(tmp_path, PLENTY, "lru")
    assert disk.stats()["blocks"] == 3
    disk.close()


def test_the_checksum_is_of_the_bytes():
    one = item(BLOCK, chain("a", 1)[0])
    assert one.is_intact and checksum(one.payload.tobytes()) == one.checksum
    assert not one._replace(payload=np.roll(one.payload, 1)).is_intact
