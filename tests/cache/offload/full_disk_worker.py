"""Run by a test inside a mount namespace of its own: a file system of 128 KiB is filled, and emptied again."""

import os
import subprocess
import sys

from tests.cache.offload.block_fixtures import chain, is_right, items
from v4jax.cache.offload.disk_tier import DiskTier


def main(directory):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", directory], check=True)
    now = [0.0]
    disk = DiskTier(os.path.join(directory, "cache"), 1 << 20, "lru", clock=lambda: now[0])
    first = items(chain("first", 6), 6)
    assert all(disk.put(one) for one in first)
    with open(os.path.join(directory, "others"), "wb", buffering=0) as others:
        try:
            while True:
                others.write(bytes(4096))
        except OSError:
            pass
    # Full: something old goes, once, and what was to be written is.
    [new] = items(chain("new", 1))
    assert disk.put(new) and disk.stats()["evictions"] == 1 and disk.stats()["full"] == 1
    for one in first + [new]:  # others take what is given up, until nothing is left to give
        disk.discard(one.key)
    with open(os.path.join(directory, "more"), "wb", buffering=0) as others:
        try:
            while True:
                others.write(bytes(4096))
        except OSError:
            pass
    assert not disk.put(new) and disk.stats()["paused"]
    disk.check_invariants()
    os.remove(os.path.join(directory, "more"))
    assert not disk.put(new) and disk.stats()["refused"] == 1  # not tried
    now[0] += 5
    assert disk.put(new) and not disk.stats()["paused"] and is_right(disk.get(new.schema, new.block_hash))
    disk.check_invariants()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
