"""What all processes of a mesh have: the books alone, by threads, and two processes (tests/cache/meshed.py)."""

import os
import pathlib
import random
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.cache import meshed
from tests.cache.stored import BLOCK, RECORD, ROOT, chain, name, payload
from tests.cache.test_parts import half
from v4jax.cache.disk import Disk, Elsewhere
from v4jax.cache.faults import FaultyFiles, failing
from v4jax.cache.parts import recut
from v4jax.cache.sharded import Sharded
from v4jax.cache.tiers import Host

PROJECT = pathlib.Path(__file__).resolve().parents[2]
PLENTY = 1 << 30


class Group:
    """Processes of a mesh, as threads: they meet in every `sync`."""

    def __init__(self, tiers, axis=-1, others=()):
        self.count, self.tiers, self._given = len(tiers), tiers, [b""] * len(tiers)
        self._meeting, self._pool = threading.Barrier(self.count), ThreadPoolExecutor(self.count)
        forms = lambda i: {w: half(w, i, axis) if self.count > 1 else w for w in (BLOCK, RECORD)}
        self.all = [
            Sharded(tiers[i], forms(i), i, self.count, lambda data, i=i: self._exchange(i, data), others)
            for i in range(self.count)
        ]

    def _exchange(self, index, data):
        self._given[index] = data
        self._meeting.wait(60)
        given = list(self._given)
        self._meeting.wait(60)
        return given

    def sync(self):
        found = list(self._pool.map(lambda one: one.sync(), self.all))
        assert all(one._have == self.all[0]._have and one._leaving == self.all[0]._leaving for one in self.all)
        return found

    def put(self, name, form=BLOCK, parent=ROOT, by=None):
        for i in range(self.count) if by is None else by:
            one = self.all[i]
            one.put(form, name, parent, recut(one.parts[form], [(form, payload(form, name))]))

    def read(self, name, form=BLOCK):
        """Whether all have it, whose bytes are right then."""
        for one in self.all:
            one.read(form, name)
        found = [found[form.key(name)] for found in self.sync()]
        assert len({data is None for data in found}) == 1
        if found[0] is None:
            return False
        parts = [(one.parts[form], data) for one, data in zip(self.all, found, strict=True)]
        assert np.array_equal(recut(form, parts), payload(form, name))
        return True

    def present(self, name, form=BLOCK):
        [answer] = {form.key(name) in one for one in self.all}
        return answer

    def close(self):
        for tier in [tier for tiers in self.tiers for tier in tiers]:
            tier.close()


def hosts(budget=PLENTY):
    return [(Host(budget, "lru"),), (Host(budget, "lru"),)]


def disks(path, *numbers, files=None):
    return [(Disk(path / str(i), PLENTY, "lru", files=files),) for i in numbers]


# --- what counts ------------------------------------------------------------------------------------------------------


def test_a_block_is_present_when_all_have_said_that_they_have_it():
    group, one = Group(hosts()), name("a")
    group.put(one, by=[0])
    group.sync()
    assert not group.present(one) and not group.read(one)
    assert [member.stats()["incomplete"] for member in group.all] == [1, 1]
    assert [member.stats()["missed_elsewhere"] for member in group.all] == [1, 0]
    group.put(one, by=[1])
    assert not group.present(one)  # nobody may know before the others
    group.sync()
    assert group.present(one) and group.read(one) and group.all[1].stats()["present"] == 1


def test_a_block_is_freed_when_all_have_reported():
    group, one = Group(hosts()), name("a")
    group.put(one)
    group.sync()
    group.tiers[1][0].discard(group.all[1].parts[BLOCK].key(one))
    assert group.present(one)  # as all were told
    group.sync()
    assert not group.present(one)  # one has reported it, the other has it still
    assert [member.stats()["leaving"] for member in group.all] == [1, 1]
    assert not group.all[1].put(BLOCK, one, ROOT, payload(group.all[1].parts[BLOCK], one))  # not yet
    assert group.tiers[0][0].stats()["blocks"] == 0  # it let its part go, and reports that in the next
    group.sync()
    assert [member.stats()["leaving"] for member in group.all] == [0, 0]
    group.put(one)
    group.sync()
    assert group.present(one) and group.read(one)


def test_what_is_being_read_is_not_dropped():
    group, one = Group(hosts()), name("a")
    group.put(one)
    group.sync()
    group.all[0].read(BLOCK, one)
    group.tiers[1][0].discard(group.all[1].parts[BLOCK].key(one))
    for _ in range(3):
        assert group.sync() == [{}, {}]
        assert group.tiers[0][0].stats()["blocks"] == 1 and group.all[0].stats()["leaving"] == 1
    with pytest.raises(ValueError, match="is being read already"):
        group.all[0].read(BLOCK, one)
    group.all[1].read(BLOCK, one)
    assert group.sync() == [{BLOCK.key(one): None}] * 2
    group.sync(), group.sync()
    assert group.tiers[0][0].stats()["blocks"] == 0 and group.all[0].stats()["leaving"] == 0


def test_what_one_cannot_store_the_others_let_go(tmp_path):
    tiers = [(Host(PLENTY, "lru"),), (Disk(tmp_path, PLENTY, "lru", files=FaultyFiles(failing("write"))),)]
    group, one = Group(tiers), name("a")
    group.put(one)
    group.sync(), group.sync()
    assert not group.present(one) and tiers[0][0].stats()["blocks"] == 0 == group.all[0].stats()["leaving"]
    group.close()


def test_a_disk_below_the_host_keeps_a_block_that_leaves_the_host(tmp_path):
    tiers = [(Host(2 * BLOCK.nbytes // 2, "lru"), disk) for [disk] in disks(tmp_path, 0, 1)]
    group, names = Group(tiers), chain("a", 6)
    for one in names:
        group.put(one)
    group.sync()
    assert tiers[0][0].stats()["evictions"] > 0 and all(map(group.present, names)) and all(map(group.read, names))
    group.close()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_lost_all_agree_and_no_byte_is_wrong(seed):
    """Tiers of a few blocks, and random losses, refusals and damage on either side."""
    rng, names = random.Random(seed), chain(seed, 8)
    group = Group([(Host(5 * BLOCK.nbytes // 2, "lru"),), (Host(4 * BLOCK.nbytes // 2 + RECORD.nbytes // 2, "lru"),)])
    hits = 0
    for _ in range(300):
        one, form = rng.choice(names), rng.choice([BLOCK, BLOCK, RECORD])
        member = rng.randrange(2)
        key, tier = group.all[member].parts[form].key(one), group.tiers[member][0]
        match rng.randrange(5):
            case 0 | 1:
                group.put(one, form, by=rng.choice([None, None, None, [member]]))
            case 2:
                known, found = group.present(one, form), group.read(one, form)
                hits += found
                assert not found or known or all(group.all[i].parts[form].key(one) in group.tiers[i][0] for i in (0, 1))
            case 3 if key in tier:
                tier.discard(key)
            case 4 if key in tier and rng.random() < 0.5:
                tier._items[key] = tier._items[key]._replace(payload=tier._items[key].payload ^ 1)
        group.sync()
        for tier in group.tiers:
            tier[0].check()
    assert hits > 10
    for _ in range(3):
        group.sync()
    for member in group.all:
        member.check()
        assert member.stats()["leaving"] == 0
    assert all(member.stats()["present"] == group.all[0].stats()["present"] for member in group.all)


# --- a restart, on this mesh and on others ---------------------------------------------------------------------------


def stored(tmp_path, names, numbers=(0, 1), **options):
    group = Group(disks(tmp_path, *numbers), **options)
    for parent, one in zip([ROOT, *names], names, strict=False):
        group.put(one, parent=parent)
    group.put(names[-1], RECORD, names[-1])
    group.sync()
    group.close()


def test_a_restart_finds_what_all_have(tmp_path):
    names = chain("a", 3)
    stored(tmp_path, names)
    lost, damaged = (next((tmp_path / "1").glob(f"{one.hex()}*.block")) for one in names[:2])
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    group = Group(disks(tmp_path, 0, 1))
    group.sync()
    assert [group.present(one) for one in names] == [False, True, True]
    assert [group.read(one) for one in names] == [False, False, True] and group.read(names[2], RECORD)
    group.sync()
    assert [group.present(one) for one in names] == [False, False, True]
    group.put(names[0])
    group.sync(), group.sync()
    assert group.read(names[0])
    group.close()


@pytest.mark.parametrize("before, now, axis", [((0, 1), (0,), 0), ((0,), (0, 1), -1), ((0, 1), (0, 1), 0)])
def test_another_mesh_finds_what_the_last_one_left(tmp_path, before, now, axis):
    names = chain("a", 3)
    stored(tmp_path, names, before)
    others = [Elsewhere(tmp_path / str(i)) for i in (0, 1, 2)]
    group = Group(disks(tmp_path, *now), axis, others)
    group.sync()
    assert all(map(group.present, names)) and group.present(names[2], RECORD)
    next((tmp_path / str(before[-1])).glob(f"{names[0].hex()}*.block")).unlink()
    assert [group.read(one) for one in names] == [False, True, True] and group.read(names[2], RECORD)
    group.sync(), group.sync()
    assert [group.present(one) for one in names] == [False, True, True]
    group.put(names[0])
    group.sync()
    assert group.read(names[0])
    for member in group.all:
        member.check()
    group.close()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_on_loopback(tmp_path):
    """See tests/cache/meshed.py for what they do; here, what one left to two, and two leave to one."""
    meshed.store_alone(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(PROJECT), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.cache.meshed", str(tmp_path)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, **options) for i in (0, 1)]
    try:
        said = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0] and all(text.endswith("done\n") for text in said), said
    meshed.read_alone(tmp_path)
