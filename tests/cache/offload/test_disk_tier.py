"""The disk tier against what disks do. Numbers are those of the faults in v4jax/cache/README.md."""

import errno
import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest

from tests.cache.offload.block_fixtures import BLOCK, RECORD, chain, is_right, item, items
from tests.cache.offload.faulty_files import FaultyFiles, failing
from v4jax.cache.offload.disk_tier import DiskTier
from v4jax.core.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
PLENTY = 1 << 30


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def disk(tmp_path):
    disk = DiskTier(tmp_path / "kv", PLENTY, "lru")
    yield disk
    disk.check_invariants()
    disk.close()


def reopened(disk, budget=PLENTY):
    disk.close()
    return DiskTier(disk.directory, budget, "lru")


def files(disk):
    return sorted(path for path in disk.directory.iterdir() if path.name != "lock")


def run(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, **options)


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_what_was_put_is_got_by_this_process_and_the_next(disk):
    stored = items(chain("a", 3), 2, 3)
    assert all(disk.put(one) for one in stored)
    assert all(is_right(disk.get(one.schema, one.block_hash)) for one in stored)
    again = reopened(disk)
    got = [again.get(one.schema, one.block_hash) for one in stored]
    assert all(map(is_right, got)) and [one.parent for one in got] == [one.parent for one in stored]
    stats = again.stats()
    assert (stats["blocks"], stats["snapshots"], stats["reads"], stats["corrupt"]) == (3, 2, 5, 0)
    assert stats["bytes"] == 5 * 4096
    again.close()


def test_files_are_private_and_hold_nothing_but_hashes(disk):
    for one in items(chain("a", 2), 2):
        disk.put(one)
    assert {path.stat().st_mode & 0o777 for path in disk.directory.iterdir()} == {0o600}
    assert disk.directory.stat().st_mode & 0o777 == 0o700


def test_what_is_not_there_is_a_miss(disk):
    [one] = items(chain("a", 1))
    assert one.key not in disk and disk.get(one.schema, one.block_hash) is None
    disk.put(one)
    files(disk)[0].unlink()  # by someone else
    assert one.key in disk and disk.get(one.schema, one.block_hash) is None and one.key not in disk
    assert not any(disk.stats()[count] for count in ("read_errors", "corrupt", "breaker_open"))


def test_the_budget_holds_and_chains_go_from_their_end(tmp_path):
    disk, names = DiskTier(tmp_path, 10 * 4096, "lru"), chain("a", 6)
    for one in items(names, 6):
        disk.put(one)
    for other in range(5):
        disk.touch([BLOCK.key(name) for name in names])
        assert disk.put(item(BLOCK, chain(other, 1)[0]))
        assert disk.stats()["bytes"] <= 10 * 4096
    disk.check_invariants()
    assert [BLOCK.key(name) in disk for name in names] == [True] * 6 and RECORD.key(names[5]) not in disk
    disk = reopened(disk, 4 * 4096)  # a smaller budget: what fits of the newest
    disk.check_invariants()
    assert disk.stats()["bytes"] <= 4 * 4096
    assert disk.put(item(BLOCK, b"x" * 16)._replace(schema=RECORD))
    disk.close()


def test_what_is_larger_than_the_budget_is_refused(tmp_path):
    disk = DiskTier(tmp_path, 4095, "lru")
    assert not disk.put(item(BLOCK, chain("a", 1)[0])) and disk.stats()["refused"] == 1
    disk.check_invariants()


def test_the_next_process_knows_what_was_used_last(tmp_path):
    disk = DiskTier(tmp_path, PLENTY, "lru")
    old, used, new = (items(chain(seed, 1))[0] for seed in ("old", "used", "new"))
    for age, one in enumerate((used, old, new)):
        disk.put(one)
        [path] = [path for path in files(disk) if path.name.startswith(one.block_hash.hex())]
        os.utime(path, (1000 + age, 1000 + age))
    disk.get(used.schema, used.block_hash)
    disk = reopened(disk, 2 * 4096)
    assert [one.key in disk for one in (old, used, new)] == [False, True, True]
    disk.close()


def test_files_of_other_models_count_and_go_when_they_are_old(tmp_path):
    disk = DiskTier(tmp_path, 3 * 4096, "lru")
    others = items(chain("a", 3))
    for one in others:
        disk.put(one)
    (tmp_path / "notes.txt").write_text("not ours")
    disk = reopened(disk, 3 * 4096)
    assert disk.stats()["blocks"] == 3
    disk.put(item(RECORD, chain("b", 1)[0]))
    assert disk.stats()["bytes"] == 3 * 4096 and (tmp_path / "notes.txt").exists()
    disk.close()


# --- 1: disk full -----------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_oldest_once(tmp_path):
    files, clock = FaultyFiles(room=4 * BLOCK.file_bytes + 1), Clock()
    disk = DiskTier(tmp_path, PLENTY, "lru", files=files, clock=clock)
    stored = [item(BLOCK, name) for name in chain("a", 7)]
    assert all(disk.put(one) for one in stored)
    stats = disk.stats()
    assert (stats["full"], stats["evictions"], stats["blocks"], stats["paused"]) == (3, 3, 4, 0)
    assert [one.key in disk for one in stored] == [False] * 3 + [True] * 4
    disk.check_invariants()


def test_writing_pauses_while_a_disk_stays_full_and_reading_goes_on(tmp_path):
    files, clock = FaultyFiles(), Clock()
    disk = DiskTier(tmp_path, PLENTY, "lru", files=files, clock=clock)
    [kept, *rest] = [item(BLOCK, name) for name in chain("a", 20)]
    assert disk.put(kept) and disk.put(rest[0])
    tries = []

    def full(operation, path):
        if operation == "write":
            tries.append(clock.now)
            raise OSError(errno.ENOSPC, "full", path)

    files.fault = full
    for second in range(40):
        clock.now = second
        disk.touch([kept.key])
        assert not disk.put(rest[1])
        assert kept.key not in disk or is_right(disk.get(kept.schema, kept.block_hash))
    assert sorted(set(tries)) == [0, 5, 15, 35]  # pauses of 5, 10, 20 seconds
    assert disk.stats()["full"] == len(tries) == 8 and disk.stats()["refused"] == 36
    files.fault = lambda operation, path: None
    clock.now = 100
    assert disk.put(rest[1]) and disk.put(rest[2]) and not disk.stats()["paused"]
    disk.check_invariants()


@pytest.mark.multiprocess
def test_a_real_file_system_that_is_full(tmp_path):
    command = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or run(*command, "mount", "-t", "tmpfs", "none", str(tmp_path)).returncode:
        pytest.skip("this system lets its users mount no file system")
    done = run(*command, sys.executable, "-m", "tests.cache.offload.full_disk_worker", str(tmp_path), cwd=ROOT)
    assert done.stdout == "done\n", done.stderr


# --- 2: read errors ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_forgotten_and_three_failures_open_the_breaker(tmp_path):
    files, clock = FaultyFiles(), Clock()
    disk = DiskTier(tmp_path, PLENTY, "lru", files=files, clock=clock)
    stored = [item(BLOCK, name) for name in chain("a", 9)]
    for one in stored:
        disk.put(one)
    get = lambda i: disk.get(stored[i].schema, stored[i].block_hash)
    files.fault = failing("read")
    assert get(0) is None and get(1) is None and stored[0].key not in disk
    files.fault = failing()
    assert is_right(get(2))  # two failures in a row are not three
    files.fault = failing("read")
    assert [get(i) for i in (3, 4, 5)] == [None] * 3 and disk.stats()["breaker_open"]
    files.fault = failing()
    assert stored[6].key not in disk and get(6) is None and not disk.put(item(BLOCK, b"n" * 16))
    clock.now = 5
    files.fault = failing("read")
    assert get(6) is None  # the probe fails, which costs twice the time
    files.fault = failing()
    clock.now = 14
    assert get(7) is None
    clock.now = 15
    assert is_right(get(7)) and not disk.stats()["breaker_open"] and disk.stats()["read_errors"] == 6
    disk.check_invariants()


# --- 3, 4, 5: damaged files -------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_seen_wherever_it_is(disk):
    rng = random.Random(0)
    stored = [item(form, name) for form in (BLOCK, RECORD) for name in chain("a", 100)]
    for number, one in enumerate(stored):
        disk.put(one)
        path = disk.directory / one.key.file(one.parent)
        data = bytearray(path.read_bytes())
        data[number * len(data) // len(stored) + rng.randrange(-2, 3)] ^= 1 << rng.randrange(8)  # every region
        path.write_bytes(data)
    again = reopened(disk)
    assert [again.get(one.schema, one.block_hash) for one in stored] == [None] * 200
    assert again.stats()["corrupt"] == 200 and again.stats()["blocks"] == again.stats()["snapshots"] == 0
    assert not files(again) and not again.stats()["breaker_open"]
    assert again.put(stored[0]) and is_right(again.get(stored[0].schema, stored[0].block_hash))
    again.close()
    disk.__init__(disk.directory, PLENTY, "lru")


@pytest.mark.parametrize("size", [0, 10, 120, BLOCK.file_bytes // 2, BLOCK.file_bytes - 1, BLOCK.file_bytes + 1, 9000])
@pytest.mark.parametrize("restart", [False, True])
def test_a_file_of_another_length_is_removed_and_those_before_it_stay(disk, size, restart):
    stored = items(chain("a", 3))
    for one in stored:
        disk.put(one)
    path = disk.directory / stored[2].key.file(stored[2].parent)
    data = path.read_bytes()
    path.write_bytes((data + bytes(size))[:size])
    if restart:
        disk.close()
        disk.__init__(disk.directory, PLENTY, "lru")
    got = [disk.get(one.schema, one.block_hash) for one in stored]
    assert got[2] is None and is_right(got[0]) and is_right(got[1])
    assert disk.stats()["corrupt"] == 1 and not path.exists()


def test_swapped_files_are_misses(disk):
    one, two = items(chain("a", 2))
    for stored in (one, two):
        disk.put(stored)
    paths = [disk.directory / stored.key.file(stored.parent) for stored in (one, two)]
    data = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(data), strict=True):
        path.write_bytes(other)
    assert [disk.get(stored.schema, stored.block_hash) for stored in (one, two)] == [None, None]
    assert disk.stats()["corrupt"] == 2


# --- 6, 10: other processes -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
def test_writers_killed_at_fifty_moments_leave_nothing_torn(tmp_path):
    done = run(sys.executable, "-m", "tests.cache.offload.crash_worker", str(tmp_path / "kv"), "50", "0", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["found"] > 100
    assert not list((tmp_path / "kv").glob("*.partial"))


def test_a_partial_file_is_swept(disk):
    [one] = items(chain("a", 1))
    disk.put(one)
    [path] = files(disk)
    path.rename(f"{path}.partial")
    disk.close()
    disk.__init__(disk.directory, PLENTY, "lru")
    assert disk.stats()["swept"] == 1 and not files(disk) and disk.get(one.schema, one.block_hash) is None


OWN = """
import sys, time
from v4jax.cache.offload.disk_tier import DiskTier
disk = DiskTier(sys.argv[1], 1 << 20, "lru")
print("mine", flush=True)
time.sleep(60)
"""


@pytest.mark.multiprocess
def test_a_second_owner_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OWN, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert child.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match="in use by another engine; end that one or give each a directory"):
            DiskTier(tmp_path, PLENTY, "lru")
        child.send_signal(signal.SIGKILL)
        child.wait()
        disk = DiskTier(tmp_path, PLENTY, "lru")
        with pytest.raises(UserError, match="in use"):  # in one process, too
            DiskTier(tmp_path, PLENTY, "lru")
        disk.close()
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


def test_a_directory_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep the cache in .*file.*name another"):
        DiskTier(tmp_path / "file" / "kv", PLENTY, "lru")


def test_a_directory_that_others_can_turn_or_write_is_refused(tmp_path):
    real, link, shared = tmp_path / "real", tmp_path / "link", tmp_path / "shared"
    real.mkdir(mode=0o700)
    link.symlink_to(real)
    with pytest.raises(UserError, match=f"link is a symbolic link.*name the directory it leads to: {real}"):
        DiskTier(link, PLENTY, "lru")
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UserError, match="can be written by every user.*chmod o-w"):
        DiskTier(shared, PLENTY, "lru")
    assert not list(real.iterdir()) and not list(shared.iterdir())


def test_a_directory_of_another_user_is_refused_and_one_of_root_is_not(tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(other, 12_345, -1)
    owner = other.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match=rf"other belongs to another user \(uid {owner}\), who could .*; name your own"):
        DiskTier(other, PLENTY, "lru")
    assert not list(other.iterdir())
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    DiskTier(other, PLENTY, "lru").close()
    monkeypatch.undo()
    if os.geteuid() == 0:
        os.chown(other, 0, -1)
        monkeypatch.setattr(os, "geteuid", lambda: owner)
        DiskTier(other, PLENTY, "lru").close()


def test_a_directory_on_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot lock .*kv: No locks available; name another"):
        DiskTier(tmp_path / "kv", PLENTY, "lru")


@pytest.mark.parametrize(
    "make",
    [
        lambda lock, other: lock.symlink_to(other),
        lambda lock, other: lock.symlink_to(other.parent / "missing"),
        lambda lock, other: os.mkfifo(lock),
        lambda lock, other: lock.hardlink_to(other),
        lambda lock, other: lock.mkdir(),
    ],
)
def test_a_lock_that_is_no_file_is_refused(tmp_path, make):
    other, directory = tmp_path / "other", tmp_path / "kv"
    other.write_text("mine")
    directory.mkdir(mode=0o700)
    make(directory / "lock", other)
    with pytest.raises(UserError, match="lock is no regular file; remove it"):
        DiskTier(directory, PLENTY, "lru")
    assert not (tmp_path / "missing").exists() and other.read_text() == "mine"


def test_a_directory_swapped_under_a_running_engine_is_not_touched(tmp_path):
    disk, (one, other) = DiskTier(tmp_path / "kv", PLENTY, "lru"), items(chain("a", 2))
    assert disk.put(one)
    (tmp_path / "kv").rename(tmp_path / "moved")
    (tmp_path / "victim").mkdir()
    (tmp_path / "kv").symlink_to(tmp_path / "victim")
    assert disk.put(other)
    assert is_right(disk.get(one.schema, one.block_hash))  # what it locked is what it reads
    disk.check_invariants()
    disk.discard(one.key)
    assert not list((tmp_path / "victim").iterdir()) and len(list((tmp_path / "moved").glob("*.block"))) == 1
    disk.close()


@pytest.mark.parametrize(
    "plant",
    [
        lambda path, other: path.symlink_to(other),
        lambda path, other: os.mkfifo(path),
    ],
)
def test_links_and_pipes_in_place_of_a_block_are_misses(tmp_path, plant):
    disk, [one] = DiskTier(tmp_path / "kv", PLENTY, "lru"), items(chain("a", 1))
    disk.put(one)
    [path] = (tmp_path / "kv").glob("*.block")
    other = tmp_path / "other"
    path.rename(other)
    plant(path, other)
    assert disk.get(one.schema, one.block_hash) is None and other.exists()
    plant(path, other)
    disk.close()
    disk = DiskTier(tmp_path / "kv", PLENTY, "lru")
    assert disk.stats()["swept"] == 1 and disk.get(one.schema, one.block_hash) is None and other.exists()
    disk.close()
