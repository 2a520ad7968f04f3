"""Two processes with four devices each that share blocks; a test starts it twice. Argument: a directory.

Blocks are arrays over all eight devices, made from what belongs under their names (`tests.cache.block_fixtures`).
"""

import os
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.cache.block_fixtures import BLOCK, RECORD, ROOT, chain, payload
from v4jax.cache.offload.disk_tier import DiskTier, Elsewhere
from v4jax.cache.parts import pack, part_of, unpack
from v4jax.cache.sharded import Sharded
from v4jax.parallel import distributed

PLENTY = 1 << 30
ALONE, BOTH = chain("alone", 2), chain("both", 4)
# Of every array of a block and of a record: which mesh axes split its axes. "far" is over processes, "near" inside one.
SPECS = {
    BLOCK: {"csa.main": (None, ("far", "near")), "csa.index": ("far",), "hca.main": ()},
    RECORD: {"ring": ("near", "far"), "tails": (None, "far")},
}


class Member:
    """This process, with its directory DIR/number and those of the others to read."""

    def __init__(self, directory, number, others=(0, 1)):
        devices = np.array(jax.devices()).reshape(2, 4)
        named = lambda spec: NamedSharding(Mesh(devices, ("far", "near")), PartitionSpec(*spec))
        self.where = {form: {name: named(spec) for name, spec in specs.items()} for form, specs in SPECS.items()}
        pages = lambda form: [
            jax.make_array_from_callback((3, *shape), named((None, *SPECS[form][name])),
                                         lambda index, shape=shape: np.zeros((3, *shape), np.uint8)[index])
            for name, _, shape in form.table
        ]  # fmt: skip
        self.disk = DiskTier(directory / str(number), PLENTY, "lru")
        self.shared = Sharded(
            [self.disk], {form: part_of(form, pages(form)) for form in SPECS}, jax.process_index(),
            jax.process_count(), distributed.all_gather_bytes, [Elsewhere(directory / str(i)) for i in others if i != number],
        )  # fmt: skip

    def put(self, form, name, parent=ROOT):
        rows = unpack(form, payload(form, name), self.where[form])
        self.shared.put(form, name, parent, pack(self.shared.parts[form], rows))

    def read(self, form, name):
        """Whether all have it; then it is on all devices as it should be."""
        self.shared.read(form, name)
        data = self.shared.sync()[form.key(name)]
        if data is None:
            return False
        got, wanted = unpack(self.shared.parts[form], data, self.where[form]), payload(form, name)
        expected = unpack(form, wanted, self.where[form])
        for name, array in got.items():
            for mine, right in zip(array.addressable_shards, expected[name].addressable_shards, strict=True):
                assert mine.index == right.index
                assert np.asarray(mine.data).tobytes() == np.asarray(right.data).tobytes()
        return True

    def restarted(self, directory, number):
        self.disk.close()
        distributed.barrier("closed")
        new = Member(directory, number)
        new.shared.sync()
        return new


def store_alone(directory):
    """One process, of whatever mesh: it writes whole blocks."""
    member = Member(directory, 2)
    for name in ALONE:
        member.put(BLOCK, name)
    member.disk.close()


def read_alone(directory):
    """One process finds what two left, save what they have lost."""
    member = Member(directory, 2)
    member.shared.sync()
    assert member.shared.parts == {form: form for form in SPECS}
    assert [member.read(BLOCK, name) for name in BOTH] == [True, True, False, True] and member.read(RECORD, BOTH[3])
    member.disk.close()


def main(directory):
    distributed.initialize(distributed.detect_process(os.environ), 120)
    index, present = jax.process_index(), lambda name: BLOCK.key(name) in member.shared
    member = Member(directory, index, others=(0, 1, 2))
    assert 0 < member.shared.parts[BLOCK].nbytes < BLOCK.nbytes
    member.shared.sync()
    assert all(map(present, ALONE)) and all(member.read(BLOCK, name) for name in ALONE)  # left by one with the whole

    for name in BOTH[:3]:
        member.put(BLOCK, name)
    member.put(RECORD, BOTH[3])
    if index == 0:
        member.put(BLOCK, BOTH[3])
    member.shared.sync()
    assert [present(name) for name in BOTH] == [True, True, True, False]  # one has its part of the last
    assert [member.read(BLOCK, name) for name in BOTH] == [True, True, True, False] and member.read(RECORD, BOTH[3])

    member = member.restarted(directory, index)
    assert [present(name) for name in BOTH] == [True, True, True, False]
    if index == 1:  # what it has of one is gone, of another damaged
        member.put(BLOCK, BOTH[3])
        path = next((directory / "1").glob(f"{BOTH[2].hex()}*.block"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        member.disk.discard(member.shared.parts[BLOCK].key(BOTH[1]))
    member.shared.sync()
    assert [present(name) for name in BOTH] == [True, False, True, True]  # the damage is not known yet
    assert [member.read(BLOCK, BOTH[i]) for i in (0, 1, 3)] == [True, False, True] and not member.read(BLOCK, BOTH[2])
    # One has reported that it lost its part of the last; the other has let go of its own, and is yet to report that.
    assert member.shared.stats()["leaving"] == 1 and BLOCK.key(BOTH[2]) not in member.shared
    member.shared.sync()
    assert member.shared.stats()["leaving"] == 0
    assert [present(name) for name in BOTH] == [True, False, False, True]
    member.put(BLOCK, BOTH[1])
    member.shared.sync()
    assert member.read(BLOCK, BOTH[1])
    member.shared.check()
    member.disk.check_invariants()
    member.disk.close()
    distributed.barrier("done")
    print("done", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
