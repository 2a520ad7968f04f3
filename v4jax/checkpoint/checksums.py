"""Checksums of stored arrays: xxh3-64 of every part of an array.

A part is one box of the regular grid in which an array is written. In a training checkpoint a part is a shard, and its
checksum is computed from memory before the write. In an export a part is a chunk. A reader of a region verifies the
parts that cover the region, so a sharded restore verifies only the data that it reads.

A step of a v4jax directory stores its checksums in `checksums/<process>.json`, one file per process:

    {"processes": 2, "arrays": {item: {name: [shape of a part, {"row.column": checksum}]}}, "extras": checksum}
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from v4jax.core import untrusted_json

if TYPE_CHECKING:
    import jax

_log = logging.getLogger(__name__)

DIRECTORY = "checksums"
_MOST_THREADS = 16


class Mismatch(Exception):
    """Data differs from its checksum, or the checksums themselves are incomplete. The message tells which."""


def digest(data) -> str:
    """Return the xxh3-64 of an array in row-major order, or of bytes, as 16 hexadecimal digits."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return xxhash.xxh3_64_hexdigest(data)


def json_digest(value) -> str:
    """Return the `digest` of a JSON value. The order of keys does not matter."""
    return digest(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())


@dataclass(frozen=True)
class PartSums:
    """Checksums of one array.

    Attributes:
        part: shape of a part.
        sums: checksum by position in the grid of parts, such as "0.3". The only part of a scalar is "0".
    """

    part: tuple[int, ...]
    sums: Mapping[str, str]

    def cover(self, region: Sequence[slice], shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the smallest box of complete parts that contains `region`, in an array of shape `shape`."""
        axes = zip(region, self.part, shape, strict=True)
        return tuple(slice(r.start // p * p, min(-(-r.stop // p) * p, n)) for r, p, n in axes)

    def verify(self, array: np.ndarray, box: Sequence[slice]) -> None:
        """Compare data with the checksums.

        Args:
            array: the data of the region `box`.
            box: region of complete parts, as `cover` returns it.

        Raises:
            Mismatch: a part has no checksum or differs from it.
        """
        grid = tuple(-(-size // part) for size, part in zip(array.shape, self.part, strict=True))
        parts = []
        for position in np.ndindex(grid):
            inside = tuple(slice(i * p, (i + 1) * p) for i, p in zip(position, self.part, strict=True))
            key = _key(i + s.start // p for i, s, p in zip(position, box, self.part, strict=True))
            parts.append((key, array[inside]))
        for (key, _), found in zip(parts, digests([part for _, part in parts]), strict=True):
            if key not in self.sums:
                raise Mismatch(f"has no checksum of its part {key}")
            if found != self.sums[key]:
                raise Mismatch("differs from its checksum")


def digests(arrays: Sequence[np.ndarray]) -> list[str]:
    """Return the `digest` of each array, computed on up to 16 threads. xxhash releases the GIL."""
    if len(arrays) < 2:
        return [digest(array) for array in arrays]
    with concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1, len(arrays))) as pool:
        return list(pool.map(digest, arrays))


def of_array(array: np.ndarray, part: Sequence[int]) -> PartSums:
    """Return the checksums of an array in memory, for parts of the shape `part`."""
    grid = list(np.ndindex(*(-(-size // p) for size, p in zip(array.shape, part, strict=True))))
    cut = [array[tuple(slice(i * p, (i + 1) * p) for i, p in zip(at, part, strict=True))] for at in grid]
    return PartSums(tuple(part), dict(zip(map(_key, grid), digests(cut), strict=True)))


def of_shards(leaves: Mapping[str, jax.Array]) -> dict[str, PartSums]:
    """Return the checksums of the shards whose replica 0 this process holds. A part is a shard.

    Args:
        leaves: {name: jax array}.

    Returns:
        {name: checksums of this process's shards}.
    """
    for leaf in leaves.values():
        leaf.copy_to_host_async()
    found, shards = {}, []
    for name, leaf in leaves.items():
        part, sums = leaf.sharding.shard_shape(leaf.shape), {}
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                key = _key((s.start or 0) // p for s, p in zip(shard.index, part, strict=True))
                shards.append((sums, key, np.asarray(shard.data)))
        found[name] = PartSums(part, sums)
    for (sums, key, _), value in zip(shards, digests([data for *_, data in shards]), strict=True):
        sums[key] = value
    return found


# --- small files that people edit --------------------------------------------------------------------------------


def of_files(directory: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """Return {name: digest} for those of the files `names` that exist in a directory."""
    return {name: digest((directory / name).read_bytes()) for name in names if (directory / name).is_file()}


def warn_of_changes(directory: pathlib.Path, known: Mapping[str, str]) -> None:
    """Log a warning for every file that differs from its digest in `known`. A deleted file causes no warning."""
    found = of_files(directory, known)
    for name in found:
        if found[name] != known[name]:
            warn_of_change(directory / name)


@functools.lru_cache(maxsize=64)  # one warning per file, however often it is read
def warn_of_change(file: pathlib.Path) -> None:
    """Log that a text file has changed. This is no error, because users edit such files, but no weights."""
    _log.warning("%s is not as v4jax wrote it: if no user edited it, it is damaged; copy it again", file)


# --- the files of a step -----------------------------------------------------------------------------------------


def to_json(items: Mapping[str, Mapping[str, PartSums]], extras: str | None, processes: int) -> dict:
    """Return the content of `checksums/<process>.json`.

    Args:
        items: {item: {name: checksums of an array}}.
        extras: `json_digest` of the extras of the step; None if the step has none.
        processes: number of processes that write the step.
    """
    arrays = {item: {name: [s.part, s.sums] for name, s in sums.items()} for item, sums in items.items()}
    return {"processes": processes, "arrays": arrays, "extras": extras}


@dataclass(frozen=True)
class StepSums:
    """Checksums of a step.

    Attributes:
        items: {item: {name: checksums of an array}}.
        extras: `json_digest` of the extras; None if the step has none.
    """

    items: dict[str, dict[str, PartSums]]
    extras: str | None

    @classmethod
    def read(cls, step: pathlib.Path) -> StepSums:
        """Read and merge the files of all processes of a step. Raises Mismatch if one is missing or unreadable."""
        try:
            first = _read(step, 0)
            files = [first, *(_read(step, process) for process in range(1, first["processes"]))]
            items: dict[str, dict[str, PartSums]] = {}
            for arrays in (file["arrays"] for file in files):
                for item, leaves in arrays.items():
                    known = items.setdefault(item, {})
                    for name, (part, sums) in leaves.items():
                        before = known.get(name, PartSums(tuple(part), {})).sums
                        known[name] = PartSums(_positive(part), {**before, **sums})
            return cls(items, first["extras"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error.strerror}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise Mismatch(f"{DIRECTORY}/ is incomplete or unreadable ({reason})") from error

    def of(self, item: str, name: str) -> PartSums:
        """Return the checksums of one array. Raises Mismatch if there are none."""
        try:
            return self.items[item][name]
        except KeyError:
            raise Mismatch("has no checksum") from None


def _read(step: pathlib.Path, process: int) -> dict:
    limit = untrusted_json.LARGE
    return untrusted_json.parse(untrusted_json.read_bytes(step / DIRECTORY / f"{process}.json", limit), limit)


def _positive(part: list) -> tuple[int, ...]:
    if not all(type(size) is int and size > 0 for size in part):
        raise ValueError(f"a part has the shape {part}")
    return tuple(part)


def _key(position) -> str:
    return ".".join(map(str, position)) or "0"
