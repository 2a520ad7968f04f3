"""Run by a test: children write records and are killed at random moments; every directory that is left must be sound.

Arguments: directory, rounds, seed. Prints one JSON line. A program of its own, because it forks.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time

from tests.cache.offload.block_fixtures import ROOT, chain, is_right, item
from v4jax.cache.offload.block_file import BlockSchema
from v4jax.cache.offload.disk_tier import DiskTier

LARGE = BlockSchema("block", (("rows", "uint8", (1 << 18,)),))  # so that much of the time is spent in writing
BUDGET = 20 * LARGE.nbytes


def write(directory, prepared, ready):
    """Write the items again and again until killed."""
    disk = DiskTier(directory, BUDGET, "lru")
    os.write(ready, b"x")
    while True:
        for one in prepared:
            disk.put(one)
            disk.get(one.schema, one.block_hash)
            if one.block_hash[0] % 4 == 0:
                disk.discard(one.key)


def main(directory, rounds, seed):
    rng, found, partial = random.Random(seed), 0, 0
    names = chain("a", 30)
    prepared = [item(LARGE, *pair) for pair in zip(names, [ROOT, *names], strict=False)]
    for _ in range(rounds):
        got, ready = os.pipe()
        child = os.fork()
        if not child:
            write(directory, rng.sample(prepared, len(prepared)), ready)
        os.read(got, 1)
        os.close(got)
        os.close(ready)
        time.sleep(rng.uniform(0.0005, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        partial += any(path.suffix == ".partial" for path in pathlib.Path(directory).iterdir())
        disk = DiskTier(directory, BUDGET, "lru")
        disk.check_invariants()
        for key in list(disk._index.entries):
            one = disk.get(LARGE, key.block_hash)
            assert one is not None and is_right(one)
            found += 1
        assert disk.stats()["corrupt"] == disk.stats()["read_errors"] == 0
        disk.close()
    print(json.dumps({"found": found, "partial": partial}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
